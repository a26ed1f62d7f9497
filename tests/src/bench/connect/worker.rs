//! Client and server of a pair of pods: one process with a thread in each pod, both on one processor.
//!
//! Two processors would measure how fast a sleeping one wakes up: on virtual machines that is ten times what a connection
//! costs, and differs from second to second. On one processor everything between connect() and the answer runs in one of the
//! two threads, forwarding on the node included (softirqs run where they are raised), so that the time of this process is the
//! time of all of it.

use std::{
    fs::File,
    io::{self, BufRead as _, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{bench::measure::quantile, netns};

/// What stays the same.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// Where the client connects to.
    pub to: SocketAddr,
    /// Where the server listens.
    pub listen: SocketAddr,
    /// The server's namespace; the client's is that of the process.
    pub server_netns: PathBuf,
    /// Tells servers apart: they answer with the byte they got, changed by this.
    pub mark: u8,
    /// The client's processor, and the server's.
    pub cpu: usize,
    /// The server's, for orders where it has one of its own.
    pub other_cpu: usize,
}

/// What to do next; a line of input each.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Order {
    pub work: Work,
    /// Client and server on a processor each.
    pub apart: bool,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Work {
    /// Connect, send a byte, get one, close; so many times.
    Connections(u32),
    /// Send a byte, get one; so many times on one connection.
    Requests(u32),
}

/// What became of an order: everything was answered by the right server, or this is not printed at all.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// Of both threads, in ns for each connection or request.
    pub cpu_ns: f64,
    /// Elapsed, in ns for each connection or request.
    pub wall_ns: f64,
    /// As the client saw it, in ns; of each connection or request.
    pub p50_ns: f64,
    pub p99_ns: f64,
    /// Connections and bytes that the server counted.
    pub accepted: u64,
    pub answered: u64,
}

/// An order that takes longer hangs: everything here is done in a fraction of a second, on a busy machine in some.
const SECONDS_AT_MOST: u32 = 60;

#[derive(Default)]
struct Counts {
    accepted: AtomicU64,
    answered: AtomicU64,
}

impl Counts {
    fn now(&self) -> [u64; 2] {
        [&self.accepted, &self.answered].map(|n| n.load(Ordering::Relaxed))
    }
}

/// Follows orders until the input ends. Prints `true` once the server listens, then a [`Sample`] for each order.
pub fn run(job: &Job) -> Result<()> {
    prefer();
    let counts = Arc::new(Counts::default());
    let (listening, counting) = (listen(job)?, Arc::clone(&counts));
    let (mark, (tell, server)) = (job.mark, mpsc::channel());
    thread::spawn(move || {
        // SAFETY: no arguments.
        tell.send(unsafe { libc::gettid() }).ok();
        serve(&listening, mark, &counting);
    });
    let server = server.recv().context("the server's thread")?;
    pin(0, job.cpu)?;
    print(&true)?;
    for line in io::stdin().lock().lines() {
        let order: Order = serde_json::from_str(&line?).context("not an order")?;
        pin(server, if order.apart { job.other_cpu } else { job.cpu })?;
        print(&carry_out(job, order.work, &counts)?)?;
    }
    Ok(())
}

fn print<T: Serialize>(value: &T) -> Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, value)?;
    writeln!(out)?;
    Ok(out.flush()?)
}

/// A socket belongs to the namespace that it was made in, whoever uses it.
fn listen(job: &Job) -> Result<TcpListener> {
    let file = File::open(&job.server_netns)
        .with_context(|| format!("cannot open {}", job.server_netns.display()))?;
    let address = job.listen;
    let inside = thread::spawn(move || netns::enter(&file).and_then(|()| TcpListener::bind(address)));
    let bound = inside.join().map_err(|_| anyhow::anyhow!("the server's thread panicked"))?;
    bound.with_context(|| format!("cannot listen on {address}"))
}

fn serve(listener: &TcpListener, mark: u8, counts: &Counts) {
    loop {
        // What goes wrong here, the client misses, and says so.
        let Ok((mut stream, _)) = listener.accept() else { return };
        counts.accepted.fetch_add(1, Ordering::Relaxed);
        stream.set_nodelay(true).ok();
        let mut byte = [0];
        while let Ok(1) = stream.read(&mut byte) {
            byte[0] ^= mark;
            counts.answered.fetch_add(1, Ordering::Relaxed);
            if stream.write_all(&byte).is_err() {
                break;
            }
        }
    }
}

fn carry_out(job: &Job, work: Work, counts: &Counts) -> Result<Sample> {
    // SAFETY: a plain integer; the signal ends the process.
    unsafe { libc::alarm(SECONDS_AT_MOST) };
    let before = counts.now();
    let (cpu, from) = (cpu_ns(), Instant::now());
    let (times, wall_ns, connections) = match work {
        Work::Connections(n) => {
            let times = repeat(n, |i| once(&mut TcpStream::connect(job.to)?, i, job.mark))?;
            (times, from.elapsed(), u64::from(n))
        }
        Work::Requests(n) => {
            let mut stream = TcpStream::connect(job.to).context("connect")?;
            stream.set_nodelay(true)?;
            let times = repeat(n, |i| once(&mut stream, i, job.mark))?;
            (times, from.elapsed(), 1)
        }
    };
    let cpu = cpu_ns() - cpu;
    let after = counts.now();
    let (accepted, answered) = (after[0] - before[0], after[1] - before[1]);
    let n = times.len() as u64;
    ensure!(
        accepted == connections && answered == n,
        "the server of {} counted {accepted} connections and {answered} bytes, not {connections} and {n}",
        job.to
    );
    let each = |ns: u64| ns as f64 / n as f64;
    let (p50_ns, p99_ns) = (quantile(&times, 0.5), quantile(&times, 0.99));
    let (cpu_ns, wall_ns) = (each(cpu), each(wall_ns.as_nanos() as u64));
    Ok(Sample { cpu_ns, wall_ns, p50_ns, p99_ns, accepted, answered })
}

/// The time of each, in ns.
fn repeat(n: u32, mut what: impl FnMut(u32) -> Result<()>) -> Result<Vec<f64>> {
    let mut times = Vec::with_capacity(n as usize);
    for i in 0..n {
        let from = Instant::now();
        what(i).with_context(|| format!("number {i} of {n}"))?;
        times.push(from.elapsed().as_nanos() as f64);
    }
    Ok(times)
}

/// A byte there, and the right one back.
fn once(stream: &mut TcpStream, i: u32, mark: u8) -> Result<()> {
    let (sent, mut got) = (i as u8, [0]);
    stream.write_all(&[sent]).context("write")?;
    stream.read_exact(&mut got).context("read")?;
    ensure!(got[0] == sent ^ mark, "another server answered: {:#x} for {sent:#x}", got[0]);
    Ok(())
}

/// Time of this process on a processor so far.
fn cpu_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: fills in `time`; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Keeps a thread on one processor; 0 is the calling one.
fn pin(thread: libc::pid_t, cpu: usize) -> io::Result<()> {
    // SAFETY: a set of processors is plain bits; `CPU_SET` checks nothing, and `cpu` is one of this machine.
    let done = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(thread, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Before whatever else wants this processor, threads to come included. Not being allowed to is no harm.
fn prefer() {
    // SAFETY: plain integers.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -15) };
}

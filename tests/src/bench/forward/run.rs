//! Sending frames down a chain, and what each of them cost.
//!
//! The generator, both ends of each veth pair and the sink all run in softirqs on the generator's CPU, within its system
//! call: the processor time of its thread is the time of the whole chain. What a busy CPU leaves to its ksoftirqd is added.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    chain::{Chain, End},
    sink::{Arrived, Expect, Sink},
    stream::{Generator, Stream, XDP_PASS, verdict},
};
use crate::bench::{Effort, measure, report::Row, sys};

/// The CPU that the generator of a lane runs on. All else of the suite runs on the others, if there are any.
pub const fn cpu_of(lane: usize) -> usize {
    lane
}

/// Binds the calling thread, and what it starts, to a CPU; does nothing where that CPU does not exist.
pub fn pin(cpu: usize) {
    // SAFETY: a set of CPUs is plain data; the call touches the calling thread only.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}

/// Frames that have not arrived by then, after the last one was sent, will not.
const PUT_OFF: Duration = Duration::from_millis(100);

/// Programs at the outer ends of a chain's devices. A veth takes redirected frames only while its peer has one.
pub struct Doors {
    links: Mutex<HashMap<u32, OwnedFd>>,
}

impl Doors {
    pub fn open(chain: &Chain) -> Result<Self> {
        let pass = verdict(XDP_PASS)?;
        let mut links = HashMap::new();
        for lane in &chain.lanes {
            for pair in [lane.client, lane.server] {
                let link = chain.outside.run(|| sys::attach_xdp(pass.as_fd(), pair.outside))?;
                links.insert(pair.outside, link);
            }
        }
        Ok(Self { links: Mutex::new(links) })
    }

    /// Puts a program at the outer end of a device, in place of the one before.
    pub fn put(&self, ifindex: u32, program: BorrowedFd) -> Result<()> {
        let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        sys::replace(links.get(&ifindex).context("no such device outside")?, program)
    }
}

/// From a generator at one end of a lane, through the node, to a sink.
pub struct Path<'a> {
    chain: &'a Chain,
    doors: &'a Doors,
    lane: usize,
    generator: Generator,
    sink: Sink,
    /// Where the sink is: a device outside, or one of the node if `at_node`.
    sink_at: u32,
    at_node: Option<OwnedFd>,
    /// What the sink has recorded of each flow.
    pub table: Option<Arc<OwnedFd>>,
}

/// Where a path's frames should come out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Outside(End),
    /// They end at the node's first device: what remains is the generator's cost.
    Entrance,
}

impl<'a> Path<'a> {
    /// Frames of `streams` in turns, from one end of a lane, and what of them is to arrive at `exit`.
    pub fn new(
        (chain, doors): (&'a Chain, &'a Doors),
        lane: usize,
        from: End,
        streams: &[&Stream],
        exit: Exit,
        expect: &Expect,
    ) -> Result<Self> {
        let ends = chain.lanes.get(lane).context("no such lane")?;
        let generator = Generator::new(streams, ends.pair(from).outside)?;
        let sink = Sink::new(expect)?;
        let (sink_at, at_node) = match exit {
            Exit::Outside(end) => (ends.pair(end).outside, None),
            Exit::Entrance => {
                let at = ends.pair(from).node;
                (at, Some(chain.attach(at, sink.program.as_fd())?))
            }
        };
        Ok(Self {
            chain,
            doors,
            lane,
            generator,
            sink,
            sink_at,
            at_node,
            table: expect.record.as_ref().map(|(table, _)| table.clone()),
        })
    }

    /// Sends `count` frames; what each cost in ns, and what arrived.
    pub fn send(&self, count: u32, verify: bool) -> Result<(f64, Arrived)> {
        if self.at_node.is_none() {
            self.doors.put(self.sink_at, self.sink.program.as_fd())?;
        }
        self.sink.reset(verify)?;
        let ns = self.chain.outside.run(|| {
            let cpu = cpu_of(self.lane);
            pin(cpu);
            let before = processor_ns(cpu)?;
            self.generator.send(count)?;
            Ok((processor_ns(cpu)? - before) as f64 / f64::from(count))
        })?;
        Ok((ns, self.arrived(count)?))
    }

    /// What has arrived; waits for what a busy CPU has put off.
    fn arrived(&self, count: u32) -> Result<Arrived> {
        let deadline = Instant::now() + PUT_OFF;
        loop {
            let arrived = self.sink.arrived()?;
            if arrived.all() >= count.into() || Instant::now() > deadline {
                return Ok(arrived);
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sends `count` frames, which all have to arrive as they should be; what each cost in ns.
    pub fn deliver(&self, count: u32, verify: bool) -> Result<f64> {
        let (ns, arrived) = self.send(count, verify)?;
        let wanted = Arrived { right: count.into(), ..Arrived::default() };
        ensure!(arrived == wanted, "of {count} frames {arrived:?} arrived");
        Ok(ns)
    }
}

/// Processor time of the calling thread and of its CPU's ksoftirqd.
fn processor_ns(cpu: usize) -> Result<u64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let softirqd = softirqd_ns(cpu);
    // SAFETY: writes one timespec.
    let code = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    ensure!(code == 0, "clock_gettime: {}", std::io::Error::last_os_error());
    Ok(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64 + softirqd)
}

/// Processor time of a CPU's ksoftirqd; 0 where it is not to be seen.
fn softirqd_ns(cpu: usize) -> u64 {
    static PIDS: Mutex<BTreeMap<usize, String>> = Mutex::new(BTreeMap::new());
    let mut pids = PIDS.lock().unwrap_or_else(PoisonError::into_inner);
    let pid = pids.entry(cpu).or_insert_with(|| softirqd(cpu)).clone();
    let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap_or_default();
    text.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0)
}

fn softirqd(cpu: usize) -> String {
    let name = format!("ksoftirqd/{cpu}");
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids = all.map(|e| e.file_name().to_string_lossy().into_owned());
    pids.find(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name))
        .unwrap_or_default()
}

/// Kernels that keep softirqs out of the time of threads (CONFIG_IRQ_TIME_ACCOUNTING) cannot be measured on in this way.
pub fn clock_sees_softirqs() -> Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let config = fs::read_to_string(format!("/boot/config-{}", release.trim())).or_else(|_| {
        let out = std::process::Command::new("zcat").arg("/proc/config.gz").output()?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&out.stdout).into_owned())
    });
    let accounted = config.unwrap_or_default().lines().any(|l| l == "CONFIG_IRQ_TIME_ACCOUNTING=y");
    ensure!(!accounted, "this kernel keeps softirqs out of the time of threads (CONFIG_IRQ_TIME_ACCOUNTING)");
    Ok(())
}

/// Times of one path in all rounds.
#[derive(Clone, Debug, Default)]
pub struct Times {
    /// First and second half of each round's order A B B A.
    pub there: Vec<f64>,
    pub back: Vec<f64>,
}

impl Times {
    fn all(&self) -> Vec<f64> {
        [self.there.as_slice(), &self.back].concat()
    }

    pub fn median(&self) -> f64 {
        measure::median(&self.all())
    }

    pub fn spread(&self) -> f64 {
        measure::spread(&self.all())
    }

    /// False if the way there and the way back differ too much: something else ran.
    pub fn is_steady(&self) -> bool {
        let (a, b) = (measure::median(&self.there), measure::median(&self.back));
        (a - b).abs() <= 0.10 * a.min(b)
    }
}

/// Frames per path and round.
pub const fn frames(effort: Effort) -> u32 {
    match effort {
        Effort::Full => 1 << 19,
        Effort::Short => 1 << 18,
        Effort::Small => 2048,
    }
}

/// All paths in turns, forth and back: A B C C B A. Every frame has to arrive.
pub fn rounds(rounds: u32, frames: u32, paths: &[&Path]) -> Result<Vec<Times>> {
    let mut times = vec![Times::default(); paths.len()];
    for _ in 0..rounds {
        for (path, times) in paths.iter().zip(&mut times) {
            times.there.push(path.deliver(frames, false)?);
        }
        for (path, times) in paths.iter().zip(&mut times).rev() {
            times.back.push(path.deliver(frames, false)?);
        }
    }
    Ok(times)
}

/// `ours` beside its baseline.
pub fn row(id: &'static str, what: impl Into<String>, ours: &Times, baseline: Option<&Times>) -> Row {
    let mut row = Row::value(id, what, "ns", ours.median());
    row.rounds = ours.there.len() as u32;
    row.spread = Some(ours.spread());
    if let Some(baseline) = baseline {
        row = row.against(baseline.median());
    }
    if ours.is_steady() && baseline.is_none_or(Times::is_steady) {
        row
    } else {
        row.noted("unsteady: forth and back differ by over 10 %")
    }
}

/// The ratio of the baseline to ours: what part of the rate of an empty program is left.
pub fn share(row: Row) -> Row {
    let ratio = row.baseline.zip(row.ours).map(|(baseline, ours)| baseline / ours);
    Row { ratio, ..row }
}

/// The same, which should be at least so much.
pub fn share_at_least(row: Row, least: f64) -> Row {
    let row = share(row);
    let met = row.ratio.map(|ratio| ratio >= least);
    Row { met, bar: format!("empty redirect / ours >= {least}"), ..row }
}

//! Servers and clients: what a test asks of them. Each is a process (`netproc`) in its place, because socket hooks go by
//! the cgroup of a process.

pub mod client;
pub mod server;
pub mod task;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead as _, BufReader, Lines, Write as _},
    net::{IpAddr, SocketAddr},
    process::{Child, ChildStdin, ChildStdout, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, bail, ensure};
use serde::de::DeserializeOwned;

use crate::place::{Place, sibling};
pub use task::{Answer, Call, Failure, Outcome, Proto, Tally, Task};

/// A running `netproc`; killed when dropped.
struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
    what: String,
}

impl Process {
    fn start(place: &Place, task: &Task) -> anyhow::Result<Self> {
        let what = format!("{task:?} in {}", place.name);
        let mut command = place.command(&sibling("netproc")?)?;
        command.arg(task::argument(task)?).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {what}"))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().context("no stdout")?);
        Ok(Self { child, stdin, lines: BufReader::new(stdout).lines(), what })
    }

    /// The next line that it prints.
    fn next<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        let Some(line) = self.lines.next() else { bail!("{} ended", self.what) };
        let line = line.with_context(|| format!("reading from {}", self.what))?;
        serde_json::from_str(&line).with_context(|| format!("{} printed {line:?}", self.what))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// An echo server (TCP and UDP) that tells its name and who it was asked by.
pub struct Server {
    _process: Process,
}

impl Server {
    /// Starts a server and waits until it listens.
    pub fn start(place: &Place, name: &str, addrs: &[SocketAddr]) -> anyhow::Result<Self> {
        let mut process =
            Process::start(place, &Task::Serve { name: name.to_owned(), addrs: addrs.to_vec() })?;
        let listening: bool = process.next()?;
        ensure!(listening, "{name} does not listen");
        Ok(Self { _process: process })
    }
}

/// What a number of calls came to.
#[derive(Clone, Debug, Default)]
pub struct Answers(pub Vec<Outcome>);

impl Answers {
    /// How often each server answered.
    pub fn counts(&self) -> BTreeMap<&str, usize> {
        let mut counts = BTreeMap::new();
        for answer in self.0.iter().flatten() {
            *counts.entry(answer.by.as_str()).or_default() += 1;
        }
        counts
    }

    /// The source addresses that a server saw.
    pub fn sources(&self, server: &str) -> BTreeSet<IpAddr> {
        self.0.iter().flatten().filter(|a| a.by == server).map(|a| a.seen.ip()).collect()
    }

    pub fn failures(&self) -> Vec<&Failure> {
        self.0.iter().filter_map(|o| o.as_ref().err()).collect()
    }

    /// The counts, unless a call failed.
    pub fn all_answered(&self) -> anyhow::Result<BTreeMap<&str, usize>> {
        let failures = self.failures();
        if let Some(first) = failures.first() {
            bail!("{} of {} calls failed, the first with: {}", failures.len(), self.0.len(), first.message);
        }
        Ok(self.counts())
    }
}

/// Gives calls over UDP source ports that no call had before. Flows outlive their sockets: a socket that got the port of an
/// earlier one by chance would be answered by that one's backend, whatever has changed since.
fn with_own_ports(call: &Call, count: usize) -> Call {
    /// Above the ephemeral range, of which a [`Load`] in the same place takes hundreds a second.
    const PORTS: std::ops::Range<u32> = 61_000..65_500;
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    let Ok(count) = u32::try_from(count) else { return call.clone() };
    if call.proto == Proto::Tcp || call.from.is_some() || count >= PORTS.end - PORTS.start {
        return call.clone();
    }
    // Ports come again after 4,500 calls: no test asks one frontend as often.
    let first = PORTS.start + GIVEN.fetch_add(count, Ordering::Relaxed) % (PORTS.end - PORTS.start - count);
    call.clone().from_ports(first as u16)
}

impl Place {
    /// Makes `count` calls, one after the other, each with a socket of its own.
    pub fn calls(&self, call: &Call, count: usize) -> anyhow::Result<Answers> {
        let mut process = Process::start(self, &Task::Calls { call: with_own_ports(call, count), count })?;
        (0..count).map(|_| process.next()).collect::<Result<_, _>>().map(Answers)
    }

    /// Makes one call.
    pub fn call(&self, call: &Call) -> anyhow::Result<Outcome> {
        self.calls(call, 1)?.0.pop().context("no outcome")
    }

    /// Opens a connection (or UDP socket) that stays open between questions.
    pub fn session(&self, call: &Call) -> anyhow::Result<Session> {
        Ok(Session { process: Process::start(self, &Task::Session(with_own_ports(call, 1)))? })
    }

    /// Starts making calls until told to stop; returns when the first is through.
    pub fn load(&self, call: &Call) -> anyhow::Result<Load> {
        let mut process = Process::start(self, &Task::Load(call.clone()))?;
        let _under_way: bool = process.next()?;
        Ok(Load { process })
    }

    /// Sends that many bytes through one TCP connection and receives as many back; both ends check every byte.
    pub fn bulk(&self, to: SocketAddr, bytes: u64) -> anyhow::Result<Result<(), Failure>> {
        Process::start(self, &Task::Bulk { to, bytes })?.next()
    }
}

/// An open connection.
pub struct Session {
    process: Process,
}

impl Session {
    /// Asks the other end who it is.
    pub fn ask(&mut self) -> anyhow::Result<Outcome> {
        let stdin = self.process.stdin.as_mut().context("session is closed")?;
        writeln!(stdin, "ask")?;
        self.process.next()
    }
}

/// Calls that go on in the background.
pub struct Load {
    process: Process,
}

impl Load {
    /// Ends it and tells what happened.
    pub fn stop(mut self) -> anyhow::Result<Tally> {
        drop(self.process.stdin.take());
        self.process.next()
    }
}

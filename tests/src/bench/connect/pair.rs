//! A client and a server on a node, from outside: started, given orders, ended.

use std::{
    io::{BufRead as _, BufReader, Lines, Write as _},
    net::SocketAddr,
    num::NonZero,
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Stdio},
    thread,
};

use anyhow::{Context as _, Result, bail};
use serde::de::DeserializeOwned;

use super::worker::{Job, Order, Sample};
use crate::{
    cluster::Node,
    place::{Family, Place, sibling},
    traffic::{Task, task::argument},
};

/// Where the servers of this benchmark listen; those of the cluster have another port.
pub const PORT: u16 = 9000;

/// Many ports, used again without waiting for the end of TIME_WAIT (RFC 6191 says why that is safe), and an end soon
/// where nobody answers.
const CLIENT: [(&str, &str); 3] =
    [("ipv4/ip_local_port_range", "10000 65000"), ("ipv4/tcp_tw_reuse", "1"), ("ipv4/tcp_syn_retries", "2")];

/// A client in one pod and a server in the other; ended when dropped.
pub struct Pair {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
    what: String,
}

/// The pods of a node that serves and asks.
pub fn pods(node: &Node) -> Result<(&Place, &Place)> {
    match node.pods.as_slice() {
        [server, client, ..] => Ok((server, client)),
        _ => bail!("{} has no two pods", node.place.name),
    }
}

/// The address that the server of a node has itself.
pub fn direct(node: &Node) -> Result<SocketAddr> {
    Ok(pods(node)?.0.addrs.socket(Family::V4, PORT))
}

impl Pair {
    /// Both on `node`; the client connects to `to`. The server's answers show `mark`.
    pub fn start(node: &Node, to: SocketAddr, mark: u8) -> Result<Self> {
        let (server, client) = pods(node)?;
        client.netns.sysctl(&CLIENT)?;
        let job = Job {
            to,
            listen: direct(node)?,
            server_netns: Path::new("/run/netns").join(server.netns.name()),
            mark,
            cpu: processors() - 1,
            other_cpu: processors().saturating_sub(2),
        };
        let what = format!("connections from {} to {to}", client.name);
        let mut command = client.command(&sibling("netproc")?)?;
        command.arg(argument(&Task::Connect(job))?).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {what}"))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().context("no stdout")?);
        let mut pair = Self { child, stdin, lines: BufReader::new(stdout).lines(), what };
        let _listens: bool = pair.next()?;
        Ok(pair)
    }

    /// Has an order carried out.
    pub fn order(&mut self, order: Order) -> Result<Sample> {
        let line = serde_json::to_string(&order)?;
        writeln!(self.stdin.as_mut().context("no stdin")?, "{line}")?;
        self.next()
    }

    fn next<T: DeserializeOwned>(&mut self) -> Result<T> {
        let Some(line) = self.lines.next() else { bail!("{} failed (see above)", self.what) };
        let line = line.with_context(|| self.what.clone())?;
        serde_json::from_str(&line).with_context(|| format!("{}: {line:?}", self.what))
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The last one is used first: the first has more of the machine's interrupts.
fn processors() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get)
}

//! What a `netproc` process is told (one JSON argument) and what it prints (one JSON value a line).

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use serde::{Deserialize, Serialize};

use crate::bench::connect::worker;

/// What a process has to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Task {
    /// See `janitor`.
    Janitor,
    /// Listen on TCP and UDP at each address. Prints `true` once it does.
    Serve { name: String, addrs: Vec<SocketAddr> },
    /// Make calls one after the other. Prints an [`Outcome`] for each.
    Calls { call: Call, count: usize },
    /// Open a connection and ask once for every line of input. Prints an [`Outcome`] for each.
    Session(Call),
    /// Make calls until the input ends. Prints `true` after the first, a [`Tally`] in the end.
    Load(Call),
    /// Send and receive that many bytes. Prints `Result<(), Failure>`.
    Bulk { to: SocketAddr, bytes: u64 },
    /// Client and server of a benchmark. See there.
    Connect(worker::Job),
}

/// The task as a command-line argument.
pub fn argument(task: &Task) -> serde_json::Result<String> {
    serde_json::to_string(task)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Proto {
    Tcp,
    /// A connected socket: hears of ICMP errors.
    Udp,
    /// sendto and recvfrom, as DNS resolvers without connect do.
    UdpUnconnected,
}

/// Where to and how.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Call {
    pub proto: Proto,
    pub to: SocketAddr,
    /// The client's own address and port (either may be unspecified); any if `None`.
    pub from: Option<SocketAddr>,
    /// Of several calls each takes the next port after that of `from`, instead of the same one.
    pub count_ports_up: bool,
    pub timeout_ms: u64,
}

impl Call {
    pub const fn new(proto: Proto, to: SocketAddr) -> Self {
        Self { proto, to, from: None, count_ports_up: false, timeout_ms: 3000 }
    }

    pub const fn tcp(to: SocketAddr) -> Self {
        Self::new(Proto::Tcp, to)
    }

    pub const fn udp(to: SocketAddr) -> Self {
        Self::new(Proto::Udp, to)
    }

    #[must_use]
    pub const fn from(mut self, addr: SocketAddr) -> Self {
        self.from = Some(addr);
        self
    }

    /// The first call from this port, each other from the next one.
    #[must_use]
    pub const fn from_ports(mut self, first: u16) -> Self {
        let any = match self.to.ip() {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        self.from = Some(SocketAddr::new(any, first));
        self.count_ports_up = true;
        self
    }

    /// The call after this one.
    pub fn next(mut self) -> Self {
        if let (Some(from), true) = (&mut self.from, self.count_ports_up) {
            from.set_port(from.port() + 1);
        }
        self
    }

    /// For calls that are expected to stay without an answer.
    #[must_use]
    pub const fn timeout_ms(mut self, timeout_ms: u64) -> Self {
        self.timeout_ms = timeout_ms;
        self
    }
}

/// What a server said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The server's name.
    pub by: String,
    /// The client as the server saw it.
    pub seen: SocketAddr,
    /// The server as the client saw it (getpeername; for unconnected sockets the sender of the answer).
    pub peer: SocketAddr,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Name of the `io::ErrorKind`.
    pub kind: String,
    pub message: String,
}

impl Failure {
    /// Refused, rather than left without an answer.
    pub fn is_refusal(&self) -> bool {
        self.kind == format!("{:?}", io::ErrorKind::ConnectionRefused)
    }

    /// Left without an answer.
    pub fn is_timeout(&self) -> bool {
        [io::ErrorKind::TimedOut, io::ErrorKind::WouldBlock].iter().any(|k| self.kind == format!("{k:?}"))
    }
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        Self { kind: format!("{:?}", e.kind()), message: e.to_string() }
    }
}

pub type Outcome = Result<Answer, Failure>;

/// What became of many calls.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    pub answered: BTreeMap<String, u64>,
    pub failed: u64,
    /// The first few failures, with the number of the call.
    pub failures: Vec<(u64, Failure)>,
}

impl Tally {
    pub fn add(&mut self, outcome: Outcome) {
        match outcome {
            Ok(answer) => *self.answered.entry(answer.by).or_default() += 1,
            Err(failure) => {
                if self.failures.len() < 10 {
                    self.failures.push((self.total(), failure));
                }
                self.failed += 1;
            }
        }
    }

    pub fn total(&self) -> u64 {
        self.answered.values().sum::<u64>() + self.failed
    }
}

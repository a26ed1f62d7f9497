//! What traffic from some place to some frontend is to get, and whether it does.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
    thread,
};

use anyhow::Context as _;
use serde_json::Value;

use super::{
    Rule,
    fixture::{address, port},
};
use crate::{
    place::{Family, Pair, Place},
    traffic::{Answers, Call, Proto},
};

/// A kind of frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    ClusterIp,
    /// On the node that the client is on; for the client outside, on node1.
    NodePort,
    /// On this node.
    NodePortOf(u8),
    LoadBalancer,
    ExternalIp,
}

/// All kinds but the ClusterIP: those that externalTrafficPolicy is about.
pub const EXTERNAL: [To; 3] = [To::NodePort, To::LoadBalancer, To::ExternalIp];

/// What new connections get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// An answer from each of these servers, and from nobody else.
    From(Vec<String>),
    /// Connection refused: RST or ICMP port unreachable.
    Refused,
    /// Nothing.
    Dropped,
    /// No answer from a backend, however that shows: the address is not served.
    Unserved,
}

/// The client's address as the servers see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The client's own.
    Kept,
    /// That of the node.
    Node(u8),
    /// The frontend's: a pod that reaches itself.
    Frontend,
}

/// One line of a rule's table. Checked in both families and for TCP and UDP, as far as the Service has them.
#[derive(Clone, Debug)]
pub struct Line {
    pub from: String,
    pub to: To,
    pub want: Want,
    pub seen: Option<Seen>,
    pub families: Vec<Family>,
    pub protos: Vec<Proto>,
    /// Name of the Service; that of the rule by default.
    pub service: Option<String>,
    /// Name of the port; the first one of the protocol by default.
    pub port: Option<String>,
    /// The node's addresses that a NodePort is asked at; the first ones by default.
    pub at: Option<Pair>,
}

/// New connections of `from` (`client`, `node1`, `pod-1a`...) to this kind of frontend.
pub fn flows(from: &str, to: To) -> Line {
    Line {
        from: from.to_owned(),
        to,
        want: Want::Refused,
        seen: None,
        families: Family::BOTH.into(),
        protos: vec![Proto::Tcp, Proto::Udp],
        service: None,
        port: None,
        at: None,
    }
}

impl Line {
    /// Each of these answers, and nobody else.
    pub fn get(mut self, servers: &[&str]) -> Self {
        self.want = Want::From(servers.iter().map(|s| (*s).to_owned()).collect());
        self
    }
    pub fn are_refused(mut self) -> Self {
        self.want = Want::Refused;
        self
    }
    pub fn are_dropped(mut self) -> Self {
        self.want = Want::Dropped;
        self
    }
    pub fn are_unserved(mut self) -> Self {
        self.want = Want::Unserved;
        self
    }
    /// The servers see the client as this.
    pub fn seen(mut self, seen: Seen) -> Self {
        self.seen = Some(seen);
        self
    }
    pub fn only(mut self, family: Family) -> Self {
        self.families = vec![family];
        self
    }
    pub fn over(mut self, proto: Proto) -> Self {
        self.protos = vec![proto];
        self
    }
    /// Of another Service of the fixture.
    pub fn of(mut self, service: &str) -> Self {
        self.service = Some(service.to_owned());
        self
    }
    /// At the port of this name.
    pub fn port(mut self, name: &str) -> Self {
        self.port = Some(name.to_owned());
        self
    }
    /// A NodePort at these addresses.
    pub fn at(mut self, addrs: Pair) -> Self {
        self.at = Some(addrs);
        self
    }
}

/// For calls that are to stay without an answer: long enough for any answer to arrive.
const NO_ANSWER_MS: u64 = 400;

/// Calls in one round: a wrong second backend stays unseen once in 2^24 times.
const ROUND: usize = 24;
/// Rounds until every backend must have been seen: one of four stays unseen once in 10^15 times.
const ROUNDS: usize = 5;

/// One line in one family and protocol.
struct Probe<'a> {
    rule: &'a Rule<'a>,
    line: &'a Line,
    from: &'a Place,
    to: SocketAddr,
    proto: Proto,
}

impl Rule<'_> {
    /// Everything about these lines that is not as it should be.
    pub fn mistakes(&self, lines: &[Line]) -> Vec<String> {
        lines.iter().flat_map(|line| self.mistakes_of(line)).collect()
    }

    fn mistakes_of(&self, line: &Line) -> Vec<String> {
        let combinations = line.families.iter().flat_map(|f| line.protos.iter().map(move |p| (*f, *p)));
        thread::scope(|scope| {
            let probes: Vec<_> = combinations
                .map(|(family, proto)| scope.spawn(move || self.probe(line, family, proto)))
                .collect();
            let ended = probes.into_iter().map(|p| p.join().unwrap_or_else(|_| Ok(vec!["panicked".into()])));
            ended.flat_map(|result| result.unwrap_or_else(|e| vec![format!("{line}: {e:#}")])).collect()
        })
    }

    fn probe(&self, line: &Line, family: Family, proto: Proto) -> anyhow::Result<Vec<String>> {
        let to = self
            .frontend_of(line, family, proto)
            .with_context(|| format!("the fixture has no such frontend for {family:?} {proto:?}"))?;
        let probe = Probe { rule: self, line, from: self.place(&line.from), to, proto };
        let wrong = probe.run()?;
        Ok(wrong.into_iter().map(|what| format!("{line} ({proto:?} {to}): {what}")).collect())
    }

    /// The address of a kind of frontend, for a client at `from`.
    pub fn frontend(&self, from: &str, to: To, family: Family, proto: Proto) -> SocketAddr {
        let line = flows(from, to);
        self.frontend_of(&line, family, proto)
            .unwrap_or_else(|| panic!("the fixture has no {to:?} for {family:?} {proto:?}"))
    }

    fn frontend_of(&self, line: &Line, family: Family, proto: Proto) -> Option<SocketAddr> {
        let service = self.service(line.service.as_deref());
        let number = |field| port(service, proto, line.port.as_deref(), field);
        let at = |list: &Value| Some(SocketAddr::new(address(list, family)?, number("port")?));
        let node_port = |node: u8| {
            let addrs = line.at.unwrap_or(self.cluster.node(node).place.addrs);
            Some(addrs.socket(family, number("nodePort")?))
        };
        match line.to {
            To::ClusterIp => at(&service["spec"]["clusterIPs"]),
            To::ExternalIp => at(&service["spec"]["externalIPs"]),
            To::LoadBalancer => at(&service["status"]["loadBalancer"]["ingress"]),
            To::NodePort => node_port(node_of(&line.from)),
            To::NodePortOf(node) => node_port(node),
        }
    }
}

/// The number of the node that a place is on; the packets of the client outside come to node1.
pub fn node_of(place: &str) -> u8 {
    match place.chars().find(char::is_ascii_digit) {
        Some('2') => 2,
        _ => 1,
    }
}

impl Probe<'_> {
    fn run(&self) -> anyhow::Result<Vec<String>> {
        match &self.line.want {
            Want::From(servers) => self.answers(servers),
            Want::Refused => self.refusal(),
            Want::Dropped => self.silence(),
            Want::Unserved => {
                let outcome = self.from.call(&self.call().timeout_ms(NO_ANSWER_MS))?;
                Ok(outcome.ok().map(|a| format!("{} answered", a.by)).into_iter().collect())
            }
        }
    }

    fn call(&self) -> Call {
        Call::new(self.proto, self.to)
    }

    fn answers(&self, servers: &[String]) -> anyhow::Result<Vec<String>> {
        let mut answers = Answers::default();
        // One first: where nobody answers, a whole round would take half a minute.
        for count in [1, ROUND - 1].into_iter().chain([ROUND; ROUNDS - 1]) {
            let first = answers.0.is_empty();
            answers.0.extend(self.from.calls(&self.call().timeout_ms(1500), count)?.0);
            if first && answers.failures().is_empty() {
                continue;
            }
            let counts = answers.counts();
            if !answers.failures().is_empty() || servers.iter().all(|s| counts.contains_key(s.as_str())) {
                break;
            }
        }
        let mut wrong = Vec::new();
        if let Some(failure) = answers.failures().first() {
            wrong.push(format!("no answer: {}", failure.message));
        }
        let wanted: BTreeSet<&str> = servers.iter().map(String::as_str).collect();
        let found: BTreeSet<&str> = answers.counts().into_keys().collect();
        if wanted != found {
            wrong.push(format!("answers came from {found:?}"));
        }
        if let Some(a) = answers.0.iter().flatten().find(|a| a.peer != self.to) {
            wrong.push(format!("the client was answered by {}", a.peer));
        }
        let sources = found.iter().flat_map(|s| answers.sources(s).into_iter().map(move |ip| (*s, ip)));
        let strange = sources.filter(|(server, ip)| !self.may_be_seen_as(server, *ip));
        wrong.extend(strange.map(|(server, ip)| format!("{server} saw the client as {ip}")));
        Ok(wrong)
    }

    fn may_be_seen_as(&self, server: &str, ip: IpAddr) -> bool {
        let cluster = &self.rule.cluster;
        match self.line.seen {
            None => true,
            Some(Seen::Frontend) => ip == self.to.ip(),
            Some(Seen::Node(n)) => cluster.node(n).place.addrs.has(ip),
            // A node's own choice of source address towards its own pods: that of the device between them.
            Some(Seen::Kept) if self.from.name.starts_with("node") => {
                let node = cluster.node(node_of(&self.from.name));
                self.from.addrs.has(ip) || node.number == node_of(server) && node.gateway().has(ip)
            }
            Some(Seen::Kept) => self.from.addrs.has(ip),
        }
    }

    /// ICMP errors are limited per second: a few may be missing. The kernel puts one off that arrives while `connect` still
    /// holds the socket, which is the rule between namespaces of one machine: the SYN after a second brings the next.
    fn refusal(&self) -> anyhow::Result<Vec<String>> {
        let mut last = None;
        for _ in 0..3 {
            match self.from.call(&self.call())? {
                Err(failure) if failure.is_refusal() => return Ok(Vec::new()),
                outcome => last = Some(outcome),
            }
        }
        Ok(vec![format!("not refused: {last:?}")])
    }

    fn silence(&self) -> anyhow::Result<Vec<String>> {
        let outcome = self.from.call(&self.call().timeout_ms(NO_ANSWER_MS))?;
        let silent = outcome.as_ref().is_err_and(|f| f.is_timeout());
        Ok(if silent { Vec::new() } else { vec![format!("not dropped: {outcome:?}")] })
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {:?} is to get {:?}", self.from, self.to, self.want)?;
        if let Some(seen) = self.seen {
            write!(f, " and be seen as {seen:?}")?;
        }
        Ok(())
    }
}

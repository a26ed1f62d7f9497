//! The cluster of these tests, and what traffic is to get.

use std::{collections::BTreeSet, net::SocketAddr, thread};

use lb_tests::{
    cluster::{Cluster, Layout, Node, Options},
    manifests::{Service, nodes},
    place::{Pair, Place},
    shared::{SOON, Shared},
    traffic::{Call, Outcome, Proto},
    wait_for,
};

/// One cluster for all tests without flags of their own; each test has its own Service.
pub static CLUSTER: Shared = Shared::new(|| cluster(&[]));

/// Calls that tell the whole set: one of three backends stays unseen once in 10^8 times.
const CALLS: usize = 48;

/// For calls that are to stay without an answer: long enough for any answer to arrive.
pub const NO_ANSWER_MS: u64 = 500;

/// The ports that Services of these tests have.
pub const PROTOS: [Proto; 2] = [Proto::Tcp, Proto::Udp];

/// A cluster with agents, Node objects and allowed external IPs.
pub fn cluster(flags: &[&str]) -> anyhow::Result<Cluster> {
    let options =
        Options::new(Layout::PointToPoint).flag("--allow-external-ips=192.0.2.0/24,2001:db8:192::/64");
    let mut cluster = Cluster::new(flags.iter().fold(options, |options, flag| options.flag(flag)))?;
    cluster.manifests.write("nodes", &nodes(cluster.nodes.iter().map(|n| &n.place)))?;
    cluster.start_agents()?;
    Ok(cluster)
}

/// The external IPs of a Service with this number; its LoadBalancer address is 192.0.2.NUMBER.
pub fn external_ips(number: u8) -> Pair {
    let number = 128 + u16::from(number);
    Pair::new(&format!("192.0.2.{number}"), &format!("2001:db8:192::e:{number}"))
}

/// A Service with all kinds of frontends. `number` is less than 120.
pub fn service(cluster: &Cluster, name: &str, number: u8, pods: &[&str]) -> Service {
    let mut service = Service::on(cluster, name, number, pods);
    let addrs = external_ips(number);
    service.external_ips = vec![addrs.v4.into(), addrs.v6.into()];
    service
}

/// Everything that a Service can be reached by, on this node.
pub fn frontends(service: &Service, node: &Node) -> Vec<(&'static str, SocketAddr)> {
    let external = service.external_ips.iter().map(|ip| ("external IP", SocketAddr::new(*ip, service.port)));
    service.frontends(node).into_iter().chain(external).collect()
}

/// Sources of traffic: outside, a pod, a process of the node.
pub fn sides(cluster: &Cluster) -> [&Place; 3] {
    [&cluster.client, cluster.pod("pod-1b"), &cluster.node(1).place]
}

/// What new connections get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// An answer from each of these, and from nobody else.
    From(&'static [&'static str]),
    /// Connection refused.
    Refused,
    /// Silence.
    Dropped,
}

/// Connections of one source to one frontend.
#[derive(Clone, Debug)]
pub struct Line<'a> {
    pub from: &'a Place,
    pub kind: &'a str,
    pub to: SocketAddr,
    pub proto: Proto,
    pub want: Want,
}

/// Lines for all these sources, frontends of a kind that `wanted` chooses, and both protocols.
pub fn lines<'a>(
    from: &[&'a Place],
    frontends: &[(&'static str, SocketAddr)],
    wanted: impl Fn(&Place, &str) -> Option<Want>,
) -> Vec<Line<'a>> {
    let mut lines = Vec::new();
    for from in from.iter().copied() {
        for (kind, to) in frontends {
            for proto in PROTOS {
                let want = wanted(from, kind);
                lines.extend(want.map(|want| Line { from, kind, to: *to, proto, want }));
            }
        }
    }
    lines
}

impl Line<'_> {
    fn call(&self) -> Call {
        Call::new(self.proto, self.to)
    }

    /// What is not as it should be.
    fn mistake(&self) -> Option<String> {
        let wrong = match &self.want {
            Want::From(servers) => self.other_answers(servers),
            Want::Refused => self.other_than(|o| o.as_ref().is_err_and(|f| f.is_refusal())),
            Want::Dropped => self.other_than(|o| o.as_ref().is_err_and(|f| f.is_timeout())),
        };
        let Self { from, kind, to, proto, want } = self;
        wrong.map(|wrong| format!("{} -> {kind} {to} {proto:?} is to get {want:?}: {wrong}", from.name))
    }

    fn other_answers(&self, servers: &[&str]) -> Option<String> {
        // One that goes wrong stands for all: each may take its time.
        let first = self.from.call(&self.call().timeout_ms(1000)).expect("calls can be made");
        let first = match first {
            Ok(answer) => answer,
            Err(failure) => return Some(failure.message),
        };
        let answers = self.from.calls(&self.call().timeout_ms(1500), CALLS).expect("calls can be made");
        if let Some(failure) = answers.failures().first() {
            return Some(format!("{} of {CALLS} failed: {}", answers.failures().len(), failure.message));
        }
        let mut found: BTreeSet<&str> = answers.counts().into_keys().collect();
        found.insert(&first.by);
        let wanted: BTreeSet<&str> = servers.iter().copied().collect();
        (found != wanted).then(|| format!("answers came from {found:?}"))
    }

    fn other_than(&self, wanted: impl Fn(&Outcome) -> bool) -> Option<String> {
        let limit = if self.want == Want::Dropped { NO_ANSWER_MS } else { 1500 };
        let outcome = self.from.call(&self.call().timeout_ms(limit)).expect("calls can be made");
        (!wanted(&outcome)).then(|| format!("{outcome:?}"))
    }
}

/// All mistakes. Lines are tried at the same time, since many wait for an answer that must not come.
pub fn mistakes(lines: &[Line<'_>]) -> Vec<String> {
    thread::scope(|scope| {
        let all: Vec<_> = lines.iter().map(|line| scope.spawn(|| line.mistake())).collect();
        all.into_iter().filter_map(|line| line.join().expect("a line does not panic")).collect()
    })
}

/// Traffic gets what these lines say.
#[track_caller]
pub fn check(lines: &[Line<'_>]) {
    assert!(!lines.is_empty(), "nothing to check");
    let mistakes = mistakes(lines);
    assert!(mistakes.is_empty(), "{} of {}:\n{}", mistakes.len(), lines.len(), mistakes.join("\n"));
}

/// Traffic comes to get what these lines say, once a change has been programmed.
#[track_caller]
pub fn check_soon(lines: &[Line<'_>]) {
    assert!(!lines.is_empty(), "nothing to check");
    let mut wrong = Vec::new();
    let waited = wait_for("it", SOON, || {
        wrong = mistakes(lines);
        wrong.is_empty()
    });
    assert!(waited.is_ok(), "{} of {}:\n{}", wrong.len(), lines.len(), wrong.join("\n"));
}

/// How often the agent of a node has counted this (`lb_common::verdict::Counter`).
pub fn counted(cluster: &Cluster, node: u8, event: &str) -> u64 {
    let metrics = cluster.agents[&format!("node{node}")].metrics().expect("metrics");
    let name = format!("lb_datapath_events_total{{event=\"{event}\"}} ");
    let line = metrics.lines().find_map(|l| l.strip_prefix(&name));
    line.and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("no counter {event}"))
}

/// Waits until all of these Services' changes are in the kernel of both nodes: that of another Service, written after them,
/// is.
pub fn settle(cluster: &Cluster) {
    use std::sync::atomic::{AtomicU8, Ordering};
    static MARK: AtomicU8 = AtomicU8::new(1);
    let number = MARK.fetch_add(1, Ordering::Relaxed);
    let mut mark = Service::on(cluster, &format!("mark-{number}"), 0, &["pod-1a"]);
    mark.cluster_ips = Pair::new(&format!("10.96.9.{number}"), &format!("fd00:10:96::9:{number}"));
    (mark.node_port, mark.load_balancer) = (None, None);
    cluster.serve(&mark).expect("a Service can be served");
    cluster.manifests.remove(&mark.name).expect("a manifest can be removed");
}

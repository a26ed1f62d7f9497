//! Rule D, the whole matrix: every source, every kind of frontend, every combination of policies, both families, TCP and
//! UDP, with real packets. Which endpoints answer, and which source address they see.
//!
//! The table is kube-proxy's (`TestInternalExternalMasquerade`), with one deliberate difference: where kube-proxy gives
//! clients the node's address ("M"), they keep their own, unless they come from outside and their backend is on another
//! node. Only there would the answer miss the node that was asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    thread,
};

use anyhow::Context as _;
use lb_tests::{
    cluster::{Cluster, Layout, Options},
    manifests::{Service, nodes},
    place::{Family, Pair, Place},
    traffic::{Answers, Call, Proto},
};
use serde_json::json;

/// One backend on each node.
const BACKENDS: [&str; 2] = ["pod-1a", "pod-2a"];

/// Calls per cell: one of two backends stays unseen once in 2^23 times.
const CALLS: usize = 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    ClusterIp,
    /// On this node.
    NodePort(u8),
    /// 127.0.0.1 and ::1.
    LoopbackNodePort,
    LoadBalancer,
    ExternalIp,
}

/// externalTrafficPolicy, internalTrafficPolicy.
const POLICIES: [(&str, &str); 4] =
    [("Cluster", "Cluster"), ("Local", "Cluster"), ("Cluster", "Local"), ("Local", "Local")];

/// What a source gets at a frontend, for each of [`POLICIES`]: the exact set of backends, each with the source address
/// that it sees. `own` is the client's; `n1` and `n2` are addresses of that node.
struct Row {
    from: &'static str,
    to: To,
    cells: [&'static str; 4],
}

const fn row(from: &'static str, to: To, cells: [&'static str; 4]) -> Row {
    Row { from, to, cells }
}

/// Packets of the client to ClusterIP, LoadBalancer address and external IP come to node1. A pod or a process of one node
/// is a client from outside to the NodePort of the other node (rule D1: the device that a packet comes by decides).
#[rustfmt::skip]
const TABLE: &[Row] = &[
    //                                   Cluster             eTP Local           iTP Local           both
    row("pod-1b", To::ClusterIp,        ["1a=own 2a=own",   "1a=own 2a=own",    "1a=own",           "1a=own"]),
    row("pod-2b", To::ClusterIp,        ["1a=own 2a=own",   "1a=own 2a=own",    "2a=own",           "2a=own"]),
    row("node1",  To::ClusterIp,        ["1a=n1 2a=n1",     "1a=n1 2a=n1",      "1a=n1",            "1a=n1"]),
    row("client", To::ClusterIp,        ["1a=own 2a=n1",    "1a=own 2a=n1",     "1a=own",           "1a=own"]),

    row("pod-1b", To::NodePort(1),      ["1a=own 2a=own",   "1a=own 2a=own",    "1a=own 2a=own",    "1a=own 2a=own"]),
    row("pod-1b", To::NodePort(2),      ["1a=n2 2a=own",    "2a=own",           "1a=n2 2a=own",     "2a=own"]),
    row("pod-2b", To::NodePort(1),      ["1a=own 2a=n1",    "1a=own",           "1a=own 2a=n1",     "1a=own"]),
    row("pod-2b", To::NodePort(2),      ["1a=own 2a=own",   "1a=own 2a=own",    "1a=own 2a=own",    "1a=own 2a=own"]),
    row("node1",  To::NodePort(1),      ["1a=n1 2a=n1",     "1a=n1 2a=n1",      "1a=n1 2a=n1",      "1a=n1 2a=n1"]),
    row("node1",  To::NodePort(2),      ["1a=n2 2a=n1",     "2a=n1",            "1a=n2 2a=n1",      "2a=n1"]),
    row("node1",  To::LoopbackNodePort, ["1a=n1 2a=n1",     "1a=n1 2a=n1",      "1a=n1 2a=n1",      "1a=n1 2a=n1"]),
    row("client", To::NodePort(1),      ["1a=own 2a=n1",    "1a=own",           "1a=own 2a=n1",     "1a=own"]),
    row("client", To::NodePort(2),      ["1a=n2 2a=own",    "2a=own",           "1a=n2 2a=own",     "2a=own"]),

    row("pod-1b", To::LoadBalancer,     ["1a=own 2a=own",   "1a=own 2a=own",    "1a=own 2a=own",    "1a=own 2a=own"]),
    row("pod-2b", To::LoadBalancer,     ["1a=own 2a=own",   "1a=own 2a=own",    "1a=own 2a=own",    "1a=own 2a=own"]),
    row("node1",  To::LoadBalancer,     ["1a=n1 2a=n1",     "1a=n1 2a=n1",      "1a=n1 2a=n1",      "1a=n1 2a=n1"]),
    row("client", To::LoadBalancer,     ["1a=own 2a=n1",    "1a=own",           "1a=own 2a=n1",     "1a=own"]),

    row("pod-1b", To::ExternalIp,       ["1a=own 2a=own",   "1a=own 2a=own",    "1a=own 2a=own",    "1a=own 2a=own"]),
    row("pod-2b", To::ExternalIp,       ["1a=own 2a=own",   "1a=own 2a=own",    "1a=own 2a=own",    "1a=own 2a=own"]),
    row("node1",  To::ExternalIp,       ["1a=n1 2a=n1",     "1a=n1 2a=n1",      "1a=n1 2a=n1",      "1a=n1 2a=n1"]),
    row("client", To::ExternalIp,       ["1a=own 2a=n1",    "1a=own",           "1a=own 2a=n1",     "1a=own"]),
];

/// Rule D2: with masqueradeAll every connection to a ClusterIP comes under an address of the node that translated it.
#[rustfmt::skip]
const MASQUERADE_ALL: &[Row] = &[
    //                                   Cluster             eTP Local           iTP Local           both
    row("pod-1b", To::ClusterIp,        ["1a=n1 2a=n1",     "1a=n1 2a=n1",      "1a=n1",            "1a=n1"]),
    row("pod-2b", To::ClusterIp,        ["1a=n2 2a=n2",     "1a=n2 2a=n2",      "2a=n2",            "2a=n2"]),
    row("node1",  To::ClusterIp,        ["1a=n1 2a=n1",     "1a=n1 2a=n1",      "1a=n1",            "1a=n1"]),
    row("client", To::ClusterIp,        ["1a=n1 2a=n1",     "1a=n1 2a=n1",      "1a=n1",            "1a=n1"]),
    // Other frontends are not meant.
    row("pod-1b", To::LoadBalancer,     ["1a=own 2a=own",   "1a=own 2a=own",    "1a=own 2a=own",    "1a=own 2a=own"]),
    row("client", To::NodePort(1),      ["1a=own 2a=n1",    "1a=own",           "1a=own 2a=n1",     "1a=own"]),
];

/// Rule D1: a pod that the local detector does not know counts as a client from outside.
#[rustfmt::skip]
const UNKNOWN_POD: &[Row] = &[
    //                                   Cluster             eTP Local           iTP Local           both
    row("pod-1b", To::ClusterIp,        ["1a=own 2a=n1",    "1a=own 2a=n1",     "1a=own",           "1a=own"]),
    row("pod-1b", To::NodePort(1),      ["1a=own 2a=n1",    "1a=own",           "1a=own 2a=n1",     "1a=own"]),
    row("pod-1b", To::LoadBalancer,     ["1a=own 2a=n1",    "1a=own",           "1a=own 2a=n1",     "1a=own"]),
    row("pod-1b", To::ExternalIp,       ["1a=own 2a=n1",    "1a=own",           "1a=own 2a=n1",     "1a=own"]),
];

/// A cluster with a Service for each of the policies.
struct Bed {
    table: &'static [Row],
    cluster: Cluster,
    services: Vec<Service>,
}

fn external_ips(policy: usize) -> Pair {
    let number = 220 + policy;
    Pair::new(&format!("192.0.2.{number}"), &format!("2001:db8:192::{number}"))
}

impl Bed {
    fn new(table: &'static [Row], layout: Layout, flags: &[&str]) -> anyhow::Result<Self> {
        let options = Options::new(layout).flag("--allow-external-ips=192.0.2.0/24,2001:db8:192::/64");
        let options = flags.iter().fold(options, |options, flag| options.flag(flag));
        let mut cluster = Cluster::new(options)?;
        cluster.manifests.write("nodes", &nodes(cluster.nodes.iter().map(|n| &n.place)))?;
        cluster.start_agents()?;
        let mut services = Vec::new();
        for (i, (external, internal)) in POLICIES.into_iter().enumerate() {
            let mut service = Service::on(&cluster, &format!("policy-{i}"), 200 + i as u8, &BACKENDS)
                .with("externalTrafficPolicy", json!(external))
                .with("internalTrafficPolicy", json!(internal));
            let addrs = external_ips(i);
            service.external_ips = vec![addrs.v4.into(), addrs.v6.into()];
            cluster.serve(&service)?;
            services.push(service);
        }
        Ok(Self { table, cluster, services })
    }

    /// Checks every cell; all mistakes are reported, not only the first.
    fn check(self) {
        let combinations = Family::BOTH.into_iter().flat_map(|f| [(f, Proto::Tcp), (f, Proto::Udp)]);
        let mistakes: Vec<String> = thread::scope(|scope| {
            let bed = &self;
            let all: Vec<_> =
                combinations.map(|(f, proto)| scope.spawn(move || bed.part(f, proto))).collect();
            all.into_iter()
                .flat_map(|part| part.join().expect("no panic").expect("calls can be made"))
                .collect()
        });
        let cells = self.table.len() * POLICIES.len() * 4;
        let logs = self.cluster.logs();
        assert!(mistakes.is_empty(), "{} of {cells} cells:\n{}\n{logs}", mistakes.len(), mistakes.join("\n"));
        self.cluster.finish().expect("everything can be taken down");
    }

    fn part(&self, family: Family, proto: Proto) -> anyhow::Result<Vec<String>> {
        let mut mistakes = Vec::new();
        for row in self.table {
            for (policy, text) in row.cells.iter().enumerate() {
                let cell = Cell { bed: self, row, policy, family, proto };
                let (wanted, found) = (wanted(text), cell.found()?);
                if wanted != found {
                    mistakes.push(format!("{cell}: got {}, not {}", shown(&found), shown(&wanted)));
                }
            }
        }
        Ok(mistakes)
    }
}

/// Backends by name, with everything that they saw clients as.
type Seen = BTreeMap<String, BTreeSet<String>>;

fn wanted(text: &str) -> Seen {
    let cells = text.split(' ').filter_map(|part| part.split_once('='));
    cells.map(|(pod, seen)| (format!("pod-{pod}"), BTreeSet::from([seen.to_owned()]))).collect()
}

fn shown(seen: &Seen) -> String {
    let all: Vec<_> = seen
        .iter()
        .map(|(pod, seen)| format!("{pod}={}", seen.iter().cloned().collect::<Vec<_>>().join("|")))
        .collect();
    if all.is_empty() { "nothing".to_owned() } else { all.join(" ") }
}

/// One policy of one row, in one family and protocol.
struct Cell<'a> {
    bed: &'a Bed,
    row: &'a Row,
    policy: usize,
    family: Family,
    proto: Proto,
}

impl Cell<'_> {
    fn to(&self) -> anyhow::Result<SocketAddr> {
        let (service, family) = (&self.bed.services[self.policy], self.family);
        let node_port = service.node_port.context("a NodePort")?;
        Ok(match self.row.to {
            To::ClusterIp => service.cluster_ip(family),
            To::NodePort(node) => self.bed.cluster.node(node).place.addrs.socket(family, node_port),
            To::LoopbackNodePort => {
                Pair { v4: Ipv4Addr::LOCALHOST, v6: Ipv6Addr::LOCALHOST }.socket(family, node_port)
            }
            To::LoadBalancer => {
                service.load_balancer.context("a LoadBalancer address")?.socket(family, service.port)
            }
            To::ExternalIp => external_ips(self.policy).socket(family, service.port),
        })
    }

    /// Every call of a place has a source port of its own. The kernel would soon give one a second time, and a client port
    /// that reaches one backend by way of two nodes at a time is a known limit (docs/architecture.md), which is not what
    /// this test is about.
    fn first_port(&self) -> u16 {
        let row = self.bed.table.iter().take_while(|row| !std::ptr::eq(*row, self.row)).count();
        // Beyond the kernel's own; an IPv6 socket at any address takes the port of IPv4, too.
        let first = if self.family == Family::V4 { 61_000 } else { 63_100 };
        first + ((row * POLICIES.len() + self.policy) * CALLS) as u16
    }

    /// Who answered, and what they saw. Failures appear as a backend of their own.
    fn found(&self) -> anyhow::Result<Seen> {
        let from = self.place()?;
        let to = self.to()?;
        let call = Call::new(self.proto, to).timeout_ms(1000).from_ports(self.first_port());
        let answers = from.calls(&call, CALLS)?;
        let mut seen = self.seen(from, &answers);
        if let Some(failure) = answers.failures().first() {
            seen.entry("failed".to_owned()).or_default().insert(failure.message.clone());
        }
        for answer in answers.0.iter().flatten().filter(|a| a.peer != to) {
            seen.entry("other name".to_owned()).or_default().insert(answer.peer.to_string());
        }
        Ok(seen)
    }

    fn place(&self) -> anyhow::Result<&Place> {
        self.bed.cluster.places().find(|p| p.name == self.row.from).context("a place of the cluster")
    }

    fn seen(&self, from: &Place, answers: &Answers) -> Seen {
        let mut seen = Seen::new();
        for answer in answers.0.iter().flatten() {
            let name = self.name_of(from, &answer.by, answer.seen.ip());
            seen.entry(answer.by.clone()).or_default().insert(name);
        }
        seen
    }

    /// What a source address is called in the table. Towards its own pods, a node's address is that of the device
    /// between them.
    fn name_of(&self, from: &Place, backend: &str, source: IpAddr) -> String {
        let home = |number: u8| backend.contains(char::from(b'0' + number));
        let node = self
            .bed
            .cluster
            .nodes
            .iter()
            .find(|n| n.place.addrs.has(source) || home(n.number) && n.gateway().has(source));
        match node {
            Some(node) => format!("n{}", node.number),
            None if from.addrs.has(source) => "own".to_owned(),
            None => source.to_string(),
        }
    }
}

impl fmt::Display for Cell<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (external, internal) = POLICIES[self.policy];
        let Row { from, to, .. } = self.row;
        write!(f, "{from} -> {to:?}, eTP {external}, iTP {internal}, {:?} {:?}", self.family, self.proto)
    }
}

#[test]
fn d1_to_d7_the_whole_truth_table_of_sources_frontends_and_policies() {
    Bed::new(TABLE, Layout::PointToPoint, &[]).unwrap().check();
}

#[test]
fn d1_to_d7_the_truth_table_where_pods_are_on_a_bridge() {
    Bed::new(TABLE, Layout::Bridge, &[]).unwrap().check();
}

/// Sockets of pods that are connected to backends directly get the same.
#[test]
fn d1_to_d7_the_truth_table_through_the_socket_hooks_of_pods() {
    Bed::new(TABLE, Layout::PointToPoint, &["--socket-lb=all"]).unwrap().check();
}

#[test]
fn d1_a_pod_that_no_detector_knows_counts_as_a_client_from_outside() {
    Bed::new(UNKNOWN_POD, Layout::PointToPoint, &["--external-device=veth1b"]).unwrap().check();
}

#[test]
fn d2_masquerade_all_gives_every_connection_to_a_cluster_ip_the_nodes_address() {
    Bed::new(MASQUERADE_ALL, Layout::PointToPoint, &["--masquerade-all=on"]).unwrap().check();
}

//! L1, L2 and C6: connections through real sockets, between pods of one node.
//!
//! Every way to a server is a node of its own, at the same time as all the others, with two pods on routed veth devices
//! and a [`pair`] of client and server in them. Rounds go through all of them and back, so that what drifts on the
//! machine is the same for each; a second node without any proxy shows what the comparison is worth.

pub mod pair;
pub mod programs;
pub mod restart;
pub mod rounds;
pub mod worker;

use std::{io, net::SocketAddr, path::PathBuf};

use anyhow::Result;

use self::{
    pair::{PORT, Pair, direct, pods},
    programs::share,
    rounds::{Kind, measure},
};
use super::{
    Effort,
    forward::run::clock_sees_softirqs,
    kube_proxy::{self, Mode, Proto},
    report::Row,
};
use crate::{
    cluster::{Cluster, Layout, Node, Options},
    manifests::{Endpoint, Service, nodes},
    place::{Family, Pair as Addresses},
};

/// Of our agents, beside the one that is measured.
const SERVICES: u32 = 10_000;
/// Of kube-proxy's rules, that one included.
const RULES: [u32; 3] = [10, 1_000, 10_000];

/// What L1 does.
pub const CRR: &str = "connect, one byte, close";

/// What stands between client and server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Nothing, and the server's own address.
    Direct,
    /// The same on another node.
    DirectAgain,
    /// Our agent with hooks at sockets.
    Sockets,
    /// Our agent with programs at devices only.
    Packets,
    /// Rules as kube-proxy has them for so many Services.
    Rules(Mode, u32),
}

impl Way {
    pub fn name(self) -> String {
        match self {
            Self::Direct => "direct".into(),
            Self::DirectAgain => "direct on another node (noise of the comparison)".into(),
            Self::Sockets => "socket hooks".into(),
            Self::Packets => "packet path".into(),
            Self::Rules(mode, services) => format!("{}, {services} Services", mode.name()),
        }
    }
}

/// A pair and its way.
pub struct Route {
    pub way: Way,
    pub pair: Pair,
}

pub fn run(effort: Effort, agent: Option<PathBuf>) -> Result<Vec<Row>> {
    let is_debug = agent.is_none();
    let ours = ours(effort.at_most(SERVICES, 10), agent.clone())?;
    let (mut plain, mut routes, mut rows) = (Vec::new(), Vec::new(), Vec::new());
    for ways in ways(effort) {
        let cluster = Cluster::new(Options::new(Layout::PointToPoint))?;
        for (number, way) in [1, 2].into_iter().zip(ways) {
            match baseline(cluster.node(number), way, routes.len() as u8) {
                Ok(route) => routes.push(route),
                Err(e) if is_not_installed(&e) => {
                    rows.push(Row::missing("L1", &format!("{CRR}, {}", way.name()), "", &format!("{e:#}")));
                }
                Err(e) => return Err(e.context(way.name())),
            }
        }
        plain.push(cluster);
    }
    for (number, way) in [(1, Way::Sockets), (2, Way::Packets)] {
        let to = measured(&ours, number)?.cluster_ip(Family::V4);
        routes.push(Route { way, pair: Pair::start(ours.node(number), to, 100 + number)? });
    }
    rows.extend(measure(effort, Kind::Connections, &mut routes)?);
    rows.extend(share(effort, Kind::Connections, &mut routes)?);
    // An open connection does not go through the rules again, however many there are.
    routes.retain(|route| !matches!(route.way, Way::Rules(_, services) if services > RULES[0]));
    rows.extend(measure(effort, Kind::Requests, &mut routes)?);
    rows.extend(share(effort, Kind::Requests, &mut routes)?);
    rows.extend(measure(effort, Kind::ConnectionsApart, &mut routes)?);
    rows.extend(measure(effort, Kind::RequestsApart, &mut routes)?);
    drop(routes);
    for cluster in plain {
        cluster.finish()?;
    }
    // With few others: traffic wants most of the processors, and a start is not what is measured here.
    let restarted = match effort {
        Effort::Small => ours,
        _ => {
            ours.finish()?;
            self::ours(10, agent)?
        }
    };
    rows.extend(restart::run(effort, restarted)?);
    if let Err(e) = clock_sees_softirqs() {
        // Restarts and what elapsed are as they are.
        rows = rows
            .into_iter()
            .map(|row| if row.id == "L1" { row.noted(&format!("{e}")) } else { row })
            .collect();
    }
    if is_debug {
        rows = rows.into_iter().map(|row| row.noted("debug build of the agent")).collect();
    }
    Ok(rows)
}

/// Those without an agent, two nodes of a cluster each; the direct one first.
fn ways(effort: Effort) -> Vec<[Way; 2]> {
    let rules = |services| Mode::ALL.map(|mode| Way::Rules(mode, services));
    let numbers: &[u32] = if effort == Effort::Small { &RULES[..1] } else { &RULES };
    [[Way::Direct, Way::DirectAgain]].into_iter().chain(numbers.iter().map(|n| rules(*n))).collect()
}

/// A program is missing; anything else is a mistake.
fn is_not_installed(error: &anyhow::Error) -> bool {
    let kinds = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind);
    kinds.into_iter().any(|kind| kind == io::ErrorKind::NotFound)
}

/// A pair on a node without an agent. Rules lead to the server from the Service in the middle of all, as half of a real
/// cluster's are before it in iptables' order.
fn baseline(node: &Node, way: Way, mark: u8) -> Result<Route> {
    let server = direct(node)?;
    let mut to = server;
    if let Way::Rules(mode, count) = way {
        let mut services = kube_proxy::services(Family::V4, Proto::Tcp, count, 1);
        let middle = &mut services[count as usize / 2];
        middle.endpoints = vec![server];
        to = SocketAddr::new(middle.cluster_ip, middle.port);
        let cluster = kube_proxy::Cluster::bench(Family::V4, node.place.addrs.v4.into());
        let rules = kube_proxy::rules(mode, &cluster, &services);
        node.place.netns.run(|| kube_proxy::load(&rules))??;
    }
    Ok(Route { way, pair: Pair::start(node, to, mark)? })
}

/// A cluster with our agents: hooks at sockets on node1, programs at devices only on node2.
pub fn ours(services: u32, agent: Option<PathBuf>) -> Result<Cluster> {
    let mut cluster = Cluster::new(Options { agent, ..Options::new(Layout::PointToPoint) })?;
    cluster.manifests.write("nodes", &nodes(cluster.nodes.iter().map(|n| &n.place)))?;
    cluster.manifests.write("others", &others(services))?;
    for number in [1, 2] {
        let service = measured(&cluster, number)?;
        cluster.manifests.write(&service.name, &service.documents())?;
    }
    for number in [1, 2] {
        cluster.restart_agent(number, &[flag(number)])?;
    }
    Ok(cluster)
}

/// Whose sockets the agent of a node serves.
pub const fn flag(number: u8) -> &'static str {
    if number == 1 { "--socket-lb=all" } else { "--socket-lb=off" }
}

/// The Service that leads to the server of a node.
fn measured(cluster: &Cluster, number: u8) -> Result<Service> {
    let (server, _) = pods(cluster.node(number))?;
    let endpoint = Endpoint::at(server.addrs, &cluster.node(number).place.name, PORT);
    let mut service = Service::new(&format!("measured-{number}"), number, vec![endpoint]);
    // One family, TCP and UDP: see `others`.
    service.port = 80;
    Ok(service)
}

/// Services that nobody asks.
fn others(count: u32) -> Vec<serde_json::Value> {
    let of = |i: u32| {
        let [.., high, low] = i.to_be_bytes();
        let ips = Addresses::new(&format!("10.97.{high}.{low}"), &format!("fd00:10:97::{i:x}"));
        let pod = Addresses::new(&format!("10.245.{high}.{low}"), &format!("fd00:10:245::{i:x}"));
        let endpoint = Endpoint::at(pod, "elsewhere", PORT);
        Service { cluster_ips: ips, ..Service::new(&format!("other-{i}"), 0, vec![endpoint]) }.documents()
    };
    (0..count).flat_map(of).collect()
}

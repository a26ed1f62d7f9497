//! What becomes of connections and sockets whose backend is gone (SEMANTICS I1 to I4, J2).

#[path = "gone/tcp.rs"]
mod tcp;
#[path = "gone/udp.rs"]
mod udp;

use std::{net::SocketAddr, time::Duration};

use bytemuck::Pod;
use lb_agent::maps::{FlowTable, FlowTables};
use lb_common::{
    Addr, LAYOUT_VERSION,
    addr::ToIp,
    conntrack::{Flow, flags},
    tuple::Tuple,
};
use lb_tests::{
    cluster::{Cluster, Layout, Node, Options},
    manifests::{Endpoint, Service, nodes},
    place::Place,
    shared::Shared,
    traffic::{Call, Failure, Outcome, Proto, Session},
    wait_for,
};

/// Pods of this one live; they only stop being endpoints.
static CLUSTER: Shared = Shared::new(|| cluster(&[]));

/// Until the agent notices that a backend is gone: it wants two unanswered packets of the client, which come with TCP's
/// retransmissions. Tens of seconds only on a machine that hardly gets on.
const NOTICED: Duration = Duration::from_secs(40);
/// For changes of manifests to take effect.
const SOON: Duration = Duration::from_secs(10);
/// For questions that are to stay without an answer.
const NO_ANSWER_MS: u64 = 300;

fn cluster(flags: &[&str]) -> anyhow::Result<Cluster> {
    let options = flags.iter().fold(Options::new(Layout::PointToPoint), |o, flag| o.flag(flag));
    let mut cluster = Cluster::new(options)?;
    cluster.manifests.write("nodes", &nodes(cluster.nodes.iter().map(|n| &n.place)))?;
    cluster.start_agents()?;
    Ok(cluster)
}

fn program(cluster: &Cluster, service: &Service) {
    cluster.manifests.write(&service.name, &service.documents()).unwrap();
}

/// Makes the Service lead to these pods alone.
fn lead_to(cluster: &Cluster, service: &mut Service, pods: &[&str]) {
    service.endpoints = pods.iter().map(|p| Endpoint::pod(cluster.pod(p))).collect();
    program(cluster, service);
}

/// Takes a pod away as a CNI plugin does, with no farewell: both ends of its device go, and with them address and routes.
fn take_away(cluster: &Cluster, name: &str) {
    let pod = cluster.pod(name);
    let home = |n: &&Node| n.pods.iter().any(|p| p.name == name);
    let node = cluster.nodes.iter().find(home).expect("the pod of a node");
    node.place.netns.ip(&[format!("link del {}", Node::pod_device(pod))]).unwrap();
}

/// Client entries of flows with this mark, on a node.
fn flows(node: &Node, wanted: impl Fn(SocketAddr, SocketAddr, u16) -> bool) -> usize {
    fn count<A: Addr + ToIp>(
        table: &FlowTable<A>,
        wanted: &impl Fn(SocketAddr, SocketAddr, u16) -> bool,
    ) -> usize
    where
        Tuple<A>: Pod,
        Flow<A>: Pod,
    {
        let entries = table.entries().unwrap();
        let forward = entries.iter().filter(|(_, f)| f.flags & flags::REPLY == 0);
        forward
            .filter(|(k, f)| {
                let frontend = SocketAddr::new(k.dst.to_ip(), k.dport.get());
                wanted(frontend, SocketAddr::new(f.dst.to_ip(), f.dport.get()), f.flags)
            })
            .count()
    }
    let dir = node.state_dir().join(format!("v{LAYOUT_VERSION}")).join("maps");
    let tables = FlowTables::open(&dir).unwrap();
    count(&tables.v4, &wanted) + count(&tables.v6, &wanted)
}

/// Flows to any of these frontends that are marked as gone.
fn marked(node: &Node, service: &Service) -> usize {
    let frontends = service.frontends(node);
    flows(node, |frontend, _, f| f & flags::GONE != 0 && frontends.iter().any(|(_, at)| *at == frontend))
}

/// connect failed, with what the packet path would have ended in: a refusal, or ETIMEDOUT where it drops (recv's own
/// timeout is EAGAIN).
fn is_refused_by_a_hook(failure: &Failure) -> bool {
    failure.is_refusal() || failure.message.contains("os error 110")
}

/// The socket is no more: recv tells the reason once, a send before that finds it not connected (EDESTADDRREQ).
fn is_destroyed(failure: &Failure) -> bool {
    failure.kind == "ConnectionAborted" || failure.message.contains("os error 89")
}

/// One socket that keeps its port, whatever happens.
struct Client {
    what: String,
    place: Place,
    call: Call,
    /// Taken only to be replaced.
    session: Option<Session>,
    /// How often the socket was destroyed under its owner, who then made a new one with the same port.
    reopened: usize,
}

impl Client {
    fn open(place: &Place, kind: &str, proto: Proto, to: SocketAddr, port: u16) -> Self {
        let any = if to.is_ipv4() { "0.0.0.0" } else { "::" };
        let from = SocketAddr::new(any.parse().unwrap(), port);
        let call = Call::new(proto, to).from(from).timeout_ms(NO_ANSWER_MS);
        let what = format!("{proto:?} {}:{port} -> {kind} {to}", place.name);
        let session = Some(place.session(&call).unwrap());
        Self { what, place: place.clone(), call, session, reopened: 0 }
    }

    /// Asks once. A socket that was destroyed, or that a hook refused to connect, is replaced for the next time.
    fn ask(&mut self) -> Outcome {
        let outcome = self.session.as_mut().unwrap().ask().unwrap();
        if outcome.as_ref().is_err_and(is_destroyed) {
            self.reopen();
            self.reopened += 1;
        } else if self.is_hooked() && outcome.as_ref().is_err_and(is_refused_by_a_hook) {
            self.reopen();
        }
        outcome
    }

    /// Whether a hook chose the socket's backend when it connected.
    fn is_hooked(&self) -> bool {
        self.place.name.starts_with("node") && self.call.proto == Proto::Udp
    }

    /// A new socket, with the same port.
    fn reopen(&mut self) {
        // The old one has to give back the port first.
        drop(self.session.take());
        self.session = Some(self.place.session(&self.call).unwrap());
    }

    /// Asks until this pod answers.
    fn wait_for(&mut self, pod: &str) {
        let mut last = None;
        let waited = wait_for(&format!("{pod} to answer {}", self.what), SOON, || {
            last = Some(self.ask());
            matches!(&last, Some(Ok(answer)) if answer.by == pod)
        });
        waited.unwrap_or_else(|e| panic!("{e:#}; last: {last:?}"));
    }

    /// Asks a few times: this pod answers each time.
    fn stays_on(&mut self, pod: &str) {
        for _ in 0..5 {
            let outcome = self.ask();
            assert_eq!(outcome.as_ref().map(|a| a.by.as_str()), Ok(pod), "{}", self.what);
        }
    }
}

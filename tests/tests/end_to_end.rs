//! The whole matrix: from pod, node and outside, to ClusterIP, NodePort and LoadBalancer address, TCP and UDP, IPv4 and
//! IPv6, in both layouts, with and without offloads, by tc and by XDP. Reverse-path filters are strict everywhere.

use std::net::SocketAddr;

use anyhow::{Context as _, bail, ensure};
use aya::{
    Ebpf, EbpfLoader,
    programs::{Xdp, xdp::XdpMode},
};
use lb_agent::datapath::OBJECT;
use lb_common::maps::{name, program};
use lb_tests::{
    cluster::{Cluster, Layout, Node, Options},
    expect::mistakes,
    manifests::{Service, nodes},
    place::Place,
    traffic::{Call, Proto},
};

/// Calls per combination: a backend that is never chosen is a mistake, not bad luck (2 backends: once in 10^12).
const CALLS: usize = 40;

/// Large enough for segmentation offload and for checksums to be wrong somewhere if they ever are.
const BULK: u64 = 5_000_000;

/// One pod on each node: the smallest Service with a local and a remote backend.
const BACKENDS: [&str; 2] = ["pod-1a", "pod-2a"];

/// Builds a cluster with agents and runs every combination; all mistakes are reported, not only the first.
fn matrix(options: Options) -> anyhow::Result<()> {
    let cluster = Cluster::new(options)?;
    run(cluster)?.finish()
}

/// The same on a cluster without agents; gives it back.
fn run(mut cluster: Cluster) -> anyhow::Result<Cluster> {
    cluster.manifests.write("nodes", &nodes(cluster.nodes.iter().map(|n| &n.place)))?;
    let service = Service::on(&cluster, "matrix", 7, &BACKENDS);
    cluster.manifests.write("matrix", &service.documents())?;
    cluster.start_agents()?;
    let mut wrong = Vec::new();
    // pod-1a is itself a backend (hairpin); node2 asks from the other side.
    for (from, asked) in [
        (cluster.pod("pod-1a"), cluster.node(1)),
        (cluster.pod("pod-1b"), cluster.node(1)),
        (&cluster.node(1).place, cluster.node(1)),
        (&cluster.node(2).place, cluster.node(2)),
        (&cluster.client, cluster.node(1)),
    ] {
        for (kind, to) in service.frontends(asked) {
            wrong.extend(frontend(&cluster, asked, from, kind, to)?);
        }
    }
    if !wrong.is_empty() {
        bail!("{} mistakes:\n{}\n{}", wrong.len(), wrong.join("\n"), cluster.logs());
    }
    Ok(cluster)
}

fn frontend(
    cluster: &Cluster,
    asked: &Node,
    from: &Place,
    kind: &str,
    to: SocketAddr,
) -> anyhow::Result<Vec<String>> {
    let backends = BACKENDS.map(|name| cluster.pod(name));
    let mut wrong = Vec::new();
    for proto in [Proto::Tcp, Proto::Udp, Proto::UdpUnconnected] {
        let answers = from.calls(&Call::new(proto, to).timeout_ms(1500), CALLS)?;
        let found = mistakes(cluster, &backends, asked, from, to, &answers);
        wrong.extend(found.iter().map(|m| format!("{} -> {kind} {to} {proto:?}: {m}", from.name)));
        // The other combinations will tell more than 40 time-outs.
        if !answers.failures().is_empty() {
            return Ok(wrong);
        }
    }
    // Twice: the two connections most likely go to different backends.
    for _ in 0..2 {
        if let Err(failure) = from.bulk(to, BULK)? {
            wrong.push(format!("{} -> {kind} {to} bulk: {}", from.name, failure.message));
        }
    }
    Ok(wrong)
}

#[test]
fn point_to_point() {
    matrix(Options::new(Layout::PointToPoint)).unwrap();
}

#[test]
fn point_to_point_without_offloads() {
    matrix(Options { offloads: false, ..Options::new(Layout::PointToPoint) }).unwrap();
}

#[test]
fn bridge() {
    matrix(Options::new(Layout::Bridge)).unwrap();
}

#[test]
fn bridge_without_offloads() {
    matrix(Options { offloads: false, ..Options::new(Layout::Bridge) }).unwrap();
}

/// With `--socket-lb all` pods need no translation per packet; what they and the servers see stays the same.
#[test]
fn pods_through_socket_hooks() {
    matrix(Options::new(Layout::PointToPoint).flag("--socket-lb=all")).unwrap();
}

/// XDP on the nodes' uplinks. Offloads are off, as frames from a wire have their checksums.
fn xdp(mode: &str) -> anyhow::Result<()> {
    let options = Options { offloads: false, ..Options::new(Layout::PointToPoint) };
    let cluster = Cluster::new(options.flag(&format!("--xdp={mode}")))?;
    let _peers = (mode == "native").then(|| receive_from_xdp(&cluster)).transpose()?;
    let mut cluster = run(cluster)?;
    for node in [1, 2] {
        let services: serde_json::Value =
            serde_json::from_str(&cluster.agent(node).command("services", &["-o", "json"])?)?;
        let services = services.as_array().context("an array")?;
        let by_xdp: u64 = services.iter().filter_map(|s| s["xdp_packets"].as_u64()).sum();
        ensure!(by_xdp > 0, "node{node} translated nothing by XDP: {services:?}");
    }
    cluster.finish()
}

/// A veth device takes frames that its peer sends by XDP_TX only if it runs an XDP program itself: give the router's
/// devices one that passes everything. It goes with the returned value.
fn receive_from_xdp(cluster: &Cluster) -> anyhow::Result<Ebpf> {
    cluster.router.run(|| {
        let mut loader = EbpfLoader::new();
        for map in [name::FLOWS4, name::FLOWS6, name::SOCKETS, name::SERVICE_STATS] {
            loader.map_max_entries(map, 64);
        }
        let mut ebpf = loader.load(OBJECT)?;
        let pass: &mut Xdp = ebpf.program_mut(program::CLOCK).context("no such program")?.try_into()?;
        pass.load()?;
        for device in ["node1", "node2"] {
            pass.attach(device, XdpMode::Driver)?;
        }
        Ok(ebpf)
    })?
}

#[test]
fn xdp_native() {
    xdp("native").unwrap();
}

#[test]
fn xdp_generic() {
    xdp("generic").unwrap();
}

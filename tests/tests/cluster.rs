//! The test bed itself: everything reaches everything before any agent runs, and nothing is left behind.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::ensure;
use lb_tests::{
    cluster::{Cluster, Layout, Options, POD_PORT},
    place::{Family, Place, cgroup_mount},
    traffic::{Call, Proto},
    wait_for,
};

/// Every pod, from every side: its answer, and the client's own address as it saw it.
fn everything_is_connected(options: Options) -> anyhow::Result<()> {
    let cluster = Cluster::new(options)?;
    let pods: Vec<&Place> = cluster.nodes.iter().flat_map(|n| &n.pods).collect();
    let nodes = cluster.nodes.iter().map(|n| &n.place);
    for from in pods.iter().copied().chain(nodes).chain([&cluster.client]) {
        for to in &pods {
            for (family, proto) in Family::BOTH.into_iter().flat_map(|f| [(f, Proto::Tcp), (f, Proto::Udp)]) {
                let call = Call::new(proto, to.addrs.socket(family, POD_PORT));
                let answer =
                    from.call(&call)?.map_err(|e| anyhow::anyhow!("{} {call:?}: {e:?}", from.name))?;
                ensure!(answer.by == to.name, "{} asked {}, {} answered", from.name, to.name, answer.by);
                // A node speaks to its own pods from the address of the device between them.
                let own_pod = !from.name.starts_with("pod") && from.name != "client";
                ensure!(
                    own_pod || from.addrs.has(answer.seen.ip()),
                    "{} was seen as {}",
                    from.name,
                    answer.seen
                );
            }
        }
    }
    let bulk = cluster.client.bulk(pods[3].addrs.socket(Family::V4, POD_PORT), 5_000_000)?;
    ensure!(bulk.is_ok(), "{bulk:?}");
    cluster.finish()
}

#[test]
fn point_to_point_is_connected() {
    everything_is_connected(Options::new(Layout::PointToPoint)).unwrap();
}

#[test]
fn bridge_is_connected() {
    everything_is_connected(Options::new(Layout::Bridge)).unwrap();
}

#[test]
fn point_to_point_without_offloads_is_connected() {
    everything_is_connected(Options { offloads: false, ..Options::new(Layout::PointToPoint) }).unwrap();
}

#[test]
fn bridge_without_offloads_is_connected() {
    everything_is_connected(Options { offloads: false, ..Options::new(Layout::Bridge) }).unwrap();
}

#[test]
fn unserved_ports_refuse_and_unrouted_addresses_time_out() {
    let cluster = Cluster::new(Options::new(Layout::PointToPoint)).unwrap();
    for proto in [Proto::Tcp, Proto::Udp] {
        let refused = Call::new(proto, cluster.pod("pod-1a").addrs.socket(Family::V4, 9));
        assert!(cluster.client.call(&refused).unwrap().unwrap_err().is_refusal());
    }
    let nowhere = Call::udp("10.244.1.99:9".parse().unwrap()).timeout_ms(50);
    assert!(cluster.client.call(&nowhere).unwrap().unwrap_err().is_timeout());
}

/// Names of what a cluster with this prefix consists of outside its own namespaces.
fn traces(prefix: &str) -> Vec<String> {
    let dirs = [Path::new("/run/netns").to_owned(), cgroup_mount().unwrap(), std::env::temp_dir()];
    let entries = dirs.iter().flat_map(|d| fs::read_dir(d).unwrap()).flatten();
    let names = entries.map(|e| e.path().display().to_string());
    names.filter(|n| n.contains(&format!("/{prefix}"))).collect()
}

#[test]
fn nothing_is_left_behind_when_the_maker_drops_it() {
    let cluster = Cluster::new(Options::new(Layout::Bridge)).unwrap();
    let prefix = cluster.router.name().trim_end_matches('r').to_owned();
    assert!(!traces(&prefix).is_empty());
    drop(cluster);
    assert_eq!(traces(prefix.trim_end_matches('-')), Vec::<String>::new());
}

/// An interrupt, a crash, a kill: the janitor notices the end of its input.
#[test]
fn nothing_is_left_behind_when_the_maker_is_killed() {
    let mut maker = Command::new(env!("CARGO_BIN_EXE_demo")).stdout(Stdio::null()).spawn().unwrap();
    let prefix = format!("lbe{}-", maker.id());
    wait_for("the demo's namespaces", Duration::from_secs(10), || !traces(&prefix).is_empty()).unwrap();
    maker.kill().unwrap();
    maker.wait().unwrap();
    wait_for("them to be gone", Duration::from_secs(20), || traces(&prefix).is_empty()).unwrap();
}

//! The agent stops, crashes, comes back and goes for good; the data path does what it should all the while.

use std::{fs, path::Path};

use aya::programs::{SchedClassifier, TcAttachType};
use lb_tests::{
    cluster::{Cluster, Layout, Node, Options},
    manifests::{Endpoint, Service, nodes},
    place::Family,
    shared::Shared,
    traffic::{Call, Load, Proto, Session},
};

static CLUSTER: Shared = Shared::new(|| {
    let mut cluster = Cluster::new(Options::new(Layout::PointToPoint))?;
    cluster.manifests.write("nodes", &nodes(cluster.nodes.iter().map(|n| &n.place)))?;
    cluster.start_agents()?;
    Ok(cluster)
});

/// Load and open connections from every side on every address.
struct Traffic {
    loads: Vec<(String, Load)>,
    sessions: Vec<(String, Session)>,
}

impl Traffic {
    fn start(cluster: &Cluster, service: &Service) -> Self {
        let mut traffic = Self { loads: Vec::new(), sessions: Vec::new() };
        for from in [&cluster.client, cluster.pod("pod-1b"), &cluster.node(1).place] {
            for (kind, to) in service.frontends(cluster.node(1)) {
                let what = format!("{} -> {kind} {to}", from.name);
                let mut session = from.session(&Call::tcp(to)).unwrap();
                session.ask().unwrap().unwrap_or_else(|e| panic!("{what}: {e:?}"));
                traffic.sessions.push((what.clone(), session));
                // One protocol each, half of all combinations: two processors have to do all this.
                let proto = if to.is_ipv4() == (kind == "NodePort") { Proto::Udp } else { Proto::Tcp };
                traffic.loads.push((format!("{what} {proto:?}"), from.load(&Call::new(proto, to)).unwrap()));
            }
        }
        traffic
    }

    /// Every open connection still works.
    fn check_sessions(&mut self) {
        for (what, session) in &mut self.sessions {
            session.ask().unwrap().unwrap_or_else(|e| panic!("{what}: {e:?}"));
        }
    }

    /// Ends it; nothing may have failed.
    fn stop(self) {
        for (what, load) in self.loads {
            let tally = load.stop().unwrap();
            assert_eq!(tally.failed, 0, "{what}: {tally:?}");
            assert!(tally.total() > 10, "{what}: hardly any traffic: {tally:?}");
        }
    }
}

#[test]
fn a_killed_agent_and_its_successor_lose_no_connection() {
    let mut cluster = CLUSTER.lock();
    let service = Service::on(&cluster, "crash", 50, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    let mut traffic = Traffic::start(&cluster, &service);
    for _ in 0..3 {
        cluster.agent(1).kill().unwrap();
        traffic.check_sessions();
        cluster.start_agent(1).unwrap();
        traffic.check_sessions();
    }
    traffic.stop();
}

#[test]
fn a_terminated_agent_leaves_the_data_path_in_place() {
    let mut cluster = CLUSTER.lock();
    let service = Service::on(&cluster, "term", 51, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    let mut traffic = Traffic::start(&cluster, &service);
    cluster.agent(1).terminate().unwrap();
    traffic.check_sessions();
    let listed = cluster.agent(1).command("services", &["-o", "json"]).unwrap();
    assert!(listed.contains("term"), "the maps tell without an agent: {listed}");
    cluster.start_agent(1).unwrap();
    traffic.check_sessions();
    traffic.stop();
}

#[test]
fn what_changed_while_the_agent_was_away_is_caught_up() {
    let mut cluster = CLUSTER.lock();
    let mut service = Service::on(&cluster, "away", 52, &["pod-1a"]);
    let gone = Service::on(&cluster, "away-gone", 53, &["pod-1a"]);
    cluster.serve(&service).unwrap();
    cluster.serve(&gone).unwrap();
    cluster.agent(1).kill().unwrap();
    service.endpoints = vec![Endpoint::pod(cluster.pod("pod-2b"))];
    cluster.manifests.write("away", &service.documents()).unwrap();
    cluster.manifests.remove("away-gone").unwrap();
    cluster.start_agent(1).unwrap();
    // Ready means programmed: no waiting.
    let from = cluster.pod("pod-1b");
    let answers = from.calls(&Call::tcp(service.cluster_ip(Family::V4)), 10).unwrap();
    assert_eq!(answers.all_answered().unwrap().into_iter().collect::<Vec<_>>(), [("pod-2b", 10)]);
    let call = Call::tcp(gone.cluster_ip(Family::V4)).timeout_ms(300);
    assert!(from.call(&call).unwrap().is_err(), "a Service that went is served still");
}

#[test]
fn a_pod_that_appears_later_is_served() {
    let cluster = CLUSTER.lock();
    let service = Service::on(&cluster, "late", 54, &["pod-2a"]);
    cluster.serve(&service).unwrap();
    // The pod's device goes and comes back as another one, as when a pod is replaced.
    let (node, pod) = (&cluster.node(1).place.netns, cluster.pod("pod-1b"));
    let device = Node::pod_device(pod);
    node.ip(&[
        format!("link del {device}"),
        format!("link add {device} type veth peer name eth0 netns {}", pod.netns.name()),
        format!("addr add 10.244.1.1/32 dev {device}"),
        format!("addr add fd00:10:244:1::1/128 dev {device} nodad"),
        format!("link set {device} up"),
        format!("route add {}/32 dev {device}", pod.addrs.v4),
        format!("route add {}/128 dev {device}", pod.addrs.v6),
    ])
    .unwrap();
    pod.netns
        .ip(&[
            format!("addr add {}/32 dev eth0", pod.addrs.v4),
            format!("addr add {}/128 dev eth0 nodad", pod.addrs.v6),
            "link set eth0 up".to_owned(),
            "route add 10.244.1.1/32 dev eth0 scope link".to_owned(),
            "route add fd00:10:244:1::1/128 dev eth0".to_owned(),
            "route add default via 10.244.1.1".to_owned(),
            "route add default via fd00:10:244:1::1 dev eth0".to_owned(),
        ])
        .unwrap();
    for family in Family::BOTH {
        let call = Call::tcp(service.cluster_ip(family)).timeout_ms(300);
        cluster.wait_for_calls("the new device to be served", pod, &call, |o| o.is_ok()).unwrap();
    }
}

/// Programs on any device of the node.
fn attached(node: &Node) -> Vec<String> {
    let query = || {
        let mut found = Vec::new();
        // Not /sys/class/net, which shows the namespace that it was mounted in.
        let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        for device in text.lines().skip(2).filter_map(|l| l.split(':').next()).map(str::trim) {
            for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
                let (_, programs) = SchedClassifier::query_tcx(device, direction).unwrap();
                found.extend(programs.iter().map(|p| format!("{device} {:?}", p.name_as_str())));
            }
        }
        found
    };
    node.place.netns.run(query).unwrap()
}

#[test]
fn cleanup_leaves_nothing() {
    let mut cluster = Cluster::new(Options::new(Layout::Bridge)).unwrap();
    let service = Service::on(&cluster, "clean", 55, &["pod-1a"]);
    cluster.manifests.write("clean", &service.documents()).unwrap();
    cluster.start_agent(1).unwrap();
    let call = Call::tcp(service.cluster_ip(Family::V4)).timeout_ms(300);
    assert!(cluster.pod("pod-1b").call(&call).unwrap().is_ok());
    assert!(!attached(cluster.node(1)).is_empty());
    cluster.agent(1).terminate().unwrap();
    cluster.agent(1).command("cleanup", &[]).unwrap();
    assert_eq!(attached(cluster.node(1)), Vec::<String>::new());
    assert_eq!(files(&cluster.node(1).state_dir()), Vec::<String>::new());
    for from in [cluster.pod("pod-1b"), &cluster.node(1).place] {
        assert!(from.call(&call).unwrap().is_err(), "{} is served still", from.name);
    }
    // A second time finds nothing to do, and that is fine.
    cluster.agent(1).command("cleanup", &[]).unwrap();
    cluster.finish().unwrap();
}

/// Everything below a directory that may not be there.
fn files(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|e| e.path().display().to_string()).collect()
}

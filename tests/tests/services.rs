//! What single fields of Services do to traffic, beside the rules in semantics/. One cluster for all; each test has its own
//! Service.

use lb_tests::{
    cluster::{Cluster, Layout, Options},
    manifests::{Endpoint, Service, nodes},
    place::{Family, Pair, Place},
    shared::{SOON, Shared},
    traffic::{Answers, Call, Proto, Server},
    wait_for,
};
use serde_json::json;

static CLUSTER: Shared = Shared::new(|| {
    let options =
        Options::new(Layout::PointToPoint).flag("--allow-external-ips=192.0.2.0/24,2001:db8:192::/64");
    let mut cluster = Cluster::new(options)?;
    cluster.manifests.write("nodes", &nodes(cluster.nodes.iter().map(|n| &n.place)))?;
    cluster.start_agents()?;
    Ok(cluster)
});

/// For calls that are to stay without an answer: long enough for any answer to arrive.
const NO_ANSWER_MS: u64 = 400;

/// Client, a pod on node1 and node1 itself: every side that traffic comes from.
fn sides(cluster: &Cluster) -> [&Place; 3] {
    [&cluster.client, cluster.pod("pod-1b"), &cluster.node(1).place]
}

fn asked(from: &Place, call: &Call, count: usize) -> Answers {
    let answers = from.calls(call, count).unwrap();
    answers.all_answered().unwrap_or_else(|e| panic!("{} -> {call:?}: {e:#}", from.name));
    answers
}

#[test]
fn without_endpoints_every_side_is_refused_at_once() {
    let cluster = CLUSTER.lock();
    let mut service = Service::on(&cluster, "none", 10, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    service.endpoints.clear();
    cluster.manifests.write("none", &service.documents()).unwrap();
    let refused = |o: &Result<_, lb_tests::traffic::Failure>| o.as_ref().is_err_and(|f| f.is_refusal());
    for from in sides(&cluster) {
        for (kind, to) in service.frontends(cluster.node(1)) {
            for proto in [Proto::Tcp, Proto::Udp] {
                let what = format!("{proto:?} from {} to {kind} {to} to be refused", from.name);
                cluster.wait_for_calls(&what, from, &Call::new(proto, to), refused).unwrap();
            }
        }
    }
}

#[test]
fn external_traffic_policy_local_keeps_clients_on_the_node_they_asked() {
    let cluster = CLUSTER.lock();
    let service = Service::on(&cluster, "etp", 12, &["pod-1a", "pod-2a", "pod-2b"])
        .with("externalTrafficPolicy", json!("Local"));
    cluster.serve(&service).unwrap();
    for (kind, to) in service.frontends(cluster.node(1)).into_iter().filter(|(kind, _)| *kind != "ClusterIP")
    {
        let answers = asked(&cluster.client, &Call::tcp(to), 10);
        assert_eq!(answers.counts().into_iter().collect::<Vec<_>>(), [("pod-1a", 10)], "{kind} {to}");
        assert!(answers.sources("pod-1a").iter().all(|s| cluster.client.addrs.has(*s)), "source is kept");
        // SEMANTICS of kube-proxy: clients in the cluster reach all endpoints.
        let answers = asked(cluster.pod("pod-1b"), &Call::tcp(to), 60);
        assert_eq!(answers.counts().len(), 3, "{kind} {to} from a pod: {:?}", answers.counts());
    }
}

#[test]
fn external_traffic_policy_local_without_local_endpoints_drops() {
    let cluster = CLUSTER.lock();
    let service =
        Service::on(&cluster, "etp-none", 13, &["pod-2a"]).with("externalTrafficPolicy", json!("Local"));
    cluster.serve(&service).unwrap();
    for (kind, to) in service.frontends(cluster.node(1)).into_iter().filter(|(kind, _)| *kind != "ClusterIP")
    {
        let failure = cluster.client.call(&Call::tcp(to).timeout_ms(NO_ANSWER_MS)).unwrap().unwrap_err();
        assert!(failure.is_timeout(), "{kind} {to}: {failure:?}");
        asked(cluster.pod("pod-1b"), &Call::tcp(to), 2);
        asked(&cluster.node(1).place, &Call::tcp(to), 2);
    }
}

#[test]
fn external_ips_are_served_where_they_are_allowed() {
    let cluster = CLUSTER.lock();
    let mut service = Service::on(&cluster, "external", 16, &["pod-1a", "pod-2a"]);
    let addrs = Pair::new("192.0.2.116", "2001:db8:192::116");
    service.external_ips = vec![addrs.v4.into(), addrs.v6.into()];
    cluster.serve(&service).unwrap();
    for family in Family::BOTH {
        for from in sides(&cluster) {
            let answers = asked(from, &Call::tcp(addrs.socket(family, 80)), 40);
            assert_eq!(answers.counts().len(), 2, "{} {family:?}: {:?}", from.name, answers.counts());
        }
    }
}

#[test]
fn host_network_backends_are_reached_from_every_side() {
    let cluster = CLUSTER.lock();
    let mut servers = Vec::new();
    let mut service = Service::on(&cluster, "host", 17, &[]);
    for node in &cluster.nodes {
        let place = &node.place;
        let addrs = Family::BOTH.map(|f| place.addrs.socket(f, 8081));
        servers.push(Server::start(place, &format!("host-{}", place.name), &addrs).unwrap());
        service.endpoints.push(Endpoint::at(place.addrs, &place.name, 8081));
    }
    cluster.serve(&service).unwrap();
    for from in sides(&cluster) {
        for (kind, to) in service.frontends(cluster.node(1)) {
            for proto in [Proto::Tcp, Proto::Udp] {
                let answers = asked(from, &Call::new(proto, to), 40);
                let counts = answers.counts();
                assert_eq!(counts.len(), 2, "{} -> {kind} {to} {proto:?}: {counts:?}", from.name);
            }
        }
    }
    assert!(servers.len() == 2);
}

#[test]
fn removed_services_are_no_longer_served_and_invalid_files_change_nothing() {
    let cluster = CLUSTER.lock();
    let service = Service::on(&cluster, "gone", 19, &["pod-1a"]);
    cluster.serve(&service).unwrap();
    let call = Call::tcp(service.cluster_ip(Family::V4)).timeout_ms(NO_ANSWER_MS);
    let pod = cluster.pod("pod-1b");
    cluster.manifests.write_text("gone.yaml", "kind: Service\nmetadata: [this is not a Service\n").unwrap();
    wait_for("the agent to complain about gone.yaml", SOON, || cluster.logs().contains("gone.yaml")).unwrap();
    asked(pod, &call, 5);
    cluster.manifests.remove("gone").unwrap();
    cluster.wait_for_calls("the Service to be gone", pod, &call, |o| o.is_err()).unwrap();
    // Written again, it works again.
    cluster.serve(&service).unwrap();
    asked(pod, &call, 5);
}

#[test]
fn two_ports_of_one_service_lead_to_their_own_targets() {
    let cluster = CLUSTER.lock();
    let pod = cluster.pod("pod-1a");
    let second = Server::start(pod, "second", &Family::BOTH.map(|f| pod.addrs.socket(f, 9090))).unwrap();
    let ports = json!([
        { "name": "tcp", "protocol": "TCP", "port": 80, "targetPort": 8080 },
        { "name": "admin", "protocol": "TCP", "port": 81, "targetPort": "admin" },
    ]);
    let mut service = Service::on(&cluster, "ports", 20, &["pod-1a"]);
    (service.node_port, service.load_balancer) = (None, None);
    let service = service.with("ports", ports).with("type", json!("ClusterIP"));
    let mut documents = service.documents();
    for slice in &mut documents[1..] {
        slice["ports"] = json!([
            { "name": "tcp", "protocol": "TCP", "port": 8080 },
            { "name": "admin", "protocol": "TCP", "port": 9090 },
        ]);
    }
    cluster.manifests.write("ports", &documents).unwrap();
    for family in Family::BOTH {
        for (port, name) in [(80, "pod-1a"), (81, "second")] {
            let call = Call::tcp(service.cluster_ips.socket(family, port)).timeout_ms(NO_ANSWER_MS);
            let from = cluster.pod("pod-2a");
            cluster
                .wait_for_calls(&format!("{name} to answer"), from, &call, |o| {
                    o.as_ref().is_ok_and(|a| a.by == name)
                })
                .unwrap();
        }
    }
    drop(second);
}

#[test]
fn health_and_metrics_answer() {
    let mut cluster = CLUSTER.lock();
    for path in ["/healthz", "/livez", "/readyz"] {
        assert_eq!(cluster.agent(1).health(path).unwrap().0, 200, "{path}");
    }
    let service = Service::on(&cluster, "counted", 21, &["pod-2a"]);
    cluster.serve(&service).unwrap();
    let before = connections(&mut cluster);
    asked(cluster.pod("pod-1b"), &Call::tcp(service.cluster_ip(Family::V4)), 3);
    wait_for("three connections to be counted", SOON, || connections(&mut cluster) >= before + 3.0).unwrap();
}

/// Sum of the connections that node1 counted for the Service `counted`.
fn connections(cluster: &mut Cluster) -> f64 {
    let metrics = cluster.agent(1).metrics().unwrap();
    let ours = metrics.lines().filter(|l| l.starts_with("lb_service_connections") && l.contains("counted"));
    ours.filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

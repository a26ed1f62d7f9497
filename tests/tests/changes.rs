//! Changes under traffic: no connection may fail, established ones keep their backend.

use std::{net::SocketAddr, time::Duration};

use lb_tests::{
    cluster::{Cluster, Layout, Options},
    manifests::{Endpoint, Service, nodes},
    place::{Family, Place},
    shared::Shared,
    traffic::{Call, Load, Proto},
    wait_for,
};

static CLUSTER: Shared = Shared::new(|| {
    let mut cluster = Cluster::new(Options::new(Layout::PointToPoint))?;
    cluster.manifests.write("nodes", &nodes(cluster.nodes.iter().map(|n| &n.place)))?;
    cluster.start_agents()?;
    Ok(cluster)
});

/// Load from every side, on every kind of address, in both families.
fn load(cluster: &Cluster, service: &Service) -> Vec<(String, Load)> {
    let sides = [&cluster.client, cluster.pod("pod-1b"), &cluster.node(1).place];
    let frontends = service.frontends(cluster.node(1));
    let each = sides.into_iter().zip(frontends.chunks(2).rev());
    let calls = each.flat_map(|(from, to)| to.iter().map(move |(kind, to)| (from, kind, *to)));
    calls.map(|(from, kind, to)| start(from, kind, to)).collect()
}

fn start(from: &Place, kind: &str, to: SocketAddr) -> (String, Load) {
    let proto = if to.is_ipv4() { Proto::Tcp } else { Proto::Udp };
    (format!("{} -> {kind} {to} {proto:?}", from.name), from.load(&Call::new(proto, to)).unwrap())
}

/// Stops all load; nothing may have failed.
fn stop(loads: Vec<(String, Load)>) {
    for (what, load) in loads {
        let tally = load.stop().unwrap();
        assert_eq!(tally.failed, 0, "{what}: {tally:?}");
        assert!(tally.total() > 10, "{what}: hardly any traffic: {tally:?}");
    }
}

/// Waits until new connections from the client go to exactly these backends.
fn wait_for_backends(cluster: &Cluster, service: &Service, names: &[&str]) {
    for number in [1, 2] {
        let from = &cluster.node(number).place;
        let call = Call::tcp(service.cluster_ip(Family::V4));
        let what = format!("{} to lead to {names:?} from {}", service.name, from.name);
        wait_for(&what, Duration::from_secs(10), || {
            let answers = from.calls(&call, 40).unwrap();
            answers.counts().into_keys().collect::<Vec<_>>() == names
        })
        .unwrap();
    }
}

#[test]
fn endpoints_come_and_go_under_traffic() {
    let cluster = CLUSTER.lock();
    let mut service = Service::on(&cluster, "moving", 40, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    let loads = load(&cluster, &service);
    let third = Endpoint::pod(cluster.pod("pod-2b"));
    for _ in 0..3 {
        service.endpoints.push(third.clone());
        cluster.manifests.write("moving", &service.documents()).unwrap();
        wait_for_backends(&cluster, &service, &["pod-1a", "pod-2a", "pod-2b"]);
        service.endpoints.pop();
        cluster.manifests.write("moving", &service.documents()).unwrap();
        wait_for_backends(&cluster, &service, &["pod-1a", "pod-2a"]);
    }
    stop(loads);
}

#[test]
fn established_connections_keep_their_backend() {
    let cluster = CLUSTER.lock();
    let mut service = Service::on(&cluster, "keeping", 41, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    let mut sessions = Vec::new();
    for from in [&cluster.client, cluster.pod("pod-1b"), &cluster.node(1).place] {
        for (_, to) in service.frontends(cluster.node(1)) {
            let mut session = from.session(&Call::tcp(to)).unwrap();
            let first = session.ask().unwrap().unwrap();
            sessions.push((format!("{} -> {to}", from.name), session, first));
        }
    }
    // Both of its backends leave the Service; their pods live on.
    service.endpoints = vec![Endpoint::pod(cluster.pod("pod-2b"))];
    cluster.manifests.write("keeping", &service.documents()).unwrap();
    wait_for_backends(&cluster, &service, &["pod-2b"]);
    for (what, session, first) in &mut sessions {
        assert_eq!(session.ask().unwrap().as_ref(), Ok(&*first), "{what}");
    }
}

#[test]
fn many_services_at_once_do_not_disturb_traffic() {
    let cluster = CLUSTER.lock();
    let service = Service::on(&cluster, "steady", 42, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    let loads = load(&cluster, &service);
    let many: Vec<Service> =
        (100..200).map(|n| Service::new(&format!("many-{n}"), n, service.endpoints.clone())).collect();
    let documents: Vec<_> = many.iter().flat_map(Service::documents).collect();
    for _ in 0..2 {
        cluster.manifests.write("many", &documents).unwrap();
        for service in [&many[0], &many[99]] {
            wait_for_backends(&cluster, service, &["pod-1a", "pod-2a"]);
        }
        cluster.manifests.remove("many").unwrap();
        let call = Call::tcp(many[99].cluster_ip(Family::V4)).timeout_ms(200);
        let from = cluster.pod("pod-1b");
        cluster.wait_for_calls("the Services to be gone", from, &call, |o| o.is_err()).unwrap();
    }
    stop(loads);
}

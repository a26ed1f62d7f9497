//! Rules C1 to C6 and C8: no usable endpoint.

use std::{net::SocketAddr, time::Duration};

use lb_tests::{
    cluster::Cluster,
    manifests::Service,
    place::{Family, Place},
    raw::{self, IcmpError, Raw},
    shared::SOON,
    traffic::{Call, Proto},
    wait_for,
};
use serde_json::json;

use crate::bed::{
    CLUSTER, Line, Want, check, check_soon, counted, external_ips, frontends, lines, service, sides,
};

/// All sources, all frontends: connection refused.
fn all_refused<'a>(cluster: &'a Cluster, service: &Service) -> Vec<Line<'a>> {
    lines(&sides(cluster), &frontends(service, cluster.node(1)), |_, _| Some(Want::Refused))
}

/// Sends a datagram to a frontend and gives the ICMP error that a raw socket sees about it.
fn error_about(from: &Place, to: SocketAddr, port: u16) -> Option<IcmpError> {
    let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
    let icmp = Raw::icmp(from, family).unwrap();
    let socket = raw::udp(from, family, port).unwrap();
    socket.send_to(b"who", to).unwrap();
    let ours = |sender, bytes: &[u8]| {
        IcmpError::parse(sender, bytes).filter(|e| e.quoted.src == socket.local_addr().unwrap())
    };
    icmp.receive(Duration::from_secs(2), ours).unwrap()
}

/// The refusal on the wire: port unreachable, from the frontend's address, about the packet as it was sent.
fn refused_by_icmp(cluster: &Cluster, service: &Service) {
    for from in [&cluster.client, cluster.pod("pod-1b")] {
        for (i, (kind, to)) in frontends(service, cluster.node(1)).into_iter().enumerate() {
            let port = 40_100 + i as u16;
            let what = format!("{} -> {kind} {to}", from.name);
            let error = error_about(from, to, port).unwrap_or_else(|| panic!("{what}: no ICMP error"));
            assert!(error.is_port_unreachable(), "{what}: {error:?}");
            assert_eq!(error.from, to.ip(), "{what}: {error:?}");
            assert_eq!(error.quoted.dst, to, "{what}: {error:?}");
            assert_eq!(error.quoted.protocol, libc::IPPROTO_UDP as u8, "{what}");
        }
    }
}

#[test]
fn c1_without_any_endpoint_every_frontend_refuses_everybody() {
    let cluster = CLUSTER.lock();
    let service = service(&cluster, "c1", 10, &[]);
    cluster.manifests.write("c1", &service.documents()).unwrap();
    check_soon(&all_refused(&cluster, &service));
    refused_by_icmp(&cluster, &service);
}

#[test]
fn c1_endpoints_that_are_gone_for_good_are_none() {
    let cluster = CLUSTER.lock();
    let mut service = service(&cluster, "c1-ended", 11, &["pod-1a", "pod-2a"]);
    for endpoint in &mut service.endpoints {
        // A failed pod, and one that has ended.
        (endpoint.ready, endpoint.serving) = (false, false);
    }
    service.endpoints[1].terminating = true;
    cluster.manifests.write("c1-ended", &service.documents()).unwrap();
    check_soon(&all_refused(&cluster, &service));
}

#[test]
fn c2_internal_policy_local_without_a_local_endpoint_drops_on_the_cluster_ip_only() {
    let cluster = CLUSTER.lock();
    let service = service(&cluster, "c2", 12, &["pod-2a"]).with("internalTrafficPolicy", json!("Local"));
    cluster.manifests.write("c2", &service.documents()).unwrap();
    let wanted = |_: &Place, kind: &str| {
        Some(if kind == "ClusterIP" { Want::Dropped } else { Want::From(&["pod-2a"]) })
    };
    check_soon(&lines(&sides(&cluster), &frontends(&service, cluster.node(1)), wanted));
    // Where there is one, it answers.
    let from = [cluster.pod("pod-2b"), &cluster.node(2).place];
    check(&lines(&from, &frontends(&service, cluster.node(2)), |_, _| Some(Want::From(&["pod-2a"]))));
    assert!(counted(&cluster, 1, "drop_no_local_endpoints_internal") > 0);
}

#[test]
fn c3_external_policy_local_without_a_local_endpoint_drops_clients_from_outside_only() {
    let cluster = CLUSTER.lock();
    let service =
        service(&cluster, "c3", 13, &["pod-2a", "pod-2b"]).with("externalTrafficPolicy", json!("Local"));
    cluster.manifests.write("c3", &service.documents()).unwrap();
    let wanted = |from: &Place, kind: &str| {
        let dropped = from.name == "client" && kind != "ClusterIP";
        Some(if dropped { Want::Dropped } else { Want::From(&["pod-2a", "pod-2b"]) })
    };
    check_soon(&lines(&sides(&cluster), &frontends(&service, cluster.node(1)), wanted));
    assert!(counted(&cluster, 1, "drop_no_local_endpoints_external") > 0);
}

#[test]
fn c4_policies_local_without_any_endpoint_refuse() {
    let cluster = CLUSTER.lock();
    for (i, field) in ["externalTrafficPolicy", "internalTrafficPolicy"].into_iter().enumerate() {
        let name = format!("c4-{i}");
        let service = service(&cluster, &name, 14 + i as u8, &[]).with(field, json!("Local"));
        cluster.manifests.write(&name, &service.documents()).unwrap();
        check_soon(&all_refused(&cluster, &service));
        refused_by_icmp(&cluster, &service);
    }
}

#[test]
fn c5_packets_of_established_connections_are_never_refused() {
    let cluster = CLUSTER.lock();
    // To nobody, and from local endpoints to those of other nodes: refused and dropped.
    for (i, left) in [&[][..], &["pod-2a"]].into_iter().enumerate() {
        let name = format!("c5-{i}");
        let mut service = service(&cluster, &name, 16 + i as u8, &["pod-1a"])
            .with("externalTrafficPolicy", json!("Local"))
            .with("internalTrafficPolicy", json!("Local"));
        cluster.serve_locally(&service);
        let mut sessions = Vec::new();
        for from in sides(&cluster) {
            for (kind, to) in frontends(&service, cluster.node(1)) {
                let mut session = from.session(&Call::tcp(to)).unwrap();
                let answer = session.ask().unwrap();
                assert!(answer.is_ok(), "{} -> {kind} {to}: {answer:?}", from.name);
                sessions.push((from, kind, to, session));
            }
        }
        service.endpoints = crate::bed::service(&cluster, &name, 16 + i as u8, left).endpoints;
        cluster.manifests.write(&name, &service.documents()).unwrap();
        let new = if left.is_empty() { Want::Refused } else { Want::Dropped };
        let to = frontends(&service, cluster.node(1));
        check_soon(&lines(&[&cluster.client], &to, |_, _| Some(new.clone())));
        for (from, kind, to, session) in &mut sessions {
            for _ in 0..2 {
                let answer = session.ask().unwrap();
                assert!(
                    answer.as_ref().is_ok_and(|a| a.by == "pod-1a"),
                    "{} -> {kind} {to}: {answer:?}",
                    from.name
                );
            }
        }
    }
}

trait ServeLocally {
    fn serve_locally(&self, service: &Service);
}

impl ServeLocally for Cluster {
    /// Like [`Cluster::serve`], for a Service whose policy serves node1 only.
    fn serve_locally(&self, service: &Service) {
        self.manifests.write(&service.name, &service.documents()).unwrap();
        let call = Call::tcp(service.cluster_ip(Family::V6)).timeout_ms(300);
        let node = &self.node(1).place;
        self.wait_for_calls("the Service to be served", node, &call, Result::is_ok).unwrap();
    }
}

#[test]
fn c6_from_some_endpoints_to_none_and_back() {
    let cluster = CLUSTER.lock();
    let mut service = service(&cluster, "c6", 18, &["pod-1a", "pod-2a"]);
    let endpoints = service.endpoints.clone();
    let to = frontends(&service, cluster.node(1));
    for _ in 0..2 {
        service.endpoints.clone_from(&endpoints);
        cluster.manifests.write("c6", &service.documents()).unwrap();
        check_soon(&lines(&sides(&cluster), &to, |_, _| Some(Want::From(&["pod-1a", "pod-2a"]))));
        service.endpoints.clear();
        cluster.manifests.write("c6", &service.documents()).unwrap();
        check_soon(&lines(&sides(&cluster), &to, |_, _| Some(Want::Refused)));
    }
    // A failed pod counts as none.
    service.endpoints = endpoints[..1].to_vec();
    cluster.manifests.write("c6", &service.documents()).unwrap();
    check_soon(&lines(&sides(&cluster), &to, |_, _| Some(Want::From(&["pod-1a"]))));
    (service.endpoints[0].ready, service.endpoints[0].serving) = (false, false);
    cluster.manifests.write("c6", &service.documents()).unwrap();
    check_soon(&lines(&sides(&cluster), &to, |_, _| Some(Want::Refused)));
}

/// Both counters, of node1.
fn no_local_endpoints(cluster: &Cluster) -> [u64; 2] {
    ["internal", "external"].map(|policy| counted(cluster, 1, &format!("drop_no_local_endpoints_{policy}")))
}

#[test]
fn c8_each_policy_has_a_counter_of_its_own() {
    let cluster = CLUSTER.lock();
    let service = service(&cluster, "c8", 19, &["pod-2a"])
        .with("externalTrafficPolicy", json!("Local"))
        .with("internalTrafficPolicy", json!("Local"));
    cluster.manifests.write("c8", &service.documents()).unwrap();
    let family = Family::V4;
    let internal = service.cluster_ip(family);
    let external = external_ips(19).socket(family, service.port);
    let dropped = |from, kind, to| Line { from, kind, to, proto: Proto::Udp, want: Want::Dropped };
    check_soon(&[dropped(cluster.pod("pod-1b"), "ClusterIP", internal)]);
    // Packets and sockets; one datagram each, so the numbers are exact.
    let cases =
        [("pod-1b", internal, 0), ("node1", internal, 0), ("client", internal, 0), ("client", external, 1)];
    for (from, to, counter) in cases {
        let before = no_local_endpoints(&cluster);
        let place = cluster.places().find(|p| p.name == from).unwrap();
        check(&[dropped(place, "", to)]);
        let after = no_local_endpoints(&cluster);
        let mut wanted = before;
        wanted[counter] += 1;
        assert_eq!(after, wanted, "{from} -> {to}");
    }
}

/// How many Service ports of IPv4 node1 says have no local endpoint, for both policies, by kube-proxy's name.
fn ports_without_local_endpoints(cluster: &Cluster) -> [u64; 2] {
    let metrics = cluster.agents["node1"].metrics().unwrap();
    ["internal", "external"].map(|policy| {
        let name = format!(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{{ip_family=\"IPv4\",traffic_policy=\"{policy}\"}} "
        );
        let line = metrics.lines().find_map(|l| l.strip_prefix(&name));
        line.and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("no gauge for policy {policy}"))
    })
}

#[test]
fn c8_services_without_local_endpoints_are_counted_for_each_policy() {
    let cluster = CLUSTER.lock();
    let before = ports_without_local_endpoints(&cluster);
    let comes = |wanted: [u64; 2]| {
        wait_for(&format!("{wanted:?} to be counted"), SOON, || {
            ports_without_local_endpoints(&cluster) == wanted
        })
        .unwrap_or_else(|e| panic!("{e:#}: {:?}", ports_without_local_endpoints(&cluster)));
    };
    // A TCP and a UDP port.
    let cases = [("internalTrafficPolicy", [2, 0]), ("externalTrafficPolicy", [0, 2])];
    for (field, more) in cases {
        let mut service = service(&cluster, "c8-gauge", 20, &["pod-2a"]).with(field, json!("Local"));
        cluster.manifests.write("c8-gauge", &service.documents()).unwrap();
        comes([before[0] + more[0], before[1] + more[1]]);
        // Nobody anywhere is another matter (C4), and so is somebody here.
        for pods in [&[][..], &["pod-1a"]] {
            service.endpoints = crate::bed::service(&cluster, "c8-gauge", 20, pods).endpoints;
            cluster.manifests.write("c8-gauge", &service.documents()).unwrap();
            comes(before);
        }
    }
    cluster.manifests.remove("c8-gauge").unwrap();
}

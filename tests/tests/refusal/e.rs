//! Rule E: LoadBalancer addresses, and who may use them.

use std::{
    net::{IpAddr, UdpSocket},
    time::Duration,
};

use lb_tests::{
    cluster::Cluster,
    manifests::Service,
    place::{Family, Pair, Place},
    raw,
    traffic::Call,
};
use serde_json::{Value, json};

use crate::bed::{
    CLUSTER, Line, NO_ANSWER_MS, Want, check, check_soon, counted, frontends, lines, service, sides,
};

const BOTH: Want = Want::From(&["pod-1a", "pod-2a"]);

/// The client's ranges.
const CLIENT: [&str; 2] = ["203.0.113.0/24", "2001:db8:203::/64"];
/// pod-1b alone: its subnet has an address of the node, too.
const POD: [&str; 2] = ["10.244.1.11/32", "fd00:10:244:1::11/128"];
const NODES: [&str; 2] = ["172.18.0.0/24", "fd00:18::/64"];

fn with_ranges(cluster: &Cluster, name: &str, number: u8, ranges: &[impl AsRef<str>]) -> Service {
    let ranges: Vec<&str> = ranges.iter().map(AsRef::as_ref).collect();
    service(cluster, name, number, &["pod-1a", "pod-2a"]).with("loadBalancerSourceRanges", json!(ranges))
}

/// All sources and frontends: those named may use the LoadBalancer address, and everybody everything else.
fn admitted<'a>(cluster: &'a Cluster, service: &Service, names: &[&str]) -> Vec<Line<'a>> {
    let from: Vec<&Place> = sides(cluster).into_iter().chain([cluster.pod("pod-1a")]).collect();
    lines(&from, &frontends(service, cluster.node(1)), |from, kind| {
        let may = kind != "LoadBalancer" || names.contains(&from.name.as_str());
        Some(if may { BOTH } else { Want::Dropped })
    })
}

#[test]
fn e1_source_ranges_gate_the_load_balancer_address_and_nothing_else() {
    let cluster = CLUSTER.lock();
    let service = with_ranges(&cluster, "e1", 40, &CLIENT);
    cluster.manifests.write("e1", &service.documents()).unwrap();
    check_soon(&admitted(&cluster, &service, &["client"]));
    let service = with_ranges(&cluster, "e1", 40, &["198.51.100.0/24", "2001:db8:51::/64"]);
    cluster.manifests.write("e1", &service.documents()).unwrap();
    check_soon(&admitted(&cluster, &service, &[]));
    assert!(counted(&cluster, 1, "drop_source_range") > 0);
    // Taken away at run time.
    let service = crate::bed::service(&cluster, "e1", 40, &["pod-1a", "pod-2a"]);
    cluster.manifests.write("e1", &service.documents()).unwrap();
    check_soon(&admitted(&cluster, &service, &["client", "pod-1a", "pod-1b", "node1"]));
}

#[test]
fn e2_source_ranges_gate_pods_and_nodes_too() {
    let cluster = CLUSTER.lock();
    for (number, ranges, names) in [(41, POD, &["pod-1b"][..]), (42, NODES, &["node1"])] {
        let name = format!("e2-{number}");
        let service = with_ranges(&cluster, &name, number, &ranges);
        cluster.manifests.write(&name, &service.documents()).unwrap();
        check_soon(&admitted(&cluster, &service, names));
    }
}

/// A host that has the address of its load balancer itself (kube-vip, MetalLB with a shared address, IPVS) speaks to it
/// from it.
#[test]
fn e3_the_load_balancer_address_itself_may_if_the_node_may() {
    let cluster = CLUSTER.lock();
    let node = &cluster.node(1).place;
    for (number, ranges, may) in [(43, NODES, true), (44, CLIENT, false)] {
        let name = format!("e3-{number}");
        let service = with_ranges(&cluster, &name, number, &ranges);
        cluster.manifests.write(&name, &service.documents()).unwrap();
        check_soon(&admitted(&cluster, &service, if may { &["node1"] } else { &["client"] }));
        let addrs = service.load_balancer.unwrap();
        node.netns
            .ip(&[
                format!("addr add {}/32 dev lo", addrs.v4),
                format!("addr add {}/128 dev lo nodad", addrs.v6),
            ])
            .unwrap();
        for family in Family::BOTH {
            let to = addrs.socket(family, service.port);
            let call = Call::tcp(to).from(addrs.socket(family, 0)).timeout_ms(NO_ANSWER_MS);
            let outcome = node.call(&call).unwrap();
            assert_eq!(outcome.is_ok(), may, "{ranges:?} {family:?}: {outcome:?}");
            if let Ok(answer) = outcome {
                assert_eq!(answer.seen.ip(), to.ip());
            }
        }
        node.netns
            .ip(&[format!("addr del {}/32 dev lo", addrs.v4), format!("addr del {}/128 dev lo", addrs.v6)])
            .unwrap();
    }
}

#[test]
fn e4_what_lists_of_ranges_mean() {
    let cluster = CLUSTER.lock();
    let all = ["client", "pod-1a", "pod-1b", "node1"];
    let client = ["client"];
    // Ranges, who may use IPv4, who may use IPv6.
    let cases: [(&[&str], &[&str], &[&str]); 5] = [
        (&["0.0.0.0/0", "::/0"], &all, &all),
        // One zero-length prefix among others: no filter for its family.
        (&["203.0.113.0/24", "0.0.0.0/0", "2001:db8:203::/64"], &all, &client),
        // A family that no range is of is not filtered.
        (&["203.0.113.0/24"], &client, &all),
        (&["2001:db8:203::/64"], &all, &client),
        (&[" 203.0.113.0/24", "\t2001:db8:203::/64 "], &client, &client),
    ];
    for (i, (ranges, v4, v6)) in cases.into_iter().enumerate() {
        let name = format!("e4-{i}");
        let service = with_ranges(&cluster, &name, 45 + i as u8, ranges);
        cluster.manifests.write(&name, &service.documents()).unwrap();
        let of = |names, is_v4| {
            let lines = admitted(&cluster, &service, names).into_iter();
            lines.filter(move |l| l.kind == "LoadBalancer" && l.to.is_ipv4() == is_v4)
        };
        check_soon(&of(v4, true).chain(of(v6, false)).collect::<Vec<_>>());
    }
}

#[test]
fn e4_a_thousand_ranges_of_one_service() {
    let cluster = CLUSTER.lock();
    let mut ranges: Vec<String> = (0..1000)
        .flat_map(|i| [format!("10.{}.{}.0/24", 100 + i / 250, i % 250), format!("2001:db8:1000:{i:x}::/64")])
        .collect();
    let service = with_ranges(&cluster, "e4-many", 52, &ranges);
    let other = crate::bed::service(&cluster, "e4-other", 53, &["pod-1a", "pod-2a"]);
    for s in [&service, &other] {
        cluster.manifests.write(&s.name, &s.documents()).unwrap();
    }
    check_soon(&admitted(&cluster, &service, &[]));
    // The last of so many is as good as the first.
    ranges.extend(CLIENT.map(str::to_owned));
    let service = with_ranges(&cluster, "e4-many", 52, &ranges);
    cluster.manifests.write("e4-many", &service.documents()).unwrap();
    check_soon(&admitted(&cluster, &service, &["client"]));
    // Ranges of one Service are nothing to another.
    check(&admitted(&cluster, &other, &["client", "pod-1a", "pod-1b", "node1"]));
}

/// Drops, and says nothing: established connections are not looked at again.
#[test]
fn e4_a_range_that_goes_ends_no_connection() {
    let cluster = CLUSTER.lock();
    let service = with_ranges(&cluster, "e4-open", 54, &CLIENT);
    cluster.manifests.write("e4-open", &service.documents()).unwrap();
    check_soon(&admitted(&cluster, &service, &["client"]));
    let to = service.load_balancer.unwrap().socket(Family::V4, service.port);
    let mut session = cluster.client.session(&Call::tcp(to)).unwrap();
    let first = session.ask().unwrap().unwrap();
    let service = with_ranges(&cluster, "e4-open", 54, &POD);
    cluster.manifests.write("e4-open", &service.documents()).unwrap();
    check_soon(&admitted(&cluster, &service, &["pod-1b"]));
    assert_eq!(session.ask().unwrap(), Ok(first));
}

/// Sets `status.loadBalancer.ingress`.
fn write_ingress(cluster: &Cluster, service: &Service, ingress: &[(IpAddr, Option<&str>)]) {
    let mut documents = service.documents();
    let entry = |(ip, mode): &(IpAddr, Option<&str>)| -> Value {
        match mode {
            Some(mode) => json!({ "ip": ip, "ipMode": mode }),
            None => json!({ "ip": ip }),
        }
    };
    let all: Vec<_> = ingress.iter().map(entry).collect();
    documents[0]["status"] = json!({ "loadBalancer": { "ingress": all } });
    cluster.manifests.write(&service.name, &documents).unwrap();
}

/// Whether a datagram of pod-1b to this address gets to the router, which has the address.
fn leaves(cluster: &Cluster, to: IpAddr, port: u16) -> bool {
    let (family, bits, flags) = if to.is_ipv4() { (Family::V4, 32, "") } else { (Family::V6, 128, "nodad") };
    cluster.router.ip(&[format!("addr add {to}/{bits} dev lo {flags}")]).unwrap();
    let router = cluster.router.run(|| UdpSocket::bind((to, port))).unwrap().unwrap();
    router.set_read_timeout(Some(Duration::from_millis(NO_ANSWER_MS))).unwrap();
    let socket = raw::udp(cluster.pod("pod-1b"), family, 0).unwrap();
    socket.send_to(b"who", (to, port)).unwrap();
    let heard = router.recv(&mut [0; 16]).is_ok();
    cluster.router.ip(&[format!("addr del {to}/{bits} dev lo")]).unwrap();
    heard
}

#[test]
fn e5_addresses_in_mode_proxy_are_not_served_all_others_are() {
    let cluster = CLUSTER.lock();
    let service = service(&cluster, "e5", 55, &["pod-1a", "pod-2a"]);
    let more = |n: u8| Pair::new(&format!("192.0.2.{n}"), &format!("2001:db8:192::5:{n}"));
    let (vip, plain, proxied) = (more(250), more(251), more(252));
    let modes = |last| {
        let modes = [(vip, Some("VIP")), (plain, None), (proxied, Some(last))];
        modes.into_iter().flat_map(|(p, mode)| Family::BOTH.map(|f| (p.ip(f), mode))).collect::<Vec<_>>()
    };
    let served = |pairs: &[Pair]| {
        let to: Vec<_> = pairs
            .iter()
            .flat_map(|p| Family::BOTH.map(|f| ("LoadBalancer", p.socket(f, service.port))))
            .collect();
        lines(&sides(&cluster), &to, |_, _| Some(BOTH))
    };
    write_ingress(&cluster, &service, &modes("Proxy"));
    check_soon(&served(&[vip, plain]));
    for family in Family::BOTH {
        assert!(
            leaves(&cluster, proxied.ip(family), service.port),
            "{family:?}: mode Proxy belongs to its proxy"
        );
    }
    write_ingress(&cluster, &service, &modes("VIP"));
    check_soon(&served(&[vip, plain, proxied]));
    write_ingress(&cluster, &service, &modes("Proxy"));
    crate::bed::settle(&cluster);
    for family in Family::BOTH {
        assert!(leaves(&cluster, proxied.ip(family), service.port), "{family:?}: the change to Proxy counts");
    }
}

#[test]
fn e6_without_node_ports_the_load_balancer_address_is_enough() {
    let cluster = CLUSTER.lock();
    let mut service = service(&cluster, "e6", 56, &["pod-1a", "pod-2a"])
        .with("allocateLoadBalancerNodePorts", json!(false))
        // Whoever implements the class: the addresses in the status are served.
        .with("loadBalancerClass", json!("example.com/own"));
    service.node_port = None;
    cluster.serve(&service).unwrap();
    let to = frontends(&service, cluster.node(1));
    assert!(
        to.iter().any(|(kind, _)| *kind == "LoadBalancer") && to.iter().all(|(kind, _)| *kind != "NodePort")
    );
    check(&lines(&sides(&cluster), &to, |_, _| Some(BOTH)));
}

#[test]
fn e7_load_balancer_traffic_of_pods_and_nodes_stays_in_the_cluster() {
    let cluster = CLUSTER.lock();
    let service = service(&cluster, "e7", 57, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    let addrs = service.load_balancer.unwrap();
    // The way to the external balancer leads nowhere.
    let all = [format!("{}/32", addrs.v4), format!("{}/128", addrs.v6)];
    cluster.router.ip(&all.clone().map(|a| format!("route add blackhole {a}"))).unwrap();
    let to: Vec<_> = frontends(&service, cluster.node(1))
        .into_iter()
        .filter(|(kind, _)| *kind == "LoadBalancer")
        .collect();
    let from = [cluster.pod("pod-1b"), cluster.pod("pod-2b"), &cluster.node(1).place, &cluster.node(2).place];
    check(&lines(&from, &to, |_, _| Some(BOTH)));
    cluster.router.ip(&all.map(|a| format!("route del blackhole {a}"))).unwrap();
}

//! Rule C7: unlisted ports of live ClusterIPs, and addresses of ServiceCIDRs that no Service has.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use lb_tests::{
    cluster::Cluster,
    manifests::Service,
    place::{Family, Pair, Place},
    raw::{self, IcmpError, Raw, ping},
    shared::SOON,
    traffic::{Call, Proto},
    wait_for,
};
use serde_json::{Value, json};

use crate::bed::{CLUSTER, Line, NO_ANSWER_MS, PROTOS, Want, check_soon, cluster, counted, service};

/// Sources of packets, and a process of the node.
const FROM: [&str; 3] = ["client", "pod-1b", "node1"];

fn place<'a>(cluster: &'a Cluster, name: &str) -> &'a Place {
    cluster.places().find(|p| p.name == name).expect("a place of the cluster")
}

#[test]
fn c7_unlisted_ports_of_a_live_cluster_ip_are_refused() {
    let cluster = CLUSTER.lock();
    let service = service(&cluster, "c7", 30, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    let lines = |port: u16, protos: &[Proto]| -> Vec<Line<'_>> {
        let combinations = FROM.iter().flat_map(|from| Family::BOTH.map(|family| (*from, family)));
        combinations
            .flat_map(|(from, family)| {
                let to = service.cluster_ips.socket(family, port);
                protos.iter().map(move |proto| (from, to, *proto))
            })
            .map(|(from, to, proto)| Line {
                from: place(&cluster, from),
                kind: "ClusterIP",
                to,
                proto,
                want: Want::Refused,
            })
            .collect()
    };
    check_soon(&lines(81, &PROTOS));
    assert!(counted(&cluster, 1, "reject_unlisted_port") > 0);
    // The other protocol of a listed port is as unlisted.
    let mut tcp_only = service.documents();
    tcp_only[0]["spec"]["ports"].as_array_mut().unwrap().retain(|p| p["protocol"] == "TCP");
    cluster.manifests.write("c7", &tcp_only).unwrap();
    check_soon(&lines(80, &[Proto::Udp]));
    // The Service gone, nothing is refused in its name any more.
    cluster.manifests.remove("c7").unwrap();
    let from = cluster.pod("pod-1b");
    let call = Call::udp(service.cluster_ips.socket(Family::V4, 81)).timeout_ms(NO_ANSWER_MS);
    cluster
        .wait_for_calls("packets to a former ClusterIP to pass", from, &call, |o| {
            o.as_ref().is_err_and(|f| !f.is_refusal())
        })
        .unwrap();
}

#[test]
fn c7_a_live_cluster_ip_without_endpoints_refuses_unlisted_ports_too() {
    let cluster = CLUSTER.lock();
    let service = service(&cluster, "c7-none", 31, &[]);
    cluster.manifests.write("c7-none", &service.documents()).unwrap();
    let lines: Vec<_> = Family::BOTH
        .into_iter()
        .flat_map(|f| [80, 81].map(|port| service.cluster_ips.socket(f, port)))
        .map(|to| Line {
            from: cluster.pod("pod-1b"),
            kind: "ClusterIP",
            to,
            proto: Proto::Udp,
            want: Want::Refused,
        })
        .collect();
    check_soon(&lines);
}

#[test]
fn c7_echo_requests_to_a_cluster_ip_are_refused_like_an_unlisted_port() {
    let cluster = CLUSTER.lock();
    let service = service(&cluster, "c7-echo", 32, &["pod-1a"]);
    cluster.serve(&service).unwrap();
    for from in [&cluster.client, cluster.pod("pod-1b")] {
        for family in Family::BOTH {
            let to = service.cluster_ips.ip(family);
            let icmp = Raw::icmp(from, family).unwrap();
            let answered = ping(from, to, Duration::from_millis(NO_ANSWER_MS)).unwrap();
            assert!(!answered, "{} -> {to}", from.name);
            let error = icmp
                .receive(Duration::from_secs(2), |sender, bytes| {
                    IcmpError::parse(sender, bytes).filter(|e| e.quoted.dst.ip() == to)
                })
                .unwrap()
                .unwrap_or_else(|| panic!("{} -> {to}: no ICMP error", from.name));
            assert!(error.is_port_unreachable() && error.from == to, "{error:?}");
        }
    }
}

/// A host beyond the nodes that has addresses from ClusterIP ranges: the router. What arrives there has passed the nodes.
struct Beyond {
    sockets: Vec<(IpAddr, UdpSocket)>,
}

const PORT: u16 = 7777;

impl Beyond {
    fn new(cluster: &Cluster, addrs: &[Pair]) -> Self {
        let ips: Vec<IpAddr> = addrs.iter().flat_map(|pair| Family::BOTH.map(|f| pair.ip(f))).collect();
        let lines: Vec<_> = ips
            .iter()
            .map(|ip| {
                if ip.is_ipv4() {
                    format!("addr add {ip}/32 dev lo")
                } else {
                    format!("addr add {ip}/128 dev lo nodad")
                }
            })
            .collect();
        cluster.router.ip(&lines).unwrap();
        let bind = |ip: &IpAddr| {
            let socket = cluster.router.run(|| UdpSocket::bind((*ip, PORT))).unwrap().unwrap();
            (*ip, socket)
        };
        Self { sockets: ips.iter().map(bind).collect() }
    }

    /// Whether a datagram from there to one of these addresses arrives.
    fn hears(&self, from: &Place, to: IpAddr) -> bool {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
        let socket = &self.sockets.iter().find(|(ip, _)| *ip == to).expect("an address of it").1;
        let word = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed).to_be_bytes();
        raw::udp(from, family, 0).unwrap().send_to(&word, (to, PORT)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(NO_ANSWER_MS))).unwrap();
        let mut buffer = [0; 16];
        loop {
            match socket.recv(&mut buffer) {
                Ok(length) if buffer[..length] == word => return true,
                // From an earlier question.
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    }

    /// Waits until datagrams of pods to both addresses of a pair arrive, or do not.
    fn wait(&self, cluster: &Cluster, to: Pair, wanted: bool) {
        let what =
            format!("packets to {} and {} to {}", to.v4, to.v6, if wanted { "pass" } else { "be dropped" });
        let from = cluster.pod("pod-1b");
        wait_for(&what, SOON, || Family::BOTH.into_iter().all(|f| self.hears(from, to.ip(f)) == wanted))
            .unwrap();
    }
}

fn service_cidr(name: &str, cidrs: &[&str]) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
        "metadata": { "name": name },
        "spec": { "cidrs": cidrs },
        "status": { "conditions": [{
            "type": "Ready", "status": "True", "reason": "", "message": "Kubernetes Service CIDR is ready",
            "lastTransitionTime": "2026-05-04T08:58:03Z",
        }] },
    })
}

const WHOLE: [&str; 2] = ["10.96.0.0/16", "fd00:10:96::/64"];

fn addrs(last: u8) -> Pair {
    Pair::new(&format!("10.96.200.{last}"), &format!("fd00:10:96::200:{last}"))
}

#[test]
fn c7_addresses_of_a_service_cidr_that_no_service_has_are_dropped() {
    let cluster = cluster(&[]).unwrap();
    let (free, outside) = (addrs(1), Pair::new("10.98.200.1", "fd00:10:98::200:1"));
    let beyond = Beyond::new(&cluster, &[free, outside]);
    let service = service(&cluster, "c7-cidr", 33, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    beyond.wait(&cluster, free, true);

    cluster.manifests.write("cidr", &[service_cidr("kubernetes", &WHOLE)]).unwrap();
    beyond.wait(&cluster, free, false);
    beyond.wait(&cluster, outside, true);
    let before = counted(&cluster, 1, "drop_unassigned_address");
    assert!(before > 0);
    // From every side, to an address that the router does not take for its own; the node's processes hear nothing either.
    let nobody = addrs(9);
    for (from, times) in [(&cluster.client, 1), (cluster.pod("pod-1b"), 1), (&cluster.node(1).place, 1)] {
        for family in Family::BOTH {
            let before = counted(&cluster, 1, "drop_unassigned_address");
            let call = Call::udp(nobody.socket(family, PORT)).timeout_ms(NO_ANSWER_MS);
            let outcome = from.call(&call).unwrap();
            assert!(outcome.as_ref().is_err_and(|f| f.is_timeout()), "{}: {outcome:?}", from.name);
            let after = counted(&cluster, 1, "drop_unassigned_address");
            assert_eq!(after, before + times, "{} {family:?}", from.name);
        }
    }
    // Addresses that Services have are served, old and new.
    let new = crate::bed::service(&cluster, "c7-new", 34, &["pod-1a", "pod-2a"]);
    for service in [&service, &new] {
        cluster.serve(service).unwrap();
    }

    // Changed, deleted, made again, a second one.
    cluster
        .manifests
        .write("cidr", &[service_cidr("kubernetes", &["10.96.0.0/20", "fd00:10:96::/112"])])
        .unwrap();
    beyond.wait(&cluster, free, true);
    let second = service_cidr("more", &["10.96.200.0/24", "fd00:10:96::200:0/112"]);
    cluster.manifests.write("more", &[second]).unwrap();
    beyond.wait(&cluster, free, false);
    cluster.manifests.remove("more").unwrap();
    beyond.wait(&cluster, free, true);
    cluster.manifests.write("cidr", &[service_cidr("kubernetes", &WHOLE)]).unwrap();
    beyond.wait(&cluster, free, false);
    cluster.manifests.remove("cidr").unwrap();
    beyond.wait(&cluster, free, true);
    cluster.serve(&service).unwrap();
}

#[test]
fn c7_a_service_takes_its_address_out_of_the_drop_and_puts_it_back() {
    let cluster = cluster(&[]).unwrap();
    let addrs = addrs(2);
    let beyond = Beyond::new(&cluster, &[addrs]);
    cluster.manifests.write("cidr", &[service_cidr("kubernetes", &WHOLE)]).unwrap();
    beyond.wait(&cluster, addrs, false);
    let mut service = service(&cluster, "c7-taken", 35, &["pod-1a"]);
    service.cluster_ips = addrs;
    cluster.serve(&service).unwrap();
    // Another proxy's: its packets are its business.
    let mut documents = service.documents();
    documents[0]["metadata"]["labels"] = json!({ "service.kubernetes.io/service-proxy-name": "other" });
    cluster.manifests.write(&service.name, &documents).unwrap();
    beyond.wait(&cluster, addrs, true);
    cluster.serve(&service).unwrap();
    cluster.manifests.remove(&service.name).unwrap();
    beyond.wait(&cluster, addrs, false);
}

#[test]
fn c7_the_option_names_ranges_where_there_are_no_objects() {
    let cluster = cluster(&["--service-cidr=10.96.0.0/16,fd00:10:96::/64"]).unwrap();
    let (free, outside) = (addrs(3), Pair::new("10.98.200.1", "fd00:10:98::200:1"));
    let beyond = Beyond::new(&cluster, &[free, outside]);
    beyond.wait(&cluster, free, false);
    beyond.wait(&cluster, outside, true);
    let service: Service = service(&cluster, "c7-option", 36, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    let to: SocketAddr = service.cluster_ip(Family::V4);
    assert!(cluster.client.call(&Call::tcp(to)).unwrap().is_ok());
}

//! Rules F4 and F5: NodePorts on loopback addresses, for processes of the node and for nobody else.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use lb_tests::{
    cluster::{Cluster, Node},
    frame::{Frame, L4},
    manifests::Service,
    netns::Netns,
    place::{Family, Pair},
    raw::{mac, send_frame},
    shared::SOON,
    traffic::{Call, Proto},
    wait_for,
};
use serde_json::json;

use crate::bed::{CLUSTER, Want, check, check_soon, cluster, counted, lines, service};

const LOOPBACK: Pair = Pair { v4: Ipv4Addr::LOCALHOST, v6: Ipv6Addr::LOCALHOST };

fn loopback(service: &Service) -> [(&'static str, SocketAddr); 2] {
    Family::BOTH.map(|f| ("NodePort on loopback", LOOPBACK.socket(f, service.node_port.unwrap())))
}

fn node_ports(service: &Service, node: &Node) -> [(&'static str, SocketAddr); 2] {
    Family::BOTH.map(|f| ("NodePort", node.place.addrs.socket(f, service.node_port.unwrap())))
}

#[test]
fn f4_node_ports_answer_processes_of_the_node_on_loopback() {
    let cluster = CLUSTER.lock();
    // Like every NodePort for the node itself: policies do not count (rule D).
    for (i, policy) in ["Cluster", "Local"].into_iter().enumerate() {
        let name = format!("f4-{i}");
        let service = service(&cluster, &name, 60 + i as u8, &["pod-1a", "pod-2a"])
            .with("externalTrafficPolicy", json!(policy))
            .with("internalTrafficPolicy", json!(policy));
        cluster.manifests.write(&name, &service.documents()).unwrap();
        for number in [1, 2] {
            let from = [&cluster.node(number).place];
            check_soon(&lines(&from, &loopback(&service), |_, _| Some(Want::From(&["pod-1a", "pod-2a"]))));
            for (_, to) in loopback(&service) {
                let answer = from[0].call(&Call::new(Proto::UdpUnconnected, to)).unwrap().unwrap();
                assert_eq!(answer.peer, to, "the process hears from whom it asked");
            }
        }
        // A pod's loopback is its own, and that of the client is nobody's business here.
        let others = [cluster.pod("pod-1b"), &cluster.client];
        check(&lines(&others, &loopback(&service), |_, _| Some(Want::Refused)));
    }
}

#[test]
fn f4_without_endpoints_loopback_refuses_too_and_a_deleted_service_leaves_it() {
    let cluster = CLUSTER.lock();
    let mut service = service(&cluster, "f4-none", 62, &["pod-1a"]);
    let node = [&cluster.node(1).place];
    cluster.manifests.write("f4-none", &service.documents()).unwrap();
    check_soon(&lines(&node, &loopback(&service), |_, _| Some(Want::From(&["pod-1a"]))));
    let before = counted(&cluster, 1, "socket_reject_no_endpoints");
    service.endpoints.clear();
    cluster.manifests.write("f4-none", &service.documents()).unwrap();
    check_soon(&lines(&node, &loopback(&service), |_, _| Some(Want::Refused)));
    assert!(counted(&cluster, 1, "socket_reject_no_endpoints") > before);
    // The port is the host's own again, and nobody listens there.
    cluster.manifests.remove("f4-none").unwrap();
    wait_for("the port to be the host's own", SOON, || {
        let before = counted(&cluster, 1, "socket_reject_no_endpoints");
        check(&lines(&node, &loopback(&service), |_, _| Some(Want::Refused)));
        counted(&cluster, 1, "socket_reject_no_endpoints") == before
    })
    .unwrap();
}

/// Serves a Service in a cluster with this flag; whether loopback answers, per family.
fn only_where_asked(flag: &str, name: &str, number: u8, wanted: [bool; 2]) {
    let cluster = cluster(&[flag]).unwrap();
    let service = service(&cluster, name, number, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    let node = [&cluster.node(1).place];
    check_soon(&lines(&node, &node_ports(&service, cluster.node(1)), |_, _| {
        Some(Want::From(&["pod-1a", "pod-2a"]))
    }));
    for (to, wanted) in loopback(&service).into_iter().zip(wanted) {
        let want = if wanted { Want::From(&["pod-1a", "pod-2a"]) } else { Want::Refused };
        check(&lines(&node, &[to], |_, _| Some(want.clone())));
    }
    // Refused by the host, where nobody listens: not in the Service's name.
    assert_eq!(counted(&cluster, 1, "socket_reject_no_endpoints"), 0);
}

#[test]
fn f4_the_option_takes_node_ports_off_loopback() {
    only_where_asked("--localhost-nodeports=off", "f4-off", 63, [false, false]);
}

#[test]
fn f4_node_port_addresses_without_loopback_leave_it_alone() {
    only_where_asked("--nodeport-addresses=172.18.0.0/16,fd00:18::/64", "f4-list", 64, [false, false]);
}

#[test]
fn f4_node_port_addresses_with_loopback_include_it() {
    let flag = "--nodeport-addresses=172.18.0.0/16,127.0.0.0/8,fd00:18::/64";
    only_where_asked(flag, "f4-listed", 65, [true, false]);
}

/// Somewhere that frames to a node can be sent from: namespace, device, both hardware addresses, the sender's addresses.
struct Wire<'a> {
    name: &'a str,
    netns: &'a Netns,
    device: &'a str,
    macs: ([u8; 6], [u8; 6]),
    own: Pair,
}

fn wires(cluster: &Cluster) -> [Wire<'_>; 2] {
    let (node, pod) = (&cluster.node(1).place.netns, cluster.pod("pod-1b"));
    let macs = |netns, device, far| (mac(netns, device).unwrap(), mac(node, far).unwrap());
    [
        Wire {
            name: "pod-1b",
            netns: &pod.netns,
            device: "eth0",
            macs: macs(&pod.netns, "eth0", "veth1b"),
            own: pod.addrs,
        },
        // The port of the router's bridge that leads to node1.
        Wire {
            name: "outside",
            netns: &cluster.router,
            device: "node1",
            macs: macs(&cluster.router, "node1", "eth0"),
            own: cluster.client.addrs,
        },
    ]
}

impl Wire<'_> {
    fn send(&self, l4: L4, port: u16, to: SocketAddr) {
        let own: IpAddr = self.own.ip(if to.is_ipv4() { Family::V4 } else { Family::V6 });
        let frame = Frame::new(l4, (own, port), (to.ip(), to.port()));
        let frame = frame.with(|f| (f.src_mac, f.dst_mac) = self.macs);
        send_frame(self.netns, self.device, &frame.bytes()).unwrap();
    }
}

#[test]
fn f5_packets_to_loopback_addresses_are_never_translated() {
    const SYN: u8 = 2;
    let cluster = CLUSTER.lock();
    let service = service(&cluster, "f5", 66, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    // Served there for processes, so there is something to reach.
    check_soon(&lines(&[&cluster.node(1).place], &loopback(&service), |_, _| {
        Some(Want::From(&["pod-1a", "pod-2a"]))
    }));
    let mut port = 42_000;
    for wire in wires(&cluster) {
        for (i, (_, to)) in loopback(&service).into_iter().enumerate() {
            for l4 in [L4::Udp, L4::Tcp(SYN)] {
                port += 2;
                let before = counted(&cluster, 1, "flow_created");
                wire.send(l4.clone(), port, to);
                // The same frame to the node's own address: it comes after the other, and it counts.
                wire.send(l4.clone(), port + 1, node_ports(&service, cluster.node(1))[i].1);
                let what = format!("{} -> {to} {l4:?}", wire.name);
                wait_for(&format!("{what}: the frame to count"), SOON, || {
                    counted(&cluster, 1, "flow_created") > before
                })
                .unwrap();
                assert_eq!(counted(&cluster, 1, "flow_created"), before + 1, "{what}");
            }
        }
    }
}

#[test]
fn f5_route_localnet_is_never_set() {
    let cluster = CLUSTER.lock();
    let service = service(&cluster, "f5-route", 67, &["pod-1a"]);
    cluster.serve(&service).unwrap();
    check_soon(&lines(&[&cluster.node(1).place], &loopback(&service), |_, _| Some(Want::From(&["pod-1a"]))));
    for node in &cluster.nodes {
        let settings = node.place.netns.run(|| -> std::io::Result<Vec<(String, String)>> {
            let mut all = Vec::new();
            for entry in fs::read_dir("/proc/sys/net/ipv4/conf")? {
                let entry = entry?;
                let value = fs::read_to_string(entry.path().join("route_localnet"))?;
                all.push((entry.file_name().to_string_lossy().into_owned(), value.trim().to_owned()));
            }
            Ok(all)
        });
        let settings = settings.unwrap().unwrap();
        assert!(settings.iter().any(|(device, _)| device == "eth0") && settings.len() > 4, "{settings:?}");
        assert!(settings.iter().all(|(_, value)| value == "0"), "{}: {settings:?}", node.place.name);
    }
}

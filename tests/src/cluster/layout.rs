//! Devices, addresses and routes of a cluster.

use super::{Cluster, Layout, Node};
use crate::{
    netns::Netns,
    place::{Family, Place},
};

/// Per namespace, before it gets devices (which copy `default`).
///
/// Duplicate address detection would keep IPv6 addresses unusable for a second.
const EVERYWHERE: [(&str, &str); 2] =
    [("ipv6/conf/all/accept_dad", "0"), ("ipv6/conf/default/accept_dad", "0")];

/// What kubelet and CNI plugins set on a node, and a distribution's strict reverse-path filter on top.
const FORWARDING: [(&str, &str); 4] = [
    ("ipv4/ip_forward", "1"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv4/conf/all/rp_filter", "1"),
    ("ipv4/conf/default/rp_filter", "1"),
];

/// The router's addresses towards nodes and client.
const INSIDE: (&str, &str) = ("172.18.0.1", "fd00:18::1");
const OUTSIDE: (&str, &str) = ("203.0.113.1", "2001:db8:203::1");

/// Service addresses; the router sends all of them to node1.
const SERVICE_RANGES: [&str; 4] = ["10.96.0.0/16", "192.0.2.0/24", "fd00:10:96::/64", "2001:db8:192::/64"];

/// Connects everything.
pub fn connect(cluster: &Cluster) -> anyhow::Result<()> {
    for netns in cluster.places().map(|p| &p.netns).chain([&cluster.router]) {
        netns.sysctl(&EVERYWHERE)?;
    }
    router(cluster)?;
    for node in &cluster.nodes {
        node_uplink(cluster, node)?;
        pods(cluster, node)?;
    }
    if !cluster.options.offloads {
        switch_offloads_off(cluster)?;
    }
    Ok(())
}

/// The router, and the client behind it.
fn router(cluster: &Cluster) -> anyhow::Result<()> {
    let (router, client) = (&cluster.router, &cluster.client);
    router.sysctl(&FORWARDING[..2])?;
    let mut lines = vec!["link add br0 type bridge mcast_snooping 0".to_owned()];
    lines.push(format!("link add out0 type veth peer name eth0 netns {}", client.netns.name()));
    for node in &cluster.nodes {
        let n = node.number;
        lines.push(format!("link add node{n} type veth peer name eth0 netns {}", node.place.netns.name()));
        lines.push(format!("link set node{n} master br0 up"));
    }
    lines.extend(address("br0", INSIDE));
    lines.extend(address("out0", OUTSIDE));
    for node in &cluster.nodes {
        for family in Family::BOTH {
            lines.push(format!("route add {} via {}", pod_range(node, family), node.place.addrs.ip(family)));
        }
    }
    let first = cluster.node(1).place.addrs;
    for range in SERVICE_RANGES {
        let family = if range.contains(':') { Family::V6 } else { Family::V4 };
        lines.push(format!("route add {range} via {}", first.ip(family)));
    }
    router.ip(&lines)?;
    client.netns.ip(&uplink(client, OUTSIDE))
}

/// The node's `eth0`, and its routes to the pods of other nodes.
fn node_uplink(cluster: &Cluster, node: &Node) -> anyhow::Result<()> {
    let netns = &node.place.netns;
    netns.sysctl(&FORWARDING)?;
    // The device came before the sysctl of its namespace.
    netns.sysctl(&[("ipv4/conf/eth0/rp_filter", "1")])?;
    let mut lines = uplink(&node.place, INSIDE);
    for other in cluster.nodes.iter().filter(|other| other.number != node.number) {
        for family in Family::BOTH {
            lines.push(format!(
                "route add {} via {}",
                pod_range(other, family),
                other.place.addrs.ip(family)
            ));
        }
    }
    netns.ip(&lines)
}

/// Addresses and default routes of a place that has one device, `eth0`.
fn uplink(place: &Place, gateway: (&str, &str)) -> Vec<String> {
    let (v4, v6) = (place.addrs.v4.to_string(), place.addrs.v6.to_string());
    let mut lines = address("eth0", (&v4, &v6)).to_vec();
    lines.extend([gateway.0, gateway.1].map(|via| format!("route add default via {via}")));
    lines
}

fn address(device: &str, (v4, v6): (&str, &str)) -> [String; 3] {
    [
        format!("addr add {v4}/24 dev {device}"),
        format!("addr add {v6}/64 dev {device} nodad"),
        format!("link set {device} up"),
    ]
}

/// The pods of a node and their devices.
fn pods(cluster: &Cluster, node: &Node) -> anyhow::Result<()> {
    let gateway = (node.gateway().v4.to_string(), node.gateway().v6.to_string());
    let gateway = (gateway.0.as_str(), gateway.1.as_str());
    let netns = &node.place.netns;
    if cluster.options.layout == Layout::Bridge {
        netns.ip(&["link add cni0 type bridge mcast_snooping 0"])?;
        netns.ip(&address("cni0", gateway))?;
    }
    for pod in &node.pods {
        let device = Node::pod_device(pod);
        netns.ip(&[format!("link add {device} type veth peer name eth0 netns {}", pod.netns.name())])?;
        match cluster.options.layout {
            Layout::Bridge => {
                netns.ip(&[format!("link set {device} master cni0 up")])?;
                pod.netns.ip(&uplink(pod, gateway))?;
            }
            Layout::PointToPoint => point_to_point(netns, &device, pod, gateway)?,
        }
    }
    Ok(())
}

/// As the `ptp` plugin does: the gateway's address on every host end, a host route to the pod, and in the pod
/// everything by way of the gateway, neighbours included.
fn point_to_point(netns: &Netns, device: &str, pod: &Place, gateway: (&str, &str)) -> anyhow::Result<()> {
    let (v4, v6) = (pod.addrs.v4, pod.addrs.v6);
    netns.ip(&[
        format!("addr add {}/32 dev {device}", gateway.0),
        format!("addr add {}/128 dev {device} nodad", gateway.1),
        format!("link set {device} up"),
        format!("route add {v4}/32 dev {device}"),
        format!("route add {v6}/128 dev {device}"),
    ])?;
    pod.netns.ip(&[
        format!("addr add {v4}/32 dev eth0"),
        format!("addr add {v6}/128 dev eth0 nodad"),
        "link set eth0 up".to_owned(),
        format!("route add {}/32 dev eth0 scope link", gateway.0),
        format!("route add {}/128 dev eth0", gateway.1),
        format!("route add default via {}", gateway.0),
        format!("route add default via {} dev eth0", gateway.1),
    ])
}

/// The pods of a node, as a route.
fn pod_range(node: &Node, family: Family) -> String {
    match family {
        Family::V4 => format!("10.244.{}.0/24", node.number),
        Family::V6 => format!("fd00:10:244:{}::/64", node.number),
    }
}

/// Real checksums and real segments on all devices, as on a wire.
fn switch_offloads_off(cluster: &Cluster) -> anyhow::Result<()> {
    let off = |netns: &Netns, device: &str| {
        netns.exec(&format!("ethtool -K {device} tx off sg off tso off gso off gro off")).map(|_| ())
    };
    for node in &cluster.nodes {
        off(&node.place.netns, "eth0")?;
        off(&cluster.router, &format!("node{}", node.number))?;
        for pod in &node.pods {
            off(&pod.netns, "eth0")?;
            off(&node.place.netns, &Node::pod_device(pod))?;
        }
    }
    off(&cluster.client.netns, "eth0")?;
    off(&cluster.router, "out0")
}

//! Which addresses the node has, and which of them serve NodePorts.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

use super::op::Family;
use crate::{model::Node, settings::NodePortAddresses};

/// Filters `local`, the addresses of this network namespace's devices, by the setting. Never loopback, which packets are
/// never served on ([`loopback_addresses`]), and never link-local addresses (an IPv6 one means nothing without its
/// device).
pub fn nodeport_addresses<'a>(
    setting: &NodePortAddresses,
    local: impl IntoIterator<Item = &'a IpAddr>,
    node: Option<&Node>,
) -> BTreeSet<IpAddr> {
    match setting {
        NodePortAddresses::All => local.into_iter().copied().filter(is_servable).collect(),
        NodePortAddresses::Primary => node.map(primary).unwrap_or_default(),
        NodePortAddresses::Cidrs(cidrs) => {
            local.into_iter().copied().filter(is_servable).filter(|ip| admits(cidrs, ip)).collect()
        }
    }
}

/// F4: the loopback addresses that sockets of the node reach NodePorts at. No packet ever does: that would take
/// `route_localnet` (CVE-2020-8558).
pub fn loopback_addresses(setting: &NodePortAddresses, localhost_nodeports: bool) -> BTreeSet<IpAddr> {
    let all = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let listed = |ip: &IpAddr| match setting {
        NodePortAddresses::All => true,
        NodePortAddresses::Primary => false,
        NodePortAddresses::Cidrs(cidrs) => admits(cidrs, ip),
    };
    all.into_iter().filter(|ip| localhost_nodeports && listed(ip)).collect()
}

/// Every address that packets from the node may come from, or that it is known by: those of its devices (`local`) and
/// those of its object. Those that come and go with pods' devices, or mean nothing elsewhere, are left out.
pub fn own_addresses<'a>(
    local: impl IntoIterator<Item = &'a IpAddr>,
    node: Option<&Node>,
) -> BTreeSet<IpAddr> {
    let known = node.into_iter().flat_map(|n| n.internal_ips.iter().chain(&n.external_ips)).copied();
    local.into_iter().copied().chain(known).filter(is_servable).collect()
}

/// F2: a list that names no CIDR of a family means "all" for that family.
fn admits(cidrs: &[IpNet], ip: &IpAddr) -> bool {
    let mut of_family = cidrs.iter().filter(|c| Family::of_net(c) == Family::of(*ip)).peekable();
    of_family.peek().is_none() || of_family.any(|c| c.contains(ip))
}

/// The Node object's addresses: per family the InternalIPs, else the ExternalIPs (which the node often does not have
/// itself: a cloud's gateway translates them).
fn primary(node: &Node) -> BTreeSet<IpAddr> {
    let mut chosen = BTreeSet::new();
    for family in [Family::V4, Family::V6] {
        let of_family = |ips: &[IpAddr]| -> Vec<IpAddr> {
            ips.iter().copied().filter(|ip| Family::of(*ip) == family && is_servable(ip)).collect()
        };
        let internal = of_family(&node.internal_ips);
        chosen.extend(if internal.is_empty() { of_family(&node.external_ips) } else { internal });
    }
    chosen
}

fn is_servable(ip: &IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    };
    !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || link_local)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(list: &[&str]) -> Vec<IpAddr> {
        list.iter().map(|a| a.parse().unwrap()).collect()
    }

    fn chosen(setting: NodePortAddresses, node: Option<&Node>) -> Vec<String> {
        let local = ips(&[
            "127.0.0.1",
            "::1",
            "192.0.2.1",
            "198.51.100.7",
            "169.254.3.3",
            "fe80::1",
            "2001:db8::1",
            "2001:db8:1::1",
        ]);
        nodeport_addresses(&setting, &local, node).iter().map(IpAddr::to_string).collect()
    }

    #[test]
    fn f1_all_is_every_address_but_loopback_and_link_local() {
        assert_eq!(
            chosen(NodePortAddresses::All, None),
            ["192.0.2.1", "198.51.100.7", "2001:db8::1", "2001:db8:1::1"]
        );
    }

    #[test]
    fn f2_a_family_without_a_cidr_serves_all_its_addresses() {
        let v4_only = NodePortAddresses::Cidrs(vec!["192.0.2.0/24".parse().unwrap()]);
        assert_eq!(chosen(v4_only, None), ["192.0.2.1", "2001:db8::1", "2001:db8:1::1"]);
        let v6_only = NodePortAddresses::Cidrs(vec!["2001:db8:1::/48".parse().unwrap()]);
        assert_eq!(chosen(v6_only, None), ["192.0.2.1", "198.51.100.7", "2001:db8:1::1"]);
        let both = NodePortAddresses::Cidrs(vec![
            "203.0.113.0/24".parse().unwrap(),
            "2001:db8::/64".parse().unwrap(),
        ]);
        assert_eq!(chosen(both, None), ["2001:db8::1"]);
    }

    #[test]
    fn f4_packets_to_loopback_are_not_served_even_if_listed() {
        let listed =
            NodePortAddresses::Cidrs(vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()]);
        assert!(chosen(listed, None).is_empty());
    }

    #[test]
    fn f4_sockets_on_loopback_are_served_if_it_is_listed_or_nothing_is() {
        let cidrs = |list: &[&str]| {
            NodePortAddresses::Cidrs(list.iter().map(|c| c.parse().unwrap()).collect::<Vec<_>>())
        };
        let served = |setting: &NodePortAddresses| -> Vec<String> {
            assert!(loopback_addresses(setting, false).is_empty());
            loopback_addresses(setting, true).iter().map(IpAddr::to_string).collect()
        };
        assert_eq!(served(&NodePortAddresses::All), ["127.0.0.1", "::1"]);
        assert!(served(&NodePortAddresses::Primary).is_empty());
        assert_eq!(served(&cidrs(&["127.0.0.0/8", "::1/128"])), ["127.0.0.1", "::1"]);
        // F2: nothing is said about the other family.
        assert_eq!(served(&cidrs(&["192.0.2.0/24"])), ["::1"]);
        assert_eq!(served(&cidrs(&["2001:db8::/32"])), ["127.0.0.1"]);
        assert!(served(&cidrs(&["192.0.2.0/24", "2001:db8::/32"])).is_empty());
    }

    #[test]
    fn e3_the_nodes_own_addresses_are_those_of_its_devices_and_its_object() {
        let node = Node {
            name: "n".into(),
            zone: None,
            internal_ips: ips(&["192.0.2.1"]),
            external_ips: ips(&["203.0.113.5"]),
        };
        let local = ips(&["127.0.0.1", "::1", "192.0.2.1", "fe80::1", "2001:db8::1"]);
        let own = own_addresses(&local, Some(&node));
        assert_eq!(own, ips(&["192.0.2.1", "203.0.113.5", "2001:db8::1"]).into_iter().collect());
    }

    #[test]
    fn f1_primary_is_what_the_node_object_says_internal_before_external() {
        let node = Node {
            name: "n".into(),
            zone: None,
            internal_ips: ips(&["192.0.2.1"]),
            external_ips: ips(&["203.0.113.5", "2001:db8:9::5"]),
        };
        assert_eq!(chosen(NodePortAddresses::Primary, Some(&node)), ["192.0.2.1", "2001:db8:9::5"]);
        assert!(chosen(NodePortAddresses::Primary, None).is_empty());
    }
}

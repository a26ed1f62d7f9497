//! Which of the node's addresses serve NodePorts.

use std::{collections::BTreeSet, net::IpAddr};

use super::op::Family;
use crate::{model::Node, settings::NodePortAddresses};

/// Filters `local`, the addresses of this network namespace's devices, by the setting. Never loopback (reaching it from
/// outside needs `route_localnet`, CVE-2020-8558) and never link-local addresses (an IPv6 one means nothing without its
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
            let admits = |ip: &IpAddr| {
                let mut of_family =
                    cidrs.iter().filter(|c| Family::of(c.addr()) == Family::of(*ip)).peekable();
                // F2: a list that names no CIDR of a family means "all" for that family.
                of_family.peek().is_none() || of_family.any(|c| c.contains(ip))
            };
            local.into_iter().copied().filter(is_servable).filter(admits).collect()
        }
    }
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
    fn f4_loopback_is_not_served_even_if_listed() {
        let listed =
            NodePortAddresses::Cidrs(vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()]);
        assert!(chosen(listed, None).is_empty());
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

use super::*;

fn device(name: &str, kind: &str) -> LinkFacts {
    LinkFacts {
        ifindex: 7,
        name: name.into(),
        kind: kind.into(),
        ethernet: true,
        up: true,
        ..Default::default()
    }
}

fn address(ip: &str, prefix: u8) -> Address {
    let ip = ip.parse().expect("an address");
    Address { ip, prefix, global: true, secondary: false, deprecated: false, tentative: false }
}

fn globs(list: &[&str]) -> Vec<glob::Pattern> {
    list.iter().map(|g| glob::Pattern::new(g).expect("a pattern")).collect()
}

fn detected(link: &LinkFacts) -> Option<Role> {
    let kinds = [(20, "bridge"), (21, "bond")].map(|(i, kind)| (i, kind.to_owned())).into();
    classify(link, &Rules::default(), &Context { default_route: [9].into(), kinds })
}

#[test]
fn hardware_is_external_unless_a_master_does_the_work() {
    let nic = LinkFacts { on_bus: true, ..device("ens3", "") };
    assert_eq!(detected(&nic), Some(Role::External));
    assert_eq!(detected(&LinkFacts { master: Some(20), ..nic.clone() }), None);
    assert_eq!(detected(&LinkFacts { master: Some(21), ..nic }), None);
}

#[test]
fn pod_sides_of_bridge_and_ptp_cnis_are_pods() {
    let veth = LinkFacts { peer_elsewhere: true, ..device("veth1", "veth") };
    assert_eq!(detected(&veth), Some(Role::Pod));
    assert_eq!(detected(&LinkFacts { master: Some(20), ..veth.clone() }), Some(Role::Pod));
    // kindnet: the gateway's address as a host route on each veth.
    let gateway = vec![address("10.244.0.1", 32)];
    assert_eq!(detected(&LinkFacts { addresses: gateway, ..veth }), Some(Role::Pod));
}

#[test]
fn a_veth_that_is_a_network_link_is_external() {
    let uplink = LinkFacts { peer_elsewhere: true, ..device("eth0", "veth") };
    assert_eq!(detected(&LinkFacts { ifindex: 9, ..uplink.clone() }), Some(Role::External));
    let second = LinkFacts { addresses: vec![address("172.19.0.3", 16)], ..uplink.clone() };
    assert_eq!(detected(&second), Some(Role::External));
    let v6 = LinkFacts { addresses: vec![address("fd00::3", 64)], ..uplink };
    assert_eq!(detected(&v6), Some(Role::External));
}

#[test]
fn plumbing_and_bridges_are_left_alone() {
    assert_eq!(detected(&device("cilium_host", "veth")), None);
    let cni0 = LinkFacts { addresses: vec![address("10.244.0.1", 24)], ..device("cni0", "bridge") };
    assert_eq!(detected(&cni0), None);
    assert_eq!(detected(&device("kube-ipvs0", "dummy")), None);
    assert_eq!(detected(&LinkFacts { ifindex: 9, ..device("br0", "bridge") }), Some(Role::External));
}

#[test]
fn overlays_and_vlans_count_with_an_address() {
    for kind in ["vxlan", "geneve", "vlan", "bond"] {
        let link = device("x", kind);
        assert_eq!(detected(&link), None, "{kind}");
        let link = LinkFacts { addresses: vec![address("10.244.1.0", 32)], ..link };
        assert_eq!(detected(&link), Some(Role::External), "{kind}");
    }
}

#[test]
fn devices_without_a_link_header_and_loopback_have_no_role() {
    let wireguard = LinkFacts { ethernet: false, ifindex: 9, ..device("wg0", "wireguard") };
    assert_eq!(detected(&wireguard), None);
    assert_eq!(detected(&LinkFacts { loopback: true, ..device("lo", "") }), None);
}

#[test]
fn globs_override_and_switch_detection_of_their_role_off() {
    let rules = Rules { external: globs(&["up*"]), pod: vec![] };
    let context = Context { default_route: [7].into(), ..Default::default() };
    assert_eq!(classify(&device("up0", "dummy"), &rules, &context), Some(Role::External));
    assert_eq!(classify(&device("eth0", ""), &rules, &context), None);
    let pod = LinkFacts { ifindex: 8, peer_elsewhere: true, ..device("veth1", "veth") };
    assert_eq!(classify(&pod, &rules, &context), Some(Role::Pod));
    let rules = Rules { external: vec![], pod: globs(&["lxc*"]) };
    assert_eq!(classify(&pod, &rules, &context), None);
    assert_eq!(classify(&device("lxc1", ""), &rules, &context), Some(Role::Pod));
}

#[test]
fn entry_prefers_primary_addresses_that_are_not_deprecated() {
    let mut temporary = address("2001:db8::2", 64);
    temporary.secondary = true;
    let mut old = address("2001:db8::3", 64);
    old.deprecated = true;
    let link_local = Address { global: false, ..address("fe80::1", 64) };
    let addresses = vec![link_local, old, temporary, address("2001:db8::4", 64), address("192.0.2.1", 24)];
    let device = entry(&LinkFacts { addresses, ..device("eth0", "") }, Role::External);
    let snat6: std::net::Ipv6Addr = "2001:db8::4".parse().expect("an address");
    let snat4: std::net::Ipv4Addr = "192.0.2.1".parse().expect("an address");
    assert_eq!((device.flags, device.snat4, device.snat6), (1, snat4.into(), v6(snat6)));
    let none = entry(&super::tests::device("veth1", "veth"), Role::Pod);
    assert_eq!(none, Device::default());
}

#[test]
fn local_addresses_are_global_ones_of_devices_that_are_up() {
    let up = LinkFacts {
        addresses: vec![
            address("192.0.2.1", 24),
            address("127.0.0.1", 8),
            Address { global: false, ..address("fe80::1", 64) },
        ],
        ..device("eth0", "")
    };
    let down = LinkFacts { up: false, addresses: vec![address("192.0.2.9", 24)], ..device("eth1", "") };
    let expected: IpAddr = "192.0.2.1".parse().expect("an address");
    assert_eq!(local_addresses([&up, &down]), [expected].into());
}

#[test]
fn automatic_xdp_is_for_wires_only() {
    use crate::datapath::Xdp;
    let nic = LinkFacts { on_bus: true, ..device("ens3", "") };
    let veth = device("eth0", "veth");
    assert_eq!(wanted_xdp(&nic, Role::External, XdpSetting::Auto), Xdp::Native);
    assert_eq!(wanted_xdp(&veth, Role::External, XdpSetting::Auto), Xdp::None);
    assert_eq!(wanted_xdp(&veth, Role::External, XdpSetting::Native), Xdp::Native);
    assert_eq!(wanted_xdp(&veth, Role::External, XdpSetting::Generic), Xdp::Generic);
    assert_eq!(wanted_xdp(&nic, Role::Pod, XdpSetting::Native), Xdp::None);
    assert_eq!(wanted_xdp(&nic, Role::External, XdpSetting::Off), Xdp::None);
    let trunk = LinkFacts { carries_vlans: true, ..nic.clone() };
    assert_eq!(wanted_xdp(&trunk, Role::External, XdpSetting::Auto), Xdp::None);
    let bond = LinkFacts { kind: "bond".into(), ..nic };
    assert_eq!(wanted_xdp(&bond, Role::External, XdpSetting::Native), Xdp::None);
}

#[test]
fn the_node_lends_the_addresses_of_its_default_route() {
    let with = |ifindex, ips: &[(&str, u8)]| LinkFacts {
        ifindex,
        addresses: ips.iter().map(|(ip, prefix)| address(ip, *prefix)).collect(),
        ..device("eth", "")
    };
    let links =
        [with(3, &[("198.51.100.1", 24)]), with(9, &[("192.0.2.1", 24)]), with(10, &[("2001:db8::1", 64)])];
    let context = Context { default_route: [9].into(), ..Default::default() };
    let node = node_entry(&links, &context);
    assert_eq!(std::net::Ipv4Addr::from(node.snat4).to_string(), "192.0.2.1");
    assert_eq!(
        node.snat6,
        v6("2001:db8::1".parse().expect("an address")),
        "any device's, if the first has none"
    );
    let down = LinkFacts { up: false, ..links[1].clone() };
    assert_eq!(
        std::net::Ipv4Addr::from(node_entry([&links[0], &down], &context).snat4).to_string(),
        "198.51.100.1"
    );
}

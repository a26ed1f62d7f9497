//! What addresses are as a whole, and where ClusterIPs come from (rule C7).

use std::collections::BTreeSet;

use ipnet::IpNet;
use lb_common::{
    cidr::{CAPACITY, flags::*},
    frontend::flags,
    select::{Unlisted, unlisted},
};

use super::world::*;
use crate::{
    model::{Change, Service, ServiceCidr, ServiceKey},
    plan::{ActualCidr, Anomaly, MapOp, Planner, Rejection, op::Family},
};

fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

fn cidrs(name: &str, list: &[&str]) -> Change {
    Change::ServiceCidr(ServiceCidr { name: name.into(), cidrs: list.iter().map(|c| net(c)).collect() })
}

fn active(world: &World) -> Vec<(String, u32)> {
    world.kernel.active_cidrs().iter().map(|(net, flags)| (net.to_string(), *flags)).collect()
}

/// What becomes of a packet to a port of this address that no Service has.
fn unlisted_port(world: &World, addr: &str) -> Unlisted {
    let addr = ip(addr);
    let value = lb_common::frontend::FrontendValue {
        service: 0,
        flags: world.kernel.addresses.get(&addr).copied().unwrap_or(0),
    };
    let around = world.kernel.active_cidrs().into_iter().filter(|(net, _)| net.contains(&addr));
    unlisted((value.flags != 0).then_some(value), around.fold(0, |all, (_, flags)| all | flags))
}

const KNOWN: u32 = ACTIVE | DROP_UNASSIGNED;

#[test]
fn c7_unlisted_ports_are_rejected_and_unassigned_addresses_of_a_service_cidr_dropped() {
    let mut world = with(external_local(), &[ready("10.0.0.1")]);
    assert_eq!(unlisted_port(&world, "10.96.0.1"), Unlisted::Reject);
    assert_eq!(unlisted_port(&world, "10.96.0.2"), Unlisted::Pass, "nobody says where ClusterIPs come from");
    assert_eq!(active(&world), [("10.96.0.1/32".to_owned(), ACTIVE)]);
    world.change([cidrs("kubernetes", &["10.96.0.0/16", "2001:db8:96::/112"])]);
    assert_eq!(active(&world), [("10.96.0.0/16".to_owned(), KNOWN), ("2001:db8:96::/112".to_owned(), KNOWN)]);
    assert_eq!(unlisted_port(&world, "10.96.0.1"), Unlisted::Reject);
    assert_eq!(unlisted_port(&world, "10.96.0.2"), Unlisted::Drop);
    for other_kind in ["192.0.2.1", "198.51.100.1", "203.0.113.1", "10.95.0.1"] {
        assert_eq!(unlisted_port(&world, other_kind), Unlisted::Pass, "{other_kind}");
    }
    // The objects are followed.
    world.change([cidrs("more", &["10.97.0.0/16"])]);
    assert_eq!(unlisted_port(&world, "10.97.3.4"), Unlisted::Drop);
    world.change([Change::DeleteServiceCidr("kubernetes".into())]);
    assert_eq!(unlisted_port(&world, "10.96.0.2"), Unlisted::Pass);
    world.change([Change::DeleteServiceCidr("more".into())]);
    assert_eq!(active(&world), [("10.96.0.1/32".to_owned(), ACTIVE)]);
    world.assert_right();
}

#[test]
fn c7_service_cidrs_of_the_settings_count_too() {
    let mut world = World::new(ROOMY);
    world.node.service_cidrs = vec![net("10.96.0.0/17"), net("10.96.128.0/17")];
    world.plan_all();
    assert_eq!(active(&world), [("10.96.0.0/16".to_owned(), KNOWN)], "neighbours are one range");
    world.change([cidrs("kubernetes", &["10.96.5.0/24"])]);
    assert_eq!(active(&world).len(), 1, "covered");
}

#[test]
fn c7_a_cluster_ip_without_ports_or_without_room_is_assigned() {
    let mut world = World::new(crate::plan::Capacities { services: 2, ..ROOMY });
    world.change([
        cidrs("kubernetes", &["10.96.0.0/16"]),
        Change::Service(service("a", &["10.96.0.1"])),
        Change::Service(service("b", &["10.96.0.2"])),
        Change::Service(Service { ports: Vec::new(), ..service("c", &["10.96.0.3"]) }),
    ]);
    assert!(!world.taken().is_empty(), "b has no record");
    for assigned in ["10.96.0.1", "10.96.0.2", "10.96.0.3"] {
        assert_eq!(unlisted_port(&world, assigned), Unlisted::Reject, "{assigned}");
    }
    world.change([Change::DeleteService(ServiceKey::new("default", "c"))]);
    assert_eq!(unlisted_port(&world, "10.96.0.3"), Unlisted::Drop);
}

#[test]
fn c7_packets_to_a_cluster_ip_of_another_proxy_pass() {
    let mut world = with(service("web", &["10.96.0.1"]), &[ready("10.0.0.1")]);
    world.change([cidrs("kubernetes", &["10.96.0.0/16"])]);
    let foreign = Service { proxy_name: Some("other".into()), ..service("web", &["10.96.0.1"]) };
    world.change([Change::Service(foreign)]);
    assert_eq!((world.both("10.96.0.1:80").as_str(), world.kernel.frontends.len()), ("pass", 0));
    assert_eq!(unlisted_port(&world, "10.96.0.1"), Unlisted::Pass);
    // I9: and back.
    world.change([Change::Service(service("web", &["10.96.0.1"]))]);
    assert_eq!(unlisted_port(&world, "10.96.0.1"), Unlisted::Reject);
    world.assert_right();
}

#[test]
fn c7_the_strongest_kind_of_an_address_counts() {
    let lb = Service { load_balancer_ips: vec![ip("10.96.0.1"), ip("192.0.2.1")], ..external_local() };
    let world = with(lb, &[ready("10.0.0.1")]);
    assert_eq!(world.kernel.addresses[&ip("10.96.0.1")], flags::KIND_CLUSTER_IP);
    assert_eq!(world.kernel.addresses[&ip("192.0.2.1")], flags::KIND_NODE_PORT, "the node has it itself");
    assert_eq!(world.kernel.addresses[&ip("192.0.2.2")], flags::KIND_NODE_PORT);
    assert_eq!(world.kernel.addresses[&ip("203.0.113.1")], flags::KIND_EXTERNAL_IP);
}

#[test]
fn c7_without_service_cidrs_the_prefix_around_cluster_ips_follows_them() {
    let mut world = World::new(ROOMY);
    let mut expect = |changes: Vec<Change>, prefix: &[&str]| {
        world.change(changes);
        let now: Vec<String> = active(&world)
            .into_iter()
            .map(|(net, flags)| {
                assert_eq!(flags, ACTIVE);
                net
            })
            .collect();
        assert_eq!(now, prefix);
    };
    expect(vec![Change::Service(service("a", &["10.96.0.1"]))], &["10.96.0.1/32"]);
    expect(vec![Change::Service(service("b", &["10.96.0.200"]))], &["10.96.0.0/24"]);
    expect(
        vec![Change::Service(service("c", &["10.96.0.50", "2001:db8::1"]))],
        &["10.96.0.0/24", "2001:db8::1/128"],
    );
    expect(
        vec![Change::DeleteService(ServiceKey::new("default", "b"))],
        &["10.96.0.0/26", "2001:db8::1/128"],
    );
}

#[test]
fn c7_more_ranges_than_elements_are_said_and_the_largest_are_kept() {
    let mut world = World::new(ROOMY);
    let many: Vec<String> =
        (0..=CAPACITY).map(|i| format!("10.{}.0.0/16", 2 * i)).chain(["172.16.0.0/12".into()]).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    world.change([cidrs("kubernetes", &many)]);
    assert_eq!(world.kernel.active_cidrs().len(), CAPACITY as usize);
    assert!(world.kernel.active_cidrs().contains(&(net("172.16.0.0/12"), KNOWN)));
    let left_out = ["10.14.0.0/16", "10.16.0.0/16"]
        .map(|c| Rejection::TooManyCidrs { cidr: net(c), capacity: CAPACITY });
    assert_eq!(world.taken(), left_out);
    assert!(left_out[0].to_string().starts_with("ServiceCIDR 10.14.0.0/16 is one too many: 8 of a family"));
    // All of them at once give way to others, with one grace period.
    let others: Vec<String> = (0..CAPACITY).map(|i| format!("10.{}.0.0/17", 2 * i + 100)).collect();
    world.change([cidrs("kubernetes", &others.iter().map(String::as_str).collect::<Vec<_>>())]);
    assert_eq!(world.taken(), []);
    let now: BTreeSet<(IpNet, u32)> = others.iter().map(|c| (net(c), KNOWN)).collect();
    assert_eq!(world.kernel.active_cidrs(), now);
}

/// A first sync, or an agent that comes back, must not drop packets to addresses that it is about to program.
#[test]
fn i6_ranges_count_only_after_every_address_in_them_is_known() {
    let mut world = World::new(ROOMY);
    let plan = world.change([
        cidrs("kubernetes", &["10.96.0.0/16"]),
        Change::Service(service("a", &["10.96.0.1"])),
        Change::Service(service("b", &["10.96.0.2"])),
    ]);
    let position = |what: &dyn Fn(&MapOp) -> bool| plan.ops.iter().rposition(what).expect("an operation");
    let opened = plan.ops.iter().position(|op| matches!(op, MapOp::SwitchCidr { .. })).expect("an operation");
    assert!(position(&|op| matches!(op, MapOp::PutAddress { .. })) < opened);
    assert!(position(&|op| matches!(op, MapOp::PutFrontend { .. })) < opened);
    // What goes, goes before the addresses in it do.
    let plan = world.change([
        Change::DeleteServiceCidr("kubernetes".into()),
        Change::DeleteService(ServiceKey::new("default", "a")),
        Change::DeleteService(ServiceKey::new("default", "b")),
    ]);
    assert_eq!(plan.ops[0], MapOp::SwitchCidr { family: Family::V4, index: 0, flags: 0 });
    assert_eq!(active(&world), []);
}

#[test]
fn i6_a_restart_keeps_ranges_and_addresses_and_repairs_strange_ones() {
    let mut world = with(external_local(), &[ready("10.0.0.1")]);
    world.change([cidrs("kubernetes", &["10.96.0.0/16"])]);
    world.restart();
    assert_eq!(world.plan_all().ops, []);
    let mut actual = world.kernel.read();
    let strange = ActualCidr { net: None, flags: 7 };
    actual.cidrs.insert((Family::V6, 3), strange);
    let wrong = lb_common::frontend::FrontendValue { service: 5, flags: flags::KIND_NODE_PORT };
    actual.addresses.insert(ip("10.96.0.1"), wrong);
    actual.addresses.insert(ip("10.99.0.1"), wrong);
    let (mut planner, anomalies) = Planner::recover(ROOMY, actual);
    assert_eq!(anomalies, [Anomaly::CidrInvalid { family: Family::V6, index: 3, flags: 7 }]);
    let ops = planner.plan_all(&world.model, &world.node).ops;
    let expected = [
        MapOp::SwitchCidr { family: Family::V6, index: 3, flags: 0 },
        MapOp::PutAddress { addr: ip("10.96.0.1"), kind: flags::KIND_CLUSTER_IP },
        MapOp::DeleteAddress { addr: ip("10.99.0.1") },
        MapOp::Grace,
    ];
    assert_eq!(ops, expected);
}

#[test]
fn f4_loopback_frontends_are_for_sockets_and_have_no_address_entry() {
    let mut world = World::new(ROOMY);
    world.node.loopback_addresses = [ip("127.0.0.1"), ip("::1")].into();
    world.change([
        Change::Service(external_local()),
        Change::Slice(slice("s", "web", &[ready("10.0.0.1"), ready("10.0.0.2").here()])),
    ]);
    world.assert_right();
    let value = world.kernel.frontends[&frontend("127.0.0.1:30080")];
    assert_eq!(value.flags, flags::KIND_NODE_PORT | flags::EXTERNAL_LOCAL | flags::LOOPBACK);
    // Localhost is inside: all endpoints, whatever the external policy.
    assert_eq!(world.ask("127.0.0.1:30080")[0], "10.0.0.1:8080 10.0.0.2:8080");
    assert!(!world.kernel.addresses.contains_key(&ip("127.0.0.1")));
    assert!(!world.kernel.frontends.contains_key(&frontend("[::1]:30080")), "the Service has no IPv6");
}

//! `spec.loadBalancerSourceRanges` (rules E1 to E4).

use lb_common::frontend::flags;

use super::world::*;
use crate::{
    model::{Change, Service, ServiceKey},
    plan::{Anomaly, Capacities, MapOp, Planner, Rejection, Resource, op::Family},
};

const LB: &str = "198.51.100.1:80";

fn ranged(ranges: &[&str]) -> Service {
    let ranges = ranges.iter().map(|r| r.parse().expect("a prefix")).collect();
    Service { source_ranges: Some(ranges), ..external_local() }
}

fn admits(world: &World, to: &str, from: &str) -> bool {
    world.kernel.admits(&frontend(to), ip(from))
}

fn ranges(world: &World) -> Vec<String> {
    world.kernel.ranges.iter().map(|(_, net)| net.to_string()).collect()
}

#[test]
fn e1_source_ranges_gate_load_balancer_addresses_alone() {
    let world = with(ranged(&["10.1.0.0/16"]), &[ready("10.0.0.1").here()]);
    assert!(admits(&world, LB, "10.1.2.3") && !admits(&world, LB, "10.2.2.3"));
    for other in ["10.96.0.1:80", "192.0.2.1:30080", "203.0.113.1:80"] {
        assert!(admits(&world, other, "10.2.2.3"), "{other}");
    }
}

#[test]
fn e2_pods_and_nodes_outside_of_the_ranges_are_not_admitted_either() {
    let world = with(ranged(&["203.0.113.0/24"]), &[ready("10.0.0.1").here()]);
    // A pod, this node, another node.
    for inside in ["10.0.0.1", "192.0.2.1", "192.0.2.77"] {
        assert!(!admits(&world, LB, inside), "{inside}");
    }
    assert_eq!(world.kernel.frontends[&frontend(LB)].flags & flags::NODE_IN_RANGES, 0);
}

#[test]
fn e3_if_this_node_is_in_a_range_its_packets_from_the_balancers_address_are_admitted() {
    let mut world = with(ranged(&["192.0.2.0/24"]), &[ready("10.0.0.1").here()]);
    assert!(admits(&world, LB, "198.51.100.1"));
    assert!(world.kernel.frontends[&frontend(LB)].flags & flags::NODE_IN_RANGES != 0);
    assert!(!admits(&world, LB, "198.51.100.2"));
    // The node's address goes, and with it the exception.
    world.node.own_addresses = [ip("10.9.9.9")].into();
    world.plan_all();
    assert!(!admits(&world, LB, "198.51.100.1"));
    assert_eq!(ranges(&world), ["192.0.2.0/24"]);
    world.assert_right();
}

#[test]
fn e4_a_zero_length_prefix_is_no_filter() {
    let world = with(ranged(&["10.1.0.0/16", "0.0.0.0/0"]), &[ready("10.0.0.1").here()]);
    assert!(admits(&world, LB, "8.8.8.8"));
    assert_eq!(world.kernel.frontends[&frontend(LB)].flags & flags::SOURCE_RANGES, 0);
    assert!(world.kernel.ranges.is_empty());
}

#[test]
fn e4_ranges_of_one_family_leave_the_other_one_open_and_that_is_said() {
    let dual = Service {
        cluster_ips: vec![ip("10.96.0.1"), ip("2001:db8:96::1")],
        load_balancer_ips: vec![ip("198.51.100.1"), ip("2001:db8:5::1")],
        ..ranged(&["10.1.0.0/16"])
    };
    let mut world = with(dual.clone(), &[ready("10.0.0.1").here()]);
    assert!(!admits(&world, LB, "8.8.8.8") && admits(&world, "[2001:db8:5::1]:80", "2001:db9::1"));
    let service = ServiceKey::new("default", "web");
    assert_eq!(world.taken(), [Rejection::UnfilteredFamily { service, family: Family::V6 }]);
    assert!(world.taken()[0].to_string().contains("has no IPv6 range"), "{}", world.taken()[0]);
    let both = ["10.1.0.0/16", "2001:db8::/32"].map(|r| r.parse().expect("a prefix"));
    world.change([Change::Service(Service { source_ranges: Some(both.into()), ..dual })]);
    assert_eq!(world.taken(), []);
    assert!(!admits(&world, "[2001:db8:5::1]:80", "2001:db9::1"));
    world.assert_right();
}

#[test]
fn e4_ranges_that_cannot_be_understood_admit_nobody() {
    let world = with(ranged(&[]), &[ready("10.0.0.1").here()]);
    assert!(!admits(&world, LB, "10.1.2.3"));
}

/// Ranges before the flag that asks for them; what is narrowed, at once.
#[test]
fn e4_whoever_is_admitted_before_and_after_is_admitted_in_between() {
    let mut world = with(external_local(), &[ready("10.0.0.1").here()]);
    for set in [
        &["10.1.0.0/16"][..],
        &["10.0.0.0/8"],
        &["10.1.0.0/16", "10.1.128.0/17", "10.3.0.0/16"],
        &["10.1.0.0/17"],
    ] {
        let mut now = world.kernel.clone();
        let plan = world.change([Change::Service(ranged(set))]);
        now.begin();
        for op in &plan.ops {
            now.apply(op);
            assert!(now.admits(&frontend(LB), ip("10.1.2.3")), "after {op:?}");
        }
        world.assert_right();
    }
    assert!(!admits(&world, LB, "10.1.200.3"));
    let plan = world.change([Change::DeleteService(ServiceKey::new("default", "web"))]);
    let at = |what: &dyn Fn(&MapOp) -> bool| plan.ops.iter().position(what).expect("an operation");
    let deleted = at(&|op| matches!(op, MapOp::DeleteRange { .. }));
    assert!(deleted < at(&|op| matches!(op, MapOp::ClearService { .. })), "before the id is reused");
    assert!(world.kernel.ranges.is_empty());
}

#[test]
fn e4_ranges_that_do_not_fit_admit_nobody_until_there_is_room() {
    let mut world = World::new(Capacities { source_ranges: 2, ..ROOMY });
    let other = Service {
        key: ServiceKey::new("default", "other"),
        cluster_ips: vec![ip("10.96.0.2")],
        load_balancer_ips: vec![ip("198.51.100.2")],
        external_ips: Vec::new(),
        ports: vec![port("", crate::plan::op::Protocol::Tcp, 80, 0)],
        ..ranged(&["10.1.0.0/16"])
    };
    world.change([Change::Service(other)]);
    world.change([Change::Service(ranged(&["10.1.0.0/16", "10.3.0.0/16"]))]);
    let admitted = ["10.1.2.3", "10.3.2.3"].map(|from| admits(&world, LB, from));
    assert_eq!(admitted, [true, false]);
    let expected = Rejection::Full {
        service: ServiceKey::new("default", "web"),
        record: "default/web/TCP/v4".into(),
        resource: Resource::SourceRanges(Family::V4),
        capacity: 2,
    };
    assert!(expected.to_string().ends_with("are full (2): raise --max-source-ranges"), "{expected}");
    assert_eq!(world.taken(), [expected]);
    assert!(world.change([Change::DeleteService(ServiceKey::new("default", "other"))]).retry);
    world.change([]);
    assert!(admits(&world, LB, "10.3.2.3"));
    assert_eq!(world.taken(), []);
}

#[test]
fn e4_ranges_survive_a_restart_and_those_of_nobody_go_before_their_record_is_anybodys() {
    let mut world = with(ranged(&["10.1.0.0/16"]), &[ready("10.0.0.1").here()]);
    world.restart();
    assert_eq!(world.plan_all().ops, []);
    let net = "10.7.0.0/16".parse().expect("a prefix");
    world.kernel.ranges.insert((2, net));
    world.kernel.ranges.insert((1, net));
    let (planner, anomalies) = Planner::recover(ROOMY, world.kernel.read());
    assert_eq!(anomalies, [Anomaly::RangeDangles { service: 2, net }]);
    world.planner = planner;
    // Id 2 would be the next one.
    let _ = world.model.apply(Change::Service(service("next", &["10.96.0.9"])));
    let plan = world.planner.plan_all(&world.model, &world.node);
    world.kernel.apply_all(&plan.ops);
    assert_eq!(world.kernel.frontends[&frontend("10.96.0.9:80")].service, 3);
    assert_eq!(ranges(&world), ["10.1.0.0/16"]);
    world.assert_right();
}

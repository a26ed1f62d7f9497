//! Services whose objects cannot be read when the agent starts, and what the first plan says about flows.

use super::world::*;
use crate::{
    model::{Change, Model, ServiceKey, SliceKey},
    plan::{Held, op::Protocol},
};

/// Two Services, and an agent that starts again without any object.
fn restarted() -> World {
    let mut world = World::with([
        Change::Service(external_local()),
        Change::Slice(slice("sw", "web", &[ready("10.0.0.1")])),
        Change::Service(service("b", &["10.96.0.2"])),
        Change::Slice(slice("sb", "b", &[ready("10.0.0.2")])),
    ]);
    world.restart();
    world.model = Model::new(NODE);
    world
}

fn held(names: &[&str], unknown: bool) -> Held {
    Held { services: names.iter().map(|n| ServiceKey::new("default", n)).collect(), unknown }
}

#[test]
fn i7_a_service_that_cannot_be_read_at_start_stays_as_it_was() {
    let mut world = restarted();
    world.planner.set_held(held(&["web"], false));
    world.plan_all();
    assert_eq!(world.both("10.96.0.1:80"), "10.0.0.1:8080");
    assert_eq!(world.both("10.96.0.2:80"), "pass", "b is gone");
    assert!(world.kernel.addresses.contains_key(&ip("198.51.100.1")));
    // Again and again, by changes of others, and by an audit.
    world.change([Change::Service(service("c", &["10.96.0.3"]))]);
    assert_eq!(world.plan_all().ops, []);
    world.restart();
    world.planner.set_held(held(&["web"], false));
    assert_eq!(world.plan_all().ops, []);
    // It can be read now, and is another one.
    let _ = world.model.apply(Change::Service(external_local()));
    let _ = world.model.apply(Change::Slice(slice("sw", "web", &[ready("10.0.0.9")])));
    world.planner.set_held(Held::default());
    world.plan_all();
    assert_eq!(world.both("10.96.0.1:80"), "10.0.0.9:8080");
    world.assert_right();
}

#[test]
fn i7_a_service_that_is_gone_for_good_goes_once_nothing_is_missing() {
    let mut world = restarted();
    world.planner.set_held(held(&["web"], false));
    world.plan_all();
    world.planner.set_held(Held::default());
    world.plan_all();
    assert!(world.kernel.frontends.is_empty() && world.kernel.addresses.is_empty());
    world.assert_right();
}

#[test]
fn i7_what_cannot_be_read_at_all_may_be_any_object_that_is_missing() {
    let mut world = restarted();
    // web's slice is missing, b altogether.
    let _ = world.model.apply(Change::Service(external_local()));
    world.planner.set_held(held(&[], true));
    assert_eq!(world.plan_all().ops, []);
    // A Service that nothing is missing of is planned.
    world.change([Change::Slice(slice("sw", "web", &[ready("10.0.0.9")]))]);
    assert_eq!(world.both("10.96.0.1:80"), "10.0.0.9:8080");
    assert_eq!(world.both("10.96.0.2:80"), "10.0.0.2:8080");
    // From here on its objects are known, whatever cannot be read.
    world.change([Change::DeleteSlice(SliceKey::new("default", "sw"))]);
    assert_eq!(world.both("10.96.0.1:80"), "refuse");
}

#[test]
fn i7_what_is_held_keeps_its_frontends_from_whoever_comes_later_in_the_alphabet() {
    let mut world = restarted();
    world.planner.set_held(held(&["b"], false));
    let _ = world.model.apply(Change::Service(service("c", &["10.96.0.2"])));
    world.plan_all();
    assert_eq!(world.both("10.96.0.2:80"), "10.0.0.2:8080");
    assert_eq!(world.taken().len(), 1);
}

/// Its flows would go on to a backend that nobody stands behind any more.
#[test]
fn i1_udp_records_whose_service_went_while_no_agent_ran_are_retired() {
    let udp = crate::model::Service {
        ports: vec![port("", Protocol::Udp, 53, 0)],
        ..service("dns", &["10.96.0.10"])
    };
    let mut world = World::with([Change::Service(udp)]);
    world.restart();
    world.model = Model::new(NODE);
    let plan = world.plan_all();
    assert_eq!(plan.retired.iter().map(|r| (r.service, r.serving.len())).collect::<Vec<_>>(), [(1, 0)]);
}

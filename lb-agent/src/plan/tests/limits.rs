//! Maps that are too small.

use super::world::*;
use crate::{
    model::{Change, ServiceKey, SliceKey},
    plan::{Capacities, Plan, Rejection, Resource, op::Family},
};

fn full(plan: &Plan) -> Vec<(Resource, String)> {
    let what = |r: &Rejection| match r {
        Rejection::Full { resource, service, .. } => (*resource, service.to_string()),
        other => panic!("{other:?}"),
    };
    let mut all: Vec<_> = plan.rejections.iter().map(what).collect();
    // A frontend and its address share a map.
    all.dedup();
    all
}

/// Services `a`, `b`, ... each with its own VIP and its own `n` endpoints.
fn services(names: &[&str], n: u8) -> Vec<Change> {
    let mut changes = Vec::new();
    for name in names {
        let i = name.as_bytes()[0] - b'a';
        changes.push(Change::Service(service(name, &[&format!("10.96.0.{i}")])));
        let endpoints: Vec<_> = (0..n).map(|e| ready(&format!("10.0.{i}.{e}"))).collect();
        changes.push(Change::Slice(slice(name, name, &endpoints)));
    }
    changes
}

fn delete(name: &str) -> Change {
    Change::DeleteService(ServiceKey::new("default", name))
}

/// `a` and `b` fit, `c` does not, until `a` is gone.
fn third_waits_for_the_first(capacities: Capacities, resource: Resource) {
    let mut world = World::new(capacities);
    let plan = world.change(services(&["a", "b", "c"], 2));
    assert_eq!(full(&plan), [(resource, "default/c".to_owned())]);
    assert!(!plan.retry);
    assert!(plan.rejections[0].to_string().contains(resource.remedy()), "{}", plan.rejections[0]);
    for (vip, expected) in
        [("10.96.0.0:80", "10.0.0.0:8080 10.0.0.1:8080"), ("10.96.0.1:80", "10.0.1.0:8080 10.0.1.1:8080")]
    {
        assert_eq!(world.both(vip), expected);
    }
    assert_eq!(world.both("10.96.0.2:80"), "pass");
    world.kernel.assert_consistent();
    assert_eq!(world.change([]).ops, [], "nothing was freed, nothing is tried");
    let plan = world.change([delete("a")]);
    assert!(plan.retry);
    let plan = world.change([]);
    assert!(!plan.retry);
    assert_eq!(world.both("10.96.0.2:80"), "10.0.2.0:8080 10.0.2.1:8080");
    assert_eq!(world.taken(), []);
    world.assert_right();
}

#[test]
fn a_rejection_names_what_to_raise() {
    let service = ServiceKey::new("default", "a");
    let record = "default/a/TCP/v4".to_owned();
    let rejection = Rejection::Full { service, record, resource: Resource::Slots, capacity: 5 };
    assert_eq!(rejection.to_string(), "default/a/TCP/v4: backend slots are full (5): raise --max-slots");
}

#[test]
fn full_services() {
    third_waits_for_the_first(Capacities { services: 3, ..ROOMY }, Resource::Services);
}

#[test]
fn full_slots() {
    third_waits_for_the_first(Capacities { slots: 5, ..ROOMY }, Resource::Slots);
}

#[test]
fn full_backends() {
    third_waits_for_the_first(Capacities { backends: 6, ..ROOMY }, Resource::Backends(Family::V4));
}

#[test]
fn full_frontends() {
    let mut world = World::new(Capacities { frontends: 4, ..ROOMY });
    let plan = world.change(services(&["a", "b", "c"], 1));
    assert_eq!(full(&plan), [(Resource::Frontends(Family::V4), "default/c".to_owned())]);
    assert_eq!(world.both("10.96.0.2:80"), "pass");
    assert!(world.change([delete("b")]).retry);
    world.change([]);
    assert_eq!(world.both("10.96.0.2:80"), "10.0.2.0:8080");
    world.assert_right();
}

#[test]
fn full_members_cost_the_memory_not_the_service() {
    let mut world = World::new(Capacities { members: 3, ..ROOMY });
    let changes = services(&["a", "b"], 2).into_iter().map(|change| match change {
        Change::Service(s) => Change::Service(crate::model::Service { affinity_timeout_s: Some(60), ..s }),
        other => other,
    });
    let plan = world.change(changes);
    assert_eq!(full(&plan), [(Resource::Members, "default/b".to_owned())]);
    assert_eq!(world.both("10.96.0.1:80"), "10.0.1.0:8080 10.0.1.1:8080");
    assert!(world.change([delete("a")]).retry);
    world.change([]);
    assert_eq!(world.taken(), []);
    world.assert_right();
}

#[test]
fn a_set_that_does_not_fit_leaves_the_service_as_it_was() {
    let mut world = World::new(Capacities { slots: 5, ..ROOMY });
    world.change(services(&["a"], 2));
    let plan = world.change(services(&["a"], 4));
    assert_eq!(full(&plan), [(Resource::Slots, "default/a".to_owned())]);
    assert_eq!((plan.ops, plan.retry), (vec![], false));
    assert_eq!(world.both("10.96.0.0:80"), "10.0.0.0:8080 10.0.0.1:8080");
    world.kernel.assert_consistent();
    // Fewer fit again.
    world.change(services(&["a"], 3));
    assert_eq!(world.taken(), []);
    world.assert_right();
    world.change([Change::DeleteSlice(SliceKey::new("default", "a"))]);
    assert_eq!(world.both("10.96.0.0:80"), "refuse");
    world.assert_right();
}

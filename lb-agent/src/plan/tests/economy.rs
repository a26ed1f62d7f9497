//! Plans hold nothing but what changed.

use super::world::*;
use crate::model::{Change, ExternalPolicy, Service};

#[test]
fn only_what_changed_is_written() {
    let endpoints = [ready("10.0.0.1"), ready("10.0.0.2").here()];
    let mut world = with(external_local(), &endpoints);
    let plan = world.change([Change::Slice(slice("s", "web", &[endpoints[1].clone(), ready("10.0.0.3")]))]);
    let kinds: Vec<String> = plan
        .ops
        .iter()
        .map(|op| format!("{op:?}").split(' ').next().unwrap_or_default().to_owned())
        .collect();
    assert_eq!(kinds, ["WriteBackend", "WriteSlots", "WriteService", "Grace", "ClearBackend"]);
    assert_eq!(world.change([Change::Service(external_local())]).ops, []);
    let plan = world
        .change([Change::Service(Service { external_policy: ExternalPolicy::Cluster, ..external_local() })]);
    assert_eq!(plan.ops.len(), EXTERNAL.len(), "{plan:?}");
    world.assert_right();
}

/// One changed endpoint costs work in proportion to its Service, and so does a new Service.
#[test]
fn work_is_in_proportion_to_what_changed() {
    let mut world = World::new(ROOMY);
    let mut changes = Vec::new();
    for i in 0..250 {
        let name = format!("s{i}");
        changes.push(Change::Service(service(&name, &[&format!("10.96.0.{i}")])));
        changes.push(Change::Slice(slice(&name, &name, &[ready(&format!("10.0.{i}.1"))])));
    }
    let plan = world.change(changes);
    let each = 250 * 6;
    assert_eq!(
        plan.ops.len(),
        each + 3,
        "name, backend, slots, record, address, frontend; around all: one range"
    );
    let plan = world.change([Change::Slice(slice("s7", "s7", &[ready("10.0.7.2")]))]);
    assert_eq!(plan.ops.len(), 5, "{plan:?}");
    let plan = world.change([node(Some("zone-b"))]);
    assert_eq!(plan.ops, []);
}

//! Taking over maps as a crash, or somebody else, left them.

use lb_common::{
    affinity::MemberKey,
    frontend::{FrontendValue, ServiceRecord, SlotRange},
};

use super::world::*;
use crate::{
    model::{Change, Service, ServiceKey},
    plan::{ActualState, Anomaly, MapOp, Planner, op::Backend, op::Family, op::Protocol},
};

/// Two Services, one with affinity, sharing a backend.
fn world() -> World {
    World::with([
        Change::Service(service("a", &["10.96.0.1"])),
        Change::Slice(slice("sa", "a", &[ready("10.0.0.1"), ready("10.0.0.2").here()])),
        Change::Service(Service { affinity_timeout_s: Some(60), ..service("b", &["10.96.0.2"]) }),
        Change::Slice(slice("sb", "b", &[ready("10.0.0.2").here()])),
    ])
}

/// Damages the kernel, restarts, plans; the result must be right and stay so.
fn repaired(damage: impl FnOnce(&mut World)) -> (World, Vec<Anomaly>) {
    let mut world = world();
    damage(&mut world);
    let (planner, anomalies) = Planner::recover(world.kernel.capacities, world.kernel.read());
    world.planner = planner;
    let plan = world.planner.plan_all(&world.model, &world.node);
    // Before the repair packets may meet anything, so only the end counts.
    world.kernel.apply_all(&plan.ops);
    world.assert_right();
    assert_eq!(world.plan_all().ops, []);
    world.change(["a", "b"].map(|name| Change::DeleteService(ServiceKey::new("default", name))));
    assert_eq!(world.planner.slots.free(), (world.kernel.capacities.slots, 1));
    assert_eq!(world.planner.record_ids.used() + world.planner.backends4.used(), 0);
    (world, anomalies)
}

#[test]
fn nothing_changes_if_nothing_is_wrong() {
    let mut world = world();
    world.restart();
    assert_eq!(world.plan_all().ops, []);
}

#[test]
fn a_restart_applies_only_the_difference() {
    let mut world = world();
    world.restart();
    let _ = world.model.apply(Change::Slice(slice("sb", "b", &[ready("10.0.0.3")])));
    // Asking for nothing in particular is asking for all, the first time.
    let plan = world.change([]);
    let touched = |op: &MapOp| matches!(op, MapOp::WriteService { service, .. } if *service == 1);
    assert!(!plan.ops.is_empty() && !plan.ops.iter().any(touched), "{plan:?}");
    world.assert_right();
}

#[test]
fn ids_survive_the_service_before_them() {
    let mut world = world();
    let id = world.kernel.frontends[&frontend("10.96.0.2:80")].service;
    world.restart();
    let _ = world.model.apply(Change::DeleteService(ServiceKey::new("default", "a")));
    world.plan_all();
    assert_eq!(world.kernel.frontends[&frontend("10.96.0.2:80")].service, id);
    world.assert_right();
}

/// A crash after any operation of any of these plans.
#[test]
fn a_crash_at_any_point_of_a_plan_is_made_good() {
    let changes = || {
        [
            Change::Service(Service { affinity_timeout_s: Some(9), ..service("c", &["10.96.0.3"]) }),
            Change::Slice(slice("sc", "c", &[ready("10.0.0.7")])),
            Change::Slice(slice("sa", "a", &[ready("10.0.0.8")])),
            Change::DeleteService(ServiceKey::new("default", "b")),
        ]
    };
    let length = world().change(changes()).ops.len();
    assert!(length > 10);
    for crash in 0..length {
        let mut world = world();
        for change in changes() {
            let _ = world.model.apply(change);
        }
        let plan = world.planner.plan_all(&world.model, &world.node);
        world.kernel.begin();
        plan.ops[..crash].iter().for_each(|op| world.kernel.apply(op));
        // A grace period later the agent is back.
        world.kernel.apply(&MapOp::Grace);
        let (planner, _) = Planner::recover(world.kernel.capacities, world.kernel.read());
        world.planner = planner;
        world.plan_all();
        world.assert_right();
        assert_eq!(world.plan_all().ops, [], "after a crash before {:?}", plan.ops[crash]);
    }
}

#[test]
fn a_range_outside_of_the_array() {
    for range in [SlotRange::new(u32::MAX, 3), SlotRange::new(ROOMY.slots - 1, 2), SlotRange::new(7, 0)] {
        let (_, anomalies) = repaired(|w| w.kernel.services.get_mut(&1).unwrap().cluster = range);
        let (base, len, capacity) = (range.base(), range.len(), ROOMY.slots);
        let expected = Anomaly::SlotsOutOfBounds { service: 1, base, len, capacity };
        assert_eq!(anomalies, if len == 0 { vec![] } else { vec![expected] });
    }
}

#[test]
fn two_records_with_the_same_slots() {
    let (_, anomalies) = repaired(|w| {
        let first = w.kernel.services[&1].cluster;
        w.kernel.services.get_mut(&2).unwrap().cluster = SlotRange::new(first.base() + 1, 4);
    });
    assert!(matches!(anomalies[..], [Anomaly::SlotsOverlap { service: 2, .. }, ..]), "{anomalies:?}");
}

#[test]
fn a_slot_that_names_no_backend() {
    for backend in [0, 77, 5000] {
        let (_, anomalies) = repaired(|w| {
            let base = w.kernel.services[&1].cluster.base();
            w.kernel.slots[base as usize] = backend;
        });
        assert_eq!(anomalies, [Anomaly::MissingBackend { service: 1, family: Family::V4, backend }]);
    }
}

#[test]
fn a_record_without_a_name_or_with_anothers() {
    let (_, anomalies) = repaired(|w| drop(w.kernel.names.remove(&1)));
    let dangles = Anomaly::FrontendDangles { frontend: frontend("10.96.0.1:80"), service: 1 };
    assert_eq!(anomalies, [Anomaly::Unnamed { service: 1, name: None }, dangles]);
    for nonsense in ["", "a", "x/y/z", "default/a/TCP/v5", "default/a/ICMP/v4"] {
        let (_, anomalies) = repaired(|w| drop(w.kernel.names.insert(1, nonsense.to_owned())));
        assert!(matches!(anomalies[0], Anomaly::Unnamed { service: 1, .. }), "{anomalies:?}");
    }
    let (_, anomalies) = repaired(|w| drop(w.kernel.names.insert(2, "default/a/TCP/v4".to_owned())));
    assert!(matches!(anomalies[0], Anomaly::DuplicateName { first: 1, second: 2, .. }), "{anomalies:?}");
}

#[test]
fn strange_frontends_members_backends_and_element_zero() {
    let backend = Backend { addr: ip("10.0.0.1"), port: 8080, protocol: Protocol::Tcp, local: true };
    let (_, anomalies) = repaired(|w| {
        let kernel = &mut w.kernel;
        kernel.frontends.insert(frontend("10.96.0.9:9"), FrontendValue { service: 1, flags: 0 });
        kernel.frontends.insert(frontend("10.96.0.8:9"), FrontendValue { service: 99, flags: 0 });
        kernel.frontends.get_mut(&frontend("10.96.0.1:80")).unwrap().service = 2;
        kernel.frontends.remove(&frontend("10.96.0.2:80"));
        kernel.members.insert(MemberKey { service: 99, backend: 1 }, 3);
        kernel.members.insert(MemberKey { service: 1, backend: 55 }, 3);
        kernel.members.insert(MemberKey { service: 2, backend: 2 }, 0);
        kernel.backends4.insert(0, backend);
        kernel.backends4.insert(60, backend);
        kernel.backends4.insert(61, Backend { port: 1, ..backend });
        kernel.services.insert(0, ServiceRecord { in_use: 1, ..ServiceRecord::default() });
    });
    assert_eq!(anomalies.len(), 5, "{anomalies:?}");
}

/// Empty maps, maps of nonsense, and no maps at all never panic.
#[test]
fn nonsense_is_survived() {
    let record = ServiceRecord {
        cluster: SlotRange::new(0, u32::MAX),
        local: SlotRange::new(u32::MAX, u32::MAX),
        affinity_timeout_s: 1,
        in_use: 7,
        _reserved: 9,
    };
    let service = |name: &str| crate::plan::ActualService { record, name: Some(name.to_owned()) };
    let actual = || ActualState {
        services: [(0, "x"), (1, "a/b/TCP/v4"), (2, "a/b/TCP/v4"), (u32::MAX, "a/b/UDP/v6")]
            .map(|(id, name)| (id, service(name)))
            .into(),
        slots: vec![9; 50],
        ..ActualState::default()
    };
    let world = world();
    for slots in [0, 10, 100] {
        let capacities = crate::plan::Capacities { slots, ..ROOMY };
        let (mut planner, anomalies) = Planner::recover(capacities, actual());
        assert!(!anomalies.is_empty());
        let plan = planner.plan_all(&world.model, &world.node);
        assert!(plan.ops.contains(&MapOp::ClearService { service: 1 }));
    }
}

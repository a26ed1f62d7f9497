use std::{collections::BTreeSet, net::IpAddr};

use super::super::core::tests::{FakeKernel, core_with, slice};
use super::*;
use crate::source::Missing;

fn addresses() -> BTreeSet<IpAddr> {
    BTreeSet::from([[192, 168, 0, 1].into()])
}

/// Two Services with two endpoints each, all programmed.
fn programmed() -> Core<FakeKernel> {
    let mut core = core_with(2);
    core.sync_early(&addresses()).unwrap();
    while core.begin_grace() {
        core.settle().unwrap();
    }
    core.kernel.plans.clear();
    core
}

fn last(core: &Core<FakeKernel>) -> &[MapOp] {
    core.kernel.plans.last().unwrap()
}

/// Slots that a plan writes, and backends.
fn written(ops: &[MapOp]) -> (Vec<u32>, Vec<u32>) {
    let slots = ops.iter().filter_map(|op| match op {
        MapOp::WriteSlots { base, .. } => Some(*base),
        _ => None,
    });
    let backends = ops.iter().filter_map(|op| match op {
        MapOp::WriteBackend { id, .. } => Some(*id),
        _ => None,
    });
    (slots.collect(), backends.collect())
}

fn clears(ops: &[MapOp]) -> usize {
    ops.iter().filter(|op| matches!(op, MapOp::ClearBackend { .. })).count()
}

#[test]
fn a_replaced_endpoint_is_in_force_before_the_grace_period_and_cleared_after_it() {
    let mut core = programmed();
    core.apply(&slice(0, &[0, 10]));
    let outcome = core.sync_early(&addresses()).unwrap();
    assert!(!last(&core).contains(&MapOp::Grace) && clears(last(&core)) == 0, "{:?}", last(&core));
    assert_eq!(written(last(&core)).1.len(), 1);
    assert!(outcome.retired.is_empty(), "packets may still open flows to what was replaced");
    assert!(core.begin_grace());
    assert!(!core.begin_grace(), "one has begun");
    let outcome = core.settle().unwrap();
    assert_eq!((last(&core).len(), clears(last(&core))), (1, 1));
    assert_eq!(outcome.retired.iter().map(|r| r.lost).collect::<Vec<_>>(), [true]);
    assert!(!core.begin_grace(), "nothing is left");
    let before = core.kernel.state.clone();
    assert_eq!(core.audit(&addresses()).unwrap().operations.values().sum::<u64>(), 0);
    assert_eq!(core.kernel.state, before);
}

#[test]
fn what_packets_may_use_is_written_by_nobody_until_it_is_given_back() {
    let mut core = programmed();
    let state = &core.kernel.state;
    let mut used: (BTreeSet<u32>, BTreeSet<u32>) =
        ((0..state.slots.len() as u32).collect(), state.backends4.keys().copied().collect());
    let mut change = |core: &mut Core<FakeKernel>, endpoint, is_new: bool| {
        core.apply(&slice(0, &[0, endpoint]));
        core.sync_early(&addresses()).unwrap();
        let (slots, backends) = written(last(core));
        // A Cluster and a Local set: all of them are on this node.
        assert_eq!((slots.len(), backends.len()), (2, 1));
        let are_new = slots.iter().filter(|base| used.0.insert(**base)).count();
        assert_eq!((are_new == 2, used.1.insert(backends[0])), (is_new, is_new), "{:?}", last(core));
    };
    change(&mut core, 10, true);
    assert!(core.begin_grace());
    // After it has begun: these wait for the next one.
    change(&mut core, 11, true);
    change(&mut core, 12, true);
    core.settle().unwrap();
    assert_eq!(clears(last(&core)), 1, "of the first change alone");
    assert!(core.begin_grace());
    core.settle().unwrap();
    assert_eq!(clears(last(&core)), 2);
    change(&mut core, 13, false);
}

#[test]
fn maps_that_are_read_again_are_waited_for_first() {
    let mut core = programmed();
    core.apply(&slice(0, &[0, 10]));
    core.sync_early(&addresses()).unwrap();
    assert!(core.begin_grace());
    core.apply(&slice(0, &[0, 11]));
    core.kernel.refuse = 1;
    core.sync_early(&addresses()).unwrap_err();
    core.kernel.plans.clear();
    let outcome = core.sync_early(&addresses()).unwrap();
    assert_eq!(core.kernel.plans[0], [MapOp::Grace]);
    assert!(outcome.retired.iter().any(|r| r.lost));
    core.kernel.plans.clear();
    core.settle().unwrap();
    assert!(core.kernel.plans.is_empty(), "what the grace period was begun for is done");
    while core.begin_grace() {
        core.settle().unwrap();
    }
    assert_eq!(core.kernel.state.backends4.len(), 4);
    assert_eq!(core.audit(&addresses()).unwrap().operations.values().sum::<u64>(), 0);
}

#[test]
fn a_turn_is_brief_if_a_few_services_have_changed_and_nothing_else() {
    let mut core = core_with(20);
    assert!(!core.is_brief(), "the maps have to be read first");
    core.sync_early(&addresses()).unwrap();
    assert!(core.is_brief());
    for i in 0..16 {
        core.apply(&slice(i, &[i, 100 + i]));
    }
    assert!(core.is_brief());
    core.apply(&slice(16, &[16, 116]));
    assert!(!core.is_brief());
    core.sync_early(&addresses()).unwrap();
    assert!(core.is_brief());
    core.missing(&Missing::default());
    assert!(!core.is_brief(), "every Service is planned again");
}

#[test]
fn a_grace_period_is_needed_until_one_has_begun_for_all_that_waits() {
    let mut core = programmed();
    assert!(!core.needs_grace());
    core.apply(&slice(0, &[0, 10]));
    core.sync_early(&addresses()).unwrap();
    assert!(core.needs_grace());
    assert!(core.begin_grace() && !core.needs_grace());
    core.apply(&slice(1, &[1, 11]));
    core.sync_early(&addresses()).unwrap();
    assert!(!core.needs_grace(), "the one that has begun comes first");
    core.settle().unwrap();
    assert!(core.needs_grace());
}

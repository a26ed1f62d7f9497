//! A plan in the making: operations by kind, put in order at the end.

use super::{Freed, Retired, op::MapOp, rejection::Rejection};

/// What is freed by a plan is collected here and given back only when the plan is complete: nothing that a packet may
/// still be using is written to before the plan's own grace period.
#[derive(Debug, Default)]
pub(super) struct Draft {
    /// Elements of `SERVICE_CIDRS4/6` that stop to count: before anything that they could drop goes.
    pub(super) close_cidrs: Vec<MapOp>,
    pub(super) names: Vec<MapOp>,
    pub(super) backends: Vec<MapOp>,
    pub(super) slots: Vec<MapOp>,
    pub(super) put_members: Vec<MapOp>,
    /// Before the frontends that ask for them.
    pub(super) put_ranges: Vec<MapOp>,
    pub(super) records: Vec<MapOp>,
    /// An address is known before its first frontend is, and until its last one is gone.
    pub(super) put_addresses: Vec<MapOp>,
    pub(super) put_frontends: Vec<MapOp>,
    pub(super) delete_frontends: Vec<MapOp>,
    pub(super) delete_addresses: Vec<MapOp>,
    pub(super) delete_ranges: Vec<MapOp>,
    pub(super) delete_members: Vec<MapOp>,
    pub(super) clear_records: Vec<MapOp>,
    pub(super) clear_backends: Vec<MapOp>,
    /// Elements of `SERVICE_CIDRS4/6` that begin to count: once every address in them is known.
    pub(super) open_cidrs: Vec<MapOp>,
    pub(super) freed: Freed,
    pub(super) freed_records: Vec<u32>,
    /// Something else that a Service may be waiting for was freed.
    pub(super) frees_room: bool,
    /// Something was replaced that is nobody's to give back.
    pub(super) grace: bool,
    pub(super) rejections: Vec<Rejection>,
    pub(super) retired: Vec<Retired>,
}

impl Draft {
    /// Whether anything is given back.
    pub(super) fn frees(&self) -> bool {
        self.frees_room
            || !self.freed.runs.is_empty()
            || !self.freed_records.is_empty()
            || !self.delete_members.is_empty()
            || !self.delete_ranges.is_empty()
            || !self.clear_backends.is_empty()
    }

    /// True if all that comes after the grace period is clearing the backends that are freed: nothing of it can be of
    /// the next plan's concern.
    pub(super) fn can_wait(&self) -> bool {
        let cleared = self.freed.backends4.len() + self.freed.backends6.len();
        !self.grace
            && self.close_cidrs.is_empty()
            && self.open_cidrs.is_empty()
            && self.clear_records.is_empty()
            && self.freed_records.is_empty()
            && self.clear_backends.len() == cleared
    }

    /// What is pointed at before what points; removal in reverse, after a grace period.
    pub(super) fn into_ops(self) -> Vec<MapOp> {
        // Additions, and changes of one value, replace nothing that is written to again.
        let grace = self.grace
            || !self.freed.runs.is_empty()
            || !self.close_cidrs.is_empty()
            || !self.clear_records.is_empty()
            || !self.clear_backends.is_empty();
        let mut ops = self.close_cidrs;
        ops.extend(self.names);
        ops.extend(self.backends);
        ops.extend(self.slots);
        ops.extend(self.put_members);
        ops.extend(self.put_ranges);
        ops.extend(self.records);
        ops.extend(self.put_addresses);
        ops.extend(self.put_frontends);
        ops.extend(self.delete_frontends);
        ops.extend(self.delete_ranges);
        ops.extend(self.delete_addresses);
        ops.extend(self.delete_members);
        ops.extend(grace.then_some(MapOp::Grace));
        ops.extend(self.clear_records);
        ops.extend(self.clear_backends);
        ops.extend(self.open_cidrs);
        ops
    }
}

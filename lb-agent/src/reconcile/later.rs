//! What is left of plans until no packet uses what they replaced any more.
//!
//! A grace period takes as long as tens of changes. Those that only replace endpoints are in force before it: the loop
//! carries their plans out up to there and goes on with the next ones, while the planner holds back what was freed.

use super::core::{Core, Kernel, Outcome, SyncError};
use crate::plan::{Freed, MapOp, Plan, Planner, Retired};

/// Of one plan or several.
#[derive(Debug, Default)]
pub(super) struct Later {
    clears: Vec<MapOp>,
    freed: Freed,
    retired: Vec<Retired>,
}

impl Later {
    fn is_empty(&self) -> bool {
        self.clears.is_empty() && self.freed == Freed::default() && self.retired.is_empty()
    }

    fn append(&mut self, mut other: Self) {
        self.clears.append(&mut other.clears);
        self.freed.append(other.freed);
        self.retired.append(&mut other.retired);
    }
}

/// By grace period.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// Has to wait for one that begins from now on.
    waiting: Later,
    /// Waits for the one that has begun.
    begun: Later,
}

impl Pending {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.begun.is_empty()
    }

    fn take(&mut self) -> Later {
        let mut all = std::mem::take(&mut self.begun);
        all.append(std::mem::take(&mut self.waiting));
        all
    }

    /// Takes out of a plan what need not be done at once.
    pub(super) fn put_off(&mut self, plan: &mut Plan) {
        let Some(freed) = plan.held_back.take() else { return };
        let Some(grace) = plan.ops.iter().position(|op| *op == MapOp::Grace) else { return };
        let clears = plan.ops.split_off(grace).split_off(1);
        let retired = std::mem::take(&mut plan.retired);
        self.waiting.append(Later { clears, freed, retired });
    }
}

impl<K: Kernel> Core<K> {
    /// What waits for a grace period now waits for the one that the caller begins, unless it has begun one already. False if
    /// there is no need for one.
    pub fn begin_grace(&mut self) -> bool {
        let needed = self.needs_grace();
        if needed {
            self.pending.begun = std::mem::take(&mut self.pending.waiting);
        }
        needed
    }

    /// True if [`Self::begin_grace`] would have the caller begin one.
    pub fn needs_grace(&self) -> bool {
        self.pending.begun.is_empty() && !self.pending.waiting.is_empty()
    }

    /// The grace period has passed: clears what was replaced, and tells whose flows have to be looked at.
    pub fn settle(&mut self) -> Result<Outcome, SyncError> {
        let begun = std::mem::take(&mut self.pending.begun);
        let mut outcome = Outcome::default();
        // Without a planner the maps will be read again, and cleared of what nobody uses.
        if let Some(mut planner) = self.planner.take() {
            self.finish(begun, &mut planner, &mut outcome)?;
            self.has_room |= planner.is_starving();
            self.planner = Some(planner);
        } else {
            outcome.retired = begun.retired;
        }
        Ok(outcome)
    }

    /// Waits for everything that is left of earlier plans, and does it.
    pub(super) fn settle_now(
        &mut self,
        planner: &mut Planner,
        outcome: &mut Outcome,
    ) -> Result<(), SyncError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        self.kernel.apply(&[MapOp::Grace])?;
        let all = self.pending.take();
        self.finish(all, planner, outcome)
    }

    /// The same where the maps are going to be read again, which shows what is left to clear.
    pub(super) fn abandon(&mut self, outcome: &mut Outcome) -> Result<(), SyncError> {
        if !self.pending.is_empty() {
            self.kernel.apply(&[MapOp::Grace])?;
            outcome.retired.append(&mut self.pending.take().retired);
        }
        Ok(())
    }

    fn finish(
        &mut self,
        later: Later,
        planner: &mut Planner,
        outcome: &mut Outcome,
    ) -> Result<(), SyncError> {
        let Later { clears, freed, mut retired } = later;
        if !clears.is_empty() {
            self.kernel.apply(&clears)?;
            outcome.count(&clears);
        }
        planner.give_back(&freed);
        outcome.retired.append(&mut retired);
        Ok(())
    }
}

#[cfg(test)]
#[path = "later_tests.rs"]
mod tests;

//! One turn of the loop, without the loop: what changed, what to do about it, doing it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
mod intake;

use super::{later::Pending, rejections::Rejections};
use crate::{
    healthcheck::{self, Tracker},
    maps::{Applied, MapError, Maps, Refused},
    model::{Model, ServiceKey},
    plan::{
        ActualState, Capacities, Held, MapOp, NodeView, Plan, Planner, Retired, no_local::NoLocalEndpoints,
        nodeport::loopback_addresses,
    },
    settings::NodePortAddresses,
    source::ObjectRef,
};

/// Plans that free room are followed by another one for whoever waits for it: at most so many times in one turn.
const ROUNDS: usize = 8;

/// So many Services are planned within a fraction of a millisecond, as a rule.
const BRIEF: usize = 16;

/// The maps as the loop needs them. Implemented by [`Maps`] alone, and by a stand-in in tests.
pub trait Kernel {
    fn capacities(&self) -> Capacities;
    fn read_actual(&self) -> Result<ActualState, MapError>;
    fn apply(&mut self, ops: &[MapOp]) -> Result<Applied, MapError>;
}

impl Kernel for Maps {
    fn capacities(&self) -> Capacities {
        Maps::capacities(self)
    }
    fn read_actual(&self) -> Result<ActualState, MapError> {
        Maps::read_actual(self)
    }
    fn apply(&mut self, ops: &[MapOp]) -> Result<Applied, MapError> {
        Maps::apply(self, ops)
    }
}

/// Why a turn failed. The next one reads the maps again.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    #[error(transparent)]
    Map(#[from] MapError),
    /// The rest of the plan was carried out.
    #[error("{first}{}", and_more(*.more))]
    Refused { more: usize, first: Refused },
}

fn and_more(n: usize) -> String {
    if n == 0 { String::new() } else { format!(" (and {n} more kinds of writes)") }
}

/// What a turn did.
#[derive(Debug, Default)]
pub struct Outcome {
    /// There was something to plan.
    pub ran: bool,
    /// The plan looked at every Service.
    pub full: bool,
    /// Operations by kind.
    pub operations: BTreeMap<&'static str, u64>,
    /// What is left out at present, by reason.
    pub rejected: BTreeMap<&'static str, i64>,
    /// Records whose flows and sockets have to be checked.
    pub retired: Vec<Retired>,
    /// Rule C8, as of now.
    pub no_local: NoLocalEndpoints,
    /// The maps were read, and hold now what they should: flows of an earlier run may have to go, whatever was retired.
    pub recovered: bool,
}

impl Outcome {
    pub(super) fn count(&mut self, ops: &[MapOp]) {
        for op in ops {
            *self.operations.entry(kind(op)).or_insert(0) += 1;
        }
    }
}

/// The settings that planning needs.
#[derive(Clone, Debug)]
pub struct NodeRules {
    pub name: String,
    pub nodeport_addresses: NodePortAddresses,
    pub allow_external_ips: Vec<IpNet>,
    pub localhost_nodeports: bool,
    pub service_cidrs: Vec<IpNet>,
}

/// The model, the planner and the maps.
pub struct Core<K> {
    pub(super) kernel: K,
    model: Model,
    /// `None` until the maps have been read, and after a failure.
    pub(super) planner: Option<Planner>,
    pub(super) pending: Pending,
    /// Something was given back that a Service may be waiting for.
    pub(super) has_room: bool,
    rules: NodeRules,
    /// As of the last plan.
    view: Option<NodeView>,
    /// The addresses that the view was made of.
    local: BTreeSet<IpAddr>,
    dirty: BTreeSet<ServiceKey>,
    all_dirty: bool,
    revision: u64,
    cidrs_dirty: bool,
    /// Plan everything, whatever is dirty.
    replan: bool,
    /// What the source cannot read.
    missing: Held,
    /// Services of which an object cannot be understood, and never could.
    unconverted: BTreeMap<ObjectRef, Option<ServiceKey>>,
    rejections: Rejections,
    health_checks: Tracker,
}

impl Core<()> {
    /// Objects can be taken in before there are maps.
    pub fn without_maps(rules: NodeRules) -> Self {
        Self {
            kernel: (),
            model: Model::new(&rules.name),
            planner: None,
            pending: Pending::default(),
            has_room: false,
            rules,
            view: None,
            local: BTreeSet::new(),
            dirty: BTreeSet::new(),
            all_dirty: false,
            revision: 0,
            cidrs_dirty: false,
            replan: false,
            missing: Held::default(),
            unconverted: BTreeMap::new(),
            rejections: Rejections::default(),
            health_checks: Tracker::default(),
        }
    }

    /// The maps are there.
    pub fn with<K>(self, kernel: K) -> Core<K> {
        Core {
            kernel,
            model: self.model,
            planner: self.planner,
            pending: self.pending,
            has_room: self.has_room,
            rules: self.rules,
            view: self.view,
            local: self.local,
            dirty: self.dirty,
            all_dirty: self.all_dirty,
            revision: self.revision,
            cidrs_dirty: self.cidrs_dirty,
            replan: self.replan,
            missing: self.missing,
            unconverted: self.unconverted,
            rejections: self.rejections,
            health_checks: self.health_checks,
        }
    }
}

impl<K: Kernel> Core<K> {
    pub fn new(kernel: K, rules: NodeRules) -> Self {
        Core::without_maps(rules).with(kernel)
    }

    fn held(&self) -> Held {
        let mut held = self.missing.clone();
        held.services.extend(self.unconverted.values().flatten().cloned());
        held
    }

    /// The next turn looks at a few Services and reads no maps, unless the addresses of the node have changed.
    pub fn is_brief(&self) -> bool {
        self.planner.is_some() && !self.all_dirty && !self.replan && self.dirty.len() <= BRIEF
    }

    /// Programs what has changed: work in proportion to that. `local` are the addresses of this network namespace.
    pub fn sync(&mut self, local: &BTreeSet<IpAddr>) -> Result<Outcome, SyncError> {
        self.turn(local, false)
    }

    /// The same without waiting for a grace period where that can be done later: see [`Core::begin_grace`].
    pub fn sync_early(&mut self, local: &BTreeSet<IpAddr>) -> Result<Outcome, SyncError> {
        self.turn(local, true)
    }

    fn turn(&mut self, local: &BTreeSet<IpAddr>, early: bool) -> Result<Outcome, SyncError> {
        let (view, is_new) = self.look_at_node(local);
        // A changed view changes every Service; a change of the node that leaves the view as it was changes none.
        let all = std::mem::take(&mut self.replan) || is_new;
        let cidrs = std::mem::take(&mut self.cidrs_dirty);
        let dirty = std::mem::take(&mut self.dirty);
        let has_room = std::mem::take(&mut self.has_room);
        let ran = all || cidrs || has_room || !dirty.is_empty() || self.planner.is_none();
        let mut outcome = Outcome { ran, ..Outcome::default() };
        self.health_checks.mark(all, &dirty);
        let result = self.program(&view, all, early, &dirty, &mut outcome);
        if result.is_ok() {
            let addresses =
                healthcheck::listen_addresses(&self.rules.nodeport_addresses, &view.nodeport_addresses);
            self.health_checks.publish(&self.model, &view, addresses);
        }
        self.view = Some(view);
        outcome.rejected = self.rejections.by_reason();
        result.map(|()| outcome)
    }

    /// Reads all maps, compares them with what they should hold, repairs what differs.
    pub fn audit(&mut self, local: &BTreeSet<IpAddr>) -> Result<Outcome, SyncError> {
        // What is due anyway is no damage.
        let mut outcome = self.sync(local)?;
        self.planner = None;
        let audit = self.sync(local)?;
        let repaired: u64 = audit.operations.values().sum();
        if repaired > 0 {
            tracing::warn!(operations = repaired, "the maps were not as they should be: repaired");
        }
        for (kind, n) in audit.operations {
            *outcome.operations.entry(kind).or_insert(0) += n;
        }
        outcome.retired.extend(audit.retired);
        Ok(Outcome {
            ran: true,
            recovered: true,
            full: true,
            rejected: audit.rejected,
            no_local: audit.no_local,
            ..outcome
        })
    }

    /// Takes the view, made anew if it may have changed; true if it has.
    fn look_at_node(&mut self, local: &BTreeSet<IpAddr>) -> (NodeView, bool) {
        let before = match self.view.take() {
            Some(view) if !self.all_dirty && self.local == *local => return (view, false),
            before => before,
        };
        self.all_dirty = false;
        self.local.clone_from(local);
        let rules = &self.rules;
        let view = NodeView {
            loopback_addresses: loopback_addresses(&rules.nodeport_addresses, rules.localhost_nodeports),
            service_cidrs: rules.service_cidrs.clone(),
            ..NodeView::new(&self.model, &rules.nodeport_addresses, &rules.allow_external_ips, local)
        };
        let is_new = before.as_ref() != Some(&view);
        (view, is_new)
    }

    fn program(
        &mut self,
        view: &NodeView,
        all: bool,
        early: bool,
        dirty: &BTreeSet<ServiceKey>,
        outcome: &mut Outcome,
    ) -> Result<(), SyncError> {
        // Until the plan has been carried out, the planner is ahead of the maps: an error on the way drops it.
        let (mut planner, recovered) = match self.planner.take() {
            Some(planner) => (planner, false),
            None => {
                self.abandon(outcome)?;
                (self.recover()?, true)
            }
        };
        if !early {
            self.settle_now(&mut planner, outcome)?;
        }
        planner.hold_back(early);
        planner.set_held(self.held());
        outcome.full = all || recovered;
        let mut plan = if outcome.full {
            planner.plan_all(&self.model, view)
        } else {
            planner.plan_services(&self.model, view, dirty)
        };
        for _ in 0..ROUNDS {
            self.carry_out(&mut plan, outcome)?;
            // Whoever has no room gets what is on its way back.
            if !self.pending.is_empty() && planner.is_starving() {
                self.settle_now(&mut planner, outcome)?;
            } else if !plan.retry {
                break;
            }
            plan = planner.plan_services(&self.model, view, []);
        }
        outcome.recovered = recovered;
        self.rejections.planned(planner.rejections());
        outcome.no_local = planner.no_local_endpoints();
        self.planner = Some(planner);
        Ok(())
    }

    fn recover(&self) -> Result<Planner, SyncError> {
        let actual = self.kernel.read_actual()?;
        let (planner, anomalies) = Planner::recover(self.kernel.capacities(), actual);
        for anomaly in anomalies {
            tracing::warn!(%anomaly, "the maps hold something that no complete plan leaves behind: it will be repaired");
        }
        Ok(planner)
    }

    fn carry_out(&mut self, plan: &mut Plan, outcome: &mut Outcome) -> Result<(), SyncError> {
        self.pending.put_off(plan);
        if plan.ops.is_empty() {
            // Flows may have to go even where the maps are right: an earlier run may have come no further than these, or an
            // endpoint that took no new flows any more has stopped serving.
            outcome.retired.append(&mut plan.retired);
            return Ok(());
        }
        let mut applied = self.kernel.apply(&plan.ops)?;
        outcome.count(&plan.ops);
        outcome.retired.append(&mut plan.retired);
        tracing::debug!(operations = plan.ops.len(), "programmed");
        match applied.refused.len() {
            0 => Ok(()),
            n => Err(SyncError::Refused { more: n - 1, first: applied.refused.swap_remove(0) }),
        }
    }
}

/// An operation's kind, as metrics call it.
fn kind(op: &MapOp) -> &'static str {
    match op {
        MapOp::NameService { .. } => "name_service",
        MapOp::WriteBackend { .. } => "write_backend",
        MapOp::WriteSlots { .. } => "write_slots",
        MapOp::PutMember { .. } => "put_member",
        MapOp::WriteService { .. } => "write_service",
        MapOp::PutFrontend { .. } => "put_frontend",
        MapOp::DeleteFrontend { .. } => "delete_frontend",
        MapOp::DeleteMember { .. } => "delete_member",
        MapOp::PutAddress { .. } => "put_address",
        MapOp::DeleteAddress { .. } => "delete_address",
        MapOp::PutRange { .. } => "put_range",
        MapOp::DeleteRange { .. } => "delete_range",
        MapOp::WriteCidr { .. } => "write_cidr",
        MapOp::SwitchCidr { .. } => "switch_cidr",
        MapOp::Grace => "grace",
        MapOp::ClearService { .. } => "clear_service",
        MapOp::ClearBackend { .. } => "clear_backend",
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
pub(super) mod tests;

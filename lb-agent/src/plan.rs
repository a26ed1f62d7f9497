//! From the model to map operations.
//!
//! [`desired`] says what one Service needs, a pure function of its objects. [`Planner`] knows what the kernel has, owns
//! every id and slot, and turns the difference into an ordered list of [`MapOp`]s that `maps.rs` carries out. Each
//! [`Plan`] must be carried out in full, in order, before the next one is made; after a failure the kernel's state
//! is unknown and is read again ([`Planner::recover`]).

use lb_common::maps::capacity;

use crate::{
    model::ServiceKey,
    settings::{self},
};

pub mod actual;
pub mod desired;
pub mod nodeport;
pub mod op;
pub mod rejection;

pub use actual::{ActualService, ActualState};
pub use desired::NodeView;
pub use op::MapOp;
use op::{Backend, Family};
pub use rejection::{Anomaly, Rejection};

/// How many elements the kernel maps have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacities {
    /// Per family.
    pub frontends: u32,
    pub services: u32,
    pub slots: u32,
    /// Per family.
    pub backends: u32,
    pub members: u32,
}

impl From<&settings::Capacities> for Capacities {
    fn from(c: &settings::Capacities) -> Self {
        Self {
            frontends: c.frontends,
            services: c.services,
            slots: c.slots,
            backends: c.backends,
            members: capacity::AFFINITY_MEMBERS,
        }
    }
}

/// What to do, and what could not be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Empty if the kernel already has what the Services want.
    pub ops: Vec<MapOp>,
    /// Those of the Services that this plan looked at, sorted. [`Planner::rejections`] has all.
    pub rejections: Vec<Rejection>,
    /// UDP records whose flows have to be checked once the operations are carried out, sorted by record.
    pub retired: Vec<Retired>,
    /// This plan freed something that a rejected Service may be waiting for: plan again (with no Service, or the next
    /// dirty ones).
    pub retry: bool,
}

/// Flows of this UDP record to any other backend than these have to go (SEMANTICS I1): a client that keeps its source
/// port would be sent to the dead backend for ever. Policies and hints do not matter here, serving ones are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retired {
    /// The record; free for another Service once it is not used any more.
    pub service: u32,
    pub family: Family,
    /// What still serves, sorted.
    pub serving: Vec<(std::net::IpAddr, u16)>,
}

// The planner, in short:
//
//   impl Planner {
//       pub fn new(capacities: Capacities) -> Self;
//       pub fn recover(capacities: Capacities, actual: ActualState) -> (Self, Vec<Anomaly>);
//       pub fn plan_all(&mut self, model: &Model, node: &NodeView) -> Plan;
//       pub fn plan_services<'a>(&mut self, model: &Model, node: &NodeView,
//                                dirty: impl IntoIterator<Item = &'a ServiceKey>) -> Plan;
//       pub fn rejections(&self) -> Vec<Rejection>;
//   }

//! Services whose objects cannot be read at present, and could not since the agent started: what an earlier run programmed
//! for them stays as it is until they can.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::frontend::flags;

use super::{Planner, op::Frontend};
use crate::model::{Model, ServiceKey};

/// Whose objects are missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    pub services: BTreeSet<ServiceKey>,
    /// There is something of which not even that is known: any Service or slice that is missing may be in it.
    pub unknown: bool,
}

impl Held {
    pub fn is_empty(&self) -> bool {
        self.services.is_empty() && !self.unknown
    }
}

impl Planner {
    /// From the next plan on, which has to be one of all ([`Planner::plan_all`]).
    pub fn set_held(&mut self, held: Held) {
        self.held = held;
    }

    /// True if the Service has records of an earlier run that nothing better is known for.
    pub(super) fn is_held(&self, key: &ServiceKey, model: &Model) -> bool {
        let lacks_objects = || model.service(key).is_none() || !model.has_slices(key);
        self.inherited.contains(key)
            && (self.held.services.contains(key) || self.held.unknown && lacks_objects())
    }

    /// Claims for held records what the kernel has of them.
    pub(super) fn claim_held(&mut self, model: &Model) {
        if self.held.is_empty() {
            return;
        }
        let held: Vec<ServiceKey> =
            self.inherited.iter().filter(|key| self.is_held(key, model)).cloned().collect();
        let mut by_record: BTreeMap<u32, Vec<(Frontend, u32)>> = BTreeMap::new();
        for (frontend, value) in self.frontends.in_kernel() {
            by_record.entry(value.service).or_default().push((frontend, value.flags));
        }
        for key in held {
            let mut addresses = BTreeSet::new();
            let mut holding = self.holdings.remove(&key).unwrap_or_default();
            for id in holding.records.iter().copied() {
                let Some(mut record) = self.records.remove(&id) else { continue };
                let frontends = by_record.remove(&id).unwrap_or_default();
                addresses.extend(frontends.iter().map(|(f, bits)| (f.addr, bits & flags::KIND_MASK)));
                self.plan_claims(id, &mut record, &frontends);
                self.records.insert(id, record);
            }
            holding.claims = self.plan_addresses(&holding.claims, addresses);
            self.holdings.insert(key, holding);
        }
    }
}

//! From the model to map operations.
//!
//! [`desired`] says what one Service needs, a pure function of its objects. [`Planner`] knows what the kernel has, owns
//! every id and slot, and turns the difference into an ordered list of [`MapOp`]s that `maps.rs` carries out. Each
//! [`Plan`] must be carried out in full, in order, before the next one is made; after a failure the kernel's state
//! is unknown and is read again ([`Planner::recover`]).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use crate::{
    model::{Model, ServiceKey},
    settings,
};

pub mod actual;
mod addresses;
mod backends;
mod cidrs;
pub mod desired;
mod draft;
pub mod endpoints;
mod frontends;
pub mod held;
mod ids;
pub mod no_local;
pub mod nodeport;
pub mod op;
mod ranges;
mod record;
mod recover;
pub mod rejection;
mod slots;

pub use actual::{ActualCidr, ActualService, ActualState};
pub use desired::NodeView;
pub use held::Held;
pub use op::MapOp;
pub use rejection::{Anomaly, Rejection, Resource};

use self::{
    addresses::Addresses,
    backends::Backends,
    cidrs::Cidrs,
    desired::{Desired, desired},
    draft::Draft,
    frontends::{Frontends, Rank, Room},
    ids::Ids,
    no_local::{NoLocal, NoLocalEndpoints},
    op::{Family, Frontend, Protocol},
    record::Record,
    recover::Leftovers,
    slots::Slots,
};

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
    /// Per family.
    pub source_ranges: u32,
}

impl From<&settings::Capacities> for Capacities {
    fn from(c: &settings::Capacities) -> Self {
        Self {
            frontends: c.frontends,
            services: c.services,
            slots: c.slots,
            backends: c.backends,
            members: c.backends,
            source_ranges: c.source_ranges,
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
    /// Records whose endpoints changed, sorted by record: flows and sockets have to be checked once the operations are
    /// carried out.
    pub retired: Vec<Retired>,
    /// This plan freed something that a rejected Service may be waiting for: plan again (with no Service, or the next
    /// dirty ones).
    pub retry: bool,
    /// What is free after the operations up to [`MapOp::Grace`] and the grace period, if the planner may hold it back
    /// ([`Planner::hold_back`]) and this plan allows that: the operations after it only clear what is in here.
    pub held_back: Option<Freed>,
}

/// What no packet uses after a grace period. Nobody else gets it before [`Planner::give_back`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    /// Slots: base and length.
    runs: Vec<(u32, u32)>,
    backends4: Vec<u32>,
    backends6: Vec<u32>,
}

impl Freed {
    /// Takes in what another plan freed.
    pub fn append(&mut self, mut other: Self) {
        self.runs.append(&mut other.runs);
        self.backends4.append(&mut other.backends4);
        self.backends6.append(&mut other.backends6);
    }
}

/// The endpoints of this record are now these; whoever speaks to another one speaks to a retired backend.
///
/// UDP flows to one have to go (SEMANTICS I1): a client that keeps its source port would be sent to the dead backend for
/// ever. TCP and SCTP connections to one go on as long as it answers (I4), for its pod may live on; if it does not answer,
/// it is gone (J2). Policies and hints do not matter here. The first plan after a start names every record: backends may
/// have gone meanwhile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retired {
    /// The record. The next plan may give the id to another Service if this one is gone.
    pub service: u32,
    pub family: Family,
    pub protocol: Protocol,
    /// Addresses that clients came by, before this plan or after it, sorted. Those that went before the agent started are
    /// not known.
    pub frontends: Vec<Frontend>,
    /// What established flows may go on to, sorted: see [`endpoints::Sets::serving`].
    pub serving: Vec<(IpAddr, u16)>,
    /// False if endpoints only came.
    pub lost: bool,
}

/// What flows and sockets have to be looked at for, once a plan is carried out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Departures {
    pub retired: Vec<Retired>,
    /// The maps were read before: flows may be left of records that an earlier run had cleared.
    pub recovered: bool,
}

impl Departures {
    /// Those of several plans, in their order.
    pub fn together(parts: Vec<Self>) -> Self {
        let recovered = parts.iter().any(|part| part.recovered);
        Self { retired: parts.into_iter().flat_map(|part| part.retired).collect(), recovered }
    }

    pub fn is_empty(&self) -> bool {
        self.retired.is_empty() && !self.recovered
    }
}

/// What a Service has.
#[derive(Clone, Debug, Default)]
struct Holding {
    records: Box<[u32]>,
    /// What it says about addresses as a whole: few.
    claims: Claims,
}

type Claims = Box<[(IpAddr, u32)]>;

/// What the kernel has, who owns it, and what is free.
#[derive(Clone, Debug)]
pub struct Planner {
    capacities: Capacities,
    record_ids: Ids,
    records: BTreeMap<u32, Box<Record>>,
    by_name: HashMap<Arc<str>, u32>,
    holdings: HashMap<ServiceKey, Holding>,
    slots: Slots,
    backends4: Backends,
    backends6: Backends,
    frontends: Frontends,
    addresses: Addresses,
    /// Of frontends and addresses.
    room: Room,
    cidrs: Cidrs,
    range_room: Room,
    members_in_kernel: u32,
    /// What the last plan of each Service left out.
    rejected: BTreeMap<ServiceKey, BTreeSet<Rejection>>,
    /// Something was freed since Services were last turned away for lack of room.
    retry: bool,
    /// What the kernel had at start and no record owns: goes with the first plan.
    leftovers: Option<Leftovers>,
    no_local: NoLocal,
    holds_back: bool,
    /// Services with records of an earlier run that have not been planned since.
    inherited: BTreeSet<ServiceKey>,
    held: Held,
}

impl Planner {
    /// For empty maps.
    pub fn new(capacities: Capacities) -> Self {
        Self::recover(capacities, ActualState::default()).0
    }

    /// Plans every Service of the model, and away with everything in the kernel that none of them wants.
    pub fn plan_all(&mut self, model: &Model, node: &NodeView) -> Plan {
        let known = model.services().map(|(key, _)| key);
        let work: BTreeSet<ServiceKey> = known.chain(self.holdings.keys()).cloned().collect();
        self.rejected.retain(|key, _| work.contains(key));
        self.retry = false;
        self.no_local = NoLocal::default();
        let mut draft = Draft::default();
        let leftovers = self.leftovers.take().unwrap_or_default();
        leftovers.plan(&mut draft);
        self.frontends.touch_all();
        self.addresses.touch_all();
        self.backends4.touch_all();
        self.backends6.touch_all();
        self.claim_held(model);
        self.plan(model, node, work, draft)
    }

    /// Plans these Services, in proportion to them alone, and those that were turned away and may fit now. The first
    /// plan is always one of all.
    pub fn plan_services<'a>(
        &mut self,
        model: &Model,
        node: &NodeView,
        dirty: impl IntoIterator<Item = &'a ServiceKey>,
    ) -> Plan {
        if self.leftovers.is_some() {
            return self.plan_all(model, node);
        }
        let mut work: BTreeSet<ServiceKey> = dirty.into_iter().cloned().collect();
        if std::mem::take(&mut self.retry) {
            work.extend(self.starved().cloned());
        }
        self.plan(model, node, work, Draft::default())
    }

    /// Everything that is left out at present, sorted.
    pub fn rejections(&self) -> Vec<Rejection> {
        let taken = self.frontends.rejections(rank(&self.records));
        let rejected = self.rejected.values().flatten().cloned();
        let all: BTreeSet<Rejection> = rejected.chain(taken).chain(self.cidrs.rejections()).collect();
        all.into_iter().collect()
    }

    /// Service ports that drop traffic because their policy is Local and no endpoint is (rule C8), as of the last plan.
    pub fn no_local_endpoints(&self) -> NoLocalEndpoints {
        self.no_local.sum()
    }

    fn plan(&mut self, model: &Model, node: &NodeView, work: BTreeSet<ServiceKey>, mut draft: Draft) -> Plan {
        for key in &work {
            if self.is_held(key, model) {
                continue;
            }
            self.rejected.remove(key);
            let service = model.service(key);
            let slices = model.slices(key);
            let wanted = service.map(|service| desired(service, || slices.iter(), node)).unwrap_or_default();
            self.no_local.update(key, service, &wanted);
            self.plan_service(key, wanted, &mut draft);
        }
        self.addresses.set_own(&node.own_addresses, |ip| {
            model.service_cidrs().chain(&node.service_cidrs).any(|net| net.contains(ip))
        });
        self.frontends.finish(rank(&self.records), &mut self.addresses, &mut self.room, &mut draft);
        if !self.addresses.finish(&mut self.room, !self.held.is_empty(), &mut draft) {
            self.reject_unknown_addresses(&work, &mut draft);
        }
        let cidrs = model.service_cidrs().chain(&node.service_cidrs);
        self.cidrs.plan(cidrs, |family| self.addresses.around_cluster_ips(family), &mut draft);
        self.backends4.finish(&mut draft.backends, &mut draft.clear_backends, &mut draft.freed.backends4);
        self.backends6.finish(&mut draft.backends, &mut draft.clear_backends, &mut draft.freed.backends6);
        self.complete(draft)
    }

    fn plan_service(&mut self, key: &ServiceKey, wanted: Desired, draft: &mut Draft) {
        self.inherited.remove(key);
        draft.rejections.extend(wanted.rejections);
        let before = self.holdings.remove(key).unwrap_or_default();
        let claims = self.plan_addresses(&before.claims, wanted.addresses);
        let mut kept = Vec::with_capacity(wanted.records.len());
        for desired in &wanted.records {
            let known = self.by_name.get(&*desired.name).copied();
            let Some(id) = known.or_else(|| self.record_ids.allocate()) else {
                draft.rejections.push(Rejection::Full {
                    service: key.clone(),
                    record: desired.name.clone(),
                    resource: Resource::Services,
                    capacity: self.capacities.services,
                });
                continue;
            };
            let mut record = self.records.remove(&id).unwrap_or_else(|| Box::new(Record::new(key, desired)));
            let planned = self.plan_record(id, &mut record, desired, draft);
            if known.is_none() {
                if !planned {
                    self.record_ids.release(id);
                    continue;
                }
                draft.names.push(MapOp::NameService { service: id, name: desired.name.clone() });
                self.by_name.insert(record.name.clone(), id);
            }
            self.plan_ranges(id, &mut record, &desired.source_ranges, draft);
            record.plan_retirement(id, &desired.sets.serving, &desired.frontends, draft);
            self.plan_claims(id, &mut record, &desired.frontends);
            self.records.insert(id, record);
            kept.push(id);
        }
        for id in before.records.into_iter().filter(|id| !kept.contains(id)) {
            self.remove_record(id, draft);
        }
        if !kept.is_empty() || !claims.is_empty() {
            self.holdings.insert(key.clone(), Holding { records: kept.into(), claims });
        }
    }

    /// Has a Service say this about addresses as a whole, and nothing that it said before.
    fn plan_addresses(&mut self, before: &[(IpAddr, u32)], wanted: BTreeSet<(IpAddr, u32)>) -> Claims {
        for (addr, kind) in &wanted {
            if before.contains(&(*addr, *kind)) {
                self.addresses.touch(*addr);
            } else {
                self.addresses.claim(*addr, *kind);
            }
        }
        for (addr, kind) in before.iter().filter(|claim| !wanted.contains(claim)) {
            self.addresses.withdraw(*addr, *kind);
        }
        wanted.into_iter().collect()
    }

    /// Addresses share the maps of the frontends, which may be full.
    fn reject_unknown_addresses(&self, work: &BTreeSet<ServiceKey>, draft: &mut Draft) {
        for key in work {
            let claimed = self.holdings.get(key).into_iter().flat_map(|holding| &holding.claims);
            let unknown = claimed.filter(|(addr, _)| !self.addresses.is_known(*addr));
            draft.rejections.extend(unknown.map(|(addr, _)| Rejection::Full {
                service: key.clone(),
                record: key.to_string(),
                resource: Resource::Frontends(Family::of(*addr)),
                capacity: self.capacities.frontends,
            }));
        }
    }

    /// Gives back what the plan frees, for the plans after it.
    fn complete(&mut self, mut draft: Draft) -> Plan {
        let held_back = (self.holds_back && draft.can_wait()).then(|| draft.freed.clone());
        if held_back.is_none() {
            self.release(&draft.freed);
        }
        for id in &draft.freed_records {
            self.record_ids.release(*id);
        }
        self.members_in_kernel -= draft.delete_members.len() as u32;
        draft.rejections.sort_unstable();
        draft.rejections.dedup();
        for rejection in draft.rejections.iter().filter(|r| !matches!(r, Rejection::FrontendTaken { .. })) {
            let Some(service) = rejection.service() else { continue };
            self.rejected.entry(service.clone()).or_default().insert(rejection.clone());
        }
        for op in &draft.delete_ranges {
            if let MapOp::DeleteRange { net, .. } = op {
                self.range_room.free_after_plan(Family::of_net(net));
            }
        }
        draft.frees_room |= self.room.complete() | self.range_room.complete();
        self.retry |= draft.frees();
        draft.retired.sort_by_key(|r| r.service);
        Plan {
            rejections: std::mem::take(&mut draft.rejections),
            retired: std::mem::take(&mut draft.retired),
            retry: self.retry && self.starved().next().is_some(),
            ops: draft.into_ops(),
            held_back,
        }
    }

    /// From now on plans may leave what they free to whoever carries them out, so that the next one need not wait for the
    /// grace period.
    pub fn hold_back(&mut self, holds_back: bool) {
        self.holds_back = holds_back;
    }

    /// No packet uses these any more, and they are cleared.
    pub fn give_back(&mut self, freed: &Freed) {
        self.release(freed);
        self.retry = true;
    }

    fn release(&mut self, freed: &Freed) {
        for (base, len) in &freed.runs {
            self.slots.release(*base, *len);
        }
        self.backends4.give_back(&freed.backends4);
        self.backends6.give_back(&freed.backends6);
    }

    /// True if there is no room for something.
    pub fn is_starving(&self) -> bool {
        self.starved().next().is_some()
    }

    /// Services that something did not fit of.
    fn starved(&self) -> impl Iterator<Item = &ServiceKey> {
        let lacks_room =
            |rejections: &BTreeSet<Rejection>| rejections.iter().any(|r| matches!(r, Rejection::Full { .. }));
        self.rejected.iter().filter(move |(_, r)| lacks_room(r)).map(|(key, _)| key)
    }

    fn backends(&mut self, family: Family) -> &mut Backends {
        match family {
            Family::V4 => &mut self.backends4,
            Family::V6 => &mut self.backends6,
        }
    }
}

/// The smallest (namespace, name) gets a frontend that several Services claim; within one, the smallest record name.
fn rank<'a>(records: &'a BTreeMap<u32, Box<Record>>) -> impl Fn(u32) -> Option<Rank<'a>> + use<'a> {
    |id| records.get(&id).map(|r| (&r.owner, &*r.name))
}

#[cfg(test)]
mod tests;

//! Service records: one Service port in one family, and what the kernel has of it.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use lb_common::{
    affinity::{MemberKey, member},
    frontend::{FrontendValue, ServiceRecord, SlotRange},
};

use super::{
    Planner, Retired,
    desired::DesiredRecord,
    draft::Draft,
    endpoints::{Sets, SocketAddr},
    op::{Family, Frontend, MapOp, Protocol},
    rejection::{Rejection, Resource},
};
use crate::model::ServiceKey;

/// Sorted endpoints of one family as bytes: 100,000 of them are remembered, to be compared once in a while.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Packed(Box<[u8]>);

impl Packed {
    fn new(endpoints: &[SocketAddr]) -> Self {
        let mut bytes = Vec::new();
        for (addr, port) in endpoints {
            match addr {
                IpAddr::V4(a) => bytes.extend(a.octets()),
                IpAddr::V6(a) => bytes.extend(a.octets()),
            }
            bytes.extend(port.to_be_bytes());
        }
        Self(bytes.into())
    }

    /// True if all of these are in `other`; both are of `family`, and so their bytes are in the order of their addresses.
    fn is_within(&self, other: &Self, family: Family) -> bool {
        let bytes = match family {
            Family::V4 => 6,
            Family::V6 => 18,
        };
        let others: Vec<&[u8]> = other.0.chunks_exact(bytes).collect();
        self.0.chunks_exact(bytes).all(|endpoint| others.binary_search(&endpoint).is_ok())
    }
}

/// A run of slots and what is in it.
#[derive(Clone, Debug, Default)]
pub(super) struct Run {
    pub(super) base: u32,
    /// Backend ids.
    pub(super) backends: Box<[u32]>,
    /// The kernel's range cannot be used: it names nothing, or what belongs to others. It is not this record's to free.
    pub(super) broken: bool,
}

impl Run {
    fn range(&self) -> SlotRange {
        match self.backends.len() {
            0 => SlotRange::EMPTY,
            len => SlotRange::new(self.base, len as u32),
        }
    }
}

/// What is planned of a record is, between plans, what the kernel has.
#[derive(Clone, Debug)]
pub(super) struct Record {
    pub(super) owner: ServiceKey,
    pub(super) name: Arc<str>,
    pub(super) family: Family,
    pub(super) protocol: Protocol,
    pub(super) kernel: ServiceRecord,
    pub(super) cluster: Run,
    pub(super) local: Run,
    /// Entries of `AFFINITY_MEMBERS`: backend id and bits, sorted by id.
    pub(super) members: Box<[(u32, u32)]>,
    /// Entries of `SOURCE_RANGES4/6`, sorted.
    pub(super) ranges: Box<[IpNet]>,
    /// With flags, sorted.
    pub(super) claims: Box<[(Frontend, u32)]>,
    /// [`Sets::serving`] at the last plan. `None`: not known.
    pub(super) serving: Option<Packed>,
}

impl Record {
    /// A record that the kernel does not have yet.
    pub(super) fn new(owner: &ServiceKey, desired: &DesiredRecord) -> Self {
        Self {
            owner: owner.clone(),
            name: desired.name.as_str().into(),
            family: desired.family,
            protocol: desired.port.protocol,
            kernel: ServiceRecord::default(),
            cluster: Run::default(),
            local: Run::default(),
            members: Box::default(),
            ranges: Box::default(),
            claims: Box::default(),
            serving: Some(Packed::default()),
        }
    }

    pub(super) fn full(&self, resource: Resource, capacity: u32) -> Rejection {
        let record = self.name.to_string();
        Rejection::Full { service: self.owner.clone(), record, resource, capacity }
    }

    /// Notes flows and sockets to look at, before the claims become `frontends`: whoever came by an address that goes away
    /// counts too.
    pub(super) fn plan_retirement(
        &mut self,
        id: u32,
        serving: &[SocketAddr],
        frontends: &[(Frontend, u32)],
        draft: &mut Draft,
    ) {
        let packed = Packed::new(serving);
        if self.serving.as_ref() == Some(&packed) {
            return;
        }
        let lost = self.serving.as_ref().is_none_or(|known| !known.is_within(&packed, self.family));
        self.serving = Some(packed);
        let mut frontends: Vec<Frontend> = self.claims.iter().chain(frontends).map(|(f, _)| *f).collect();
        frontends.sort_unstable();
        frontends.dedup();
        let (family, protocol, serving) = (self.family, self.protocol, serving.to_vec());
        draft.retired.push(Retired { service: id, family, protocol, frontends, serving, lost });
    }

    /// Each backend of either set once, with its `member` bits, sorted by id.
    pub(super) fn backends(&self) -> Vec<(u32, u32)> {
        merge_bits(&self.cluster.backends, &self.local.backends)
    }
}

/// Ids of both sets, each once, sorted, with the bits of the sets it is in.
fn merge_bits(cluster: &[u32], local: &[u32]) -> Vec<(u32, u32)> {
    let bits = |ids: &[u32], bit| ids.iter().map(|id| (*id, bit)).collect::<Vec<_>>();
    let mut merged = [bits(cluster, member::CLUSTER), bits(local, member::LOCAL)].concat();
    merged.sort_unstable();
    merged.dedup_by(|later, kept| {
        let same = later.0 == kept.0;
        if same {
            kept.1 |= later.1;
        }
        same
    });
    merged
}

fn is_local(bits: u32) -> bool {
    bits & member::LOCAL != 0
}

/// Both sets as ids.
#[derive(Debug, Default)]
struct Held {
    cluster: Vec<u32>,
    local: Vec<u32>,
    /// What to give back if the sets are not used after all: id, and whether it was taken as local.
    acquired: Vec<(u32, bool)>,
}

/// Where a set goes.
enum Placed {
    /// The kernel has it.
    Same,
    New(Run),
}

impl Planner {
    /// Makes the record `id` what is desired, as far as there is room: if its sets do not fit, it stays as it was.
    /// False if nothing of it was planned.
    pub(super) fn plan_record(
        &mut self,
        id: u32,
        record: &mut Record,
        desired: &DesiredRecord,
        draft: &mut Draft,
    ) -> bool {
        let mut timeout_s = desired.affinity_timeout_s;
        if let Err((resource, capacity)) = self.plan_sets(record, &desired.sets, draft) {
            draft.rejections.push(record.full(resource, capacity));
            if !record.cluster.broken && !record.local.broken {
                return false;
            }
            // Nothing at all is better than traffic to somebody else's backends.
            for run in [&mut record.cluster, &mut record.local].into_iter().filter(|run| run.broken) {
                swap(run, Placed::New(Run::default()), draft);
            }
            timeout_s = record.kernel.affinity_timeout_s;
        }
        self.plan_members(id, record, timeout_s != 0, draft);
        let planned = ServiceRecord {
            cluster: record.cluster.range(),
            local: record.local.range(),
            affinity_timeout_s: timeout_s,
            in_use: 1,
            _reserved: 0,
        };
        if record.kernel != planned {
            record.kernel = planned;
            draft.records.push(MapOp::WriteService { service: id, record: planned });
        }
        true
    }

    /// Moves the record to other sets, or leaves everything as it was.
    fn plan_sets(&mut self, record: &mut Record, sets: &Sets, draft: &mut Draft) -> Result<(), Full> {
        let held = self.hold(record.family, record.protocol, sets)?;
        let placed = (self.place(&record.cluster, &held.cluster), self.place(&record.local, &held.local));
        let (Some(cluster), Some(local)) = placed else {
            for placed in [placed.0, placed.1] {
                if let Some(Placed::New(run)) = placed
                    && !run.backends.is_empty()
                {
                    self.slots.release(run.base, run.backends.len() as u32);
                }
            }
            self.let_go(record.family, held.acquired);
            return Err((Resource::Slots, self.capacities.slots));
        };
        // After the new ones are held: what is in both never drops to nobody.
        for (backend, bits) in record.backends() {
            self.backends(record.family).release(backend, is_local(bits));
        }
        swap(&mut record.cluster, cluster, draft);
        swap(&mut record.local, local, draft);
        Ok(())
    }

    /// Ids for both sets, or none.
    fn hold(&mut self, family: Family, protocol: Protocol, sets: &Sets) -> Result<Held, Full> {
        let mut held = Held::default();
        let backends = self.backends(family);
        let mut acquire = |at: SocketAddr, is_local: bool, acquired: &mut Vec<(u32, bool)>| {
            let id = backends.acquire(at, protocol, is_local)?;
            acquired.push((id, is_local));
            Some(id)
        };
        let cluster = sets.cluster.iter().map(|at| {
            let is_local = sets.local.binary_search(at).is_ok();
            acquire(*at, is_local, &mut held.acquired)
        });
        let Some(cluster) = cluster.collect::<Option<Vec<u32>>>() else {
            return Err(self.out_of_backends(family, held));
        };
        let local = sets.local.iter().map(|at| match sets.cluster.binary_search(at) {
            Ok(i) => Some(cluster[i]),
            Err(_) => acquire(*at, true, &mut held.acquired),
        });
        let Some(local) = local.collect::<Option<Vec<u32>>>() else {
            return Err(self.out_of_backends(family, held));
        };
        Ok(Held { cluster, local, acquired: held.acquired })
    }

    fn out_of_backends(&mut self, family: Family, held: Held) -> Full {
        self.let_go(family, held.acquired);
        (Resource::Backends(family), self.capacities.backends)
    }

    fn let_go(&mut self, family: Family, acquired: Vec<(u32, bool)>) {
        for (id, is_local) in acquired {
            self.backends(family).release(id, is_local);
        }
    }

    /// `None`: there is no room.
    fn place(&mut self, run: &Run, backends: &[u32]) -> Option<Placed> {
        if !run.broken && *run.backends == *backends {
            return Some(Placed::Same);
        }
        let base =
            if backends.is_empty() { 0 } else { self.slots.allocate(u32::try_from(backends.len()).ok()?)? };
        Some(Placed::New(Run { base, backends: backends.into(), broken: false }))
    }

    /// Brings `AFFINITY_MEMBERS` in line with the record's sets. A member that does not fit costs its clients the
    /// memory, not the service.
    fn plan_members(&mut self, id: u32, record: &mut Record, affinity: bool, draft: &mut Draft) {
        let wanted = if affinity { record.backends() } else { Vec::new() };
        if *wanted == *record.members {
            return;
        }
        let key = |backend| MemberKey { service: id, backend };
        let mut members = Vec::with_capacity(wanted.len());
        for (backend, bits) in &wanted {
            let old = record.members.binary_search_by_key(backend, |m| m.0).map(|i| record.members[i].1);
            if old.is_err() {
                if self.members_in_kernel >= self.capacities.members {
                    continue;
                }
                self.members_in_kernel += 1;
            }
            if old != Ok(*bits) {
                draft.put_members.push(MapOp::PutMember { key: key(*backend), bits: *bits });
            }
            members.push((*backend, *bits));
        }
        if members.len() < wanted.len() {
            draft.rejections.push(record.full(Resource::Members, self.capacities.members));
        }
        let gone = record.members.iter().filter(|m| wanted.binary_search_by_key(&m.0, |w| w.0).is_err());
        draft.delete_members.extend(gone.map(|m| MapOp::DeleteMember { key: key(m.0) }));
        record.members = members.into();
    }

    /// Makes the record claim these frontends and no others.
    pub(super) fn plan_claims(&mut self, id: u32, record: &mut Record, wanted: &[(Frontend, u32)]) {
        for (frontend, flags) in &record.claims {
            if wanted.binary_search(&(*frontend, *flags)).is_err() {
                self.frontends.withdraw(*frontend, id);
            }
        }
        for (frontend, flags) in wanted {
            if record.claims.binary_search(&(*frontend, *flags)).is_err() {
                self.frontends.claim(*frontend, FrontendValue { service: id, flags: *flags });
            } else {
                self.frontends.touch(*frontend);
            }
        }
        if *record.claims != *wanted {
            record.claims = wanted.into();
        }
    }

    /// Plans a record that nobody wants any more away.
    pub(super) fn remove_record(&mut self, id: u32, draft: &mut Draft) {
        let Some(mut record) = self.records.remove(&id) else { return };
        self.by_name.remove(&record.name);
        record.plan_retirement(id, &[], &[], draft);
        self.plan_claims(id, &mut record, &[]);
        self.plan_members(id, &mut record, false, draft);
        self.plan_ranges(id, &mut record, &[], draft);
        for (backend, bits) in record.backends() {
            self.backends(record.family).release(backend, is_local(bits));
        }
        for run in [&mut record.cluster, &mut record.local] {
            swap(run, Placed::New(Run::default()), draft);
        }
        draft.clear_records.push(MapOp::ClearService { service: id });
        draft.freed_records.push(id);
    }
}

/// What is full, and how much of it there is.
type Full = (Resource, u32);

fn swap(run: &mut Run, placed: Placed, draft: &mut Draft) {
    let Placed::New(new) = placed else { return };
    if !new.backends.is_empty() {
        draft.slots.push(MapOp::WriteSlots { base: new.base, backends: new.backends.to_vec() });
    }
    let old = std::mem::replace(run, new);
    // Where a broken range leads nobody knows; nobody is there any more after a grace period.
    draft.grace |= old.broken;
    if !old.broken && !old.backends.is_empty() {
        draft.freed.runs.push((old.base, old.backends.len() as u32));
    }
}

//! Taking over what the kernel has: records are found again by name, backends by endpoint. What fits nowhere is left
//! over and goes with the first plan, in the usual order.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use ipnet::IpNet;
use lb_common::{affinity::MemberKey, frontend::SlotRange};

use super::{
    Capacities, Holding, Planner,
    actual::{ActualService, ActualState},
    addresses::Addresses,
    backends::Backends,
    cidrs::Cidrs,
    draft::Draft,
    frontends::{Frontends, Room},
    held::Held,
    ids::Ids,
    op::{Family, MapOp, Protocol},
    record::{Record, Run},
    rejection::Anomaly,
    slots::Slots,
};
use crate::model::ServiceKey;

/// What no record owns.
#[derive(Clone, Debug, Default)]
pub(super) struct Leftovers {
    /// Their ids count as used until they are cleared.
    records: Vec<u32>,
    members: Vec<MemberKey>,
    ranges: Vec<(u32, IpNet)>,
    /// Parts of runs that cannot be used but that packets may still read.
    runs: Vec<(u32, u32)>,
    /// Element 0 of `SERVICES` is no record.
    clear_record_0: bool,
}

impl Leftovers {
    pub(super) fn plan(self, draft: &mut Draft) {
        draft.delete_members.extend(self.members.into_iter().map(|key| MapOp::DeleteMember { key }));
        let deletion = |(service, net)| MapOp::DeleteRange { service, net };
        draft.delete_ranges.extend(self.ranges.into_iter().map(deletion));
        let zero = self.clear_record_0.then_some(0);
        let cleared = zero.iter().chain(&self.records);
        draft.clear_records.extend(cleared.map(|id| MapOp::ClearService { service: *id }));
        draft.freed_records.extend(self.records);
        draft.freed.runs.extend(self.runs);
    }
}

impl Planner {
    /// A planner that knows what the kernel has, and what is wrong with it. Ids and slots stay what they are, so that a
    /// plan after a restart holds only what has changed meanwhile. Call [`Planner::plan_all`] next.
    pub fn recover(capacities: Capacities, actual: ActualState) -> (Self, Vec<Anomaly>) {
        let mut anomalies = Vec::new();
        let valid = |id: &u32| (1..capacities.services).contains(id);
        let used: BTreeSet<u32> = actual.services.keys().copied().filter(valid).collect();
        // What names a record that is not there must be gone before a record gets the id.
        let named: BTreeSet<u32> =
            named_records(&actual).filter(valid).filter(|id| !used.contains(id)).collect();
        let mut room = Room::new(capacities.frontends);
        let mut backends =
            |family, found| Backends::recover(family, capacities.backends, found, &mut anomalies);
        let mut planner = Self {
            capacities,
            record_ids: Ids::new(capacities.services, used.union(&named).copied()),
            records: BTreeMap::new(),
            by_name: HashMap::new(),
            holdings: HashMap::new(),
            slots: Slots::new(capacities.slots),
            backends4: backends(Family::V4, actual.backends4),
            backends6: backends(Family::V6, actual.backends6),
            frontends: Frontends::recover(BTreeMap::new(), &mut room),
            addresses: Addresses::recover(actual.addresses, &mut room),
            room,
            cidrs: Cidrs::recover(actual.cidrs, &mut anomalies),
            range_room: Room::new(capacities.source_ranges),
            members_in_kernel: actual.members.len() as u32,
            rejected: BTreeMap::new(),
            retry: false,
            no_local: Default::default(),
            holds_back: false,
            leftovers: None,
            inherited: BTreeSet::new(),
            held: Held::default(),
        };
        let mut leftovers = Leftovers { records: named.into_iter().collect(), ..Leftovers::default() };
        let mut sound = planner.recover_records(actual.services, &mut leftovers, &mut anomalies);
        for (id, record) in &mut sound {
            planner.recover_runs(*id, record, &actual.slots, &mut leftovers, &mut anomalies);
        }
        recover_members(actual.members, &mut sound, &mut leftovers, &mut anomalies);
        for (_, net) in &actual.ranges {
            planner.range_room.take_over(Family::of_net(net));
        }
        recover_ranges(actual.ranges, &mut sound, &mut leftovers, &mut anomalies);
        for (frontend, value) in &actual.frontends {
            if !sound.contains_key(&value.service) {
                anomalies.push(Anomaly::FrontendDangles { frontend: *frontend, service: value.service });
            }
        }
        planner.frontends = Frontends::recover(actual.frontends, &mut planner.room);
        planner.inherited = planner.holdings.keys().cloned().collect();
        planner.records = sound;
        planner.leftovers = Some(leftovers);
        (planner, anomalies)
    }

    /// The records that have a name; the others are left over.
    fn recover_records(
        &mut self,
        services: BTreeMap<u32, ActualService>,
        leftovers: &mut Leftovers,
        anomalies: &mut Vec<Anomaly>,
    ) -> BTreeMap<u32, Box<Record>> {
        let capacity = self.capacities.services;
        let mut records = BTreeMap::new();
        let mut owned: HashMap<ServiceKey, Vec<u32>> = HashMap::new();
        for (id, service) in services {
            let ranges = [service.record.cluster, service.record.local];
            if !self.record_ids.is_valid(id) {
                anomalies.push(Anomaly::ServiceOutOfBounds { service: id, capacity });
                leftovers.clear_record_0 |= id == 0;
                self.keep_unused(ranges, leftovers);
                continue;
            }
            let Some(record) = service.name.as_deref().and_then(|name| parse(name, &service)) else {
                anomalies.push(Anomaly::Unnamed { service: id, name: service.name });
                leftovers.records.push(id);
                self.keep_unused(ranges, leftovers);
                continue;
            };
            if let Some(first) = self.by_name.get(&record.name) {
                let name = record.name.to_string();
                anomalies.push(Anomaly::DuplicateName { name, first: *first, second: id });
                leftovers.records.push(id);
                self.keep_unused(ranges, leftovers);
                continue;
            }
            self.by_name.insert(record.name.clone(), id);
            owned.entry(record.owner.clone()).or_default().push(id);
            records.insert(id, Box::new(record));
        }
        let holding = |records: Vec<u32>| Holding { records: records.into(), ..Holding::default() };
        self.holdings = owned.into_iter().map(|(key, records)| (key, holding(records))).collect();
        records
    }

    /// Takes the slots that the record's ranges name.
    fn recover_runs(
        &mut self,
        id: u32,
        record: &mut Record,
        slots: &[u32],
        leftovers: &mut Leftovers,
        anomalies: &mut Vec<Anomaly>,
    ) {
        let ranges = [record.kernel.cluster, record.kernel.local];
        let runs = ranges.map(|range| match self.recover_run(id, record, range, slots, leftovers) {
            Ok(run) => run,
            Err(anomaly) => {
                anomalies.push(anomaly);
                Run { broken: true, ..Run::default() }
            }
        });
        [record.cluster, record.local] = runs;
        for (backend, bits) in record.backends() {
            self.backends(record.family).hold(backend, bits & lb_common::affinity::member::LOCAL != 0);
        }
    }

    fn recover_run(
        &mut self,
        service: u32,
        record: &Record,
        range: SlotRange,
        slots: &[u32],
        leftovers: &mut Leftovers,
    ) -> Result<Run, Anomaly> {
        if range.is_empty() {
            // A base without a length is no run, but not what a plan writes either.
            return Ok(Run { broken: range != SlotRange::EMPTY, ..Run::default() });
        }
        let (base, len) = (range.base(), range.len());
        let capacity = self.capacities.slots.min(u32::try_from(slots.len()).unwrap_or(u32::MAX));
        if !in_bounds(range, capacity) {
            self.keep_unused([range], leftovers);
            return Err(Anomaly::SlotsOutOfBounds { service, base, len, capacity });
        }
        let free = self.slots.take(base, len);
        if free != [(base, len)] {
            leftovers.runs.extend(free);
            return Err(Anomaly::SlotsOverlap { service, base, len });
        }
        let ids = &slots[base as usize..(base + len) as usize];
        let (family, protocol) = (record.family, record.protocol);
        if let Some(backend) = ids.iter().copied().find(|id| !self.backends(family).is(*id, protocol)) {
            leftovers.runs.extend(free);
            return Err(Anomaly::MissingBackend { service, family, backend });
        }
        Ok(Run { base, backends: ids.into(), broken: false })
    }

    /// Slots of a record that is not taken over: nobody else gets them before it is gone.
    fn keep_unused<const N: usize>(&mut self, ranges: [SlotRange; N], leftovers: &mut Leftovers) {
        let capacity = self.capacities.slots;
        for range in ranges.into_iter().filter(|r| !r.is_empty() && r.base() < capacity) {
            let len = range.len().min(capacity - range.base());
            leftovers.runs.extend(self.slots.take(range.base(), len));
        }
    }
}

fn in_bounds(range: SlotRange, capacity: u32) -> bool {
    range.base().checked_add(range.len()).is_some_and(|end| end <= capacity)
}

fn recover_members(
    members: BTreeMap<MemberKey, u32>,
    records: &mut BTreeMap<u32, Box<Record>>,
    leftovers: &mut Leftovers,
    anomalies: &mut Vec<Anomaly>,
) {
    let mut found: BTreeMap<u32, Vec<(u32, u32)>> = BTreeMap::new();
    for (key, bits) in members {
        if records.contains_key(&key.service) {
            found.entry(key.service).or_default().push((key.backend, bits));
        } else {
            anomalies.push(Anomaly::MemberDangles { service: key.service, backend: key.backend });
            leftovers.members.push(key);
        }
    }
    for (service, list) in found {
        if let Some(record) = records.get_mut(&service) {
            record.members = list.into();
        }
    }
}

/// Ranges of records that are there; one of the other family admits nobody and goes too.
fn recover_ranges(
    ranges: BTreeSet<(u32, IpNet)>,
    records: &mut BTreeMap<u32, Box<Record>>,
    leftovers: &mut Leftovers,
    anomalies: &mut Vec<Anomaly>,
) {
    let mut found: BTreeMap<u32, Vec<IpNet>> = BTreeMap::new();
    for (service, net) in ranges {
        if records.get(&service).is_some_and(|r| r.family == Family::of_net(&net)) {
            found.entry(service).or_default().push(net);
        } else {
            anomalies.push(Anomaly::RangeDangles { service, net });
            leftovers.ranges.push((service, net));
        }
    }
    for (service, list) in found {
        if let Some(record) = records.get_mut(&service) {
            record.ranges = list.into();
        }
    }
}

/// Every record that an entry of another map names.
fn named_records(actual: &ActualState) -> impl Iterator<Item = u32> {
    let frontends = actual.frontends.values().map(|value| value.service);
    let members = actual.members.keys().map(|key| key.service);
    frontends.chain(members).chain(actual.ranges.iter().map(|(service, _)| *service))
}

/// Reads `namespace/name:port/TCP/v4` back. The name is the record's identity; what it says must be what its creator
/// meant, so anything else is nobody's.
fn parse(name: &str, service: &ActualService) -> Option<Record> {
    let (rest, family) = name.rsplit_once('/')?;
    let (rest, protocol) = rest.rsplit_once('/')?;
    let (namespace, rest) = rest.split_once('/')?;
    let owner = rest.split_once(':').map_or(rest, |(owner, _)| owner);
    let family = match family {
        "v4" => Family::V4,
        "v6" => Family::V6,
        _ => return None,
    };
    let protocol =
        [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|p| p.to_string() == protocol)?;
    Some(Record {
        owner: ServiceKey::new(namespace, owner),
        name: Arc::from(name),
        family,
        protocol,
        kernel: service.record,
        cluster: Run::default(),
        local: Run::default(),
        members: Box::default(),
        ranges: Box::default(),
        claims: Box::default(),
        serving: None,
    })
}

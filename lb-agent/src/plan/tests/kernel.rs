//! The kernel maps as plain collections: carries operations out and refuses what would hurt a packet.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use lb_common::{
    affinity::MemberKey,
    frontend::{FrontendValue, ServiceRecord, SlotRange, flags},
    select::{Choice, Origin},
};

use crate::plan::{
    ActualCidr, ActualService, ActualState, Capacities, MapOp,
    op::{Backend, Family, Frontend, Protocol},
};

/// What a new flow gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Not a frontend: the packet is none of our business.
    Pass,
    Refuse,
    Drop,
    To(BTreeSet<(IpAddr, u16)>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    pub capacities: Capacities,
    pub frontends: BTreeMap<Frontend, FrontendValue>,
    pub services: BTreeMap<u32, ServiceRecord>,
    pub names: BTreeMap<u32, String>,
    pub slots: Vec<u32>,
    pub backends4: BTreeMap<u32, Backend>,
    pub backends6: BTreeMap<u32, Backend>,
    pub members: BTreeMap<MemberKey, u32>,
    pub addresses: BTreeMap<IpAddr, u32>,
    pub ranges: BTreeSet<(u32, IpNet)>,
    /// Also those that do not count any more.
    pub cidrs: BTreeMap<(Family, u32), (IpNet, u32)>,
    /// Elements that a packet may be reading though they have been switched off since the last grace period.
    lingering_cidrs: BTreeSet<(Family, u32)>,
    /// Slots that a packet may be reading because of a range that has been replaced since the last grace period.
    lingering: BTreeSet<u32>,
    graces: usize,
}

impl Kernel {
    pub fn new(capacities: Capacities) -> Self {
        Self {
            capacities,
            frontends: BTreeMap::new(),
            services: BTreeMap::new(),
            names: BTreeMap::new(),
            slots: vec![0; capacities.slots as usize],
            backends4: BTreeMap::new(),
            backends6: BTreeMap::new(),
            members: BTreeMap::new(),
            addresses: BTreeMap::new(),
            ranges: BTreeSet::new(),
            cidrs: BTreeMap::new(),
            lingering_cidrs: BTreeSet::new(),
            lingering: BTreeSet::new(),
            graces: 0,
        }
    }

    /// What the reader in `maps.rs` would find.
    pub fn read(&self) -> ActualState {
        let ids: BTreeSet<u32> = self.services.keys().chain(self.names.keys()).copied().collect();
        let service = |id| ActualService {
            record: self.services.get(&id).copied().unwrap_or_default(),
            name: self.names.get(&id).cloned(),
        };
        ActualState {
            frontends: self.frontends.clone(),
            services: ids.into_iter().map(|id| (id, service(id))).collect(),
            slots: self.slots.clone(),
            backends4: self.backends4.clone(),
            backends6: self.backends6.clone(),
            members: self.members.clone(),
            addresses: self
                .addresses
                .iter()
                .map(|(addr, kind)| (*addr, FrontendValue { service: 0, flags: *kind }))
                .collect(),
            ranges: self.ranges.clone(),
            cidrs: self
                .cidrs
                .iter()
                .filter(|(_, (_, flags))| *flags != 0)
                .map(|(at, (net, flags))| (*at, ActualCidr { net: Some(*net), flags: *flags }))
                .collect(),
        }
    }

    /// The ranges that count, with their flags.
    pub fn active_cidrs(&self) -> BTreeSet<(IpNet, u32)> {
        self.cidrs.values().filter(|(_, flags)| *flags != 0).copied().collect()
    }

    /// Whether a LoadBalancer frontend, or any other, lets `source` in.
    pub fn admits(&self, frontend: &Frontend, source: IpAddr) -> bool {
        let value = self.frontends[frontend];
        let mut ranges = self.ranges.iter().filter(|(service, _)| *service == value.service);
        value.flags & flags::SOURCE_RANGES == 0 || ranges.any(|(_, net)| net.contains(&source))
    }

    fn fits(&self, family: Family) -> bool {
        let frontends = self.frontends.keys().map(|f| f.addr);
        let entries = frontends.chain(self.addresses.keys().copied()).filter(|ip| Family::of(*ip) == family);
        entries.count() <= self.capacities.frontends as usize
    }

    fn backends(&mut self, family: Family) -> &mut BTreeMap<u32, Backend> {
        match family {
            Family::V4 => &mut self.backends4,
            Family::V6 => &mut self.backends6,
        }
    }

    fn live_slots(&self) -> BTreeSet<u32> {
        let ranges = self.services.values().flat_map(|r| [r.cluster, r.local]);
        ranges.flat_map(|r| r.base()..r.base().saturating_add(r.len())).collect()
    }

    /// A plan begins.
    pub fn begin(&mut self) {
        self.graces = 0;
    }

    pub fn apply_all(&mut self, ops: &[MapOp]) {
        self.begin();
        for op in ops {
            self.apply(op);
        }
        let is_opened = |op: &MapOp| matches!(op, MapOp::SwitchCidr { flags, .. } if *flags != 0);
        if let Some(first) = ops.iter().position(is_opened) {
            let mut rest = ops[first..].iter();
            let is_cidr = |op: &MapOp| is_opened(op) || matches!(op, MapOp::WriteCidr { .. });
            assert!(rest.all(is_cidr), "addresses in a range may be unknown yet: {ops:#?}");
        }
        assert!(self.lingering_cidrs.is_empty(), "switched off without a grace period: {ops:#?}");
        assert!(self.graces <= 1, "one grace period is enough: {ops:#?}");
        // The next plan may reuse whatever this one freed.
        assert!(self.lingering.is_empty(), "replaced without a grace period: {ops:#?}");
    }

    pub fn apply(&mut self, op: &MapOp) {
        match op {
            MapOp::NameService { service, name } => {
                assert!((1..self.capacities.services).contains(service), "{op:?}");
                assert!(!self.services.contains_key(service) && !self.names.contains_key(service), "{op:?}");
                self.names.insert(*service, name.clone());
            }
            MapOp::WriteBackend { id, backend } => self.write_backend(*id, backend),
            MapOp::WriteSlots { base, backends } => {
                let live = self.live_slots();
                for (slot, id) in (*base..).zip(backends) {
                    assert!(!live.contains(&slot) && !self.lingering.contains(&slot), "{op:?} is being read");
                    self.slots[slot as usize] = *id;
                }
            }
            MapOp::PutMember { key, bits } => {
                assert!(self.members.insert(*key, *bits) != Some(*bits), "{op:?} changes nothing");
                assert!(self.members.len() <= self.capacities.members as usize, "{op:?} does not fit");
            }
            MapOp::WriteService { service, record } => {
                assert!(self.names.contains_key(service), "{op:?} has no name");
                self.linger(*service, Some(record));
                assert!(self.services.insert(*service, *record) != Some(*record), "{op:?} changes nothing");
            }
            MapOp::PutFrontend { frontend, value } => {
                assert!(self.services.contains_key(&value.service), "{op:?} points nowhere");
                assert!(self.frontends.insert(*frontend, *value) != Some(*value), "{op:?} changes nothing");
                assert!(self.fits(Family::of(frontend.addr)), "{op:?} does not fit");
                let addr = &frontend.addr;
                assert!(addr.is_loopback() || self.addresses.contains_key(addr), "{op:?}: unknown address");
            }
            MapOp::PutAddress { addr, kind } => {
                assert!(self.addresses.insert(*addr, *kind) != Some(*kind), "{op:?} changes nothing");
                assert!(self.fits(Family::of(*addr)), "{op:?} does not fit");
            }
            MapOp::DeleteAddress { addr } => {
                assert!(self.addresses.remove(addr).is_some(), "{op:?}");
                assert!(self.frontends.keys().all(|f| f.addr != *addr), "{op:?} has frontends");
            }
            MapOp::PutRange { service, net } => {
                assert!(self.names.contains_key(service), "{op:?} has no name");
                assert!(self.ranges.insert((*service, *net)), "{op:?} changes nothing");
                let family = Family::of_net(net);
                let count = self.ranges.iter().filter(|(_, n)| Family::of_net(n) == family).count();
                assert!(count <= self.capacities.source_ranges as usize, "{op:?} does not fit");
            }
            MapOp::DeleteRange { service, net } => {
                assert!(self.ranges.remove(&(*service, *net)), "{op:?}");
            }
            MapOp::WriteCidr { index, net } => {
                let at = (Family::of_net(net), *index);
                assert!(*index < lb_common::cidr::CAPACITY, "{op:?}");
                assert!(!self.lingering_cidrs.contains(&at), "{op:?} is being read");
                let old = self.cidrs.insert(at, (*net, 0));
                assert!(old.is_none_or(|(_, flags)| flags == 0), "{op:?} is in use");
            }
            MapOp::SwitchCidr { family, index, flags } => {
                let (net, old) = self.cidrs[&(*family, *index)];
                assert!((old == 0) != (*flags == 0), "{op:?}: neither on nor off");
                if *flags == 0 {
                    self.lingering_cidrs.insert((*family, *index));
                }
                self.cidrs.insert((*family, *index), (net, *flags));
            }
            MapOp::DeleteFrontend { frontend } => {
                assert!(self.frontends.remove(frontend).is_some(), "{op:?}")
            }
            MapOp::DeleteMember { key } => assert!(self.members.remove(key).is_some(), "{op:?}"),
            MapOp::Grace => {
                self.graces += 1;
                self.lingering.clear();
                self.lingering_cidrs.clear();
            }
            MapOp::ClearService { service } => {
                assert_eq!(self.graces, 1, "{op:?} before the grace period");
                assert!(self.frontends.values().all(|v| v.service != *service), "{op:?} in use");
                assert!(self.members.keys().all(|k| k.service != *service), "{op:?} has members");
                assert!(self.ranges.iter().all(|(s, _)| s != service), "{op:?} has source ranges");
                self.services.remove(service);
                self.names.remove(service);
            }
            MapOp::ClearBackend { family, id } => {
                assert_eq!(self.graces, 1, "{op:?} before the grace period");
                assert!(self.backends(*family).remove(id).is_some(), "{op:?} is not there");
            }
        }
    }

    fn write_backend(&mut self, id: u32, backend: &Backend) {
        assert!((1..self.capacities.backends).contains(&id));
        let old = self.backends(Family::of(backend.addr)).insert(id, *backend);
        if let Some(old) = old {
            let address = |b: &Backend| (b.addr, b.port, b.protocol);
            assert_eq!(address(&old), address(backend), "backend {id} is in use");
            assert_ne!(old.local, backend.local, "backend {id} does not change");
        }
    }

    /// Packets may go on reading the ranges that `service` has now.
    fn linger(&mut self, service: u32, next: Option<&ServiceRecord>) {
        let Some(old) = self.services.get(&service).copied() else { return };
        let next = next.copied().unwrap_or_default();
        for (old, next) in [(old.cluster, next.cluster), (old.local, next.local)] {
            if old != next {
                self.lingering.extend(old.base()..old.base().saturating_add(old.len()));
            }
        }
    }

    /// What a new flow from `origin` to `frontend` gets at this moment. Panics on what a packet must never meet.
    pub fn decide(&self, frontend: &Frontend, origin: Origin) -> Decision {
        match self.frontends.get(frontend) {
            Some(value) => self.decide_as(frontend, *value, origin),
            None => Decision::Pass,
        }
    }

    /// As if the frontend's value were `value`.
    pub fn decide_as(&self, frontend: &Frontend, value: FrontendValue, origin: Origin) -> Decision {
        let record = self.services.get(&value.service).expect("a frontend points at a record");
        match record.choose(value.flags, origin) {
            Choice::Reject => Decision::Refuse,
            Choice::Drop => Decision::Drop,
            Choice::Slots(range) => Decision::To(self.endpoints(range, frontend)),
        }
    }

    fn endpoints(&self, range: SlotRange, frontend: &Frontend) -> BTreeSet<(IpAddr, u16)> {
        let backends = match Family::of(frontend.addr) {
            Family::V4 => &self.backends4,
            Family::V6 => &self.backends6,
        };
        let ids = &self.slots[range.base() as usize..(range.base() + range.len()) as usize];
        let endpoint = |id: &u32| {
            assert_ne!(*id, 0, "a slot names backend 0");
            let backend = backends.get(id).expect("a slot names a backend");
            assert_eq!(backend.protocol, frontend.protocol);
            (backend.addr, backend.port)
        };
        ids.iter().map(endpoint).collect()
    }

    /// Members and `local` flags fit the sets, and nothing is there that nobody uses.
    pub fn assert_consistent(&self) {
        let protocol_of = |name: &String| {
            let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
            protocols.into_iter().find(|p| name.contains(&format!("/{p}/"))).expect("a protocol")
        };
        assert!(self.services.keys().eq(self.names.keys()));
        let (mut used, mut local) = (BTreeSet::new(), BTreeSet::new());
        let mut members = BTreeMap::new();
        for (id, record) in &self.services {
            let v6 = self.names[id].ends_with("/v6");
            for (range, bit) in [(record.cluster, 1), (record.local, 2)] {
                for slot in range.base()..range.base() + range.len() {
                    let backend = self.slots[slot as usize];
                    let element = if v6 { self.backends6[&backend] } else { self.backends4[&backend] };
                    assert_eq!(element.protocol, protocol_of(&self.names[id]));
                    used.insert((v6, backend));
                    if bit == 2 {
                        local.insert((v6, backend));
                    }
                    if record.affinity_timeout_s != 0 {
                        *members.entry(MemberKey { service: *id, backend }).or_insert(0) |= bit;
                    }
                }
            }
        }
        assert_eq!(members, self.members, "members are not the sets");
        let four = self.backends4.iter().map(|(id, b)| ((false, *id), b.local));
        let all: BTreeMap<_, _> =
            four.chain(self.backends6.iter().map(|(id, b)| ((true, *id), b.local))).collect();
        assert!(all.keys().eq(used.iter()), "backends that nobody uses");
        for (id, is_local) in all {
            assert_eq!(is_local, local.contains(&id), "backend {id:?}");
        }
    }
}

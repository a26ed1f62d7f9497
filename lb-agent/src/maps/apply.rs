//! The interpreter of [`MapOp`]: the one place where a plan becomes writes.

use std::{io, net::IpAddr, thread, time::Duration};

use ipnet::IpNet;
use lb_common::{
    Be16, V4, V6,
    addr::v6,
    affinity::MemberKey,
    backend::{Backend as RawBackend, flags},
    cidr::ServiceCidr,
    frontend::{FrontendKey, FrontendValue, ServiceName, ServiceRecord},
    maps::name,
    source::ADMITTED,
};
use tokio::{
    runtime::{Handle, RuntimeFlavor},
    task::block_in_place,
};

use super::{
    MapError, Maps, Written, capacity_option,
    ranges::{self, RangeKey, RangeKey4, RangeKey6},
};
use crate::{
    machine,
    plan::op::{Backend, Family, Frontend, MapOp, Protocol},
};

/// What became of a plan.
#[derive(Debug, Default)]
pub struct Applied {
    /// Operations carried out.
    pub done: usize,
    /// What the kernel refused, one per map and kind of write. Everything else of the plan was carried out.
    pub refused: Vec<Refused>,
}

/// Entries that the kernel did not take.
#[derive(Debug, thiserror::Error)]
#[error("{entries} entries of {map} could not be {what}{}", self.remedy())]
pub struct Refused {
    pub map: &'static str,
    /// "written" or "deleted".
    pub what: &'static str,
    pub entries: usize,
    /// Why the first of them was refused.
    #[source]
    pub source: io::Error,
}

impl Refused {
    /// True if the map is full.
    pub fn is_full(&self) -> bool {
        // ENOSPC is what tries say.
        matches!(self.source.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC))
    }

    fn remedy(&self) -> String {
        if self.is_full() {
            format!(": the map is full, raise {}", capacity_option(self.map))
        } else {
            String::new()
        }
    }
}

/// Hash map writes of one kind that follow each other in a plan, waiting to be sent as batches.
#[derive(Default)]
struct Pending {
    kind: Option<Kind>,
    keys4: Vec<FrontendKey<V4>>,
    values4: Vec<FrontendValue>,
    keys6: Vec<FrontendKey<V6>>,
    values6: Vec<FrontendValue>,
    members: Vec<MemberKey>,
    bits: Vec<u32>,
    ranges4: Vec<RangeKey4>,
    ranges6: Vec<RangeKey6>,
    services: Vec<u32>,
    names: Vec<ServiceName>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    NameService,
    PutFrontend,
    DeleteFrontend,
    PutMember,
    DeleteMember,
    PutRange,
    DeleteRange,
}

impl Kind {
    /// The kind of an operation that is sent in batches.
    fn of(op: &MapOp) -> Option<Self> {
        match op {
            MapOp::NameService { .. } => Some(Self::NameService),
            MapOp::PutFrontend { .. } | MapOp::PutAddress { .. } => Some(Self::PutFrontend),
            MapOp::DeleteFrontend { .. } | MapOp::DeleteAddress { .. } => Some(Self::DeleteFrontend),
            MapOp::PutMember { .. } => Some(Self::PutMember),
            MapOp::DeleteMember { .. } => Some(Self::DeleteMember),
            MapOp::PutRange { .. } => Some(Self::PutRange),
            MapOp::DeleteRange { .. } => Some(Self::DeleteRange),
            _ => None,
        }
    }
}

impl Maps {
    /// Carries out a plan in its order. A full map does not stop it; an index beyond an array does, because what
    /// follows could point there, and any prefix of a plan is a safe state.
    ///
    /// Blocks for the plan's grace periods.
    pub fn apply(&mut self, ops: &[MapOp]) -> Result<Applied, MapError> {
        let mut applied = Applied::default();
        let mut pending = Pending::default();
        for op in ops {
            let kind = Kind::of(op);
            if pending.kind != kind {
                self.flush(&mut pending, &mut applied)?;
                pending.kind = kind;
            }
            if kind.is_some() {
                pending.push(op);
            } else {
                self.apply_one(op, &mut applied)?;
                applied.done += 1;
            }
        }
        self.flush(&mut pending, &mut applied)?;
        Ok(applied)
    }

    fn flush(&self, pending: &mut Pending, applied: &mut Applied) -> Result<(), MapError> {
        let p = std::mem::take(pending);
        match p.kind {
            Some(Kind::NameService) => {
                self.stats.zero(&p.services)?;
                applied.add(name::SERVICE_NAMES, "written", self.names.put_all(&p.services, &p.names));
            }
            Some(Kind::PutFrontend) => {
                p.keys4.iter().try_for_each(|key| self.bystanders.know_address(&key.addr))?;
                p.keys6.iter().try_for_each(|key| self.bystanders.know_address(&key.addr))?;
                applied.add(name::FRONTENDS4, "written", self.frontends4.put_all(&p.keys4, &p.values4));
                applied.add(name::FRONTENDS6, "written", self.frontends6.put_all(&p.keys6, &p.values6));
                self.epochs.renew_all_nothing();
            }
            Some(Kind::DeleteFrontend) => {
                applied.add(name::FRONTENDS4, "deleted", self.frontends4.delete_all(&p.keys4));
                applied.add(name::FRONTENDS6, "deleted", self.frontends6.delete_all(&p.keys6));
            }
            Some(Kind::PutMember) => {
                applied.add(name::AFFINITY_MEMBERS, "written", self.members.put_all(&p.members, &p.bits));
            }
            Some(Kind::DeleteMember) => {
                applied.add(name::AFFINITY_MEMBERS, "deleted", self.members.delete_all(&p.members));
            }
            Some(Kind::PutRange) => {
                let admitted = |n| vec![ADMITTED; n];
                let (v4, v6) = (admitted(p.ranges4.len()), admitted(p.ranges6.len()));
                applied.add(name::SOURCE_RANGES4, "written", self.ranges4.put_all(&p.ranges4, &v4));
                applied.add(name::SOURCE_RANGES6, "written", self.ranges6.put_all(&p.ranges6, &v6));
            }
            Some(Kind::DeleteRange) => {
                applied.add(name::SOURCE_RANGES4, "deleted", self.ranges4.delete_all(&p.ranges4));
                applied.add(name::SOURCE_RANGES6, "deleted", self.ranges6.delete_all(&p.ranges6));
            }
            None => {}
        }
        Ok(())
    }

    fn apply_one(&mut self, op: &MapOp, applied: &mut Applied) -> Result<(), MapError> {
        match op {
            MapOp::WriteBackend { id, backend } => self.write_backend(*id, backend)?,
            MapOp::WriteSlots { base, backends } => {
                for (index, id) in (*base..).zip(backends) {
                    self.slots.store(index, id)?;
                }
            }
            MapOp::WriteService { service, record } => self.services.store(*service, record)?,
            MapOp::Grace => wait_in_place(wait_for_packets),
            MapOp::ClearService { service } => {
                self.services.store(*service, &ServiceRecord::default())?;
                if let Err(e) = self.names.delete(service) {
                    applied.refuse(name::SERVICE_NAMES, "deleted", 1, e);
                }
            }
            MapOp::ClearBackend { family: Family::V4, id } => {
                self.backends4.store(*id, &RawBackend::default())?
            }
            MapOp::ClearBackend { family: Family::V6, id } => {
                self.backends6.store(*id, &RawBackend::default())?
            }
            MapOp::WriteCidr { index, net } => self.write_cidr(*index, net)?,
            MapOp::SwitchCidr { family, index, flags } => {
                self.switch_cidr(*family, *index, *flags)?;
                self.epochs.renew_all_nothing();
            }
            // Batches: see `Kind::of`.
            MapOp::NameService { .. }
            | MapOp::PutFrontend { .. }
            | MapOp::DeleteFrontend { .. }
            | MapOp::PutAddress { .. }
            | MapOp::DeleteAddress { .. }
            | MapOp::PutRange { .. }
            | MapOp::DeleteRange { .. }
            | MapOp::PutMember { .. }
            | MapOp::DeleteMember { .. } => {}
        }
        Ok(())
    }

    fn write_backend(&mut self, id: u32, backend: &Backend) -> Result<(), MapError> {
        let flags = backend_flags(backend);
        let port = Be16::new(backend.port);
        self.bystanders.know_port(port)?;
        match backend.addr {
            IpAddr::V4(a) => self.backends4.store(id, &RawBackend::new(a.into(), port, flags)),
            IpAddr::V6(a) => self.backends6.store(id, &RawBackend::new(v6(a), port, flags)),
        }
    }

    fn write_cidr(&mut self, index: u32, net: &IpNet) -> Result<(), MapError> {
        match net {
            IpNet::V4(n) => {
                let (net, mask) = (n.network().into(), n.netmask().into());
                self.cidrs4.store(index, &ServiceCidr { net, mask, flags: 0, _pad: 0 })
            }
            IpNet::V6(n) => {
                let (net, mask) = (v6(n.network()), v6(n.netmask()));
                self.cidrs6.store(index, &ServiceCidr { net, mask, flags: 0, _pad: 0 })
            }
        }
    }

    /// Writes the flags, and the rest as it is. An element that does not exist is refused by the store.
    fn switch_cidr(&mut self, family: Family, index: u32, flags: u32) -> Result<(), MapError> {
        match family {
            Family::V4 => {
                let element = self.cidrs4.load(index)?.unwrap_or_default();
                self.cidrs4.store(index, &ServiceCidr { flags, ..element })
            }
            Family::V6 => {
                let element = self.cidrs6.load(index)?.unwrap_or_default();
                self.cidrs6.store(index, &ServiceCidr { flags, ..element })
            }
        }
    }
}

impl Pending {
    fn push(&mut self, op: &MapOp) {
        match op {
            MapOp::NameService { service, name } => {
                self.services.push(*service);
                self.names.push(service_name(name));
            }
            MapOp::PutFrontend { frontend, value } => {
                self.push_frontend(frontend_key(frontend), Some(*value))
            }
            MapOp::DeleteFrontend { frontend } => self.push_frontend(frontend_key(frontend), None),
            MapOp::PutAddress { addr, kind } => {
                self.push_frontend(address_key(*addr), Some(FrontendValue { service: 0, flags: *kind }));
            }
            MapOp::DeleteAddress { addr } => self.push_frontend(address_key(*addr), None),
            MapOp::PutRange { service, net } | MapOp::DeleteRange { service, net } => {
                match ranges::key(*service, net) {
                    RangeKey::V4(k) => self.ranges4.push(k),
                    RangeKey::V6(k) => self.ranges6.push(k),
                }
            }
            MapOp::PutMember { key, bits } => {
                self.members.push(*key);
                self.bits.push(*bits);
            }
            MapOp::DeleteMember { key } => self.members.push(*key),
            _ => {}
        }
    }

    /// `value`: to write; none to delete.
    fn push_frontend(&mut self, key: Key, value: Option<FrontendValue>) {
        match key {
            Key::V4(k) => {
                self.keys4.push(k);
                self.values4.extend(value);
            }
            Key::V6(k) => {
                self.keys6.push(k);
                self.values6.extend(value);
            }
        }
    }
}

impl Applied {
    fn add(&mut self, map: &'static str, what: &'static str, written: Written) {
        self.done += written.done;
        if let Some(e) = written.first_error {
            self.refuse(map, what, written.refused, e);
        }
    }

    fn refuse(&mut self, map: &'static str, what: &'static str, entries: usize, source: io::Error) {
        match self.refused.iter_mut().find(|r| r.map == map && r.what == what) {
            Some(known) => known.entries += entries,
            None => self.refused.push(Refused { map, what, entries, source }),
        }
    }
}

enum Key {
    V4(FrontendKey<V4>),
    V6(FrontendKey<V6>),
}

fn frontend_key(f: &Frontend) -> Key {
    let (port, proto) = (Be16::new(f.port), f.protocol.number());
    match f.addr {
        IpAddr::V4(a) => Key::V4(FrontendKey::new(a.into(), port, proto)),
        IpAddr::V6(a) => Key::V6(FrontendKey::new(v6(a), port, proto)),
    }
}

fn address_key(addr: IpAddr) -> Key {
    match addr {
        IpAddr::V4(a) => Key::V4(FrontendKey::address(a.into())),
        IpAddr::V6(a) => Key::V6(FrontendKey::address(v6(a))),
    }
}

/// [`RawBackend::flags`]: the protocol rides along as its IP number, so that ids can be recovered from the array alone.
pub(super) fn backend_flags(backend: &Backend) -> u16 {
    let local = if backend.local { flags::LOCAL } else { 0 };
    flags::IN_USE | local | u16::from(backend.protocol.number()) << flags::PROTO_SHIFT
}

/// The reverse of [`backend_flags`]; `None` for an element that is free or names no known protocol.
pub(super) fn backend_from_flags(addr: IpAddr, port: u16, raw: u16) -> Option<Backend> {
    if raw & flags::IN_USE == 0 {
        return None;
    }
    let protocol = Protocol::from_number((raw >> flags::PROTO_SHIFT) as u8)?;
    Some(Backend { addr, port, protocol, local: raw & flags::LOCAL != 0 })
}

/// A name as `SERVICE_NAMES` stores it. Names made of RFC 1123 labels fit; a longer one is cut at a character.
fn service_name(text: &str) -> ServiceName {
    let mut utf8 = [0; ServiceName::CAPACITY_BYTES];
    let fits = (0..=utf8.len().min(text.len())).rev().find(|&n| text.is_char_boundary(n)).unwrap_or(0);
    utf8[..fits].copy_from_slice(&text.as_bytes()[..fits]);
    ServiceName { utf8 }
}

/// The text in an entry of `SERVICE_NAMES`.
pub(super) fn name_text(name: &ServiceName) -> String {
    let end = name.utf8.iter().position(|&b| b == 0).unwrap_or(name.utf8.len());
    String::from_utf8_lossy(&name.utf8[..end]).into_owned()
}

/// How long to wait where the kernel offers no grace period. A program runs for microseconds; only preemption in a
/// socket hook can stretch that.
const GRACE_FALLBACK: Duration = Duration::from_millis(50);

/// Returns when no program that was running at the call still is.
///
/// MEMBARRIER_CMD_GLOBAL is synchronize_rcu (kernel/sched/membarrier.c), and every program runs inside an RCU read section.
/// The kernel refuses it with nohz_full CPUs, and skips it on a machine with one CPU.
pub(crate) fn wait_for_packets() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_long = 1;
    let one_cpu = machine::online_cpus() == 1;
    // SAFETY: no pointers.
    if one_cpu || unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) } != 0 {
        thread::sleep(GRACE_FALLBACK);
    }
}

/// Waits for the kernel in the middle of a task: on a thread of the runtime, other tasks go on elsewhere meanwhile.
pub(crate) fn wait_in_place<T>(wait: impl FnOnce() -> T) -> T {
    match Handle::try_current() {
        Ok(runtime) if runtime.runtime_flavor() == RuntimeFlavor::MultiThread => block_in_place(wait),
        _ => wait(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn while_the_only_thread_of_the_runtime_waits_other_tasks_go_on() {
        let waiting = tokio::spawn(async {
            let (done, is_done) = std::sync::mpsc::channel();
            tokio::spawn(async move { done.send(()) });
            let mut seen = false;
            wait_in_place(|| seen = is_done.recv_timeout(Duration::from_secs(20)).is_ok());
            seen
        });
        assert!(waiting.await.unwrap());
    }

    #[tokio::test]
    async fn a_runtime_without_other_threads_waits_itself() {
        wait_in_place(wait_for_packets);
    }

    #[test]
    fn names_are_cut_at_a_character_and_read_back() {
        assert_eq!(name_text(&service_name("default/web:http")), "default/web:http");
        let long = "é".repeat(200);
        assert_eq!(name_text(&service_name(&long)), "é".repeat(ServiceName::CAPACITY_BYTES / 2));
    }

    #[test]
    fn backend_flags_carry_the_protocol() {
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            for local in [true, false] {
                let b = Backend { addr: [10, 0, 0, 1].into(), port: 80, protocol, local };
                assert_eq!(backend_from_flags(b.addr, b.port, backend_flags(&b)), Some(b));
            }
        }
        assert_eq!(backend_from_flags([10, 0, 0, 1].into(), 80, 0), None);
    }
}

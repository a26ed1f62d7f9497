//! From a frontend to a backend: policy, affinity, slot.

use lb_common::{
    affinity::{AffinityKey, AffinityValue, MemberKey, is_fresh, member},
    backend::Backend,
    frontend::{FrontendValue, SlotRange, flags},
    select::{self, Choice, Origin},
    verdict::Counter,
};

use crate::{globals, maps, net::Net};

/// A backend and its id.
#[derive(Clone, Copy)]
pub struct Picked<A> {
    pub id: u32,
    pub backend: Backend<A>,
}

/// Why a new flow gets no backend. One payload only: so it fits a register, as what functions of the object return must.
#[derive(Clone, Copy)]
pub enum Refusal {
    /// Nobody serves: tell the client.
    Reject,
    /// The address has no such port: tell the client.
    RejectUnlisted,
    /// Say nothing.
    Drop(Counter),
    /// Addressed to another host: leave it alone.
    NotOurs,
}

impl Refusal {
    /// The [code](Self::code) of no refusal.
    pub const NO_REFUSAL: u32 = u32::MAX;
    const REJECT: u32 = Counter::COUNT;
    const REJECT_UNLISTED: u32 = Counter::COUNT + 1;
    const NOT_OURS: u32 = Counter::COUNT + 2;

    /// As a number: the index of the counter, or one behind those.
    #[inline(always)]
    pub const fn code(self) -> u32 {
        match self {
            Self::Drop(counter) => counter as u32,
            Self::Reject => Self::REJECT,
            Self::RejectUnlisted => Self::REJECT_UNLISTED,
            Self::NotOurs => Self::NOT_OURS,
        }
    }

    /// That with this [code](Self::code), if any.
    #[inline(always)]
    pub const fn of_code(code: u32) -> Option<Self> {
        match (code, Counter::from_index(code)) {
            (_, Some(counter)) => Some(Self::Drop(counter)),
            (Self::NO_REFUSAL, _) => None,
            (Self::REJECT, _) => Some(Self::Reject),
            (Self::REJECT_UNLISTED, _) => Some(Self::RejectUnlisted),
            _ => Some(Self::NotOurs),
        }
    }

    /// Where it is counted.
    #[inline(always)]
    pub const fn counter(self) -> Counter {
        match self {
            Self::Reject => Counter::RejectNoEndpoints,
            Self::RejectUnlisted => Counter::RejectUnlistedPort,
            Self::Drop(counter) => counter,
            // Never counted: the packet passes.
            Self::NotOurs => Counter::DropBadMap,
        }
    }
}

/// Picks the backend of a new flow from `client`. `hash` decides unless the client is remembered.
#[inline(always)]
pub fn pick<A: Net>(
    frontend: FrontendValue,
    origin: Origin,
    client: A,
    hash: u32,
    now: u32,
) -> Result<Picked<A>, Refusal> {
    let bad_map = Refusal::Drop(Counter::DropBadMap);
    let record = maps::SERVICES.get_ptr(frontend.service).ok_or(bad_map)?;
    // SAFETY: both ranges are aligned 64-bit integers that the agent stores as one; volatile keeps it one load each.
    let (cluster, local) = unsafe {
        (
            SlotRange(core::ptr::read_volatile(&raw const (*record).cluster.0)),
            SlotRange(core::ptr::read_volatile(&raw const (*record).local.0)),
        )
    };
    let range = match select::choose(frontend.flags, origin, cluster, local) {
        Choice::Slots(range) => range,
        Choice::Reject => return Err(Refusal::Reject),
        Choice::Drop => return Err(Refusal::Drop(no_local_endpoints(frontend.flags))),
    };
    if frontend.flags & flags::AFFINITY == 0 {
        return from_slot(range, hash).ok_or(bad_map);
    }
    // SAFETY: aligned; a torn read cannot happen on 32 bits.
    let timeout_s = unsafe { core::ptr::read_volatile(&raw const (*record).affinity_timeout_s) };
    let set = if select::wants_local(frontend.flags, origin) { member::LOCAL } else { member::CLUSTER };
    let key = AffinityKey::new(client, frontend.service);
    let picked = match remembered(&key, set, now, timeout_s) {
        Some(picked) => picked,
        None => from_slot(range, hash).ok_or(bad_map)?,
    };
    // Every new connection restarts the timeout (rule G3).
    A::put_affinity(&key, &AffinityValue { backend: picked.id, last_used: now });
    Ok(picked)
}

/// Rule C8: one counter per policy. That of a ClusterIP is the internal one, whoever asks.
#[inline(always)]
const fn no_local_endpoints(frontend_flags: u32) -> Counter {
    if frontend_flags & flags::KIND_MASK == flags::KIND_CLUSTER_IP {
        Counter::DropNoLocalEndpointsInternal
    } else {
        Counter::DropNoLocalEndpointsExternal
    }
}

#[inline(always)]
fn from_slot<A: Net>(range: SlotRange, hash: u32) -> Option<Picked<A>> {
    let id = *maps::SLOTS.get(select::slot_index(range, hash))?;
    backend(id)
}

#[inline(always)]
fn backend<A: Net>(id: u32) -> Option<Picked<A>> {
    if id == 0 {
        return None;
    }
    Some(Picked { id, backend: A::backend(id)? })
}

/// The backend that this client had last, while the memory is fresh and the backend is still in the set that the
/// client may use (rule G4).
#[inline(always)]
fn remembered<A: Net>(key: &AffinityKey<A>, set: u32, now: u32, timeout_s: u32) -> Option<Picked<A>> {
    let memory = A::affinity(key)?;
    if !is_fresh(memory.last_used, now, timeout_s, globals::jiffies_per_s()) {
        return None;
    }
    let member = MemberKey { service: key.service, backend: memory.backend };
    // SAFETY: copied at once.
    let sets = unsafe { maps::AFFINITY_MEMBERS.get(member).copied()? };
    if sets & set == 0 {
        return None;
    }
    backend(memory.backend)
}

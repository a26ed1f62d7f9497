//! This CPU's cache of flows ([`lb_common::flow_cache`]): read before the tables, and filled after them.

use aya_ebpf::helpers::{bpf_get_smp_processor_id, bpf_ktime_get_ns};
use lb_common::{
    conntrack::{Flow, tcp},
    flow_cache::{CachedFlow, epoch_index, hash, is_stale, other_slot, slot_index},
    proto,
    tuple::Tuple,
};

use crate::{
    forward, globals, maps,
    net::{Net, Packet, Scratch},
};

/// Where a packet's flow has its place, and the epoch that it may be noted with.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Place {
    slot: u32,
    /// Low half. Read before the flow table is, and so before whatever changes there.
    epoch: u32,
}

impl Place {
    /// No cache.
    const NOWHERE: Self = Self { slot: u32::MAX, epoch: 0 };

    /// That of a packet's flow.
    #[inline(always)]
    pub fn of<A: Net>(p: &Packet<A>) -> Self {
        let slots = globals::flow_cache_slots();
        if slots == 0 {
            return Self::NOWHERE;
        }
        let hash = hash(&p.tuple);
        let Some(epoch) = maps::FLOW_EPOCHS.get_ptr(epoch_index(hash)) else { return Self::NOWHERE };
        // SAFETY: an aligned integer; volatile keeps it one load.
        let epoch = unsafe { core::ptr::read_volatile(epoch) } as u32;
        let slots = if A::IS_V6 { slots / 4 } else { slots };
        // SAFETY: no arguments, no effects.
        let cpu = unsafe { bpf_get_smp_processor_id() };
        Self { slot: slot_index(cpu, slots, hash), epoch }
    }
}

/// What is known about the packet's flow, if that is all there is to know: a packet with news has to be seen by the table.
#[inline(always)]
pub fn find<A: Net>(p: &Packet<A>, place: Place) -> Option<&'static CachedFlow<A>> {
    if globals::flow_cache_slots() == 0 {
        return None;
    }
    let mut cached = A::cached(place.slot)?;
    // SAFETY: an element of this CPU's part; programs of one CPU do not interrupt each other.
    if !is_same(unsafe { &(*cached).key }, &p.tuple) {
        cached = A::cached(other_slot(place.slot))?;
        // SAFETY: as above.
        if !is_same(unsafe { &(*cached).key }, &p.tuple) {
            return None;
        }
    }
    // SAFETY: as above.
    let cached = unsafe { &*cached };
    let is_current = cached.epoch == place.epoch
        && !is_stale(cached.stamped, p.now, globals::jiffies_per_s())
        && p.tcp_flags & !tcp::ACK == 0;
    if is_current { Some(cached) } else { None }
}

/// Which way a noted flow's packets go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// To the stack.
    Stack,
    /// Where the routing table said, whose answer is in the scratch memory.
    Routed,
}

/// Notes the flow of the packet in the scratch memory for those that follow.
#[inline(always)]
pub fn fill<A: Net>(p: &Packet<A>, flow: &Flow<A>, way: Way) {
    // A flow may end with its first packet: a flood of new ones fills no cache.
    let seen = if p.tuple.proto == proto::TCP { tcp::ACK } else { 0 };
    let is_plain = p.tcp_flags == seen && flow.created != p.now;
    if globals::flow_cache_slots() != 0 && is_plain {
        note(flow, way as u32);
    }
}

/// Not inlined, for the stack's sake.
#[inline(never)]
fn note<A: Net>(flow: &Flow<A>, way: u32) -> u32 {
    let Some(Scratch { packet: p, fib, place, .. }) = A::scratch() else { return 0 };
    let Some(mut cached) = A::cached(place.slot) else { return 0 };
    // SAFETY: as in `find`.
    if is_others(unsafe { &*cached }, p) {
        let Some(other) = A::cached(other_slot(place.slot)) else { return 0 };
        cached = other;
        // SAFETY: as in `find`.
        if is_others(unsafe { &*cached }, p) {
            return 0;
        }
    }
    // SAFETY: as in `find`.
    let cached = unsafe { &mut *cached };
    let hop = &mut cached.next_hop;
    if way == Way::Stack as u32 {
        hop.ifindex = 0;
    } else if fib.ifindex > u16::MAX as u32 {
        // Does not fit.
        return 0;
    } else {
        hop.macs = forward::macs(fib);
        // The kernel has put the route's MTU where it was told the packet's length (kernel commit e1850ea9bd9e, 5.12).
        hop.mtu = fib.tot_len;
        hop.ifindex = fib.ifindex as u16;
    }
    cached.fill(&p.tuple, flow, place.epoch);
    0
}

/// Fresh flows keep their slot: two that took turns would write with every packet. A new map is all zeroes.
#[inline(always)]
fn is_others<A: Net>(cached: &CachedFlow<A>, p: &Packet<A>) -> bool {
    cached.key.proto != 0
        && !is_stale(cached.stamped, p.now, globals::jiffies_per_s())
        && !is_same(&cached.key, &p.tuple)
}

/// Compares without a branch for each word.
#[inline(always)]
fn is_same<A: Net>(a: &Tuple<A>, b: &Tuple<A>) -> bool {
    let ports = |t: &Tuple<A>| (t.sport.raw() as u32) << 16 | t.dport.raw() as u32;
    let mut differences = (ports(a) ^ ports(b)) | (a.proto ^ b.proto) as u32;
    for i in 0..A::WORDS {
        differences |= (a.src.word(i) ^ b.src.word(i)) | (a.dst.word(i) ^ b.dst.word(i));
    }
    differences == 0
}

/// To be called after an entry of the flow table was removed or changed: no CPU believes what it has noted about it.
#[inline(always)]
pub fn renew_epoch<A: Net>(key: &Tuple<A>) {
    if globals::flow_cache_slots() == 0 {
        return;
    }
    if let Some(epoch) = maps::FLOW_EPOCHS.get_ptr_mut(epoch_index(hash(key))) {
        // The time will do where another would need an atomic addition: no earlier epoch had it.
        // SAFETY: aligned, and read and written as a whole by everybody.
        unsafe { core::ptr::write_volatile(epoch, bpf_ktime_get_ns()) };
    }
}

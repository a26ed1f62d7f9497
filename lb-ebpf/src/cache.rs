//! This CPU's cache of flows ([`lb_common::flow_cache`]): read before the tables, and filled after them.

use aya_ebpf::helpers::{bpf_get_smp_processor_id, bpf_ktime_get_ns};
use lb_common::{
    conntrack::{Flow, tcp},
    flow_cache::{
        CachedFlow, Tags, epoch_index, hash, is_stale, nothing_epoch_index, other_slot, slot_index, tag, way,
    },
    proto,
    tuple::Tuple,
};

use crate::{
    forward, globals, maps, metrics,
    net::{Net, Packet, Scratch},
};

/// Where a packet's flow has its place, and the epochs that it may be noted with.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Place {
    slot: u32,
    hash: u32,
    /// Low half. Read before the flow table is, and so before whatever changes there.
    epoch: u32,
    /// The same for tuples without a flow.
    nothing_epoch: u32,
    /// Of [`flow_cache::hook`]. No narrower than the others: padding would be copied byte by byte.
    hook: u32,
}

/// The epoch at this index, low half.
#[inline(always)]
fn epoch(index: u32) -> Option<u32> {
    // SAFETY: an aligned integer; volatile keeps it one load.
    maps::FLOW_EPOCHS.get_ptr(index).map(|epoch| unsafe { core::ptr::read_volatile(epoch) } as u32)
}

impl Place {
    /// No cache.
    pub const NOWHERE: Self = Self { slot: u32::MAX, hash: 0, epoch: 0, nothing_epoch: 0, hook: 0 };

    /// That of a packet's flow.
    #[inline(always)]
    pub fn of<A: Net>(p: &Packet<A>, hook: u8) -> Self {
        let slots = globals::flow_cache_slots();
        if slots == 0 {
            return Self::NOWHERE;
        }
        let hash = hash(&p.tuple);
        let Some(epoch) = epoch(epoch_index(hash)) else { return Self::NOWHERE };
        let slots = if A::IS_V6 { slots / 4 } else { slots };
        // SAFETY: no arguments, no effects.
        let cpu = unsafe { bpf_get_smp_processor_id() };
        Self { slot: slot_index(cpu, slots, hash, hook), hash, epoch, nothing_epoch: 0, hook: hook as u32 }
    }

    /// To be called before the tables are asked, if the cache knows nothing.
    #[inline(always)]
    pub fn before_tables(&mut self) {
        if globals::flow_cache_slots() != 0 {
            self.nothing_epoch = epoch(nothing_epoch_index(self.hash)).unwrap_or_default();
        }
    }
}

/// After a packet that the cache does not know, as many that it knows are looked up by their tags first, and by what bystanders
/// are known by before.
pub const COLD_PACKETS: u32 = 8;

/// What is known about the packet's flow, if that is all there is to know: a packet with news has to be seen by the table.
#[inline(always)]
pub fn find<A: Net>(p: &Packet<A>, place: &Place, cold: &mut u32) -> Option<&'static CachedFlow<A>> {
    // Whoever opens a flow touches enough cold memory as it is.
    if globals::flow_cache_slots() == 0 || news(p) & !tcp::ACK != 0 {
        return None;
    }
    if *cold != 0 && !is_tagged::<A>(place)? {
        *cold = COLD_PACKETS;
        return None;
    }
    let found = match same_at(p, place, place.slot) {
        None => same_at(p, place, other_slot(place.slot)),
        found => found,
    };
    if found.is_none() {
        *cold = COLD_PACKETS;
    } else if *cold != 0 {
        *cold -= 1;
    }
    let cached = found?;
    let current =
        if cached.way == way::NOTHING { epoch(nothing_epoch_index(place.hash))? } else { place.epoch };
    let is_current = cached.epoch == current && !is_stale(cached.stamped, p.now, globals::jiffies_per_s());
    if is_current { Some(cached) } else { None }
}

/// False if both slots of the place have other tags: then they are not worth fetching.
#[inline(always)]
fn is_tagged<A: Net>(place: &Place) -> Option<bool> {
    // SAFETY: bytes of this CPU; those beside them may be another's.
    let tags = unsafe { &(*A::tags(place.slot)?).of_slot };
    let has_tag = |slot| tags[Tags::position(slot)] == tag(place.hash);
    Some(has_tag(place.slot) || has_tag(other_slot(place.slot)))
}

/// The entry in this slot, if it is of the packet's tuple and hook.
#[inline(always)]
fn same_at<A: Net>(p: &Packet<A>, place: &Place, slot: u32) -> Option<&'static CachedFlow<A>> {
    // SAFETY: an element of this CPU's part; programs of one CPU do not interrupt each other.
    let cached = unsafe { &*A::cached(slot)? };
    if is_same(cached, &p.tuple, place.hook) { Some(cached) } else { None }
}

/// The TCP flags that the flow table takes note of.
#[inline(always)]
const fn news<A: Net>(p: &Packet<A>) -> u8 {
    p.tcp_flags & (tcp::SYN | tcp::ACK | tcp::FIN | tcp::RST)
}

/// True for packets that look like all that will follow.
#[inline(always)]
const fn is_plain<A: Net>(p: &Packet<A>) -> bool {
    match p.tuple.proto {
        proto::TCP => news(p) == tcp::ACK,
        proto::UDP => true,
        _ => false,
    }
}

/// Notes the flow of the packet in the scratch memory for those that follow; `way` is [`way::STACK`], or [`way::ROUTED`] with
/// the routing table's answer in the scratch memory.
#[inline(always)]
pub fn fill<A: Net>(p: &Packet<A>, flow: &Flow<A>, way: u8) {
    // A flow may end with its first packet: a flood of new ones fills no cache.
    if globals::flow_cache_slots() != 0 && is_plain(p) && flow.created != p.now {
        note(flow, way as u32);
    }
}

/// Not inlined, for the stack's sake.
#[inline(never)]
fn note<A: Net>(flow: &Flow<A>, way: u32) -> u32 {
    let Some(Scratch { packet: p, fib, place, .. }) = A::scratch() else { return 0 };
    let Some(cached) = free_slot(p, place, false) else { return 0 };
    let hop = &mut cached.next_hop;
    if way == way::ROUTED as u32 {
        if fib.ifindex > u16::MAX as u32 {
            // Does not fit.
            return 0;
        }
        hop.macs = forward::macs(fib);
        // The kernel has put the route's MTU where it was told the packet's length (kernel commit e1850ea9bd9e, 5.12).
        hop.mtu = fib.tot_len;
        hop.ifindex = fib.ifindex as u16;
    }
    cached.fill(&p.tuple, flow, place.epoch);
    cached.counted_at = metrics::place_of(flow.service);
    cached.hook = place.hook as u8;
    cached.way = way as u8;
    0
}

/// Notes that the packet in the scratch memory has no flow and opens none: one such packet of eight. Most tuples have few
/// packets, and what has many is soon known.
#[inline(always)]
pub fn fill_nothing<A: Net>(p: &Packet<A>) {
    if globals::flow_cache_slots() == 0 || !is_plain(p) {
        return;
    }
    if let Some(Scratch { others, .. }) = A::scratch() {
        *others = others.wrapping_add(1);
        if *others & 7 == 0 {
            note_nothing::<A>();
        }
    }
}

/// Not inlined, for the stack's sake.
#[inline(never)]
fn note_nothing<A: Net>() -> u32 {
    let Some(Scratch { packet: p, place, .. }) = A::scratch() else { return 0 };
    let Some(cached) = free_slot(p, place, true) else { return 0 };
    cached.key = p.tuple;
    cached.stamped = p.now;
    cached.epoch = place.nothing_epoch;
    cached.hook = place.hook as u8;
    cached.way = way::NOTHING;
    0
}

/// A place for the packet's flow, or for `nothing`, which takes no other's.
#[inline(always)]
fn free_slot<A: Net>(p: &Packet<A>, place: &Place, nothing: bool) -> Option<&'static mut CachedFlow<A>> {
    let mut slot = place.slot;
    let mut cached = A::cached(slot)?;
    // SAFETY: as in `same_at`.
    if is_others(unsafe { &*cached }, p, place.hook, nothing) {
        slot = other_slot(slot);
        cached = A::cached(slot)?;
        // SAFETY: as in `same_at`.
        if is_others(unsafe { &*cached }, p, place.hook, nothing) {
            return None;
        }
    }
    // SAFETY: as in `is_tagged`.
    unsafe { (*A::tags(slot)?).of_slot[Tags::position(slot)] = tag(place.hash) };
    // SAFETY: as in `same_at`.
    Some(unsafe { &mut *cached })
}

/// Fresh flows keep their slot: two that took turns would write with every packet. A new map is all zeroes.
#[inline(always)]
fn is_others<A: Net>(cached: &CachedFlow<A>, p: &Packet<A>, hook: u32, nothing: bool) -> bool {
    cached.key.proto != 0
        && (nothing || cached.way != way::NOTHING)
        && !is_stale(cached.stamped, p.now, globals::jiffies_per_s())
        && !is_same(cached, &p.tuple, hook)
}

/// Compares without a branch for each word. IPv6 has one in the middle: the compiler loads all words before it looks at any,
/// which takes stack.
#[inline(always)]
fn is_same<A: Net>(cached: &CachedFlow<A>, b: &Tuple<A>, hook: u32) -> bool {
    let a = &cached.key;
    let ports = |t: &Tuple<A>| (t.sport.raw() as u32) << 16 | t.dport.raw() as u32;
    let mut differences = (ports(a) ^ ports(b)) | (a.proto ^ b.proto) as u32 | (cached.hook as u32 ^ hook);
    for i in 0..A::WORDS {
        differences |= a.src.word(i) ^ b.src.word(i);
    }
    if A::IS_V6 && differences != 0 {
        return false;
    }
    for i in 0..A::WORDS {
        differences |= a.dst.word(i) ^ b.dst.word(i);
    }
    differences == 0
}

/// To be called after an entry of the flow table was removed or changed: no CPU believes what it has noted about it.
#[inline(always)]
pub fn renew_epoch<A: Net>(key: &Tuple<A>) {
    if globals::flow_cache_slots() != 0 {
        renew(epoch_index(hash(key)));
    }
}

/// To be called after an entry of the flow table was made that no packet of its tuple made: no CPU believes that there is
/// nothing.
#[inline(always)]
pub fn renew_nothing<A: Net>(key: &Tuple<A>) {
    if globals::flow_cache_slots() != 0 {
        renew(nothing_epoch_index(hash(key)));
    }
}

#[inline(always)]
fn renew(index: u32) {
    if let Some(epoch) = maps::FLOW_EPOCHS.get_ptr_mut(index) {
        // The time will do where another would need an atomic addition: no earlier epoch had it.
        // SAFETY: aligned, and read and written as a whole by everybody.
        unsafe { core::ptr::write_volatile(epoch, bpf_ktime_get_ns()) };
    }
}

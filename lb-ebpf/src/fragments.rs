//! Fragments at ingress: only the first one of a datagram has ports.
//!
//! A first fragment notes its ports in `FRAGMENTS*`, where the later ones find them. A later one that comes before the
//! first cannot wait where it is: its frame goes to `HELD*`, and comes back out of the first one's packet, which takes
//! the shape of each held frame in turn and sends a copy of itself back in by the same device. No timers and nobody in
//! user space: what never sees its first fragment is pushed out of the table by others. Held are only datagrams to addresses
//! of Services and to the address that translated packets leave under; noted, beside these, all of a flow.

use aya_ebpf::{
    bindings::BPF_F_INGRESS,
    helpers::generated::{bpf_clone_redirect, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes},
};
use lb_common::{
    device,
    fragment::{
        FragmentPorts, HELD_FRAME_BYTES, HELD_PER_DATAGRAM, HeldFrame, HeldKey, OWN_FRAME_BYTES, is_together,
    },
    verdict::Counter,
};

use crate::{
    globals, lookup, maps, metrics,
    net::{ANY, NOEXIST, Net, Packet},
    parse::ETHERNET_BYTES,
    skb::Skb,
    tc::NEXT,
};

const SHOT: i32 = 2;
/// Not a code of the kernel: the ports became known.
pub const KNOWN: i32 = i32::MIN;

/// Notes the ports of a first fragment.
#[inline(always)]
pub fn note<A: Net>(p: &Packet<A>) {
    let ports = FragmentPorts { sport: p.tuple.sport, dport: p.tuple.dport, seen: p.now };
    A::put_fragment(&p.fragment_key(), &ports);
}

/// For a first fragment that comes in: notes its ports and lets go of those that wait for it. False if the packet could
/// not get its own content back. Not inlined, for the sake of whole packets, like all of this module.
#[inline(never)]
pub fn on_first<A: Net>(skb: Skb, p: &Packet<A>) -> bool {
    if !concerns_us(p) {
        return true;
    }
    note(p);
    match A::held(&held_key(p, 0)) {
        Some(_) => release(skb, p),
        None => true,
    }
}

/// For a later fragment whose ports are not known: puts it aside, or lets it pass if it is nobody's business here.
/// [`KNOWN`] if the first one came at this moment.
#[inline(never)]
pub fn hold<A: Net>(skb: Skb, p: &mut Packet<A>) -> i32 {
    if skb.has_vlan() || !concerns_us(p) || lookup::origin(p).is_none() || !put_aside(skb, p) {
        metrics::count(Counter::PassFragmentUnknown);
        return NEXT;
    }
    // Another CPU may have noted the first one since the look, and found nothing to let go.
    match A::fragment(&p.fragment_key()) {
        Some(ports) if is_together(ports.seen, p.now, globals::jiffies_per_s()) => {
            p.tuple.sport = ports.sport;
            p.tuple.dport = ports.dport;
            forget_last(p);
            KNOWN
        }
        _ => {
            metrics::count(Counter::FragmentHeld);
            SHOT
        }
    }
}

/// True for datagrams to an address of a Service, or to one that translated answers come back to.
#[inline(always)]
fn concerns_us<A: Net>(p: &Packet<A>) -> bool {
    if A::frontend(&p.address_key()).is_some() {
        return true;
    }
    is_address_of(p, p.ifindex) || is_address_of(p, device::ANY)
}

#[inline(always)]
fn is_address_of<A: Net>(p: &Packet<A>, ifindex: u32) -> bool {
    // SAFETY: read at once.
    let device = unsafe { maps::DEVICES.get(ifindex) };
    device.and_then(A::snat_addr).is_some_and(|addr| addr == p.tuple.dst)
}

#[inline(always)]
fn held_key<A: Net>(p: &Packet<A>, index: u32) -> HeldKey<A> {
    HeldKey { datagram: p.fragment_key(), index }
}

/// Copies the frame to the first free place of its datagram.
#[inline(always)]
fn put_aside<A: Net>(skb: Skb, p: &Packet<A>) -> bool {
    let Some(copy) = save(skb, p.ifindex, p.now) else { return false };
    for index in 0..HELD_PER_DATAGRAM {
        let key = held_key(p, index);
        // Looks before it writes: an LRU map takes an element and copies the frame before it sees that the key exists.
        match A::held(&key) {
            None => {
                if A::put_held(&key, copy, NOEXIST).is_ok() {
                    return true;
                }
            }
            // SAFETY: a map value, valid for the program's run.
            Some(held) if is_together(unsafe { (*held).seen }, p.now, globals::jiffies_per_s()) => {}
            Some(_) => return A::put_held(&key, copy, ANY).is_ok(),
        }
    }
    false
}

/// Takes back what [`put_aside`] has put there last. That may be another CPU's frame by now, and this one may have been let
/// go already: then a fragment goes out twice or is lost with its datagram, as on any network.
#[inline(always)]
fn forget_last<A: Net>(p: &Packet<A>) {
    for back in 0..HELD_PER_DATAGRAM {
        let key = held_key(p, HELD_PER_DATAGRAM - 1 - back);
        if A::held(&key).is_some() {
            A::remove_held(&key);
            return;
        }
    }
}

/// Sends a copy of each held frame back in, behind this packet, which has its own content again at the end.
#[inline(always)]
fn release<A: Net>(skb: Skb, p: &Packet<A>) -> bool {
    let Some(own) = save_own(skb) else { return true };
    let own_bytes = skb.len();
    // A sum that the device took over the whole packet (CHECKSUM_COMPLETE) is that of this content alone; a change of the
    // length makes the kernel forget it. Where the length cannot change, nothing has changed yet.
    // SAFETY: plain integers.
    if unsafe { bpf_skb_change_tail(skb.0, own_bytes + 1, 0) } != 0 {
        return true;
    }
    for index in 0..HELD_PER_DATAGRAM {
        let key = held_key(p, index);
        let Some(held) = A::held(&key) else { break };
        // SAFETY: a map value, valid for the program's run.
        let held = unsafe { &*held };
        if is_together(held.seen, p.now, globals::jiffies_per_s())
            && become_frame(skb, &held.frame, held.bytes)
        {
            // By the device that it came by, whose MAC address it has; or by this one if a tag still names the VLAN device.
            let ifindex = if skb.has_vlan() { p.ifindex } else { held.ifindex };
            // SAFETY: plain integers.
            if unsafe { bpf_clone_redirect(skb.0, ifindex, BPF_F_INGRESS as u64) } == 0 {
                metrics::count(Counter::FragmentReleased);
            }
        }
        A::remove_held(&key);
    }
    become_frame(skb, own, own_bytes)
}

/// Copies the first fragment itself, which may be longer than those that are held.
#[inline(always)]
fn save_own(skb: Skb) -> Option<&'static [u8; OWN_FRAME_BYTES]> {
    let copy = maps::OWN_SCRATCH.get_ptr_mut(0)?;
    // SAFETY: this CPU's own element.
    let copy = unsafe { &mut *copy };
    let bytes = skb.len();
    // Not `== 0`: the verifier of 6.1 learns no lower bound from that.
    if bytes < ETHERNET_BYTES || bytes > OWN_FRAME_BYTES as u32 {
        return None;
    }
    // SAFETY: the buffer has at least `bytes` bytes.
    let code = unsafe { bpf_skb_load_bytes(skb.0.cast(), 0, copy.as_mut_ptr().cast(), bytes) };
    if code == 0 { Some(copy) } else { None }
}

/// Copies the frame to this CPU's scratch memory.
#[inline(always)]
fn save(skb: Skb, ifindex: u32, now: u32) -> Option<&'static HeldFrame> {
    let copy = maps::HELD_SCRATCH.get_ptr_mut(0)?;
    // SAFETY: this CPU's own element.
    let copy = unsafe { &mut *copy };
    let bytes = skb.len();
    // As in `save_own`.
    if bytes < ETHERNET_BYTES || bytes > HELD_FRAME_BYTES as u32 {
        return None;
    }
    // SAFETY: the buffer has at least `bytes` bytes.
    if unsafe { bpf_skb_load_bytes(skb.0.cast(), 0, copy.frame.as_mut_ptr().cast(), bytes) } != 0 {
        return None;
    }
    copy.bytes = bytes;
    copy.seen = now;
    copy.ifindex = ifindex;
    Some(copy)
}

/// Gives the packet the first `bytes` bytes of `frame` as its content.
#[inline(always)]
fn become_frame<const N: usize>(skb: Skb, frame: &[u8; N], bytes: u32) -> bool {
    if bytes < ETHERNET_BYTES || bytes > N as u32 {
        return false;
    }
    // SAFETY: plain integers, then a buffer of at least `bytes` bytes.
    unsafe {
        bpf_skb_change_tail(skb.0, bytes, 0) == 0
            && bpf_skb_store_bytes(skb.0, 0, frame.as_ptr().cast(), bytes, 0) == 0
    }
}

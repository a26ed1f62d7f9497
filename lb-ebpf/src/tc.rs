//! The classifiers, on every device of the data path: `ingress` translates packets that come in, `egress` the answers
//! that leave.

use aya_ebpf::helpers::generated::{bpf_redirect, bpf_redirect_neigh};
use lb_common::{
    V4, V6,
    conntrack::{Flow, flags},
    flow_cache::{CachedFlow, hook, way},
    proto,
    verdict::Counter,
};

use crate::{
    bystander,
    cache::{self, Place},
    conntrack, echo,
    forward::{self, Fib, NextHop},
    fragments,
    frame::{self, Frame, Plain, Translation},
    globals, icmp,
    lookup::{self, Found, Hook},
    metrics,
    net::{Packet, Scratch},
    once::Once,
    parse::{ETHERNET_BYTES, Parse, Parsed, behind_tag, ethertype},
    reset,
    rewrite::{Header, rewrite},
    service::Refusal,
    skb::Skb,
    trace::Printed,
};

/// TCX_NEXT, which is also TC_ACT_UNSPEC: on to the next program on the hook, whoever owns it, then to the stack.
pub const NEXT: i32 = -1;
const SHOT: i32 = 2;
/// Not a code of the kernel: `transit` asks for an ICMP error. It does not send that itself, for the stack's sake.
pub const ANSWER: i32 = i32::MIN;
/// Not a code of the kernel either: the tables have to be asked about a plain packet, which has been read.
const LONG_WAY: i32 = i32::MIN + 1;
/// Nor this: the packet has not been read.
const NOT_PLAIN: i32 = i32::MIN + 2;

/// What a step did: the code to return, or why the packet is dropped.
pub type Outcome = Result<i32, Counter>;

/// All that the classifiers need of a family.
pub trait Family: Parse + Plain + Header + icmp::Build + Printed + Once {}
impl Family for V4 {}
impl Family for V6 {}

#[inline(always)]
pub fn ingress(skb: Skb) -> i32 {
    skb.clear_sent();
    match skb.protocol() {
        ethertype::IPV4 => match noted::<V4>(skb, hook::INGRESS) {
            LONG_WAY => ingress4(skb, ETHERNET_BYTES, true),
            NOT_PLAIN => ingress4(skb, ETHERNET_BYTES, false),
            code => code,
        },
        ethertype::IPV6 => match noted::<V6>(skb, hook::INGRESS) {
            LONG_WAY => ingress6(skb, ETHERNET_BYTES, true),
            NOT_PLAIN => ingress6(skb, ETHERNET_BYTES, false),
            code => code,
        },
        _ => match behind_tag(skb) {
            (ethertype::IPV4, l3) => ingress4(skb, l3, false),
            (ethertype::IPV6, l3) => ingress6(skb, l3, false),
            _ => NEXT,
        },
    }
}

#[inline(always)]
pub fn egress(skb: Skb) -> i32 {
    if skb.is_sent() {
        // Translated where it came in.
        return NEXT;
    }
    match skb.protocol() {
        ethertype::IPV4 => match noted::<V4>(skb, hook::EGRESS) {
            LONG_WAY => egress4(skb, ETHERNET_BYTES, true),
            NOT_PLAIN => egress4(skb, ETHERNET_BYTES, false),
            code => code,
        },
        ethertype::IPV6 => match noted::<V6>(skb, hook::EGRESS) {
            LONG_WAY => egress6(skb, ETHERNET_BYTES, true),
            NOT_PLAIN => egress6(skb, ETHERNET_BYTES, false),
            code => code,
        },
        _ => match behind_tag(skb) {
            (ethertype::IPV4, l3) => egress4(skb, l3, false),
            (ethertype::IPV6, l3) => egress6(skb, l3, false),
            _ => NEXT,
        },
    }
}

// The tables, one function per family and direction: each gets a stack frame of its own (the limit is 512 bytes).

#[inline(never)]
fn ingress4(skb: Skb, l3: u32, is_read: bool) -> i32 {
    action(on_ingress::<V4>(skb, l3, is_read))
}
#[inline(never)]
fn ingress6(skb: Skb, l3: u32, is_read: bool) -> i32 {
    action(on_ingress::<V6>(skb, l3, is_read))
}
#[inline(never)]
fn egress4(skb: Skb, l3: u32, is_read: bool) -> i32 {
    action(on_egress::<V4>(skb, l3, is_read))
}
#[inline(never)]
fn egress6(skb: Skb, l3: u32, is_read: bool) -> i32 {
    action(on_egress::<V6>(skb, l3, is_read))
}

#[inline(always)]
pub fn action(outcome: Outcome) -> i32 {
    match outcome {
        Ok(code) => code,
        Err(reason) => {
            metrics::count(reason);
            SHOT
        }
    }
}

#[inline(always)]
fn on_ingress<A: Family>(skb: Skb, l3: u32, is_read: bool) -> Outcome {
    let Some(Scratch { packet: p, place, is_routed, .. }) = A::scratch() else { return Ok(NEXT) };
    *is_routed = 0;
    p.ifindex = skb.ifindex();
    p.addressee.kind = skb.packet_type();
    match if is_read { rest(skb, p, place) } else { parse(skb, l3, p, place) } {
        Parsed::Packet if p.is_first_fragment() => {
            if !fragments::on_first(skb, p) {
                return Err(Counter::DropRewriteFailed);
            }
        }
        Parsed::Packet => {}
        Parsed::IcmpError => return Ok(icmp::translate(skb, p, 0)),
        Parsed::Echo => return Ok(echo::on_request(skb, p)),
        Parsed::UnknownFragment => match fragments::hold(skb, p) {
            // The first one came meanwhile, and its ports are in `p`.
            fragments::KNOWN => {}
            code => return Ok(code),
        },
        Parsed::Other => return Ok(NEXT),
    }
    p.wire_bytes = wire_bytes(skb, p);
    match lookup::ingress(p, Hook::Classifier(skb.0)) {
        Found::Nothing => {
            cache::fill_nothing(p);
            Ok(NEXT)
        }
        Found::Flow(flow) => {
            if p.is_first_fragment() {
                // Of a flow, whatever address it is to: an answer may come by another device than the request left by.
                fragments::note(p);
            }
            // SAFETY: see `Found::Flow`.
            send_on(skb, p, unsafe { &*flow })
        }
        Found::Refused(Refusal::Drop(reason)) => Err(reason),
        Found::NotOurs | Found::Refused(Refusal::NotOurs) => Ok(NEXT),
        Found::Refused(refusal @ (Refusal::Reject | Refusal::RejectUnlisted)) => {
            metrics::count(refusal.counter());
            Ok(icmp::answer(skb, p, icmp::Error::PORT_UNREACHABLE))
        }
    }
}

#[inline(always)]
fn on_egress<A: Family>(skb: Skb, l3: u32, is_read: bool) -> Outcome {
    let Some(Scratch { packet: p, place, .. }) = A::scratch() else { return Ok(NEXT) };
    p.ifindex = skb.ifindex();
    p.addressee.kind = skb.packet_type();
    match if is_read { rest(skb, p, place) } else { parse(skb, l3, p, place) } {
        Parsed::Packet => {}
        Parsed::IcmpError => return Ok(icmp::translate(skb, p, flags::AT_EGRESS)),
        Parsed::Echo | Parsed::Other => return Ok(NEXT),
        Parsed::UnknownFragment => {
            // Stacks send their own fragments in order, and so does whoever forwards what it has put together.
            metrics::count(Counter::PassFragmentUnknown);
            return Ok(NEXT);
        }
    }
    match lookup::egress(p) {
        Some(flow) => {
            if p.is_first_fragment() {
                fragments::note(p);
            }
            // SAFETY: see `Found::Flow`.
            let flow = unsafe { &*flow };
            translate(skb, p, flow, p.ttl)?;
            cache::fill(p, flow, way::STACK);
        }
        None => cache::fill_nothing(p),
    }
    Ok(NEXT)
}

/// For a bystander nothing, else what this CPU has noted about the packet's flow, done; [`LONG_WAY`] or [`NOT_PLAIN`] if there is more to it.
#[inline(always)]
fn noted<A: Family>(skb: Skb, hook: u8) -> i32 {
    let frame = Frame::of_skb(skb);
    let Some(Scratch { packet: p, place, cold, .. }) = A::scratch() else { return NOT_PLAIN };
    if !frame::parse(frame, p) {
        return NOT_PLAIN;
    }
    // After packets that the cache knew, one more of them is likely.
    let is_warm = *cold == 0;
    if !is_warm && is_bystander(p, hook) {
        *cold = cache::COLD_PACKETS;
        return NEXT;
    }
    p.now = conntrack::now();
    *place = Place::of(p, hook);
    match cache::find(p, place, cold) {
        None if is_warm && is_bystander(p, hook) => NEXT,
        None => LONG_WAY,
        Some(cached) if cached.way == way::NOTHING => NEXT,
        Some(cached) => send_noted(skb, frame, p, cached),
    }
}

#[inline(always)]
fn is_bystander<A: Family>(p: &Packet<A>, hook: u8) -> bool {
    match hook {
        hook::EGRESS => bystander::is_source(p.tuple.sport),
        _ => bystander::is_destination(&p.tuple.dst),
    }
}

/// The short way.
#[inline(always)]
fn send_noted<A: Family>(skb: Skb, frame: Frame, p: &mut Packet<A>, cached: &CachedFlow<A>) -> i32 {
    let leaves = cached.way == way::ROUTED;
    if leaves && (p.ttl <= 1 || skb.has_vlan()) {
        return LONG_WAY;
    }
    if skb.gso_size() != 0 || frame::may_be_unfinished(frame, p) {
        return send_unfinished(skb, p, cached);
    }
    if leaves && p.ip_bytes > cached.next_hop.mtu as u32 {
        return LONG_WAY;
    }
    let new = Translation::noted(cached);
    let Some(growth) = frame::translate(frame, p, &new, leaves as u8) else { return LONG_WAY };
    skb.sum_has_grown(growth);
    metrics::count_service(cached.counted_at, 1, p.ip_bytes, false);
    go_on(skb, frame, cached)
}

/// The same for packets whose checksum may be left to the device. Not inlined, for the stack's sake.
#[inline(never)]
fn send_unfinished<A: Family>(skb: Skb, p: &mut Packet<A>, cached: &CachedFlow<A>) -> i32 {
    let leaves = cached.way == way::ROUTED;
    if !read_rest(skb, p) || leaves && wire_bytes(skb, p) > cached.next_hop.mtu as u32 {
        return LONG_WAY;
    }
    if frame::translate_unfinished(skb, p, &Translation::noted(cached), leaves as u8).is_err() {
        return action(Err(Counter::DropRewriteFailed));
    }
    metrics::count_service(cached.counted_at, skb.packets(), p.ip_bytes, false);
    go_on(skb, Frame::of_skb(skb), cached)
}

/// Sends a translated packet where its flow goes.
#[inline(always)]
fn go_on<A: Family>(skb: Skb, frame: Frame, cached: &CachedFlow<A>) -> i32 {
    if cached.way != way::ROUTED {
        return NEXT;
    }
    let hop = &cached.next_hop;
    if frame.write_macs(&hop.macs).is_none() {
        return action(Err(Counter::DropRewriteFailed));
    }
    skb.mark_sent();
    // SAFETY: plain integers.
    unsafe { bpf_redirect(hop.ifindex as u32, 0) as i32 }
}

/// What the cache has not asked about a plain packet. False if it has no such header.
#[inline(always)]
fn read_rest<A: Family>(skb: Skb, p: &mut Packet<A>) -> bool {
    p.l3 = ETHERNET_BYTES;
    p.l4 = A::L4 as u32;
    p.l4_bytes = 8;
    p.is_fragment = false;
    p.is_later_fragment = false;
    if p.tuple.proto == proto::TCP {
        let Some(offset) = Frame::of_skb(skb).read::<u8>(A::L4 + 12) else { return false };
        p.l4_bytes = (offset >> 4) << 2;
    }
    true
}

/// Completes what [`noted`] has read.
#[inline(always)]
fn rest<A: Family>(skb: Skb, p: &mut Packet<A>, place: &mut Place) -> Parsed {
    place.before_tables();
    if read_rest(skb, p) { Parsed::Packet } else { Parsed::Other }
}

#[inline(always)]
fn parse<A: Family>(skb: Skb, l3: u32, p: &mut Packet<A>, place: &mut Place) -> Parsed {
    *place = Place::NOWHERE;
    p.now = conntrack::now();
    A::parse(skb, l3, p)
}

/// Translates a packet that came in and sends it where its flow goes.
#[inline(always)]
fn send_on<A: Family>(skb: Skb, p: &Packet<A>, flow: &Flow<A>) -> Outcome {
    if flow.flags & flags::GONE != 0 && reset::applies(p) {
        return Ok(reset::answer(skb, p));
    }
    if flow.flags & flags::TRANSIT != 0 {
        return match (A::transit(skb.0, flow), A::scratch()) {
            (ANSWER, Some(Scratch { error, .. })) => Ok(icmp::answer(skb, p, *error)),
            (code, _) => Ok(code),
        };
    }
    translate(skb, p, flow, p.ttl)?;
    if flow.flags & flags::HAIRPIN != 0 {
        return back_out(skb);
    }
    if flow.flags & flags::GONE == 0 {
        cache::fill(p, flow, way::STACK);
    }
    Ok(NEXT)
}

#[inline(always)]
fn translate<A: Family>(skb: Skb, p: &Packet<A>, flow: &Flow<A>, ttl: u8) -> Outcome {
    let new = flow.rewritten(p.tuple.proto);
    rewrite(skb, p, &new, ttl).map_err(|_| Counter::DropRewriteFailed)?;
    metrics::count_service(metrics::place_of(flow.service), skb.packets(), p.ip_bytes, false);
    Ok(NEXT)
}

/// Out by the device that it came in by, to whoever sent it.
#[inline(always)]
pub fn back_out(skb: Skb) -> Outcome {
    let Some(macs) = skb.load::<[[u8; 6]; 2]>(0) else { return Err(Counter::DropRewriteFailed) };
    skb.store(0, &[macs[1], macs[0]]).map_err(|_| Counter::DropRewriteFailed)?;
    // SAFETY: plain integers.
    Ok(unsafe { bpf_redirect(skb.ifindex(), 0) } as i32)
}

/// To another node, or back from there to the client, past the stack. Called through [`Once::transit`].
#[inline(always)]
pub fn transit<A: Family>(skb: Skb, p: &Packet<A>, flow: &Flow<A>) -> i32 {
    action(on_transit(skb, p, flow))
}

#[inline(always)]
fn on_transit<A: Family>(skb: Skb, p: &Packet<A>, flow: &Flow<A>) -> Outcome {
    if is_tagged(skb, p) {
        // The frame belongs to the VLAN device on top, where it comes by again without its tag.
        return Ok(NEXT);
    }
    let Some(Scratch { fib, is_routed, via, error, .. }) = A::scratch() else {
        return Err(Counter::DropBadMap);
    };
    if p.ttl <= 1 {
        metrics::count(Counter::DropTtlExceeded);
        *error = icmp::Error::TIME_EXCEEDED;
        return Ok(ANSWER);
    }
    let code = forward::onward(skb.ctx(), p, &flow.dst, fib, *is_routed);
    match code {
        forward::result::SUCCESS | forward::result::NO_NEIGH => {}
        forward::result::FRAG_NEEDED => {
            metrics::count(Counter::DropTooBig);
            *error = icmp::Error::too_big(fib.tot_len);
            return Ok(ANSWER);
        }
        _ => return Err(Counter::DropNoRoute),
    }
    translate(skb, p, flow, p.ttl - 1)?;
    // The packets that follow leave with the MAC addresses that were found. Once a second they come by here, where the kernel
    // sends, and so finds out whether the neighbour is still there.
    if globals::flow_cache_slots() != 0
        && code == forward::result::SUCCESS
        && flow.flags & flags::GONE == 0
        && forward::is_ethernet(fib.ifindex)
    {
        cache::fill(p, flow, way::ROUTED);
    }
    leave(skb, fib, via)
}

#[inline(always)]
fn is_tagged<A: Family>(skb: Skb, p: &Packet<A>) -> bool {
    skb.has_vlan() || p.l3 != ETHERNET_BYTES
}

/// Length from the IP header on of the longest packet that goes over the wire.
#[inline(always)]
fn wire_bytes<A: Family>(skb: Skb, p: &Packet<A>) -> u32 {
    match skb.gso_size() {
        0 => p.ip_bytes,
        payload => (p.l4 - p.l3) + p.l4_bytes as u32 + payload,
    }
}

/// Out by the device that the routing table named. The kernel finds the neighbour, or makes an entry for it, and keeps
/// it alive: the MAC address from the routing table would be used on when nobody answers there any more.
/// It need not look for the route again.
#[inline(always)]
fn leave(skb: Skb, fib: &Fib, via: &mut NextHop) -> Outcome {
    skb.mark_sent();
    *via = NextHop::of(fib);
    let (via, bytes) = ((via as *mut NextHop).cast(), size_of::<NextHop>() as i32);
    // SAFETY: the parameters are a valid struct of the size given.
    Ok(unsafe { bpf_redirect_neigh(fib.ifindex, via, bytes, 0) } as i32)
}

/// Sends a translated ICMP error where the flow it is about goes.
#[inline(always)]
pub fn send_error<A: Family>(skb: Skb, p: &Packet<A>, flow: &Flow<A>, src: &A, fib: &mut Fib) -> Outcome {
    if flow.flags & flags::HAIRPIN != 0 {
        return back_out(skb);
    }
    if flow.flags & flags::TRANSIT == 0 {
        return Ok(NEXT);
    }
    match forward::route(skb.ctx(), p, src, &flow.dst, 0, fib) {
        forward::result::SUCCESS | forward::result::NO_NEIGH => match A::scratch() {
            Some(Scratch { via, .. }) => leave(skb, fib, via),
            None => Err(Counter::DropBadMap),
        },
        _ => Err(Counter::DropNoRoute),
    }
}

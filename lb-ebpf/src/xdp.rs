//! The driver path, for frames from a wire: the plain cases of what `tc` does, decided by the same code. Whatever is not
//! plain (options, fragments, extension headers, VLAN tags, refusals, hairpins, a missing neighbour, a packet too big)
//! goes on untouched and meets the classifier. Packets without news take what this CPU has noted about their flow (`cache`).
//!
//! Never for frames of a local stack: their checksum may be left to the device, which XDP cannot see.

use aya_ebpf::{
    bindings::{xdp_action, xdp_md},
    helpers::generated::bpf_redirect,
    programs::XdpContext,
};
use lb_common::{
    V4, V6,
    conntrack::{Flow, flags},
    device,
    flow_cache::{CachedFlow, hook, way},
    verdict::Counter,
};

use crate::{
    cache::{self, Place},
    conntrack, forward,
    frame::{self, Frame, L3, Plain, Translation},
    lookup::{self, Found, Hook},
    maps, metrics,
    net::{Addressee, Packet, Scratch},
    once::Once,
    parse::ethertype,
    trace::Printed,
};

/// What XDP does with each family.
trait Wire: Plain + Printed + Once {
    /// What the cache has nothing to say about.
    fn long_way(ctx: *mut xdp_md) -> u32;
}

impl Wire for V4 {
    #[inline(always)]
    fn long_way(ctx: *mut xdp_md) -> u32 {
        long_way4(ctx)
    }
}

impl Wire for V6 {
    #[inline(always)]
    fn long_way(ctx: *mut xdp_md) -> u32 {
        long_way6(ctx)
    }
}

#[inline(always)]
pub fn run(ctx: &XdpContext) -> u32 {
    let ctx = ctx.ctx;
    match Frame::of(ctx).read::<u16>(L3 - 2) {
        Some(ethertype::IPV4) => on_frame::<V4>(ctx),
        Some(ethertype::IPV6) => on_frame::<V6>(ctx),
        _ => xdp_action::XDP_PASS,
    }
}

#[inline(always)]
fn on_frame<A: Wire>(ctx: *mut xdp_md) -> u32 {
    let frame = Frame::of(ctx);
    let Some(Scratch { packet: p, place, cold, .. }) = A::scratch() else { return xdp_action::XDP_PASS };
    // SAFETY: the context of the running program.
    p.ifindex = unsafe { (*ctx).ingress_ifindex };
    if !frame::parse(frame, p) {
        return xdp_action::XDP_PASS;
    }
    p.now = conntrack::now();
    *place = Place::of(p, hook::XDP);
    if let Some(cached) = cache::find(p, place, cold)
        && let Some(action) = send_cached(frame, p, cached)
    {
        return action;
    }
    A::long_way(ctx)
}

/// By the tables. Functions of their own, for the stack's sake.
#[inline(never)]
fn long_way4(ctx: *mut xdp_md) -> u32 {
    by_tables::<V4>(Frame::of(ctx))
}
#[inline(never)]
fn long_way6(ctx: *mut xdp_md) -> u32 {
    by_tables::<V6>(Frame::of(ctx))
}

#[inline(always)]
fn by_tables<A: Wire>(frame: Frame) -> u32 {
    let Some(Scratch { packet: p, place, is_routed, .. }) = A::scratch() else { return xdp_action::XDP_PASS };
    place.before_tables();
    *is_routed = 0;
    p.wire_bytes = p.ip_bytes;
    p.addressee.kind = Addressee::ASK_MAC;
    let Some(mac) = frame.read::<[u16; 3]>(0) else { return xdp_action::XDP_PASS };
    p.addressee.mac = bytemuck::cast(mac);
    match lookup::ingress(p, Hook::Xdp(frame.ctx.cast())) {
        // SAFETY: see `Found::Flow`.
        Found::Flow(flow) => send_on(frame, p, unsafe { &*flow }).unwrap_or(xdp_action::XDP_PASS),
        Found::Nothing => {
            cache::fill_nothing(p);
            xdp_action::XDP_PASS
        }
        Found::NotOurs => xdp_action::XDP_PASS,
        // The classifier refuses it the same way, and can tell the sender.
        Found::Refused(_) => left_to_tc(),
    }
}

#[inline(always)]
fn left_to_tc() -> u32 {
    metrics::count(Counter::XdpLeftToTc);
    xdp_action::XDP_PASS
}

/// The short way. `None` before anything is changed if the packet needs the long one.
#[inline(always)]
fn send_cached<A: Wire>(frame: Frame, p: &Packet<A>, cached: &CachedFlow<A>) -> Option<u32> {
    if cached.way == way::NOTHING {
        return Some(xdp_action::XDP_PASS);
    }
    let hop = &cached.next_hop;
    let leaves = cached.way == way::ROUTED;
    if leaves && (p.ttl <= 1 || p.ip_bytes > hop.mtu as u32) {
        return None;
    }
    // Frames from a wire have finished checksums.
    frame::translate(frame, p, &Translation::noted(cached), leaves as u8)?;
    metrics::count_service(cached.counted_at, 1, p.ip_bytes, true);
    if !leaves {
        return Some(xdp_action::XDP_PASS);
    }
    frame.write_macs(&hop.macs)?;
    Some(leave(hop.ifindex as u32, p.ifindex))
}

#[inline(always)]
fn send_on<A: Wire>(frame: Frame, p: &Packet<A>, flow: &Flow<A>) -> Option<u32> {
    if flow.flags & (flags::HAIRPIN | flags::GONE) != 0 {
        return Some(left_to_tc());
    }
    let Scratch { fib, is_routed, .. } = A::scratch()?;
    if flow.flags & flags::TRANSIT == 0 {
        frame::translate(frame, p, &Translation::of(&p.tuple, flow), 0)?;
        metrics::count_service(metrics::place_of(flow.service), 1, p.ip_bytes, true);
        cache::fill(p, flow, way::STACK);
        return Some(xdp_action::XDP_PASS);
    }
    if p.ttl <= 1 {
        return Some(left_to_tc());
    }
    let code = forward::onward(frame.ctx, p, &flow.dst, fib, *is_routed);
    if code != forward::result::SUCCESS
        || !takes_frames(fib.ifindex, p.ifindex)
        || !forward::is_in_use(fib, p.now)
    {
        return Some(left_to_tc());
    }
    frame::translate(frame, p, &Translation::of(&p.tuple, flow), 1)?;
    metrics::count_service(metrics::place_of(flow.service), 1, p.ip_bytes, true);
    frame.write_macs(&forward::macs(fib))?;
    cache::fill(p, flow, way::ROUTED);
    Some(leave(fib.ifindex, p.ifindex))
}

#[inline(always)]
fn leave(ifindex: u32, came_by: u32) -> u32 {
    if ifindex == came_by {
        return xdp_action::XDP_TX;
    }
    // SAFETY: plain integers.
    unsafe { bpf_redirect(ifindex, 0) as u32 }
}

/// True if XDP can send frames that came in by `from` out by `to`: many drivers, and all of tunnels and VLANs, cannot.
#[inline(always)]
fn takes_frames(to: u32, from: u32) -> bool {
    // SAFETY: read at once.
    to == from || unsafe { maps::DEVICES.get(to) }.is_some_and(|d| d.flags & device::flags::XDP_TARGET != 0)
}

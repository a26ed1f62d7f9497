//! Transit: the way out of the node without the stack.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_fib_lookup;
use lb_common::{
    device::{self, Neighbour},
    verdict::Counter,
};

use crate::{
    globals, maps,
    net::{ANY, Net, Packet, Scratch},
};

/// `struct bpf_fib_lookup` of the kernel's UAPI, with the members that are used named. IPv4 addresses are the first word.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Fib {
    family: u8,
    l4_protocol: u8,
    sport: u16,
    dport: u16,
    /// In: length from the IP header, 0 for no check. Out: MTU of the route.
    pub tot_len: u16,
    /// In: the device that the packet came by. Out: the device to leave by.
    pub ifindex: u32,
    /// IPv4: type of service; IPv6: flow information.
    tos: u32,
    src: [u32; 4],
    dst: [u32; 4],
    vlan: u32,
    pub smac: [u8; 6],
    pub dmac: [u8; 6],
}

const _: () = assert!(size_of::<Fib>() == 64);

/// `struct bpf_redir_neigh` of the kernel's UAPI. IPv4 addresses are the first word.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NextHop {
    family: u32,
    addr: [u32; 4],
}

const _: () = assert!(size_of::<NextHop>() == 20);

impl NextHop {
    /// What [`route`] found: the gateway, which may be of the other family, is where the destination was.
    #[inline(always)]
    pub const fn of(fib: &Fib) -> Self {
        Self { family: fib.family as u32, addr: fib.dst }
    }
}

/// Return values of `bpf_fib_lookup` that are told apart.
pub mod result {
    pub const SUCCESS: i64 = 0;
    pub const NO_NEIGH: i64 = 7;
    pub const FRAG_NEEDED: i64 = 8;
}

/// Asks the kernel's routing table. `ip_bytes` is checked against the route's MTU unless it is 0.
///
/// Returns the kernel's code and fills `fib` (MAC addresses only on success); a negative code means that the arguments
/// were refused.
#[inline(always)]
pub fn route<A: Net>(ctx: *mut c_void, p: &Packet<A>, src: &A, dst: &A, ip_bytes: u16, fib: &mut Fib) -> i64 {
    fib.family = A::AF;
    fib.l4_protocol = p.tuple.proto;
    fib.sport = 0;
    fib.dport = 0;
    fib.tot_len = ip_bytes;
    fib.ifindex = p.ifindex;
    fib.tos = if A::IS_V6 { 0 } else { p.tos as u32 };
    for i in 0..A::WORDS {
        fib.src[i] = src.word(i);
        fib.dst[i] = dst.word(i);
    }
    fib.vlan = 0;
    // SAFETY: the parameters are a valid struct of the size given.
    unsafe { bpf_fib_lookup(ctx, (fib as *mut Fib).cast(), size_of::<Fib>() as i32, 0) as i64 }
}

/// [`route`] for a packet in transit to `dst`, unless opening its flow has asked before. The kernel routes what it forwards
/// before it gives it another source (POSTROUTING), so rules by source see the packet's own.
#[inline(always)]
pub fn onward<A: Net>(ctx: *mut c_void, p: &Packet<A>, dst: &A, fib: &mut Fib, is_routed: u32) -> i64 {
    if is_routed != 0 {
        return result::SUCCESS;
    }
    route(ctx, p, &p.tuple.src, dst, p.wire_bytes as u16, fib)
}

/// The address of this node that a packet to `dst` leaves under: that of the device the route names, or the node's own.
#[inline(always)]
pub fn snat_addr<A: Net>(ctx: *mut c_void, p: &Packet<A>, dst: A, is_local: bool) -> Result<A, Counter> {
    let Some(Scratch { fib, is_routed, .. }) = A::scratch() else { return Err(Counter::DropBadMap) };
    let mut code = route(ctx, p, &p.tuple.src, &dst, p.wire_bytes as u16, fib);
    *is_routed = (code == result::SUCCESS) as u32;
    if code == result::FRAG_NEEDED {
        // Then the kernel names no device.
        code = route(ctx, p, &p.tuple.src, &dst, 0, fib);
    }
    // A packet that is too big for the link gets its flow too: whoever forwards it tells the sender.
    if !matches!(code, result::SUCCESS | result::NO_NEIGH | result::FRAG_NEEDED) {
        return Err(Counter::DropNoRoute);
    }
    // SAFETY: copied at once.
    let device = match unsafe { maps::DEVICES.get(fib.ifindex).copied() } {
        Some(device) if A::snat_addr(&device).is_some() => Some(device),
        // Overlays without Ethernet headers carry no programs: what came back by one would end in the node's own stack.
        None if !is_local => None,
        // Devices without an address of their own (unnumbered uplinks, those towards pods) lend the node's.
        // SAFETY: as above.
        _ => unsafe { maps::DEVICES.get(device::ANY).copied() },
    };
    device.as_ref().and_then(A::snat_addr).ok_or(Counter::DropNoSnatAddress)
}

/// Destination and source of the Ethernet header, as [`route`] found them.
#[inline(always)]
pub fn macs(fib: &Fib) -> [u16; 6] {
    let half = |mac: &[u8; 6], i: usize| u16::from_ne_bytes([mac[2 * i], mac[2 * i + 1]]);
    let (d, s) = (&fib.dmac, &fib.smac);
    [half(d, 0), half(d, 1), half(d, 2), half(s, 0), half(s, 1), half(s, 2)]
}

/// True for devices of ours: those have Ethernet headers.
#[inline(always)]
pub fn is_ethernet(ifindex: u32) -> bool {
    // SAFETY: not read.
    unsafe { maps::DEVICES.get(ifindex) }.is_some()
}

/// False once a second for each neighbour: then the stack sends a packet, which keeps the kernel's entry about it alive. A look
/// into the routing table does not, and would find the MAC address of a neighbour that is long gone.
#[inline(always)]
pub fn is_in_use(fib: &Fib, now: u32) -> bool {
    let neighbour = Neighbour { ifindex: fib.ifindex, mac: fib.dmac, _pad: 0 };
    match maps::NEIGHBOURS.get_ptr_mut(neighbour) {
        Some(sent) => {
            // SAFETY: an aligned integer. Should two CPUs find it old at once, two packets go to the stack.
            let sent = unsafe { &mut *sent };
            let is_fresh = now.wrapping_sub(*sent) < globals::jiffies_per_s();
            if !is_fresh {
                *sent = now;
            }
            is_fresh
        }
        None => {
            // One that does not fit is asked about later.
            let _ = maps::NEIGHBOURS.insert(neighbour, now, ANY);
            true
        }
    }
}

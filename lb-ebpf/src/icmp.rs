//! ICMP errors: those about translated packets, which must speak of the packet as its sender knows it, and our own.

use aya_ebpf::{
    bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    helpers::generated::{bpf_skb_adjust_room, bpf_skb_change_tail},
};
use bytemuck::{Pod, Zeroable};
use lb_common::{
    Be16, V4, V6,
    checksum::{self, Sum},
    conntrack::flags,
    proto,
    tuple::Tuple,
    verdict::Counter,
};

use crate::{
    globals, maps, metrics,
    net::{Net, Packet, Quoted, Scratch},
    parse::{ETHERNET_BYTES, Ipv4Header, Ipv6Header, PortsStart, ports},
    rewrite::{TCP_CHECK, UDP_CHECK},
    skb::{Failed, Skb},
    tc::{self, Family, NEXT, Outcome},
};

/// ICMP header: type, code, checksum, rest.
const ICMP_BYTES: u32 = 8;

/// An error that we send, in one register: calls in the object pass nothing larger.
#[derive(Clone, Copy)]
pub struct Error(u32);

impl Error {
    /// RFC 792 type 3 code 3, RFC 4443 type 1 code 4.
    pub const PORT_UNREACHABLE: Self = Self(1 << 16);
    /// RFC 792 type 11 code 0, RFC 4443 type 3 code 0.
    pub const TIME_EXCEEDED: Self = Self(2 << 16);
    const TOO_BIG: u32 = 3;

    /// RFC 792 type 3 code 4 with the next link's MTU (RFC 1191), RFC 4443 type 2.
    #[inline(always)]
    pub const fn too_big(mtu_bytes: u16) -> Self {
        Self(Self::TOO_BIG << 16 | mtu_bytes as u32)
    }

    const fn is_port_unreachable(self) -> bool {
        self.0 == Self::PORT_UNREACHABLE.0
    }

    /// The MTU of a too-big error.
    const fn mtu_bytes(self) -> Option<u16> {
        if self.0 >> 16 == Self::TOO_BIG { Some(self.0 as u16) } else { None }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct IcmpHeader {
    kind: u8,
    code: u8,
    check: u16,
    rest: [u8; 4],
}

impl IcmpHeader {
    #[inline(always)]
    fn sum(&self) -> Sum {
        Sum::new()
            .add16(u16::from_ne_bytes([self.kind, self.code]))
            .add16(u16::from_ne_bytes([self.rest[0], self.rest[1]]))
            .add16(u16::from_ne_bytes([self.rest[2], self.rest[3]]))
    }
}

/// What differs between the families when an error is built or read.
pub trait Build: Net {
    /// Bytes that an error adds in front of the packet that it quotes.
    const ROOM_BYTES: u32;
    fn header(error: Error) -> (u8, u8, [u8; 4]);
    /// Writes the IP and ICMP headers of an error from `src` to `dst` at `l3`. `quoted` is the sum of what follows.
    fn store(
        skb: Skb,
        l3: u32,
        src: &Self,
        dst: &Self,
        error: Error,
        quoted: Sum,
        quoted_bytes: u32,
    ) -> Result<(), Failed>;
    /// Writes an IP header without options or extensions for a packet of our own with `payload_bytes` of `proto`.
    fn store_plain_header(
        skb: Skb,
        l3: u32,
        src: &Self,
        dst: &Self,
        proto: u8,
        payload_bytes: u16,
    ) -> Result<(), Failed>;
    /// The tuple that an error quotes, and where its parts are.
    fn quoted(skb: Skb, at: u32, out: &mut Quoted<Self>) -> bool;
    /// Writes the quoted addresses, which adds `change` to a sum over them; returns what the whole quoted header adds to
    /// the ICMP checksum.
    fn store_quoted(skb: Skb, q: &Quoted<Self>, new: &Tuple<Self>, change: Sum) -> Result<Sum, Failed>;
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Error4 {
    ip: Ipv4Header,
    icmp: IcmpHeader,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Error6 {
    ip: Ipv6Header,
    icmp: IcmpHeader,
}

impl Build for V4 {
    const ROOM_BYTES: u32 = 28;

    #[inline(always)]
    fn header(error: Error) -> (u8, u8, [u8; 4]) {
        if let Some(mtu_bytes) = error.mtu_bytes() {
            let [hi, lo] = mtu_bytes.to_be_bytes();
            (3, 4, [0, 0, hi, lo])
        } else if error.is_port_unreachable() {
            (3, 3, [0; 4])
        } else {
            (11, 0, [0; 4])
        }
    }

    #[inline(always)]
    fn store(
        skb: Skb,
        l3: u32,
        src: &Self,
        dst: &Self,
        error: Error,
        quoted: Sum,
        quoted_bytes: u32,
    ) -> Result<(), Failed> {
        let (kind, code, rest) = Self::header(error);
        let mut icmp = IcmpHeader { kind, code, check: 0, rest };
        icmp.check = quoted.plus(icmp.sum()).checksum();
        let ip = Ipv4Header::own(src, dst, proto::ICMP, ICMP_BYTES as u16 + quoted_bytes as u16);
        skb.store(l3, &Error4 { ip, icmp })
    }

    #[inline(always)]
    fn store_plain_header(
        skb: Skb,
        l3: u32,
        src: &Self,
        dst: &Self,
        proto: u8,
        payload_bytes: u16,
    ) -> Result<(), Failed> {
        skb.store(l3, &Ipv4Header::own(src, dst, proto, payload_bytes))
    }

    #[inline(always)]
    fn quoted(skb: Skb, at: u32, out: &mut Quoted<Self>) -> bool {
        let Some(ip) = skb.load::<Ipv4Header>(at) else { return false };
        let header_bytes = ip.header_bytes();
        if header_bytes == 0 || ip.fragment_offset() != 0 {
            return false;
        }
        *out.tuple.addresses_mut() = [ip.src, ip.dst];
        out.ip_check = ip.check;
        quoted_ports(skb, ip.proto, at, at + header_bytes, out)
    }

    #[inline(always)]
    fn store_quoted(skb: Skb, q: &Quoted<Self>, new: &Tuple<Self>, change: Sum) -> Result<Sum, Failed> {
        let check = checksum::update(q.ip_check, change);
        skb.store(q.l3 + 10, &check)?;
        skb.store(q.l3 + 12, new.addresses())?;
        Ok(change.sub16(q.ip_check).add16(check))
    }
}

impl Build for V6 {
    const ROOM_BYTES: u32 = 48;

    #[inline(always)]
    fn header(error: Error) -> (u8, u8, [u8; 4]) {
        if let Some(mtu_bytes) = error.mtu_bytes() {
            let [hi, lo] = mtu_bytes.to_be_bytes();
            (2, 0, [0, 0, hi, lo])
        } else if error.is_port_unreachable() {
            (1, 4, [0; 4])
        } else {
            (3, 0, [0; 4])
        }
    }

    #[inline(always)]
    fn store(
        skb: Skb,
        l3: u32,
        src: &Self,
        dst: &Self,
        error: Error,
        quoted: Sum,
        quoted_bytes: u32,
    ) -> Result<(), Failed> {
        let (kind, code, rest) = Self::header(error);
        let payload = Be16::new((ICMP_BYTES + quoted_bytes) as u16);
        // RFC 8200 section 8.1: the pseudo-header counts too.
        let mut sum = quoted.add16(payload.raw()).add16(Be16::new(proto::ICMPV6 as u16).raw());
        for i in 0..4 {
            sum = sum.add32(lb_common::Addr::word(src, i)).add32(lb_common::Addr::word(dst, i));
        }
        let mut icmp = IcmpHeader { kind, code, check: 0, rest };
        icmp.check = sum.plus(icmp.sum()).checksum();
        let ip = Ipv6Header::own(src, dst, proto::ICMPV6, payload.get());
        skb.store(l3, &Error6 { ip, icmp })
    }

    #[inline(always)]
    fn store_plain_header(
        skb: Skb,
        l3: u32,
        src: &Self,
        dst: &Self,
        proto: u8,
        payload_bytes: u16,
    ) -> Result<(), Failed> {
        skb.store(l3, &Ipv6Header::own(src, dst, proto, payload_bytes))
    }

    #[inline(always)]
    fn quoted(skb: Skb, at: u32, out: &mut Quoted<Self>) -> bool {
        let Some(next) = skb.load::<u8>(at + 6) else { return false };
        if !skb.load_into(at + 8, out.tuple.addresses_mut()) {
            return false;
        }
        // An error that quotes extension headers is rare, and left alone.
        quoted_ports(skb, next, at, at + Self::HEADER_BYTES, out)
    }

    #[inline(always)]
    fn store_quoted(skb: Skb, q: &Quoted<Self>, new: &Tuple<Self>, change: Sum) -> Result<Sum, Failed> {
        skb.store(q.l3 + 8, new.addresses())?;
        Ok(change)
    }
}

/// Completes `out`, whose addresses are filled.
#[inline(always)]
fn quoted_ports<A: Net>(skb: Skb, proto: u8, l3: u32, l4: u32, out: &mut Quoted<A>) -> bool {
    if !matches!(proto, proto::TCP | proto::UDP | proto::SCTP) {
        return false;
    }
    let Some(start) = skb.load::<PortsStart>(l4) else { return false };
    out.tuple.sport = start.sport;
    out.tuple.dport = start.dport;
    out.tuple.proto = proto;
    out.tuple._pad = 0;
    out.tuple._pad2 = 0;
    out.l3 = l3;
    out.l4 = l4;
    true
}

/// Translates an ICMP error that quotes a packet of a flow. `hook` is 0 at ingress, `AT_EGRESS` at egress.
///
/// The error goes the way of the packets that answer the quoted one, so the flow entry of that direction tells where;
/// the quotation gets the reverse of that entry's tuple, which is the quoted packet as its sender made it.
#[inline(never)]
pub fn translate<A: Family>(skb: Skb, p: &Packet<A>, hook: u16) -> i32 {
    tc::action(on_error(skb, p, hook))
}

#[inline(always)]
fn on_error<A: Family>(skb: Skb, p: &Packet<A>, hook: u16) -> Outcome {
    let Some(Scratch { quoted: q, inner, outer, fib, .. }) = A::scratch() else { return Ok(NEXT) };
    if !A::quoted(skb, p.l4 + ICMP_BYTES, q) {
        return Ok(NEXT);
    }
    // An error goes to the sender of what it quotes; anything else is not to be believed.
    if p.tuple.dst != q.tuple.src {
        return Ok(NEXT);
    }
    *inner = q.tuple.reversed();
    let Some(found) = A::flow(inner) else { return Ok(NEXT) };
    // SAFETY: a map value, valid for the program's run.
    let flow = unsafe { &*found };
    if flow.flags & flags::AT_EGRESS != hook {
        return Ok(NEXT);
    }
    if flow.flags & flags::TRANSIT != 0 && (skb.has_vlan() || p.l3 != ETHERNET_BYTES || p.ttl <= 1) {
        return Ok(NEXT);
    }
    let ttl = if flow.flags & flags::TRANSIT != 0 { p.ttl - 1 } else { p.ttl };
    // The other end of the flow speaks for itself under its frontend's address; a router on the way has its own.
    // In transit towards the backend the router's address would be a stranger's in the pod network.
    let to_backend = flow.flags & (flags::TRANSIT | flags::REPLY) == flags::TRANSIT;
    let src = if to_backend || p.tuple.src == q.tuple.dst { flow.src } else { p.tuple.src };
    *inner = flow.rewritten(q.tuple.proto).reversed();
    *outer = Tuple::new(src, Be16::default(), flow.dst, Be16::default(), p.tuple.proto);
    store_translated(skb, p, q, inner, outer, ttl).map_err(|_| Counter::DropRewriteFailed)?;
    metrics::count(Counter::IcmpTranslated);
    tc::send_error(skb, p, flow, &outer.src, fib)
}

/// Makes the error one about `inner`, with the addresses of `outer`.
#[inline(always)]
fn store_translated<A: Family>(
    skb: Skb,
    p: &Packet<A>,
    q: &Quoted<A>,
    inner: &Tuple<A>,
    outer: &Tuple<A>,
    ttl: u8,
) -> Result<(), Failed> {
    let quoted_change = Sum::from_raw(quoted_change::<A>());
    let mut delta = A::store_quoted(skb, q, inner, quoted_change)?;
    delta = delta.replace_port(q.tuple.sport, inner.sport).replace_port(q.tuple.dport, inner.dport);
    skb.store(q.l4, &ports(inner))?;
    if q.tuple.proto == proto::UDP {
        delta = delta.plus(store_quoted_udp_check(skb, q, inner, quoted_change)?);
    }
    let addresses = Sum::from_raw(outer_change::<A>());
    if A::IS_V6 {
        delta = delta.plus(addresses);
    }
    let check = skb.load::<u16>(p.l4 + 2).ok_or(Failed)?;
    skb.store(p.l4 + 2, &checksum::update(check, delta))?;
    A::store_header(skb, p, outer, ttl, addresses)
}

/// What the change of the quoted addresses adds to a checksum. Not inlined, for the stack's sake, and without arguments,
/// because LLVM would pass the words of a tuple one by one.
#[inline(never)]
fn quoted_change<A: Net>() -> u64 {
    let Some(Scratch { quoted, inner, .. }) = A::scratch() else { return 0 };
    Sum::new().replace_addr(&quoted.tuple.src, &inner.src).replace_addr(&quoted.tuple.dst, &inner.dst).raw()
}

/// The same for the addresses of the error itself.
#[inline(never)]
fn outer_change<A: Net>() -> u64 {
    let Some(Scratch { packet, outer, .. }) = A::scratch() else { return 0 };
    Sum::new().replace_addr(&packet.tuple.src, &outer.src).replace_addr(&packet.tuple.dst, &outer.dst).raw()
}

/// The quoted UDP checksum follows its addresses and ports (RFC 5508 section 4.2); that of TCP may lie beyond the
/// quotation and nobody checks it.
#[inline(always)]
fn store_quoted_udp_check<A: Family>(
    skb: Skb,
    q: &Quoted<A>,
    inner: &Tuple<A>,
    addresses: Sum,
) -> Result<Sum, Failed> {
    let old = skb.load::<u16>(q.l4 + UDP_CHECK).ok_or(Failed)?;
    let change = addresses.replace_port(q.tuple.sport, inner.sport).replace_port(q.tuple.dport, inner.dport);
    let new = checksum::update_udp(old, change);
    skb.store(q.l4 + UDP_CHECK, &new)?;
    Ok(Sum::new().sub16(old).add16(new))
}

/// Turns the packet into an ICMP error about itself and sends it back.
///
/// Quoted are the IP header and the first 20 bytes of TCP or 8 of others, at least what RFC 792 asks for.
#[inline(never)]
pub fn answer<A: Family>(skb: Skb, p: &Packet<A>, error: Error) -> i32 {
    tc::action(on_answer(skb, p, error))
}

#[inline(always)]
fn on_answer<A: Family>(skb: Skb, p: &Packet<A>, error: Error) -> Outcome {
    // RFC 1122 section 3.2.2, RFC 4443 section 2.4: never to a source that is not one host.
    if p.l3 != ETHERNET_BYTES || p.is_later_fragment || !p.tuple.src.is_unicast() {
        return Err(Counter::DropIcmpBuildFailed);
    }
    if !within_budget(p.now) {
        return Err(Counter::DropIcmpRateLimited);
    }
    build(skb, p, error).map_err(|_| Counter::DropIcmpBuildFailed)?;
    tc::back_out(skb)
}

/// ICMP errors that one CPU sends per second. RFC 1812 section 4.3.2.8 asks for a limit: spoofed packets for a Service
/// without endpoints would make the node flood their alleged senders. The kernel's own is 1000
/// (net.ipv4.icmp_msgs_per_sec).
const ERRORS_PER_S: u32 = 1000;

/// This CPU's errors of the current second.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Budget {
    since: u32,
    sent: u32,
}

#[inline(always)]
pub fn within_budget(now: u32) -> bool {
    let Some(budget) = maps::ICMP_BUDGET.get_ptr_mut(0) else { return false };
    // SAFETY: this CPU's own element.
    let budget = unsafe { &mut *budget };
    if now.wrapping_sub(budget.since) >= globals::jiffies_per_s() {
        *budget = Budget { since: now, sent: 0 };
    }
    budget.sent += 1;
    budget.sent <= ERRORS_PER_S
}

/// Longest IP header with options, or IPv6 header with extensions, that is quoted.
const QUOTED_HEADER_MAX_WORDS: u32 = 16;

#[inline(always)]
fn build<A: Family>(skb: Skb, p: &Packet<A>, error: Error) -> Result<(), Failed> {
    let mut sum = Sum::new();
    let words = (p.l4 - p.l3) / 4;
    if words > QUOTED_HEADER_MAX_WORDS {
        return Err(Failed);
    }
    for i in 0..QUOTED_HEADER_MAX_WORDS {
        if i >= words {
            break;
        }
        sum = sum.add32(skb.load::<u32>(p.l3 + i * 4).ok_or(Failed)?);
    }
    let (transport, transport_bytes) = seal_transport(skb, p)?;
    sum = sum.plus(transport);
    // SAFETY: plain integers.
    if unsafe { bpf_skb_change_tail(skb.0, p.l4 + transport_bytes, 0) } != 0 {
        return Err(Failed);
    }
    // SAFETY: plain integers.
    if unsafe { bpf_skb_adjust_room(skb.0, A::ROOM_BYTES as i32, BPF_ADJ_ROOM_MAC, 0) } != 0 {
        return Err(Failed);
    }
    A::store(skb, p.l3, &p.tuple.dst, &p.tuple.src, error, sum, p.l4 - p.l3 + transport_bytes)
}

/// Gives the transport header a checksum field that no checksum offload changes (see
/// [`checksum::offload_fixed_point`]); returns the sum and length of what is quoted of it.
#[inline(always)]
fn seal_transport<A: Family>(skb: Skb, p: &Packet<A>) -> Result<(Sum, u32), Failed> {
    let mut sum = Sum::new();
    if p.tuple.proto == proto::SCTP
        && let Some(words) = skb.load::<[u32; 5]>(p.l4)
    {
        // Up to the initiate tag of an INIT: without it the sender must not believe the error (RFC 9260 section 10, ICMP6). If
        // the checksum is left to a device, it is to the pod's own one, which leaves it alone on the way back.
        for word in words {
            sum = sum.add32(word);
        }
        return Ok((sum, 20));
    }
    if p.tuple.proto != proto::TCP && p.tuple.proto != proto::UDP {
        // Echo requests: no device completes their checksum.
        let words = skb.load::<[u32; 2]>(p.l4).ok_or(Failed)?;
        return Ok((sum.add32(words[0]).add32(words[1]), 8));
    }
    if p.tuple.proto == proto::TCP {
        let words = skb.load::<[u32; 5]>(p.l4).ok_or(Failed)?;
        sum = sum.add32(words[0]).add32(words[1]).add32(words[2]).add32(words[3]);
        // The last word is checksum and urgent pointer.
        let [_, _, u0, u1] = words[4].to_ne_bytes();
        sum = sum.add16(u16::from_ne_bytes([u0, u1]));
        let check = checksum::offload_fixed_point(sum);
        skb.store(p.l4 + TCP_CHECK, &check)?;
        return Ok((sum.add16(check), 20));
    }
    let words = skb.load::<[u16; 4]>(p.l4).ok_or(Failed)?;
    sum = sum.add16(words[0]).add16(words[1]).add16(words[2]);
    let check = checksum::offload_fixed_point(sum);
    skb.store(p.l4 + UDP_CHECK, &check)?;
    Ok((sum.add16(check), 8))
}

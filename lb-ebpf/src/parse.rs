//! From an skb to a [`Packet`]. Decides, explicitly, what is not ours: see [`Parsed`].
//!
//! IPv4 options are honoured by the header length. IPv6 hop-by-hop options, destination options, routing headers that
//! have no segments left and fragment headers are walked; anything else (an authentication header covers the addresses,
//! a routing header with segments left has another destination) is not touched.

use bytemuck::{Pod, Zeroable};
use lb_common::{
    Be16, V4, V6, checksum::Sum, conntrack::sctp_flags, fragment::is_together, proto, tuple::Tuple,
    verdict::Counter,
};

use crate::{
    globals, metrics,
    net::{Net, Packet, Ports},
    skb::Skb,
};

/// EtherTypes (IEEE 802 numbers).
pub mod ethertype {
    pub const IPV4: u16 = 0x0800u16.to_be();
    pub const IPV6: u16 = 0x86ddu16.to_be();
    pub const VLAN: u16 = 0x8100u16.to_be();
    pub const VLAN_SERVICE: u16 = 0x88a8u16.to_be();
}

pub const ETHERNET_BYTES: u32 = 14;
const VLAN_BYTES: u32 = 4;

/// RFC 791 section 3.1.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Ipv4Header {
    pub version_ihl: u8,
    pub tos: u8,
    pub total_bytes: Be16,
    pub id: u16,
    pub fragment: Be16,
    pub ttl: u8,
    pub proto: u8,
    pub check: u16,
    pub src: V4,
    pub dst: V4,
}

/// TTL and hop limit of our own packets (RFC 1700).
pub const TTL: u8 = 64;

impl Ipv4Header {
    /// The header of a packet of our own, never fragmented, with `payload_bytes` of `proto`.
    #[inline(always)]
    pub fn own(src: &V4, dst: &V4, proto: u8, payload_bytes: u16) -> Self {
        let mut ip = Self {
            version_ihl: 0x45,
            // Internetwork control (RFC 1812 section 4.3.2.5).
            tos: 0xc0,
            total_bytes: Be16::new(V4::HEADER_BYTES as u16 + payload_bytes),
            id: 0,
            fragment: Be16::new(0x4000),
            ttl: TTL,
            proto,
            check: 0,
            src: *src,
            dst: *dst,
        };
        ip.check = Sum::new()
            .add16(u16::from_ne_bytes([ip.version_ihl, ip.tos]))
            .add16(ip.total_bytes.raw())
            .add16(ip.fragment.raw())
            .add16(u16::from_ne_bytes([ip.ttl, ip.proto]))
            .add32(src.raw())
            .add32(dst.raw())
            .checksum();
        ip
    }

    /// Header length in bytes; 0 if the field is out of range.
    #[inline(always)]
    pub const fn header_bytes(&self) -> u32 {
        let words = (self.version_ihl & 0xf) as u32;
        if self.version_ihl >> 4 != 4 || words < 5 { 0 } else { words * 4 }
    }
    #[inline(always)]
    pub const fn fragment_offset(&self) -> u16 {
        self.fragment.get() & 0x1fff
    }
    #[inline(always)]
    pub const fn more_fragments(&self) -> bool {
        self.fragment.get() & 0x2000 != 0
    }
}

/// RFC 8200 section 3.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Ipv6Header {
    pub version_class_flow: u32,
    pub payload_bytes: Be16,
    pub next: u8,
    pub hop_limit: u8,
    pub src: V6,
    pub dst: V6,
}

impl Ipv6Header {
    /// The header of a packet of our own with `payload_bytes` of `proto`.
    #[inline(always)]
    pub const fn own(src: &V6, dst: &V6, proto: u8, payload_bytes: u16) -> Self {
        Self {
            version_class_flow: 0x6000_0000u32.to_be(),
            payload_bytes: Be16::new(payload_bytes),
            next: proto,
            hop_limit: TTL,
            src: *src,
            dst: *dst,
        }
    }
}

/// An [`Ipv6Header`] up to its addresses.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Ipv6Start {
    version_class_flow: u32,
    payload_bytes: Be16,
    next: u8,
    hop_limit: u8,
}

/// A TCP header without options (RFC 9293 section 3.1).
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct TcpHeader {
    pub sport: Be16,
    pub dport: Be16,
    pub seq: u32,
    pub ack: u32,
    pub offset: u8,
    pub flags: u8,
    pub window: u16,
    pub check: u16,
    pub urgent: u16,
}

/// An SCTP header and the first chunk's (RFC 9260 section 3): every packet has one.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SctpStart {
    sport: Be16,
    dport: Be16,
    tag: u32,
    check: u32,
    first_chunk: u8,
    chunk_flags: u8,
    chunk_bytes: Be16,
}

/// Length of an SCTP header without chunks.
pub const SCTP_BYTES: u8 = 12;

/// The start of UDP and SCTP headers.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct PortsStart {
    pub sport: Be16,
    pub dport: Be16,
    pub rest: u32,
}

/// What a frame is.
pub enum Parsed {
    /// `packet` is filled, with ports.
    Packet,
    /// `packet` is filled up to the addresses: an ICMP error, which quotes another packet.
    IcmpError,
    /// `packet` is filled up to the addresses: an echo request.
    Echo,
    /// `packet` is filled up to the addresses: a fragment whose ports are not known yet.
    UnknownFragment,
    /// Neither.
    Other,
}

/// Where the IP header of a frame with a VLAN tag in the data is, and its EtherType. One tag is skipped; a tag kept beside
/// the data needs no skipping.
#[inline(always)]
pub fn behind_tag(skb: Skb) -> (u16, u32) {
    let outer = skb.protocol();
    if outer != ethertype::VLAN && outer != ethertype::VLAN_SERVICE {
        return (0, 0);
    }
    match skb.load::<u16>(ETHERNET_BYTES + 2) {
        Some(inner) => (inner, ETHERNET_BYTES + VLAN_BYTES),
        None => (0, 0),
    }
}

/// Parsing of one family.
pub trait Parse: Net {
    /// Fills `p` from the frame whose IP header is at `l3`.
    fn parse(skb: Skb, l3: u32, p: &mut Packet<Self>) -> Parsed;
}

impl Parse for V4 {
    #[inline(always)]
    fn parse(skb: Skb, l3: u32, p: &mut Packet<Self>) -> Parsed {
        let Some(ip) = skb.load::<Ipv4Header>(l3) else { return Parsed::Other };
        let header_bytes = ip.header_bytes();
        if header_bytes == 0 {
            return Parsed::Other;
        }
        p.tuple = Tuple::new(ip.src, Be16::default(), ip.dst, Be16::default(), ip.proto);
        p.l3 = l3;
        p.l4 = l3 + header_bytes;
        p.ip_bytes = ip_bytes(skb, l3, ip.total_bytes.get() as u32);
        p.ttl = ip.ttl;
        p.tos = ip.tos;
        p.ip_check = ip.check;
        p.fragment_id = ip.id as u32;
        p.is_later_fragment = ip.fragment_offset() != 0;
        p.is_fragment = p.is_later_fragment || ip.more_fragments();
        if ip.proto == proto::ICMP {
            // Not redirects (type 5): about a translated packet they name a backend as the next hop, and a client that
            // learned that for the Service's address would no longer reach its other backends.
            return icmp(skb, p, 8, |t| matches!(t, 3 | 4 | 11 | 12));
        }
        transport(skb, p)
    }
}

/// IPv6 extension headers (IANA protocol numbers).
mod extension {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const DESTINATION: u8 = 60;
    #[inline(always)]
    pub const fn is(next: u8) -> bool {
        matches!(next, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION)
    }

    /// More than these in one packet have no use.
    pub const MAX: usize = 6;
}

impl Parse for V6 {
    #[inline(always)]
    fn parse(skb: Skb, l3: u32, p: &mut Packet<Self>) -> Parsed {
        let Some(start) = skb.load::<Ipv6Start>(l3) else { return Parsed::Other };
        if !skb.load_into(l3 + size_of::<Ipv6Start>() as u32, p.tuple.addresses_mut()) {
            return Parsed::Other;
        }
        p.tuple.proto = start.next;
        p.tuple._pad = 0;
        p.tuple._pad2 = 0;
        p.l3 = l3;
        p.l4 = l3 + Self::HEADER_BYTES;
        p.ip_bytes = match start.payload_bytes.get() as u32 {
            0 => ip_bytes(skb, l3, 0),
            payload => ip_bytes(skb, l3, payload + Self::HEADER_BYTES),
        };
        p.ttl = start.hop_limit;
        p.tos = 0;
        p.ip_check = 0;
        p.fragment_id = 0;
        p.is_later_fragment = false;
        p.is_fragment = false;
        if extension::is(start.next) && !walk_extensions(skb, p) {
            return Parsed::Other;
        }
        if p.tuple.proto == proto::ICMPV6 {
            // RFC 4443 section 2.1: error messages have the high bit clear.
            return icmp(skb, p, 128, |t| (1..128).contains(&t));
        }
        transport(skb, p)
    }
}

/// Moves `p` past the extension headers. False if the packet is not ours to touch.
#[inline(never)]
fn walk_extensions(skb: Skb, p: &mut Packet<V6>) -> bool {
    for _ in 0..extension::MAX {
        let kind = p.tuple.proto;
        if !extension::is(kind) {
            return true;
        }
        let Some(h) = skb.load::<[u8; 8]>(p.l4) else { return false };
        p.tuple.proto = h[0];
        if kind == extension::FRAGMENT {
            let offset_flags = u16::from_be_bytes([h[2], h[3]]);
            p.is_later_fragment = offset_flags & 0xfff8 != 0;
            // An atomic fragment (RFC 6946) is a whole packet.
            p.is_fragment = offset_flags & 0xfff9 != 0;
            p.fragment_id = u32::from_ne_bytes([h[4], h[5], h[6], h[7]]);
            p.l4 += 8;
            if p.is_later_fragment {
                return true;
            }
        } else {
            if kind == extension::ROUTING && h[3] != 0 {
                break;
            }
            p.l4 += (h[1] as u32 + 1) * 8;
        }
    }
    metrics::count(Counter::PassExtensionHeader);
    false
}

/// Length from the IP header on. What the header says, because short frames are padded; a packet larger than the field can
/// say has 0 there (BIG TCP, kernel commit b1a78b9b9886).
#[inline(always)]
fn ip_bytes(skb: Skb, l3: u32, told: u32) -> u32 {
    if told == 0 { skb.len().wrapping_sub(l3) } else { told }
}

#[inline(always)]
fn icmp<A: Net>(skb: Skb, p: &Packet<A>, echo: u8, is_error: impl Fn(u8) -> bool) -> Parsed {
    if p.is_fragment {
        return Parsed::Other;
    }
    match skb.load::<u8>(p.l4) {
        Some(kind) if is_error(kind) => Parsed::IcmpError,
        Some(kind) if kind == echo => Parsed::Echo,
        _ => Parsed::Other,
    }
}

/// Fills the ports. A later fragment has them from its first one, which `fragments` has noted.
#[inline(always)]
fn transport<A: Net>(skb: Skb, p: &mut Packet<A>) -> Parsed {
    p.tcp_flags = 0;
    p.l4_bytes = 8;
    if p.is_later_fragment {
        if !matches!(p.tuple.proto, proto::UDP | proto::TCP | proto::SCTP) {
            return Parsed::Other;
        }
        return match A::fragment(&p.fragment_key()) {
            Some(ports) if is_together(ports.seen, p.now, globals::jiffies_per_s()) => {
                p.tuple.sport = ports.sport;
                p.tuple.dport = ports.dport;
                Parsed::Packet
            }
            _ => Parsed::UnknownFragment,
        };
    }
    match p.tuple.proto {
        proto::TCP => {
            let Some(tcp) = skb.load::<TcpHeader>(p.l4) else { return Parsed::Other };
            p.tuple.sport = tcp.sport;
            p.tuple.dport = tcp.dport;
            p.tcp_flags = tcp.flags;
            p.l4_bytes = (tcp.offset >> 4) << 2;
            if !holds::<A, TcpHeader>(p) {
                return Parsed::Other;
            }
        }
        proto::UDP => {
            let Some(udp) = skb.load::<PortsStart>(p.l4) else { return Parsed::Other };
            p.tuple.sport = udp.sport;
            p.tuple.dport = udp.dport;
            if !holds::<A, PortsStart>(p) {
                return Parsed::Other;
            }
        }
        proto::SCTP => {
            let Some(sctp) = skb.load::<SctpStart>(p.l4) else { return Parsed::Other };
            p.tuple.sport = sctp.sport;
            p.tuple.dport = sctp.dport;
            p.tcp_flags = sctp_flags(sctp.first_chunk);
            p.l4_bytes = SCTP_BYTES;
            if !holds::<A, SctpStart>(p) {
                return Parsed::Other;
            }
        }
        _ => return Parsed::Other,
    }
    Parsed::Packet
}

/// True if a layer 4 header `T` ends within the packet, not in the padding of a short frame.
#[inline(always)]
const fn holds<A: Net, T>(p: &Packet<A>) -> bool {
    p.l4 - p.l3 + size_of::<T>() as u32 <= p.ip_bytes
}

/// Both ports of `t`, as a header starts with them.
#[inline(always)]
pub const fn ports<A: Net>(t: &Tuple<A>) -> Ports {
    Ports { source: t.sport, dest: t.dport }
}

//! Writes a flow's translation into an skb: addresses, ports, checksums and, in transit, the TTL.

use bytemuck::{Pod, Zeroable};
use lb_common::{
    V4, V6,
    checksum::{self, Sum},
    crc32c, proto,
    tuple::Tuple,
};

use crate::{
    net::{Net, Packet},
    parse,
    skb::{Failed, Skb},
};

/// Offset of the checksum in a TCP header.
pub const TCP_CHECK: u32 = 16;
/// Offset of the checksum in a UDP header.
pub const UDP_CHECK: u32 = 6;

/// The part of an IP header that translation changes.
pub trait Header: Net {
    fn store_header(skb: Skb, p: &Packet<Self>, new: &Tuple<Self>, ttl: u8, delta: Sum)
    -> Result<(), Failed>;
}

/// Bytes 8 to 19 of an IPv4 header.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Ipv4Tail {
    ttl: u8,
    proto: u8,
    check: u16,
    src: V4,
    dst: V4,
}

impl Header for V4 {
    #[inline(always)]
    fn store_header(
        skb: Skb,
        p: &Packet<Self>,
        new: &Tuple<Self>,
        ttl: u8,
        delta: Sum,
    ) -> Result<(), Failed> {
        let delta =
            delta.sub16(u16::from_ne_bytes([p.ttl, new.proto])).add16(u16::from_ne_bytes([ttl, new.proto]));
        let tail = Ipv4Tail {
            ttl,
            proto: new.proto,
            check: checksum::update(p.ip_check, delta),
            src: new.src,
            dst: new.dst,
        };
        skb.store(p.l3 + 8, &tail)
    }
}

impl Header for V6 {
    #[inline(always)]
    fn store_header(
        skb: Skb,
        p: &Packet<Self>,
        new: &Tuple<Self>,
        ttl: u8,
        _delta: Sum,
    ) -> Result<(), Failed> {
        if ttl != p.ttl {
            // No checksum makes up for the hop limit. Its word has whatever beside it.
            skb.sum_has_grown(
                Sum::new().sub16(u16::from_ne_bytes([0, p.ttl])).add16(u16::from_ne_bytes([0, ttl])),
            );
            skb.store(p.l3 + 7, &ttl)?;
        }
        skb.store(p.l3 + 8, new.addresses())
    }
}

/// Gives the packet the tuple `new` and the time to live `ttl`. After a failure it may be half rewritten: drop it.
#[inline(always)]
pub fn rewrite<A: Header>(skb: Skb, p: &Packet<A>, new: &Tuple<A>, ttl: u8) -> Result<(), Failed> {
    let old = &p.tuple;
    let addresses = Sum::new().replace_addr(&old.src, &new.src).replace_addr(&old.dst, &new.dst);
    if old.proto == proto::SCTP {
        rewrite_sctp(skb, p, new)?;
    } else if !p.is_later_fragment {
        let is_udp = old.proto == proto::UDP;
        let check = p.l4 + if is_udp { UDP_CHECK } else { TCP_CHECK };
        skb.csum_addresses(check, addresses, is_udp, A::IS_V6)?;
        if old.sport != new.sport || old.dport != new.dport {
            let ports = Sum::new().replace_port(old.sport, new.sport).replace_port(old.dport, new.dport);
            if is_udp && skb.load::<u16>(check) == Some(0) {
                // No checksum that makes up for the ports.
                skb.sum_has_grown(ports);
            } else {
                skb.csum_ports(check, ports, is_udp)?;
            }
            skb.store(p.l4, &parse::ports(new))?;
        }
    }
    A::store_header(skb, p, new, ttl, addresses)
}

/// Offset of the checksum in an SCTP header.
const SCTP_CHECK: u32 = 8;

/// The checksum of SCTP (RFC 9260 section 6.8) covers the whole packet but no addresses.
#[inline(always)]
fn rewrite_sctp<A: Net>(skb: Skb, p: &Packet<A>, new: &Tuple<A>) -> Result<(), Failed> {
    let old = &p.tuple;
    if p.is_later_fragment || old.sport == new.sport && old.dport == new.dport {
        return Ok(());
    }
    if p.is_fragment {
        // How long the whole packet is, only its last fragment tells. SCTP itself avoids fragments (RFC 9260 section 6.9).
        return Err(Failed);
    }
    let [old, new] = [parse::ports(old), parse::ports(new)].map(bytemuck::cast::<_, u32>);
    store_sctp(skb, p.l4, p.ip_bytes - (p.l4 - p.l3), old, new)
}

/// Not inlined, for the stack's sake and that of all other packets.
#[inline(never)]
fn store_sctp(skb: Skb, l4: u32, bytes: u32, old: u32, new: u32) -> Result<(), Failed> {
    let check = skb.load::<u32>(l4 + SCTP_CHECK).ok_or(Failed)?;
    // Left to the device (CHECKSUM_PARTIAL) by a local stack, which puts 0 there: whoever completes the sum takes it over the
    // field as it is, so it must stay 0. Of finished sums, one in 2^32 is 0 too.
    if check != 0 {
        skb.store(l4 + SCTP_CHECK, &crc32c::update(check, old, new, bytes))?;
    }
    skb.store(l4, &new)
}

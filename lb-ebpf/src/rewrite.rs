//! Writes a flow's translation into an skb: addresses, ports, checksums and, in transit, the TTL.

use bytemuck::{Pod, Zeroable};
use lb_common::{
    V4, V6,
    checksum::{self, Sum},
    proto,
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
    if !p.is_later_fragment {
        let is_udp = old.proto == proto::UDP;
        let check = p.l4 + if is_udp { UDP_CHECK } else { TCP_CHECK };
        skb.csum_addresses(check, addresses, is_udp, A::IS_V6)?;
        if old.sport != new.sport || old.dport != new.dport {
            let ports = Sum::new().replace_port(old.sport, new.sport).replace_port(old.dport, new.dport);
            skb.csum_ports(check, ports, is_udp)?;
            skb.store(p.l4, &parse::ports(new))?;
        }
    }
    A::store_header(skb, p, new, ttl, addresses)
}

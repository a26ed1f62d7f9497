//! Plain frames, read in place: no VLAN tags, options, extension headers or fragments. What most packets are, and all that XDP
//! and the caches are about; `parse` knows the rest.

use core::ffi::c_void;

use aya_ebpf::bindings::xdp_md;
use lb_common::{
    Be16, Be32, V4, V6,
    checksum::{self, Sum},
    conntrack::{Flow, tcp},
    flow_cache::CachedFlow,
    proto,
    tuple::Tuple,
};

use crate::{
    net::{Net, Packet},
    parse::{ETHERNET_BYTES, Ipv4Header},
    rewrite::{TCP_CHECK, UDP_CHECK},
    skb::{Failed, Skb},
};

/// A frame between its two pointers. Nothing in XDP moves the data while this program runs.
#[derive(Clone, Copy)]
pub struct Frame {
    data: usize,
    end: usize,
    pub ctx: *mut c_void,
}

/// Offset of the IP header: frames with a VLAN tag are left alone.
pub const L3: usize = ETHERNET_BYTES as usize;

/// Something in a frame: an Ethernet header has 14 bytes, so what follows is at even addresses only. Tells the compiler
/// to load halfwords instead of bytes.
#[repr(C, packed(2))]
pub struct Even<T>(pub T);

impl Frame {
    #[inline(always)]
    pub fn of(ctx: *mut xdp_md) -> Self {
        // SAFETY: the context of the running program.
        let (data, end) = unsafe { ((*ctx).data as usize, (*ctx).data_end as usize) };
        Self { data, end, ctx: ctx.cast() }
    }

    /// What of an skb lies in one piece: its headers, mostly. Not to be used any more once a helper has changed the packet.
    #[inline(always)]
    pub fn of_skb(skb: Skb) -> Self {
        // SAFETY: the context of the running program.
        let (data, end) = unsafe { ((*skb.0).data as usize, (*skb.0).data_end as usize) };
        Self { data, end, ctx: skb.ctx() }
    }

    /// A pointer to a `T` at `offset`, if the frame is that long.
    #[inline(always)]
    pub fn at<T>(self, offset: usize) -> Option<*mut Even<T>> {
        let start = self.data + offset;
        if start + size_of::<T>() > self.end { None } else { Some(start as *mut Even<T>) }
    }

    #[inline(always)]
    pub fn read<T: Copy>(self, offset: usize) -> Option<T> {
        // SAFETY: inside the frame, by the check in `at`.
        self.at::<T>(offset).map(|p| unsafe { (*p).0 })
    }

    /// The eight words of an IPv6 header's addresses, one by one: copied as a whole they would become a call.
    #[inline(always)]
    pub fn addresses6(self) -> Option<*mut Even<Be32>> {
        self.at::<[V6; 2]>(L3 + 8).map(|p| p.cast())
    }

    /// The Ethernet header's addresses, one halfword after the other: as a whole they would become a call.
    #[inline(always)]
    pub fn write_macs(self, macs: &[u16; 6]) -> Option<()> {
        let p: *mut u16 = self.at::<[u16; 6]>(0)?.cast();
        for (i, half) in macs.iter().enumerate() {
            // SAFETY: six halfwords lie inside the frame, by the check in `at`; they are at even addresses.
            unsafe { *p.add(i) = *half };
        }
        Some(())
    }

    #[inline(always)]
    pub fn write<T: Copy>(self, offset: usize, value: T) -> Option<()> {
        let p = self.at::<T>(offset)?;
        // SAFETY: as above.
        unsafe { (*p).0 = value };
        Some(())
    }
}

/// A family's plain packets.
pub trait Plain: Net {
    /// Offset of the layer 4 header: no options, no extension headers.
    const L4: usize = L3 + Self::HEADER_BYTES as usize;
    /// Fills `p` up to the ports. False if the packet is not plain.
    fn read_header(frame: Frame, p: &mut Packet<Self>) -> bool;
    /// What [`Self::write_header`] adds to the sum of the header.
    fn header_growth(new: &Translation<Self>, hops: u8) -> Sum;
    /// Writes addresses, and a TTL that is less by `hops`, which it must be larger than.
    fn write_header(frame: Frame, p: &Packet<Self>, new: &Translation<Self>, hops: u8) -> Option<()>;
}

impl Plain for V4 {
    #[inline(always)]
    fn read_header(frame: Frame, p: &mut Packet<Self>) -> bool {
        let Some(ip) = frame.read::<Ipv4Header>(L3) else { return false };
        // 0x3fff: more fragments, or a fragment offset.
        if ip.version_ihl != 0x45 || ip.fragment.get() & 0x3fff != 0 {
            return false;
        }
        p.tuple = Tuple::new(ip.src, Be16::default(), ip.dst, Be16::default(), ip.proto);
        p.ip_bytes = ip.total_bytes.get() as u32;
        p.ttl = ip.ttl;
        p.tos = ip.tos;
        p.ip_check = ip.check;
        true
    }

    #[inline(always)]
    fn write_header(frame: Frame, p: &Packet<Self>, new: &Translation<Self>, hops: u8) -> Option<()> {
        let delta = new.l3_delta.sub16(u16::from_ne_bytes([hops, 0]));
        frame.write(L3 + 8, p.ttl - hops)?;
        frame.write(L3 + 10, checksum::update(p.ip_check, delta))?;
        frame.write(L3 + 12, *new.src)?;
        frame.write(L3 + 16, *new.dst)
    }

    /// The header's checksum makes up for everything else.
    #[inline(always)]
    fn header_growth(_new: &Translation<Self>, _hops: u8) -> Sum {
        Sum::new()
    }
}

impl Plain for V6 {
    #[inline(always)]
    fn read_header(frame: Frame, p: &mut Packet<Self>) -> bool {
        let Some(words) = frame.addresses6() else { return false };
        for i in 0..4 {
            // SAFETY: eight words lie inside the frame, by the check in `at`.
            unsafe {
                p.tuple.src[i] = (*words.add(i)).0;
                p.tuple.dst[i] = (*words.add(4 + i)).0;
            }
        }
        let Some(payload_bytes) = frame.read::<Be16>(L3 + 4) else { return false };
        let Some([next, hop_limit]) = frame.read::<[u8; 2]>(L3 + 6) else { return false };
        p.tuple.proto = next;
        p.tuple._pad = 0;
        p.tuple._pad2 = 0;
        p.ip_bytes = payload_bytes.get() as u32 + Self::HEADER_BYTES;
        p.ttl = hop_limit;
        p.tos = 0;
        true
    }

    #[inline(always)]
    fn write_header(frame: Frame, p: &Packet<Self>, new: &Translation<Self>, hops: u8) -> Option<()> {
        frame.write(L3 + 7, p.ttl - hops)?;
        let words = frame.addresses6()?;
        for i in 0..4 {
            // SAFETY: as in `read_header`.
            unsafe {
                (*words.add(i)).0 = new.src[i];
                (*words.add(4 + i)).0 = new.dst[i];
            }
        }
        Some(())
    }

    #[inline(always)]
    fn header_growth(new: &Translation<Self>, hops: u8) -> Sum {
        new.l3_delta.sub16(u16::from_ne_bytes([0, hops]))
    }
}

/// What becomes of a packet's addresses and ports, and what that changes in its checksums.
pub struct Translation<'a, A> {
    pub src: &'a A,
    pub dst: &'a A,
    /// As a header starts with them.
    pub ports: u32,
    /// Addresses and ports.
    pub l4_delta: Sum,
    /// Addresses.
    pub l3_delta: Sum,
}

impl<'a, A: Net> Translation<'a, A> {
    #[inline(always)]
    pub fn of(old: &Tuple<A>, flow: &'a Flow<A>) -> Self {
        let l3_delta = Sum::new().replace_addr(&old.src, &flow.src).replace_addr(&old.dst, &flow.dst);
        Self {
            src: &flow.src,
            dst: &flow.dst,
            ports: flow.ports(),
            l4_delta: l3_delta.replace_port(old.sport, flow.sport).replace_port(old.dport, flow.dport),
            l3_delta,
        }
    }

    #[inline(always)]
    pub fn noted(cached: &'a CachedFlow<A>) -> Self {
        Self {
            src: &cached.src,
            dst: &cached.dst,
            ports: cached.ports,
            l4_delta: Sum::new().add16(cached.l4_delta),
            l3_delta: Sum::new().add16(cached.l3_delta),
        }
    }
}

/// Fills `p` with what the headers say. False if the packet is not plain.
#[inline(always)]
pub fn parse<A: Plain>(frame: Frame, p: &mut Packet<A>) -> bool {
    if !A::read_header(frame, p) {
        return false;
    }
    let Some([sport, dport]) = frame.read::<[Be16; 2]>(A::L4) else { return false };
    p.tuple.sport = sport;
    p.tuple.dport = dport;
    p.tcp_flags = 0;
    match p.tuple.proto {
        proto::UDP => p.ip_bytes >= A::HEADER_BYTES + 8 && frame.at::<u16>(A::L4 + 6).is_some(),
        proto::TCP => {
            // The flags, and the last two bytes: the whole header is there, and not in the padding of a short frame.
            let Some(seen) = frame.read::<u8>(A::L4 + 13) else { return false };
            p.tcp_flags = seen & (tcp::SYN | tcp::ACK | tcp::FIN | tcp::RST);
            p.ip_bytes >= A::HEADER_BYTES + 20 && frame.at::<u16>(A::L4 + 18).is_some()
        }
        _ => false,
    }
}

/// Offset of the L4 checksum.
#[inline(always)]
const fn check_at<A: Plain>(is_udp: bool) -> usize {
    A::L4 + if is_udp { UDP_CHECK } else { TCP_CHECK } as usize
}

/// True if the L4 checksum may be left to the device (`CHECKSUM_PARTIAL`), which no program can see. Not to be asked about
/// packets that will be cut into segments: their pseudo-header's length need not be the packet's.
///
/// The device adds up everything from the L4 header on, the field itself included, and puts the complement there. For that
/// to be the checksum, the field has to hold the pseudo-header's sum (modulo 65535, RFC 1071), whoever made the packet. So
/// does one finished checksum of 65535. Where the device is to finish the checksum of an inner packet, the outer one is
/// finished, or there is none.
#[inline(always)]
pub fn may_be_unfinished<A: Plain>(frame: Frame, p: &Packet<A>) -> bool {
    let bytes = (p.ip_bytes - A::HEADER_BYTES) as u16;
    let check = if p.tuple.proto == proto::UDP {
        match frame.read::<[Be16; 2]>(check_at::<A>(true) - 2) {
            // The pseudo-header has the length that UDP's header says.
            Some([told, check]) if told.get() == bytes => Some(check.raw()),
            _ => None,
        }
    } else {
        frame.read(check_at::<A>(false))
    };
    check.is_none_or(|check| checksum::is_sum(check, checksum::pseudo(&p.tuple, bytes)))
}

/// Writes a translation into a frame whose checksums are finished, and gives what the sum of all bytes from the IP header on
/// has grown by. All headers were read before, so nothing here can fail halfway.
#[inline(always)]
pub fn translate<A: Plain>(frame: Frame, p: &Packet<A>, new: &Translation<A>, hops: u8) -> Option<Sum> {
    let was = update_check(frame, p, new.l4_delta)?;
    frame.write(A::L4, new.ports)?;
    A::write_header(frame, p, new, hops)?;
    // Ports and L4 checksum together make up for the addresses, unless there is no checksum.
    let growth = A::header_growth(new, hops).sub16(new.l3_delta.fold16());
    Some(if was == 0 && p.tuple.proto == proto::UDP { growth.plus(new.l4_delta) } else { growth })
}

/// Changes the L4 checksum by `delta`; gives what it was.
#[inline(always)]
fn update_check<A: Plain>(frame: Frame, p: &Packet<A>, delta: Sum) -> Option<u16> {
    if p.tuple.proto == proto::UDP {
        let was = frame.read(check_at::<A>(true))?;
        frame.write(check_at::<A>(true), checksum::update_udp(was, delta))?;
        Some(was)
    } else {
        let was = frame.read(check_at::<A>(false))?;
        frame.write(check_at::<A>(false), checksum::update(was, delta))?;
        Some(was)
    }
}

/// Writes a translation into a packet whose L4 checksum may be left to the device: then it has to follow the addresses only,
/// as the device sees the ports. After a failure the packet may be half rewritten: drop it.
///
/// The kernel's helper knows. It is asked to apply the change of the addresses, which differs in sign between the two
/// kinds, and so tells what is left to do.
#[inline(always)]
pub fn translate_unfinished<A: Plain>(
    skb: Skb,
    p: &Packet<A>,
    new: &Translation<A>,
    hops: u8,
) -> Result<(), Failed> {
    let frame = Frame::of_skb(skb);
    frame.write(A::L4, new.ports).ok_or(Failed)?;
    A::write_header(frame, p, new, hops).ok_or(Failed)?;
    let is_udp = p.tuple.proto == proto::UDP;
    let was = read_check::<A>(frame, is_udp).ok_or(Failed)?;
    skb.csum_pseudo_header(check_at::<A>(is_udp) as u32, new.l3_delta, is_udp)?;
    let frame = Frame::of_skb(skb);
    let is = read_check::<A>(frame, is_udp).ok_or(Failed)?;
    let ports = new.l4_delta.sub16(new.l3_delta.fold16());
    if checksum::is_sum(0, new.l3_delta) {
        // No change, and no sign.
        skb.csum_ports(check_at::<A>(is_udp) as u32, ports, is_udp)?;
    } else if checksum::is_sum(is, new.l3_delta.add16(was)) {
        return Ok(());
    } else {
        update_check(frame, p, ports).ok_or(Failed)?;
    }
    // The helper has taken the addresses out of a sum over the whole packet; without a checksum it did nothing.
    let growth = A::header_growth(new, hops);
    skb.sum_has_grown(if was == 0 && is_udp { growth.plus(ports) } else { growth });
    Ok(())
}

#[inline(always)]
fn read_check<A: Plain>(frame: Frame, is_udp: bool) -> Option<u16> {
    if is_udp { frame.read(check_at::<A>(true)) } else { frame.read(check_at::<A>(false)) }
}

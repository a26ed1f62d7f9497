//! What differs between IPv4 and IPv6: the maps, and the shape of the header. All other code is generic over [`Net`].

use aya_ebpf::btf_maps::lpm_trie::Key;
use lb_common::{
    Addr, Be16, V4, V6,
    affinity::{AffinityKey, AffinityValue},
    backend::Backend,
    conntrack::Flow,
    device::Device,
    flow_cache::{CachedFlow, Tags},
    fragment::{FragmentKey, FragmentPorts, HeldFrame, HeldKey},
    frontend::{FrontendKey, FrontendValue},
    source::SourceRange,
    tuple::Tuple,
};

use crate::{
    cache::{self, Place},
    forward::{Fib, NextHop},
    icmp, maps,
};

/// `bpf_map_update_elem` flag: create only.
pub const NOEXIST: u64 = 1;
/// `bpf_map_update_elem` flag: create or replace.
pub const ANY: u64 = 0;

/// An address family as the data path sees it.
pub trait Net: Addr {
    /// Length of the fixed IP header in bytes.
    const HEADER_BYTES: u32;
    /// AF_INET or AF_INET6.
    const AF: u8;

    fn frontend(key: &FrontendKey<Self>) -> Option<FrontendValue>;
    fn backend(id: u32) -> Option<Backend<Self>>;
    fn flow(key: &Tuple<Self>) -> Option<*mut Flow<Self>>;
    fn put_flow(key: &Tuple<Self>, flow: &Flow<Self>, mode: u64) -> Result<(), i32>;
    fn remove_flow(key: &Tuple<Self>);
    /// Slot of the flow cache.
    fn cached(index: u32) -> Option<*mut CachedFlow<Self>>;
    /// The tags of a slot and its neighbours.
    fn tags(slot: u32) -> Option<*mut Tags>;
    fn affinity(key: &AffinityKey<Self>) -> Option<AffinityValue>;
    fn put_affinity(key: &AffinityKey<Self>, value: &AffinityValue);
    fn fragment(key: &FragmentKey<Self>) -> Option<FragmentPorts>;
    fn put_fragment(key: &FragmentKey<Self>, ports: &FragmentPorts);
    fn held(key: &HeldKey<Self>) -> Option<*const HeldFrame>;
    fn put_held(key: &HeldKey<Self>, frame: &HeldFrame, mode: u64) -> Result<(), i32>;
    fn remove_held(key: &HeldKey<Self>);
    /// Flags of the range of ClusterIPs that an address is in; 0: none.
    fn service_cidr(&self) -> u32;
    /// True if the Service's source ranges admit this client.
    fn is_admitted(&self, service: u32) -> bool;
    /// This CPU's scratch memory. Valid for one step: callees use it too.
    fn scratch() -> Option<&'static mut Scratch<Self>>;
    /// An address that one host has: something can be sent to it.
    fn is_unicast(&self) -> bool;
    /// The source address for flows that leave by this device, if it has one of this family.
    fn snat_addr(device: &Device) -> Option<Self>;
}

macro_rules! impl_net {
    ($t:ty, $header:literal, $af:literal, $frontends:ident, $backends:ident, $flows:ident, $cache:ident, $tags:ident, $affinity:ident,
     $fragments:ident, $held:ident, $cidrs:ident, $ranges:ident, $scratch:ident, $snat:ident, $none:expr, $unicast:ident) => {
        impl Net for $t {
            const HEADER_BYTES: u32 = $header;
            const AF: u8 = $af;

            #[inline(always)]
            fn frontend(key: &FrontendKey<Self>) -> Option<FrontendValue> {
                // SAFETY: the value is eight aligned bytes, read as one.
                maps::$frontends.get_ptr(key).map(|v| unsafe { core::ptr::read_volatile(v) })
            }
            #[inline(always)]
            fn backend(id: u32) -> Option<Backend<Self>> {
                maps::$backends.get(id).copied()
            }
            #[inline(always)]
            fn flow(key: &Tuple<Self>) -> Option<*mut Flow<Self>> {
                maps::$flows.get_ptr_mut(key)
            }
            #[inline(always)]
            fn put_flow(key: &Tuple<Self>, flow: &Flow<Self>, mode: u64) -> Result<(), i32> {
                maps::$flows.insert(key, flow, mode)
            }
            #[inline(always)]
            fn remove_flow(key: &Tuple<Self>) {
                // It may be gone already: the sweeper removes flows too.
                let _ = maps::$flows.remove(key);
                cache::renew_epoch(key);
            }
            #[inline(always)]
            fn cached(index: u32) -> Option<*mut CachedFlow<Self>> {
                // An entry begins with the flow.
                maps::$cache.get_ptr_mut(index).map(|entry| entry.cast())
            }
            #[inline(always)]
            fn tags(slot: u32) -> Option<*mut Tags> {
                maps::$tags.get_ptr_mut(Tags::index(slot))
            }
            #[inline(always)]
            fn affinity(key: &AffinityKey<Self>) -> Option<AffinityValue> {
                // SAFETY: copied at once; a concurrent update of the same client changes to another valid memory.
                unsafe { maps::$affinity.get(key).copied() }
            }
            #[inline(always)]
            fn put_affinity(key: &AffinityKey<Self>, value: &AffinityValue) {
                // A full LRU evicts; failing altogether only costs stickiness.
                let _ = maps::$affinity.insert(key, value, ANY);
            }
            #[inline(always)]
            fn fragment(key: &FragmentKey<Self>) -> Option<FragmentPorts> {
                // SAFETY: copied at once.
                unsafe { maps::$fragments.get(key).copied() }
            }
            #[inline(always)]
            fn put_fragment(key: &FragmentKey<Self>, ports: &FragmentPorts) {
                // LRU: the oldest datagram gives way.
                let _ = maps::$fragments.insert(key, ports, ANY);
            }
            #[inline(always)]
            fn held(key: &HeldKey<Self>) -> Option<*const HeldFrame> {
                maps::$held.get_ptr(key)
            }
            #[inline(always)]
            fn put_held(key: &HeldKey<Self>, frame: &HeldFrame, mode: u64) -> Result<(), i32> {
                maps::$held.insert(key, frame, mode)
            }
            #[inline(always)]
            fn remove_held(key: &HeldKey<Self>) {
                // It may have been evicted.
                let _ = maps::$held.remove(key);
            }
            #[inline(always)]
            fn service_cidr(&self) -> u32 {
                maps::$cidrs.get(0).map_or(0, |ranges| ranges.flags_of(self))
            }
            #[inline(always)]
            fn is_admitted(&self, service: u32) -> bool {
                let source = SourceRange { service, addr: *self };
                let key = Key::new(SourceRange::<Self>::LOOKUP_BITS, source);
                maps::$ranges.get(&key).is_some()
            }
            #[inline(always)]
            fn scratch() -> Option<&'static mut Scratch<Self>> {
                // SAFETY: per CPU, and programs of one CPU do not interrupt each other: tc and XDP run with bottom
                // halves off. A callee may fetch it again: nobody keeps a reference to a member over a call that
                // writes that member.
                maps::$scratch.get_ptr_mut(0).map(|s| unsafe { &mut *s })
            }
            #[inline(always)]
            fn is_unicast(&self) -> bool {
                $unicast(self)
            }
            #[inline(always)]
            fn snat_addr(device: &Device) -> Option<Self> {
                if device.$snat == $none { None } else { Some(device.$snat) }
            }
        }
    };
}

impl_net!(
    V4,
    20,
    2,
    FRONTENDS4,
    BACKENDS4,
    FLOWS4,
    FLOW_CACHE4,
    FLOW_TAGS4,
    AFFINITY4,
    FRAGMENTS4,
    HELD4,
    SERVICE_CIDRS4,
    SOURCE_RANGES4,
    SCRATCH4,
    snat4,
    V4::default(),
    is_unicast4
);
impl_net!(
    V6,
    40,
    10,
    FRONTENDS6,
    BACKENDS6,
    FLOWS6,
    FLOW_CACHE6,
    FLOW_TAGS6,
    AFFINITY6,
    FRAGMENTS6,
    HELD6,
    SERVICE_CIDRS6,
    SOURCE_RANGES6,
    SCRATCH6,
    snat6,
    V6::default(),
    is_unicast6
);

/// Not 0.0.0.0/8, 127.0.0.0/8, multicast, reserved or broadcast (RFC 1122 section 3.2.1.3).
#[inline(always)]
const fn is_unicast4(addr: &V4) -> bool {
    let first = addr.get() >> 24;
    first != 0 && first != 127 && first < 224
}

/// Not unspecified, loopback or multicast (RFC 4291 section 2.4).
#[inline(always)]
fn is_unicast6(addr: &V6) -> bool {
    let high = addr[0].raw() | addr[1].raw() | addr[2].raw();
    addr[0].get() >> 24 != 0xff && (high != 0 || addr[3].get() > 1)
}

/// What is kept off the stack, which has 512 bytes for a whole call chain.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Scratch<A> {
    pub packet: Packet<A>,
    /// A flow that was just opened: the entry of the client's packets, that of the answers, and the latter's key.
    pub opened: Flow<A>,
    pub reply: Flow<A>,
    pub reply_key: Tuple<A>,
    /// An ICMP error: what it quotes, and both tuples that it gets.
    pub quoted: Quoted<A>,
    pub inner: Tuple<A>,
    pub outer: Tuple<A>,
    pub fib: Fib,
    /// 1 if `fib` is the routing table's answer for this packet already: opening its flow has asked. Set to 0 before the tables
    /// are asked.
    pub is_routed: u32,
    /// tc: the next hop that `fib` named.
    pub via: NextHop,
    /// The packet's place in the flow cache.
    pub place: Place,
    /// Packets that look at their tag, and at what tells bystanders, before they fetch an entry of the flow cache: see
    /// [`cache::find`].
    pub cold: u32,
    /// Packets so far that were none of ours: see [`cache::fill_nothing`].
    pub others: u32,
    /// What `tc::transit` wants told to the sender, when it returns [`crate::tc::ANSWER`].
    pub error: icmp::Error,
}

/// A packet inside an ICMP error.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Quoted<A> {
    pub tuple: Tuple<A>,
    pub l3: u32,
    pub l4: u32,
    pub ip_check: u16,
    pub _pad: u16,
}

/// A packet as parsed, whatever the hook.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Packet<A> {
    pub tuple: Tuple<A>,
    /// Offset of the IP header from the start of the frame.
    pub l3: u32,
    /// Offset of the layer 4 header from the start of the frame. Not meaningful for later fragments.
    pub l4: u32,
    /// Length from the IP header on, in bytes.
    pub ip_bytes: u32,
    /// The same of the longest packet that this one is when it goes over a wire: GRO has put packets together. Set before the
    /// tables are asked.
    pub wire_bytes: u32,
    /// TTL or hop limit.
    pub ttl: u8,
    /// IPv4: type of service; IPv6: traffic class.
    pub tos: u8,
    /// The flags byte of the TCP header; for SCTP what its first chunk stands for; 0 for others.
    pub tcp_flags: u8,
    /// Length of the TCP header in bytes, 12 for SCTP, 8 for others.
    pub l4_bytes: u8,
    /// IPv4 header checksum as in the packet.
    pub ip_check: u16,
    /// `fragment` below is valid and this is not the first fragment: there is no layer 4 header.
    pub is_later_fragment: bool,
    /// Part of a fragmented datagram.
    pub is_fragment: bool,
    /// Identification field of a fragment.
    pub fragment_id: u32,
    /// The device that the packet came in by.
    pub ifindex: u32,
    /// Whom the frame is for, so far as the hook can tell.
    pub addressee: Addressee,
    /// [`crate::conntrack::now`] when it came in.
    pub now: u32,
}

impl<A: Net> Packet<A> {
    #[inline(always)]
    pub const fn fragment_key(&self) -> FragmentKey<A> {
        FragmentKey::new(self.tuple.src, self.tuple.dst, self.fragment_id, self.tuple.proto)
    }

    /// A TCP packet that ends a connection.
    #[inline(always)]
    pub const fn is_end(&self) -> bool {
        use lb_common::conntrack::tcp;
        self.tcp_flags & (tcp::FIN | tcp::RST) != 0
    }

    /// A TCP packet that accepts a connection.
    #[inline(always)]
    pub const fn is_syn_ack(&self) -> bool {
        use lb_common::conntrack::tcp;
        self.tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN | tcp::ACK
    }

    /// A TCP packet that opens a connection.
    #[inline(always)]
    pub const fn is_syn(&self) -> bool {
        use lb_common::conntrack::tcp;
        self.tcp_flags & (tcp::SYN | tcp::ACK | tcp::FIN | tcp::RST) == tcp::SYN
    }

    /// The entry about the destination as a whole.
    #[inline(always)]
    pub const fn address_key(&self) -> FrontendKey<A> {
        FrontendKey::address(self.tuple.dst)
    }

    /// A first fragment.
    #[inline(always)]
    pub const fn is_first_fragment(&self) -> bool {
        self.is_fragment && !self.is_later_fragment
    }

    #[inline(always)]
    pub const fn frontend_key(&self) -> FrontendKey<A> {
        FrontendKey::new(self.tuple.dst, self.tuple.dport, self.tuple.proto)
    }
}

/// Whom a frame is addressed to.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Addressee {
    /// tc: `skb->pkt_type` (PACKET_HOST is 0). XDP: [`Addressee::ASK_MAC`].
    pub kind: u32,
    /// XDP: the destination MAC address.
    pub mac: [u8; 6],
}

impl Addressee {
    pub const HOST: u32 = 0;
    pub const OTHER_HOST: u32 = 3;
    /// `mac` has to be compared with the device's.
    pub const ASK_MAC: u32 = u32::MAX;
}

/// Ports as the first four bytes of TCP, UDP and SCTP headers have them.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Ports {
    pub source: Be16,
    pub dest: Be16,
}

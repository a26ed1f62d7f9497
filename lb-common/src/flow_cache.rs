//! Each CPU's own cache of flows: one cache line an entry, where the flow table takes three or four.
//!
//! A cached flow says what the flow table, the routing table and the checks of the slow path said a moment ago, for packets
//! that bring no news: no TCP flag but ACK, and within the second in which the table's entry was stamped. It is believed
//! only while
//!
//! * the key is the packet's tuple, byte by byte, and the hook is the same;
//! * the *epoch* of the tuple is what it was before the flow was looked up. Whoever removes or changes an entry of the flow
//!   table makes the epoch a new one afterwards (the time, CLOCK_MONOTONIC in ns), and the agent does so with all of them
//!   when routes or devices change;
//! * less than a second has passed since the flow was stamped: so the table hears of the flow as often as without a cache,
//!   and nothing depends on an agent that is alive.
//!
//! Packets that are none of ours are cached too ([`way::NOTHING`]): most of what passes a node's devices. They have epochs of
//! their own, which end when a flow is opened whose answers have that tuple, or when the agent adds frontends.
//!
//! An entry that is still fresh is not replaced: two flows on one slot would take turns to write, with every packet. But a
//! flow takes the place of nothing.

use crate::{Addr, V4, V6, conntrack::Flow, map_type, maps::name, tuple::Tuple};

/// Value of `FLOW_CACHE4` and `FLOW_CACHE6`: a flow, its next hop, and what translation changes in the checksums.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachedFlow<A> {
    pub key: Tuple<A>,
    /// Source and destination after rewriting.
    pub src: A,
    pub dst: A,
    /// Both ports after rewriting, as a header starts with them.
    pub ports: u32,
    /// Index into `SERVICE_STATS`: where this CPU counts the packets.
    pub counted_at: u32,
    /// Kernel jiffies (low 32 bits) when the flow table's entry was stamped.
    pub stamped: u32,
    /// Low half of the tuple's epoch.
    pub epoch: u32,
    /// Folded difference of the checksum over addresses and ports: that of TCP and UDP.
    pub l4_delta: u16,
    /// Folded difference of the checksum over the addresses: that of the IPv4 header, without the TTL's part.
    pub l3_delta: u16,
    pub next_hop: NextHop,
    /// Of [`hook`]: where the packet is seen.
    pub hook: u8,
    /// Of [`way`]: what becomes of it.
    pub way: u8,
    pub _pad: u16,
}

/// Where packets are seen: one tuple may pass several hooks, and each does something else with it.
pub mod hook {
    pub const XDP: u8 = 0;
    pub const INGRESS: u8 = 1;
    pub const EGRESS: u8 = 2;
}

/// What becomes of a packet.
pub mod way {
    /// It is translated, and goes on to the stack.
    pub const STACK: u8 = 0;
    /// It is translated, and leaves by the next hop.
    pub const ROUTED: u8 = 1;
    /// It passes as it is. Such an entry has no translation and no next hop.
    pub const NOTHING: u8 = 2;
}

/// Where a packet goes after translation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NextHop {
    /// Destination and source of the Ethernet header.
    pub macs: [u16; 6],
    /// Longest packet that the way takes, in bytes from the IP header on.
    pub mtu: u16,
    /// The device to leave by. Flows by a device whose index does not fit are not cached.
    pub ifindex: u16,
}

map_type!(NextHop, size = 16);

/// Bytes of an entry: a cache line, or two.
pub const ENTRY4_BYTES: usize = 64;
pub const ENTRY6_BYTES: usize = 128;

/// [`CachedFlow<V4>`] fills a line.
pub type Entry4 = CachedFlow<V4>;

/// [`CachedFlow<V6>`] and what is left of two lines.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry6 {
    pub flow: CachedFlow<V6>,
    pub _pad: [u32; 4],
}

map_type!(CachedFlow<V4>, size = ENTRY4_BYTES);
map_type!(CachedFlow<V6>, size = 112);
map_type!(Entry6, size = ENTRY6_BYTES);

/// What stands in the entry of each of eight slots, as far as a byte can tell ([`tag`]); byte 0 is of the first slot. A tuple
/// that the cache does not know is mostly recognized by its tag: entries fill megabytes, tags fit a processor's second-level
/// cache.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tags {
    pub of_slot: [u8; Tags::SLOTS],
}

impl Tags {
    /// Array elements take eight bytes at least.
    pub const SLOTS: usize = 8;

    /// Index into the tags' map.
    #[inline(always)]
    pub const fn index(slot: u32) -> u32 {
        slot / Self::SLOTS as u32
    }

    /// Position within an element.
    #[inline(always)]
    pub const fn position(slot: u32) -> usize {
        slot as usize % Self::SLOTS
    }
}

map_type!(Tags, size = Tags::SLOTS);

/// Number of epochs of each kind; a power of two. Each stands for all tuples that hash to it.
pub const EPOCHS: u32 = 4096;
/// Length of `FLOW_EPOCHS`: the epochs of entries of the flow table, and then those of tuples that have none.
pub const ALL_EPOCHS: u32 = 2 * EPOCHS;

/// Odd multipliers, one a word of the key, from the fraction of pi (the words of Blowfish's P-array).
const MULTIPLIERS: [u64; 10] = [
    0x243f_6a88_85a3_08d3,
    0x1319_8a2e_0370_7345,
    0xa409_3822_299f_31d1,
    0x082e_fa98_ec4e_6c89,
    0x4528_21e6_38d0_1377,
    0xbe54_66cf_34e9_0c6d,
    0xc0ac_29b7_c97c_50dd,
    0x3f84_d5b5_b547_0917,
    0x9216_d5d9_8979_fb1b,
    0xd131_0ba6_98df_b5ad,
];

/// Where a tuple has its place: multilinear hashing, whose multiplications do not wait for each other. Not the hash that
/// picks backends: who can guess this one can make flows share a slot, and so keep them out of the cache, and no more.
#[inline(always)]
pub fn hash<A: Addr>(key: &Tuple<A>) -> u32 {
    let ports = (key.sport.raw() as u64) << 16 | key.dport.raw() as u64;
    // Beside the ports, so that one multiplication does for both.
    let sum = (ports | (key.proto as u64) << 32).wrapping_mul(MULTIPLIERS[0]);
    let sum = sum.wrapping_add(weighted(&key.src, 1)).wrapping_add(weighted(&key.dst, DST));
    mixed(sum).wrapping_shr(32) as u32
}

/// A hash of a destination address whose high bits are the good ones.
#[inline(always)]
pub fn hash_of_destination<A: Addr>(dst: &A) -> u64 {
    mixed(weighted(dst, DST))
}

/// The multiplier of a destination's first word.
const DST: usize = 5;

#[inline(always)]
fn weighted<A: Addr>(addr: &A, first: usize) -> u64 {
    let (mut sum, mut i) = (0_u64, 0);
    while i < A::WORDS {
        sum = sum.wrapping_add((addr.word(i) as u64).wrapping_mul(MULTIPLIERS[first + i]));
        i += 1;
    }
    sum
}

/// Sums alone put neighbours onto a lattice.
#[inline(always)]
const fn mixed(sum: u64) -> u64 {
    (sum ^ sum >> 29).wrapping_mul(MULTIPLIERS[9])
}

/// Index into `FLOW_EPOCHS`: ends when an entry of the flow table is removed or changed.
#[inline(always)]
pub const fn epoch_index(hash: u32) -> u32 {
    hash % EPOCHS
}

/// Index into `FLOW_EPOCHS`: ends when an entry of the flow table is made.
#[inline(always)]
pub const fn nothing_epoch_index(hash: u32) -> u32 {
    EPOCHS + hash % EPOCHS
}

/// Index into the cache of the `cpu`-th CPU, which has `slots` (a power of two) of them. Each hook has a pair of its own.
#[inline(always)]
pub const fn slot_index(cpu: u32, slots: u32, hash: u32, hook: u8) -> u32 {
    cpu * slots + ((hash ^ (hook as u32) << 1) & (slots - 1))
}

/// The byte of a tuple's hash that its place says least about.
#[inline(always)]
pub const fn tag(hash: u32) -> u8 {
    (hash >> 24) as u8
}

/// Where a flow whose slot is taken may be instead: next to it, as processors fetch lines in pairs.
#[inline(always)]
pub const fn other_slot(slot: u32) -> u32 {
    slot ^ 1
}

/// True if an entry stamped then is worth nothing now.
#[inline(always)]
pub const fn is_stale(stamped: u32, now: u32, jiffies_per_s: u32) -> bool {
    now.wrapping_sub(stamped) >= jiffies_per_s
}

/// Slots for each of `cpus` CPUs out of `total`: the largest power of two that all can have; 0 switches the cache off.
/// A flow's packets come to one CPU (receive-side scaling), so more CPUs need no more slots together. IPv6 has a quarter.
pub const fn slots_per_cpu(total: u32, cpus: u32) -> u32 {
    match total / if cpus == 0 { 1 } else { cpus } {
        // Too few for a pair of each family.
        0..=7 => 0,
        each => 1 << each.ilog2(),
    }
}

/// Lengths of the maps where each CPU has so many slots; a map has one entry at least.
pub const fn lengths(slots: u32, cpus: u32) -> [(&'static str, u32); 4] {
    let slots4 = if slots == 0 { 4 } else { slots * cpus };
    let slots6 = slots4 / 4;
    let tags = Tags::SLOTS as u32;
    [
        (name::FLOW_CACHE4, slots4),
        (name::FLOW_CACHE6, slots6),
        (name::FLOW_TAGS4, slots4.div_ceil(tags)),
        (name::FLOW_TAGS6, slots6.div_ceil(tags)),
    ]
}

impl<A: Addr> CachedFlow<A> {
    /// Makes this the entry for packets of `key`, but for the next hop, hook, way and where they are counted.
    #[inline(always)]
    pub fn fill(&mut self, key: &Tuple<A>, flow: &Flow<A>, epoch: u32) {
        use crate::checksum::Sum;
        let addresses = Sum::new().replace_addr(&key.src, &flow.src).replace_addr(&key.dst, &flow.dst);
        let all = addresses.replace_port(key.sport, flow.sport).replace_port(key.dport, flow.dport);
        self.key = *key;
        self.src = flow.src;
        self.dst = flow.dst;
        self.ports = flow.ports();
        self.stamped = flow.last_seen;
        self.epoch = epoch;
        self.l4_delta = all.fold16();
        self.l3_delta = addresses.fold16();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::{Be16, Be32, proto};

    fn tuple(client: u32, port: u16) -> Tuple<V4> {
        Tuple::new(Be32::new(client), Be16::new(port), Be32::new(0x0a60_0001), Be16::new(80), proto::TCP)
    }

    #[test]
    fn tuples_that_differ_little_spread_like_random_ones() {
        let spread = |tuples: &mut dyn Iterator<Item = u32>| {
            let mut slots: HashMap<u32, u32> = HashMap::new();
            for hash in tuples {
                *slots.entry(hash & 0xffff).or_default() += 1;
            }
            slots.len()
        };
        // 65,536 balls into as many bins leave 1/e of them empty: 41,427 are hit.
        for used in [
            spread(&mut (0..=u16::MAX).map(|port| hash(&tuple(0xc612_0001, port)))),
            spread(&mut (0..1 << 16).map(|client| hash(&tuple(0xc612_0000 + client, 40_000)))),
            spread(
                &mut (0..1 << 16).map(|n| hash(&tuple(0xc612_0000 + (n >> 8), 40_000 + (n & 0xff) as u16))),
            ),
            spread(&mut (0..1u32 << 16).map(|n| {
                let src = [0x2001_0db8, 0, n >> 4, 1].map(Be32::new);
                let dst = [0xfd00_0096, 0, 0, n & 0xf].map(Be32::new);
                hash(&Tuple::<V6>::new(src, Be16::new(1024), dst, Be16::new(80), proto::UDP))
            })),
        ] {
            assert!((40_000..48_000).contains(&used), "{used} of 65,536 slots in use");
        }
    }

    #[test]
    fn every_part_of_the_tuple_counts() {
        let base = hash(&tuple(1, 1));
        let other = Tuple { proto: proto::UDP, ..tuple(1, 1) };
        for different in [hash(&tuple(2, 1)), hash(&tuple(1, 2)), hash(&other), hash(&tuple(1, 1).reversed())]
        {
            assert_ne!(base, different);
        }
    }

    #[test]
    fn slots_are_shared_out_in_powers_of_two() {
        assert_eq!(slots_per_cpu(1 << 18, 2), 1 << 17);
        assert_eq!(slots_per_cpu(1 << 18, 3), 1 << 16);
        assert_eq!(slots_per_cpu(100, 128), 0);
        assert_eq!(slots_per_cpu(16, 2), 8);
        assert_eq!(slots_per_cpu(0, 2), 0);
        assert_eq!(slot_index(2, 4, 0xffff_fffd, hook::XDP), 9);
        assert_eq!(slot_index(2, 4, 0xffff_fffd, hook::INGRESS), 11);
        assert_eq!(slot_index(2, 2, 0xffff_fffd, hook::EGRESS), 5, "never another CPU's");
    }

    #[test]
    fn every_slot_of_both_families_has_a_tag() {
        // (slots per CPU, CPUs); IPv6 has a quarter of the slots.
        for (slots, cpus) in [(0, 3), (8, 1), (8, 3), (1 << 17, 2)] {
            let [(_, slots4), (_, slots6), (_, tags4), (_, tags6)] = lengths(slots, cpus);
            assert!(slots6 >= 1);
            for (slots, tags) in [(slots4, tags4), (slots6, tags6)] {
                let last = slots - 1;
                assert_eq!(Tags::index(last) + 1, tags);
                assert_eq!(Tags::index(last) * 8 + Tags::position(last) as u32, last);
            }
        }
    }

    #[test]
    fn tags_tell_tuples_of_one_slot_apart() {
        // Of 65,536 tuples, those that share a slot of 4,096 have the same tag once in 256 pairs.
        let mut slots: HashMap<u32, Vec<u8>> = HashMap::new();
        for n in 0..1 << 16 {
            let hash = hash(&tuple(0xc612_0000 + n, 40_000));
            slots.entry(slot_index(0, 4096, hash, hook::XDP)).or_default().push(tag(hash));
        }
        let (mut pairs, mut same) = (0, 0);
        for tags in slots.values() {
            for (i, a) in tags.iter().enumerate() {
                pairs += i;
                same += tags[..i].iter().filter(|b| *b == a).count();
            }
        }
        assert!((pairs / 300..pairs / 200).contains(&same), "{same} of {pairs} pairs have the same tag");
    }

    #[test]
    fn an_entry_lives_for_the_second_of_its_stamp() {
        assert!(!is_stale(100, 349, 250));
        assert!(is_stale(100, 350, 250));
        // Across the end of the counter, and a stamp of another CPU that is ahead.
        assert!(!is_stale(u32::MAX - 9, 9, 250));
        assert!(is_stale(101, 100, 250));
    }
}

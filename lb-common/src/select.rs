//! Which backend a new flow gets. The data path, the tests and whatever explains decisions use this one piece.

use crate::{
    Addr, cidr,
    frontend::{FrontendValue, ServiceRecord, SlotRange, flags},
    tuple::Tuple,
};

/// Where a packet came from, as kube-proxy's local detector sees it: by the device, not by the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A pod of this node, or a process of the node itself.
    Internal,
    /// The wire.
    External,
}

/// What a frontend does with a new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Choice {
    /// One of these slots.
    Slots(SlotRange),
    /// Nobody serves the Service anywhere: refuse at once (ICMP port unreachable, ECONNREFUSED).
    Reject,
    /// The policy is Local, and all endpoints are on other nodes: no answer.
    Drop,
}

/// What becomes of a new packet whose port has no frontend (rule C7, as kube-proxy's nftables mode has it).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Unlisted {
    /// Nobody's business here.
    Pass,
    /// A ClusterIP without such a port.
    Reject,
    /// An address of a ServiceCIDR that no Service has.
    Drop,
}

/// Decides by the entry about the destination's address as a whole, if there is one, and by the flags of the range that
/// the address is in ([`cidr::flags`]; 0: none).
#[inline(always)]
pub const fn unlisted(address: Option<FrontendValue>, range_flags: u32) -> Unlisted {
    match address {
        Some(value) if value.flags & flags::KIND_MASK == flags::KIND_CLUSTER_IP => Unlisted::Reject,
        Some(_) => Unlisted::Pass,
        None if range_flags & cidr::flags::DROP_UNASSIGNED != 0 => Unlisted::Drop,
        None => Unlisted::Pass,
    }
}

/// True if an echo request to this address is to be answered, where that is asked for at all: the node answers for its
/// own addresses itself.
#[inline(always)]
pub const fn answers_ping(address: FrontendValue) -> bool {
    matches!(
        address.flags & flags::KIND_MASK,
        flags::KIND_CLUSTER_IP | flags::KIND_LOAD_BALANCER | flags::KIND_EXTERNAL_IP
    )
}

/// True if this frontend offers `origin` only endpoints of this node.
#[inline(always)]
pub const fn wants_local(frontend_flags: u32, origin: Origin) -> bool {
    let bit = match origin {
        Origin::Internal => flags::INTERNAL_LOCAL,
        Origin::External => flags::EXTERNAL_LOCAL,
    };
    frontend_flags & bit != 0
}

/// The set that a new flow is chosen from.
///
/// Both ranges are loaded once by the caller: each is one atomic load of the record.
#[inline(always)]
pub const fn choose(frontend_flags: u32, origin: Origin, cluster: SlotRange, local: SlotRange) -> Choice {
    if !wants_local(frontend_flags, origin) {
        return if cluster.is_empty() { Choice::Reject } else { Choice::Slots(cluster) };
    }
    if !local.is_empty() {
        Choice::Slots(local)
    } else if cluster.is_empty() {
        Choice::Reject
    } else {
        Choice::Drop
    }
}

impl ServiceRecord {
    /// [`choose`] on a record at rest.
    pub const fn choose(&self, frontend_flags: u32, origin: Origin) -> Choice {
        choose(frontend_flags, origin, self.cluster, self.local)
    }
}

/// The slot in `range` for `hash`: multiplication instead of a remainder (Lemire), so no division and no panic.
#[inline(always)]
pub const fn slot_index(range: SlotRange, hash: u32) -> u32 {
    range.base().wrapping_add(((hash as u64 * range.len() as u64) >> 32) as u32)
}

/// Mixes one word into a hash (the body of MurmurHash3 x86_32, public domain).
#[inline(always)]
pub const fn mix(hash: u32, word: u32) -> u32 {
    let k = word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
    (hash ^ k).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64)
}

/// Spreads a hash over all 32 bits (the finalizer of MurmurHash3 x86_32).
#[inline(always)]
pub const fn finalize(mut hash: u32) -> u32 {
    hash ^= hash >> 16;
    hash = hash.wrapping_mul(0x85eb_ca6b);
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

/// Hash of a packet's tuple. `seed` differs per node boot, so that nobody outside can aim at one backend.
#[inline(always)]
pub fn hash_tuple<A: Addr>(t: &Tuple<A>, seed: u32) -> u32 {
    let mut h = seed;
    let mut i = 0;
    while i < A::WORDS {
        h = mix(h, t.src.word(i));
        h = mix(h, t.dst.word(i));
        i += 1;
    }
    h = mix(h, (t.sport.raw() as u32) << 16 | t.dport.raw() as u32);
    finalize(mix(h, t.proto as u32))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Be16, Be32, proto};

    #[test]
    fn local_policy_falls_back_to_reject_only_when_nobody_serves_anywhere() {
        let some = SlotRange::new(4, 2);
        let none = SlotRange::EMPTY;
        let f = flags::EXTERNAL_LOCAL;
        assert_eq!(choose(f, Origin::External, some, none), Choice::Drop);
        assert_eq!(choose(f, Origin::External, none, none), Choice::Reject);
        assert_eq!(choose(f, Origin::External, none, some), Choice::Slots(some));
        assert_eq!(choose(f, Origin::Internal, some, none), Choice::Slots(some));
        assert_eq!(choose(flags::INTERNAL_LOCAL, Origin::Internal, some, none), Choice::Drop);
        assert_eq!(choose(0, Origin::External, none, some), Choice::Reject);
    }

    #[test]
    fn unlisted_ports_of_cluster_ips_are_rejected_and_unassigned_addresses_dropped() {
        let of = |kind| Some(FrontendValue { service: 0, flags: kind });
        let drop = cidr::flags::ACTIVE | cidr::flags::DROP_UNASSIGNED;
        assert_eq!(unlisted(of(flags::KIND_CLUSTER_IP), drop), Unlisted::Reject);
        assert_eq!(unlisted(of(flags::KIND_CLUSTER_IP), cidr::flags::ACTIVE), Unlisted::Reject);
        assert_eq!(unlisted(of(flags::KIND_FOREIGN), drop), Unlisted::Pass);
        assert_eq!(unlisted(of(flags::KIND_NODE_PORT), drop), Unlisted::Pass);
        assert_eq!(unlisted(None, drop), Unlisted::Drop);
        assert_eq!(unlisted(None, cidr::flags::ACTIVE), Unlisted::Pass);
        assert_eq!(unlisted(None, 0), Unlisted::Pass);
    }

    proptest! {
        #[test]
        fn slot_stays_inside_its_range(base in 0u32..1 << 30, len in 1u32..1 << 20, hash: u32) {
            let i = slot_index(SlotRange::new(base, len), hash);
            prop_assert!(i >= base && i < base + len);
        }
    }

    /// 10 slots, 100,000 consecutive source ports and addresses: chi-squared with 9 degrees of freedom stays below
    /// the 99.99 % quantile (33.7).
    #[test]
    fn consecutive_clients_spread_evenly() {
        let range = SlotRange::new(0, 10);
        let mut counts = [0u32; 10];
        for i in 0..100_000u32 {
            let t = Tuple::new(
                Be32::new(0x0a00_0000 + i / 1000),
                Be16::new(30_000 + (i % 1000) as u16),
                Be32::new(0x0a60_0001),
                Be16::new(80),
                proto::TCP,
            );
            counts[slot_index(range, hash_tuple(&t, 1)) as usize] += 1;
        }
        let chi: f64 = counts.iter().map(|&c| (f64::from(c) - 10_000.0).powi(2) / 10_000.0).sum();
        assert!(chi < 33.7, "chi-squared {chi}, counts {counts:?}");
    }
}

//! `spec.loadBalancerSourceRanges`: who may use a LoadBalancer address.

use crate::{Addr, V4, V6, map_type};

/// Data of the keys of `SOURCE_RANGES4` and `SOURCE_RANGES6` (longest-prefix-match tries, asked only for frontends with
/// [`SOURCE_RANGES`](crate::frontend::flags::SOURCE_RANGES)): the ranges of all Services in one trie.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceRange<A> {
    /// Index into `SERVICES`; always matched in full.
    pub service: u32,
    pub addr: A,
}

map_type!(SourceRange<V4>, size = 8);
map_type!(SourceRange<V6>, size = 20);

impl<A: Addr> SourceRange<A> {
    /// Prefix length of a key, in bits, for a range of `bits`.
    #[inline(always)]
    pub const fn prefix_bits(bits: u32) -> u32 {
        32 + bits
    }

    /// Prefix length, in bits, of a lookup: all of the address.
    pub const LOOKUP_BITS: u32 = Self::prefix_bits(A::WORDS as u32 * 32);
}

/// The value of `SOURCE_RANGES4` and `SOURCE_RANGES6`. A range that is there admits.
pub const ADMITTED: u32 = 1;

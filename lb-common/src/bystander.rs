//! Packets that no Service has to do with, told by a bit: most of what passes a node's devices goes from pod to pod.
//!
//! Every packet that is translated where it comes in is for an address that a frontend has, or had when the flow was opened, or
//! that the node gives to flows as their source. Every packet that is translated where it leaves comes from a port that a backend
//! serves at, or did when the flow was opened. `BYSTANDERS` has a bit for each hash of an address, and one for each port: **set if nothing of ours has it**.
//! So the zeroes of a new map say that anything may be ours, and who adds something clears its bit first.
//!
//! Bits are only set where all is known that there is: when the agent starts, before its own programs run. What has gone by then,
//! and has no flow left, is a bystander from then on. Programs of the last run share the map, so who changes the hash or the lengths
//! raises `LAYOUT_VERSION`. A bit that is clear for want of knowing better, or because two addresses share
//! it, costs a look into the tables.

use crate::{Addr, Be16, flow_cache::hash_of_destination};

/// Bits for addresses of both families. With 10,000 dual-stack Services, one in fourteen other addresses shares one.
pub const ADDRESS_BITS: u32 = 1 << ADDRESS_BITS_LOG2;
const ADDRESS_BITS_LOG2: u32 = 18;
const PORT_BITS: u32 = 1 << 16;
/// Length of `BYSTANDERS`: words of 64 bits, those for addresses first.
pub const WORDS: u32 = (ADDRESS_BITS + PORT_BITS) / u64::BITS;

/// Where a bit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bit(u32);

impl Bit {
    /// Of a destination address.
    #[inline(always)]
    pub fn of_address<A: Addr>(addr: &A) -> Self {
        Self((hash_of_destination(addr) >> (u64::BITS - ADDRESS_BITS_LOG2)) as u32)
    }

    /// Of a source port.
    #[inline(always)]
    pub const fn of_port(port: Be16) -> Self {
        Self(ADDRESS_BITS + port.get() as u32)
    }

    /// Index into `BYSTANDERS`.
    #[inline(always)]
    pub const fn index(self) -> u32 {
        self.0 / u64::BITS
    }

    /// The word of `BYSTANDERS` with this bit alone.
    #[inline(always)]
    pub const fn mask(self) -> u64 {
        1 << (self.0 % u64::BITS)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::{Be32, V6};

    #[test]
    fn addresses_and_ports_do_not_share_bits_and_all_fit() {
        let last = Bit::of_port(Be16::new(u16::MAX));
        assert_eq!((last.index(), last.mask()), (WORDS - 1, 1 << 63));
        assert_eq!(Bit::of_port(Be16::new(0)).0, ADDRESS_BITS);
        for addr in [0, 1, 0x0a60_0001, u32::MAX] {
            assert!(Bit::of_address(&Be32::new(addr)).0 < ADDRESS_BITS);
            assert!(Bit::of_address(&[Be32::new(addr); 4]).0 < ADDRESS_BITS);
        }
    }

    /// 20,000 balls in 262,144 bins hit 19,256 of them on average (`bins * (1 - exp(-balls / bins))`).
    #[test]
    fn neighbouring_addresses_have_bits_of_their_own() {
        let spread =
            |bits: &mut dyn Iterator<Item = Bit>| bits.map(|bit| bit.0).collect::<HashSet<_>>().len();
        let n = 20_000;
        for used in [
            spread(&mut (0..n).map(|i| Bit::of_address(&Be32::new(0x0a60_0000 + i)))),
            spread(&mut (0..n).map(|i| Bit::of_address(&Be32::new(0x0a00_0000 + (i << 8) + 1)))),
            spread(&mut (0..n).map(|i| {
                let addr: V6 = [0xfd00_0010, 0x0096_0000, 0, i].map(Be32::new);
                Bit::of_address(&addr)
            })),
            spread(&mut (0..n).map(|i| {
                let addr: V6 = [0xfd00_0010, 0x0244_0000 + (i >> 8), 0, i & 0xff].map(Be32::new);
                Bit::of_address(&addr)
            })),
        ] {
            assert!(used > 19_100, "{used} bits for {n} addresses");
        }
    }

    /// Computed by hand (in Python): the address's words as loaded, times the sixth to ninth 64-bit words of pi's fraction, added
    /// up; `(sum ^ sum >> 29)` times the tenth; the upper 18 bits.
    #[test]
    fn bits_are_where_programs_of_the_last_run_look_for_them() {
        assert_eq!(Bit::of_address(&Be32::new(0x0a60_0001)).0, 120_330);
        let addr: V6 = [0xfd00_0010, 0x0096_0000, 0, 0xa].map(Be32::new);
        assert_eq!(Bit::of_address(&addr).0, 114_853);
    }

    #[test]
    fn every_word_of_an_address_counts() {
        let base: V6 = [0xfd00_0010, 1, 2, 3].map(Be32::new);
        for i in 0..4 {
            let mut other = base;
            other[i] = Be32::new(77);
            assert_ne!(Bit::of_address(&base), Bit::of_address(&other), "word {i}");
        }
    }
}

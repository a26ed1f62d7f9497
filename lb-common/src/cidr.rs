//! Where ClusterIPs come from: the ServiceCIDRs of the cluster (rule C7).

use crate::{Addr, V4, V6, map_type};

/// The one element of `SERVICE_CIDRS4` and of `SERVICE_CIDRS6`: all ranges, for one lookup. Every packet of other traffic
/// that opens something asks.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceCidrs<A> {
    pub ranges: [ServiceCidr<A>; CAPACITY as usize],
}

map_type!(ServiceCidrs<V4>, size = 16 * CAPACITY as usize);
map_type!(ServiceCidrs<V6>, size = 40 * CAPACITY as usize);

impl<A: Addr> ServiceCidrs<A> {
    /// [`flags`] of the first range that the address is in; 0: none.
    #[inline(always)]
    pub fn flags_of(&self, addr: &A) -> u32 {
        let mut i = 0;
        while i < self.ranges.len() {
            if self.ranges[i].contains(addr) {
                return self.ranges[i].flags;
            }
            i += 1;
        }
        0
    }
}

/// A range of ClusterIPs. The agent writes `net` and `mask` of an element that is not active,
/// then its flags; an active one is only ever switched off.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceCidr<A> {
    pub net: A,
    pub mask: A,
    /// [`flags`]; 0: unused.
    pub flags: u32,
    pub _pad: u32,
}

map_type!(ServiceCidr<V4>, size = 16);
map_type!(ServiceCidr<V6>, size = 40);

/// Bits of [`ServiceCidr::flags`].
pub mod flags {
    /// The element counts.
    pub const ACTIVE: u32 = 1 << 0;
    /// The cluster says that ClusterIPs come from here, so an address that no Service has leads nowhere. Without it the
    /// element is the smallest prefix around all known ClusterIPs: packets to other addresses need no second lookup.
    pub const DROP_UNASSIGNED: u32 = 1 << 1;
}

/// As many ServiceCIDRs of a family can be told apart.
pub const CAPACITY: u32 = 8;

impl<A: Addr> ServiceCidr<A> {
    #[inline(always)]
    pub fn contains(&self, addr: &A) -> bool {
        // First, because most are not.
        if self.flags & flags::ACTIVE == 0 {
            return false;
        }
        let mut i = 0;
        let mut differs = 0;
        while i < A::WORDS {
            differs |= (addr.word(i) ^ self.net.word(i)) & self.mask.word(i);
            i += 1;
        }
        differs == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Be32;

    #[test]
    fn contains_by_prefix_and_only_while_active() {
        let mut cidr = ServiceCidr {
            net: Be32::new(0x0a60_0000),
            mask: Be32::new(0xffff_f000),
            flags: flags::ACTIVE,
            _pad: 0,
        };
        assert!(cidr.contains(&Be32::new(0x0a60_0fff)));
        assert!(!cidr.contains(&Be32::new(0x0a60_1000)));
        cidr.flags = 0;
        assert!(!cidr.contains(&Be32::new(0x0a60_0fff)));
    }
}

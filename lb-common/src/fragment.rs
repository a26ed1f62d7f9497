//! Fragments of IP datagrams. Only the first one has ports; all have what [`FragmentKey`] holds.

use crate::{Addr, Be16, V4, V6, map_type};

/// Key of `FRAGMENTS4` and `FRAGMENTS6`: what all fragments of one datagram share (RFC 791, RFC 8200 section 4.5).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FragmentKey<A> {
    pub src: A,
    pub dst: A,
    /// Identification field as in the packet (IPv4 has 16 bits).
    pub id: u32,
    pub proto: u8,
    pub _pad: u8,
    pub _pad2: u16,
}

map_type!(FragmentKey<V4>, size = 16);
map_type!(FragmentKey<V6>, size = 40);

impl<A: Addr> FragmentKey<A> {
    #[inline(always)]
    pub const fn new(src: A, dst: A, id: u32, proto: u8) -> Self {
        Self { src, dst, id, proto, _pad: 0, _pad2: 0 }
    }
}

/// Value of `FRAGMENTS4` and `FRAGMENTS6`: the ports, which only the first fragment has.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentPorts {
    pub sport: Be16,
    pub dport: Be16,
    /// Kernel jiffies (low 32 bits) when the first fragment came.
    pub seen: u32,
}

map_type!(FragmentPorts, size = 8);

/// Key of `HELD4` and `HELD6`: a later fragment that came before the first one of its datagram.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HeldKey<A> {
    pub datagram: FragmentKey<A>,
    /// Counts the fragments of a datagram, below [`HELD_PER_DATAGRAM`].
    pub index: u32,
}

map_type!(HeldKey<V4>, size = 20);
map_type!(HeldKey<V6>, size = 44);

/// How many fragments of one datagram wait for its first one. With 1500 bytes each that is a datagram of 24 kB.
pub const HELD_PER_DATAGRAM: u32 = 16;

/// Longest frame that is held: an Ethernet header, and a little more than Ethernet's MTU.
pub const HELD_FRAME_BYTES: usize = 1536;

/// Longest first fragment that others can wait for: 9216 bytes is what jumbo frames have at most.
pub const OWN_FRAME_BYTES: usize = 9216 + 64;

/// Value of `HELD4` and `HELD6`: the whole frame.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldFrame {
    pub frame: [u8; HELD_FRAME_BYTES],
    /// Length of the frame in bytes.
    pub bytes: u32,
    /// Kernel jiffies (low 32 bits) when it came.
    pub seen: u32,
    /// The device that it came by.
    pub ifindex: u32,
}

map_type!(HeldFrame, size = HELD_FRAME_BYTES + 12);

/// Identification fields come back (RFC 4963): fragments that are further apart than this are not of one datagram. The
/// kernel itself waits 30 seconds (net.ipv4.ipfrag_time); fragments that were sent together arrive together.
pub const TOGETHER_S: u32 = 5;

/// True if something noted at `seen` may belong to the same datagram as a fragment that comes now.
#[inline(always)]
pub const fn is_together(seen: u32, now: u32, jiffies_per_s: u32) -> bool {
    now.wrapping_sub(seen) <= TOGETHER_S * jiffies_per_s
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fragments_belong_together_for_five_seconds_also_across_the_jiffies_wrap() {
        assert!(is_together(u32::MAX - 100, 399, 100));
        assert!(!is_together(u32::MAX - 100, 400, 100));
    }
}

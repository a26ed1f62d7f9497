//! The 5-tuple of a packet, which is also the key of a flow.

use crate::{Addr, Be16, V4, V6, map_type};

/// Source, destination, ports and protocol of a packet. ICMP errors are looked up by the tuple that they quote.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tuple<A> {
    pub src: A,
    pub dst: A,
    pub sport: Be16,
    pub dport: Be16,
    pub proto: u8,
    pub _pad: [u8; 3],
}

map_type!(Tuple<V4>, size = 16);
map_type!(Tuple<V6>, size = 40);

impl<A: Addr> Tuple<A> {
    #[inline(always)]
    pub const fn new(src: A, sport: Be16, dst: A, dport: Be16, proto: u8) -> Self {
        Self { src, dst, sport, dport, proto, _pad: [0; 3] }
    }

    /// The tuple of the packets that answer this one.
    #[inline(always)]
    pub const fn reversed(&self) -> Self {
        Self::new(self.dst, self.dport, self.src, self.sport, self.proto)
    }
}

/// Key of `FRAGMENTS4` and `FRAGMENTS6`: what all fragments of one datagram share (RFC 791, RFC 8200 section 4.5).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FragmentKey<A> {
    pub src: A,
    pub dst: A,
    /// Identification field as in the packet (IPv4 has 16 bits).
    pub id: u32,
    pub proto: u8,
    pub _pad: [u8; 3],
}

map_type!(FragmentKey<V4>, size = 16);
map_type!(FragmentKey<V6>, size = 40);

impl<A: Addr> FragmentKey<A> {
    #[inline(always)]
    pub const fn new(src: A, dst: A, id: u32, proto: u8) -> Self {
        Self { src, dst, id, proto, _pad: [0; 3] }
    }
}

/// Value of `FRAGMENTS4` and `FRAGMENTS6`: the ports, which only the first fragment has.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentPorts {
    pub sport: Be16,
    pub dport: Be16,
}

map_type!(FragmentPorts, size = 4);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Be32;

    proptest! {
        #[test]
        fn reversing_twice_is_identity(s: u32, d: u32, sp: u16, dp: u16, p: u8) {
            let t = Tuple::new(Be32::new(s), Be16::new(sp), Be32::new(d), Be16::new(dp), p);
            prop_assert_eq!(t.reversed().reversed(), t);
        }
    }
}

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
    // Two fields, not an array: LLVM's BPF target calls memset for three bytes.
    pub _pad: u8,
    pub _pad2: u16,
}

map_type!(Tuple<V4>, size = 16);
map_type!(Tuple<V6>, size = 40);

impl<A: Addr> Tuple<A> {
    #[inline(always)]
    pub const fn new(src: A, sport: Be16, dst: A, dport: Be16, proto: u8) -> Self {
        Self { src, dst, sport, dport, proto, _pad: 0, _pad2: 0 }
    }

    /// Source and destination, side by side as both IP headers have them.
    #[inline(always)]
    pub const fn addresses(&self) -> &[A; 2] {
        // SAFETY: repr(C) puts `src` and `dst` at the start, and A has no padding (it is Pod).
        unsafe { &*(self as *const Self).cast() }
    }

    /// As [`Self::addresses`], to be filled.
    #[inline(always)]
    pub const fn addresses_mut(&mut self) -> &mut [A; 2] {
        // SAFETY: as above; any bytes are a valid A.
        unsafe { &mut *(self as *mut Self).cast() }
    }

    /// The tuple of the packets that answer this one.
    #[inline(always)]
    pub const fn reversed(&self) -> Self {
        Self::new(self.dst, self.dport, self.src, self.sport, self.proto)
    }
}

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

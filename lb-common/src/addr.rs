//! Addresses and ports as the network carries them.

use core::fmt::Debug;

use crate::map_type;

/// A 16-bit integer in network byte order, as it sits in the packet.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Be16(u16);

/// A 32-bit integer in network byte order, as it sits in the packet.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Be32(u32);

map_type!(Be16, size = 2);
map_type!(Be32, size = 4);

impl Be16 {
    /// From a value in host order.
    #[inline(always)]
    pub const fn new(host: u16) -> Self {
        Self(host.to_be())
    }
    /// From the integer as loaded from the packet.
    #[inline(always)]
    pub const fn from_raw(raw: u16) -> Self {
        Self(raw)
    }
    /// The value in host order.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }
    /// The integer as stored in the packet.
    #[inline(always)]
    pub const fn raw(self) -> u16 {
        self.0
    }
}

impl Be32 {
    /// From a value in host order.
    #[inline(always)]
    pub const fn new(host: u32) -> Self {
        Self(host.to_be())
    }
    /// From the integer as loaded from the packet.
    #[inline(always)]
    pub const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }
    /// The value in host order.
    #[inline(always)]
    pub const fn get(self) -> u32 {
        u32::from_be(self.0)
    }
    /// The integer as stored in the packet.
    #[inline(always)]
    pub const fn raw(self) -> u32 {
        self.0
    }
}

/// An IPv4 address.
pub type V4 = Be32;
/// An IPv6 address.
pub type V6 = [Be32; 4];

/// An address of either family: all code that is the same for both is generic over it.
pub trait Addr: Copy + Eq + Debug + Default + bytemuck::Pod {
    /// True for IPv6.
    const IS_V6: bool;
    /// Number of 32-bit words.
    const WORDS: usize;
    /// The `i`-th 32-bit word as stored in the packet; 0 beyond the end.
    fn word(&self, i: usize) -> u32;
}

impl Addr for V4 {
    const IS_V6: bool = false;
    const WORDS: usize = 1;
    #[inline(always)]
    fn word(&self, i: usize) -> u32 {
        if i == 0 { self.0 } else { 0 }
    }
}

impl Addr for V6 {
    const IS_V6: bool = true;
    const WORDS: usize = 4;
    #[inline(always)]
    fn word(&self, i: usize) -> u32 {
        match self.get(i) {
            Some(w) => w.0,
            None => 0,
        }
    }
}

/// The IPv4-mapped IPv6 form `::ffff:a.b.c.d` (RFC 4291 section 2.5.5.2), used where one key serves both families.
#[inline(always)]
pub const fn v4_mapped(v4: V4) -> V6 {
    [Be32(0), Be32(0), Be32(0xffffu32.to_be()), v4]
}

/// The IPv4 address inside an IPv4-mapped one, or `None`.
#[inline(always)]
pub fn unmap_v4(v6: &V6) -> Option<V4> {
    if v6[0].0 == 0 && v6[1].0 == 0 && v6[2].0 == 0xffffu32.to_be() { Some(v6[3]) } else { None }
}

#[cfg(feature = "user")]
mod user {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use super::*;

    impl From<Ipv4Addr> for Be32 {
        fn from(a: Ipv4Addr) -> Self {
            Be32::new(u32::from(a))
        }
    }
    impl From<Be32> for Ipv4Addr {
        fn from(a: Be32) -> Self {
            Ipv4Addr::from(a.get())
        }
    }

    /// `a` as stored in a packet.
    pub fn v6(a: Ipv6Addr) -> V6 {
        bytemuck::cast(a.octets())
    }

    /// Conversion to the standard library's address, for showing.
    pub trait ToIp {
        fn to_ip(&self) -> IpAddr;
    }
    impl ToIp for V4 {
        fn to_ip(&self) -> IpAddr {
            IpAddr::V4((*self).into())
        }
    }
    impl ToIp for V6 {
        fn to_ip(&self) -> IpAddr {
            IpAddr::V6(Ipv6Addr::from(bytemuck::cast::<V6, [u8; 16]>(*self)))
        }
    }
}
#[cfg(feature = "user")]
pub use user::{ToIp, v6};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_order_is_what_the_wire_has() {
        assert_eq!(bytemuck::bytes_of(&Be16::new(80)), [0, 80]);
        assert_eq!(bytemuck::bytes_of(&Be32::new(0x0a60_0001)), [10, 96, 0, 1]);
    }

    #[test]
    fn mapped_v4_round_trips_and_nothing_else_unmaps() {
        let a = Be32::new(0x0a00_0001);
        assert_eq!(unmap_v4(&v4_mapped(a)), Some(a));
        assert_eq!(unmap_v4(&[Be32::new(0x2001_0db8), Be32(0), Be32::new(0xffff), a]), None);
    }
}

//! What the kernel programs and the agent must agree on.
//!
//! Two things live here and nowhere else: the layout of every map ([`maps`] and the type modules), and every
//! decision that both sides take or explain ([`select`], [`conntrack`], [`nat`]). All of it is plain values in,
//! values out: it runs in the kernel, in the agent and in host tests alike.
//!
//! **Byte order.** Addresses and ports are stored as they sit in the packet ([`Be32`], [`Be16`]); everything else
//! is native. **Padding** is always an explicit zeroed field, because a map key is compared byte by byte.
//! A change to any layout raises [`LAYOUT_VERSION`]; the agent never opens pins of another version.
#![cfg_attr(not(any(test, feature = "user")), no_std)]

pub mod addr;
pub mod affinity;
pub mod backend;
pub mod bystander;
pub mod checksum;
pub mod cidr;
pub mod conntrack;
pub mod crc32c;
pub mod device;
pub mod flow_cache;
pub mod fragment;
pub mod frontend;
pub mod maps;
pub mod nat;
pub mod select;
pub mod socket;
pub mod source;
pub mod tuple;
pub mod verdict;

pub use addr::{Addr, Be16, Be32, V4, V6};

/// Version of every map layout in this crate. Part of the pin path.
pub const LAYOUT_VERSION: u32 = 2;

/// IP protocol numbers (IANA assigned-numbers) that the data path knows by name.
pub mod proto {
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ICMPV6: u8 = 58;
    pub const SCTP: u8 = 132;
}

/// Declares a type that crosses the kernel border: checks its size and alignment, and makes it `Pod` for bytemuck
/// (implicit padding is ruled out by the size assertion: it must equal the sum of the fields) and for aya.
macro_rules! map_type {
    ($t:ty, size = $size:expr) => {
        const _: () = assert!(core::mem::size_of::<$t>() == $size);
        const _: () = assert!(core::mem::align_of::<$t>() <= 8);
        // SAFETY: repr(C), every field is itself a plain integer type, and the asserted size equals the sum of the
        // field sizes, so there is no implicit padding; every bit pattern is a value.
        unsafe impl bytemuck::Zeroable for $t {}
        // SAFETY: as above.
        unsafe impl bytemuck::Pod for $t {}
        #[cfg(feature = "user")]
        // SAFETY: as above.
        unsafe impl aya::Pod for $t {}
    };
}
pub(crate) use map_type;

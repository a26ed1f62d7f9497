//! Backends: the endpoints that traffic is sent to.

use crate::{Addr, Be16, V4, V6, map_type};

/// Element of the arrays `BACKENDS4` and `BACKENDS6`, indexed by backend id.
///
/// A backend is (address, port, protocol) and is shared by all Services that use it. Its address never changes while
/// any slot or flow can name the id: ids are reused only after a grace period.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend<A> {
    pub addr: A,
    pub port: Be16,
    /// [`flags`].
    pub flags: u16,
}

map_type!(Backend<V4>, size = 8);
map_type!(Backend<V6>, size = 20);

impl<A: Addr> Backend<A> {
    #[inline(always)]
    pub const fn new(addr: A, port: Be16, flags: u16) -> Self {
        Self { addr, port, flags }
    }
    #[inline(always)]
    pub const fn is_local(&self) -> bool {
        self.flags & flags::LOCAL != 0
    }
}

/// Bits of [`Backend::flags`].
pub mod flags {
    /// The id is taken.
    pub const IN_USE: u16 = 1 << 0;
    /// `endpoint.nodeName` is this node: traffic from outside needs no SNAT, its answers come back through here.
    pub const LOCAL: u16 = 1 << 1;
    /// The backend belongs to UDP, else TCP, else SCTP: for `lb-agent backends` and id recovery.
    pub const PROTO_SHIFT: u16 = 8;
}

//! What the socket hooks remember: which Service address a socket believes it speaks to.

use crate::{Be16, V6, map_type};

/// Key of `SOCKETS` (LRU): a socket and the backend that it was given. IPv4 in its mapped form.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SocketKey {
    /// `bpf_get_socket_cookie`: unique for the life of the kernel.
    pub cookie: u64,
    pub backend: V6,
    pub port: Be16,
    pub proto: u8,
    pub _pad: u8,
    pub _pad2: u32,
}

map_type!(SocketKey, size = 32);

/// Value of `SOCKETS`: the frontend that the process named.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketOrigin {
    pub frontend: V6,
    pub port: Be16,
    pub _pad: u16,
    pub _pad2: u32,
}

map_type!(SocketOrigin, size = 24);

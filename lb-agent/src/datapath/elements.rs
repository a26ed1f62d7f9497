//! Single entries of maps whose types only their pins tell. Keys and values have the map's sizes.

use std::{io, os::fd::BorrowedFd};

use super::bpf::{bpf, raw};

// enum bpf_cmd, include/uapi/linux/bpf.h.
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;

/// Flags of an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Write {
    Any = 0,
    /// Only where the key is new: EEXIST otherwise.
    New = 1,
    /// Only where the key is there: ENOENT otherwise.
    Replace = 2,
}

#[repr(C)]
struct ElementAttr {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl ElementAttr {
    fn new(map: BorrowedFd<'_>, key: &[u8], value: *const u8, flags: u64) -> Self {
        Self { map_fd: raw(map), _pad: 0, key: key.as_ptr() as u64, value: value as u64, flags }
    }
}

/// Writes one entry.
pub fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8], how: Write) -> io::Result<()> {
    bpf(BPF_MAP_UPDATE_ELEM, &mut ElementAttr::new(map, key, value.as_ptr(), how as u64)).map(drop)
}

/// Reads one entry into `value`; false if there is none.
pub fn lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    found(bpf(BPF_MAP_LOOKUP_ELEM, &mut ElementAttr::new(map, key, value.as_mut_ptr(), 0)))
}

/// Deletes one entry; false if there was none.
pub fn delete(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<bool> {
    found(bpf(BPF_MAP_DELETE_ELEM, &mut ElementAttr::new(map, key, std::ptr::null(), 0)))
}

fn found(done: io::Result<libc::c_long>) -> io::Result<bool> {
    match done {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

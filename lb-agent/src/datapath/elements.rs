//! Single entries of maps whose types only their pins tell. Keys and values have the map's sizes.

use std::{io, os::fd::BorrowedFd};

use crate::maps::sys::{Command, elem};

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

/// Writes one entry.
pub fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8], how: Write) -> io::Result<()> {
    // SAFETY: both have the map's sizes.
    unsafe { elem(map, Command::UpdateElem, key.as_ptr() as u64, value.as_ptr() as u64, how as u64) }
}

/// Reads one entry into `value`; false if there is none.
pub fn lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    // SAFETY: both have the map's sizes.
    found(unsafe { elem(map, Command::LookupElem, key.as_ptr() as u64, value.as_mut_ptr() as u64, 0) })
}

/// Deletes one entry; false if there was none.
pub fn delete(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<bool> {
    // SAFETY: the key has the map's size.
    found(unsafe { elem(map, Command::DeleteElem, key.as_ptr() as u64, 0, 0) })
}

fn found(done: io::Result<()>) -> io::Result<bool> {
    match done {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

//! The bpf(2) commands that aya does not offer (batches, a run of a pinned XDP program) or only for exclusive references
//! (single entries).

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

/// Commands of bpf(2) (`enum bpf_cmd` in linux/bpf.h).
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub(crate) enum Command {
    LookupElem = 1,
    UpdateElem = 2,
    DeleteElem = 3,
    GetNextKey = 4,
    ProgTestRun = 10,
    LookupBatch = 24,
    UpdateBatch = 26,
    DeleteBatch = 27,
}

/// The part of `union bpf_attr` for single entries.
#[repr(C)]
struct ElemAttr {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The part of `union bpf_attr` for batches.
#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// # Safety
/// Every address in `attr` must be valid for what `command` reads and writes there.
unsafe fn bpf<A>(command: Command, attr: &mut A) -> io::Result<()> {
    // SAFETY: `attr` is a live, properly sized part of bpf_attr (the kernel takes shorter ones); what it points at is
    // the caller's promise.
    let rc = unsafe {
        libc::syscall(libc::SYS_bpf, command as libc::c_long, std::ptr::from_mut(attr), size_of::<A>())
    };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Flag of [`Command::UpdateElem`]: replace only.
pub(super) const BPF_EXIST: u64 = 2;

/// A single-entry command.
///
/// # Safety
/// `key` must point at key-size bytes of the map, `value` at value-size bytes (not read or written by a deletion). For
/// [`Command::GetNextKey`], `key` may be 0 and `value` must point at key-size bytes.
pub(crate) unsafe fn elem(
    fd: BorrowedFd<'_>,
    command: Command,
    key: u64,
    value: u64,
    flags: u64,
) -> io::Result<()> {
    let mut attr = ElemAttr { map_fd: fd.as_raw_fd() as u32, _pad: 0, key, value, flags };
    // SAFETY: the caller's promise.
    unsafe { bpf(command, &mut attr) }
}

/// Where a batch command reads or writes.
pub(super) struct Batch {
    pub(super) in_batch: u64,
    pub(super) out_batch: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) count: u32,
}

/// A batch command: the number of entries done, and why it stopped. The number is only meaningful with success and with
/// errors that concern an entry.
///
/// # Safety
/// `keys` and `values` must point at `count` keys and values of the map's sizes (values not used by a deletion), the
/// two batch positions at 8 bytes or be 0.
pub(super) unsafe fn batch(fd: BorrowedFd<'_>, command: Command, b: &Batch) -> (u32, io::Result<()>) {
    let mut attr = BatchAttr {
        in_batch: b.in_batch,
        out_batch: b.out_batch,
        keys: b.keys,
        values: b.values,
        count: b.count,
        map_fd: fd.as_raw_fd() as u32,
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: the caller's promise.
    let result = unsafe { bpf(command, &mut attr) };
    (attr.count.min(b.count), result)
}

/// The part of `union bpf_attr` for BPF_PROG_TEST_RUN.
#[repr(C)]
#[derive(Default)]
struct TestRunAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
}

/// Runs a program once on `packet` and forgets what came out.
pub(super) fn run_program(fd: BorrowedFd<'_>, packet: &[u8]) -> io::Result<()> {
    let mut attr = TestRunAttr {
        prog_fd: fd.as_raw_fd() as u32,
        data_size_in: packet.len() as u32,
        data_in: packet.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: `data_in` is read for `data_size_in` bytes, nothing else is pointed at.
    unsafe { bpf(Command::ProgTestRun, &mut attr) }
}

/// ENOTSUPP, which the kernel returns for a map type without batches and the C library does not know.
const ENOTSUPP: i32 = 524;

/// True if the kernel, or a filter on system calls, does not know this batch command for this map.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(ENOTSUPP | libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP | libc::EPERM)
    )
}

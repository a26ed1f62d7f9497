//! bpf(2) calls that aya 0.14 does not offer, or not in the form needed here: links with their device or cgroup (aya hides
//! both), XDP attachment without the silent fall back to netlink (which cannot be pinned), and batches.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

// enum bpf_cmd, include/uapi/linux/bpf.h.
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;

/// Flag of BPF_LINK_CREATE for tcx (6.6): before all that is there, as no other program is named.
const BPF_F_BEFORE: u32 = 1 << 3;
/// The same: right after the link that is named by its descriptor.
const BPF_F_AFTER: u32 = 1 << 4;
const BPF_F_LINK: u32 = 1 << 13;

/// enum bpf_attach_type, as far as it is used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum AttachType {
    CgroupInet4Connect = 10,
    CgroupInet6Connect = 11,
    CgroupUdp4Sendmsg = 14,
    CgroupUdp6Sendmsg = 15,
    CgroupUdp4Recvmsg = 19,
    CgroupUdp6Recvmsg = 20,
    CgroupInet4Getpeername = 29,
    CgroupInet6Getpeername = 30,
    Xdp = 37,
    TcxIngress = 46,
    TcxEgress = 47,
}

/// XDP_FLAGS_*, include/uapi/linux/if_link.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum XdpMode {
    Generic = 1 << 1,
    Native = 1 << 2,
}

fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is one of the zero-padded repr(C) structs below, which start as the command's part of union bpf_attr
    // does; the kernel takes missing trailing fields as zero. Pointers in it are to live buffers of the stated size.
    let done = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>() as libc::c_uint)
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) }
}

fn bpf_fd<T>(command: libc::c_long, attr: &mut T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    // SAFETY: the commands that this is called for return a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

#[repr(C)]
struct ObjectAttr {
    pathname: u64,
    fd: u32,
    flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))
}

/// Pins a program, map or link.
pub fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    bpf(BPF_OBJ_PIN, &mut ObjectAttr { pathname: path.as_ptr() as u64, fd: raw(fd), flags: 0 }).map(drop)
}

/// Opens a pin. NotFound where there is none.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    bpf_fd(BPF_OBJ_GET, &mut ObjectAttr { pathname: path.as_ptr() as u64, fd: 0, flags: 0 })
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug)]
pub enum LinkTarget<'a> {
    /// tcx: in front of the programs of others.
    Tcx(u32),
    /// tcx: right after another link.
    TcxAfter(u32, BorrowedFd<'a>),
    Xdp(u32, XdpMode),
    Cgroup(BorrowedFd<'a>),
}

#[repr(C)]
#[derive(Default)]
struct LinkCreateAttr {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    _pad: u32,
    expected_revision: u64,
}

/// Attaches a program by a new link; closing the descriptor detaches it unless it has been pinned.
pub fn link_create(
    program: BorrowedFd<'_>,
    target: LinkTarget<'_>,
    attach_type: AttachType,
) -> io::Result<OwnedFd> {
    let (target, flags, relative) = match target {
        LinkTarget::Tcx(ifindex) => (ifindex, BPF_F_BEFORE, 0),
        LinkTarget::TcxAfter(ifindex, link) => (ifindex, BPF_F_AFTER | BPF_F_LINK, raw(link)),
        LinkTarget::Xdp(ifindex, mode) => (ifindex, mode as u32, 0),
        // Without flags: the kernel takes cgroup links as "multi" by itself and refuses the flag.
        LinkTarget::Cgroup(fd) => (raw(fd), 0, 0),
    };
    let (prog_fd, attach_type) = (raw(program), attach_type as u32);
    let mut attr = LinkCreateAttr { prog_fd, target, attach_type, flags, relative, ..Default::default() };
    bpf_fd(BPF_LINK_CREATE, &mut attr)
}

#[repr(C)]
struct LinkUpdateAttr {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// Puts another program behind a link: a packet sees the old one or the new one.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdateAttr { link_fd: raw(link), new_prog_fd: raw(program), flags: 0, old_prog_fd: 0 };
    bpf(BPF_LINK_UPDATE, &mut attr).map(drop)
}

#[repr(C)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The start of struct bpf_link_info.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct LinkInfo {
    /// enum bpf_link_type.
    pub kind: u32,
    pub id: u32,
    pub program_id: u32,
    _pad: u32,
    /// Depends on `kind`.
    target: [u32; 4],
}

impl LinkInfo {
    /// The device of a tcx or XDP link; 0 once the device is gone.
    pub const fn ifindex(&self) -> u32 {
        let [ifindex, ..] = self.target;
        ifindex
    }
    /// The cgroup of a cgroup link: the inode number of its directory; 0 once it is gone.
    pub const fn cgroup_id(&self) -> u64 {
        let [low, high, ..] = self.target;
        if cfg!(target_endian = "little") {
            (high as u64) << 32 | low as u64
        } else {
            (low as u64) << 32 | high as u64
        }
    }
}

/// What the kernel knows about a link.
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = LinkInfo::default();
    let mut attr = InfoAttr {
        bpf_fd: raw(link),
        info_len: size_of::<LinkInfo>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// The id of a loaded program (second field of struct bpf_prog_info).
pub fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    let mut info = [0_u32; 2];
    let mut attr = InfoAttr { bpf_fd: raw(program), info_len: 8, info: std::ptr::from_mut(&mut info) as u64 };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    let [_, id] = info;
    Ok(id)
}

#[repr(C)]
#[derive(Default)]
struct QueryAttr {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    _pad: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// Ids of the links on a device's tcx hook, first to last. The device is looked up in the caller's network namespace.
pub fn tcx_links(ifindex: u32, attach_type: AttachType) -> io::Result<Vec<u32>> {
    // The kernel allows 64 programs per hook (BPF_MPROG_MAX).
    let (mut programs, mut links) = ([0_u32; 64], [0_u32; 64]);
    let mut attr = QueryAttr {
        target: ifindex,
        attach_type: attach_type as u32,
        prog_ids: programs.as_mut_ptr() as u64,
        prog_cnt: 64,
        link_ids: links.as_mut_ptr() as u64,
        ..Default::default()
    };
    bpf(BPF_PROG_QUERY, &mut attr)?;
    Ok(links.into_iter().take(attr.prog_cnt as usize).collect())
}

#[repr(C)]
#[derive(Default)]
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

/// Entries moved by one system call.
pub const CHUNK: usize = 4096;

/// Sizes of one entry as bpf(2) transfers it (`value`: all CPUs of a per-CPU map).
#[derive(Clone, Copy, Debug)]
pub struct EntrySize {
    pub key: usize,
    pub value: usize,
}

/// Entries read from a map: keys and values, each packed one after the other.
#[derive(Debug, Default)]
pub struct Batch {
    pub keys: Vec<u8>,
    pub values: Vec<u8>,
    pub count: usize,
}

/// Reads a map in batches.
#[derive(Debug)]
pub struct BatchReader<'a> {
    map: BorrowedFd<'a>,
    size: EntrySize,
    /// Where the kernel is: for hash maps a u32, for others a key; no key here is longer.
    position: Option<[u8; 64]>,
    done: bool,
}

impl<'a> BatchReader<'a> {
    pub const fn new(map: BorrowedFd<'a>, size: EntrySize) -> Self {
        Self { map, size, position: None, done: false }
    }

    /// The next up to `count` entries; `None` at the end.
    pub fn next(&mut self, count: usize) -> io::Result<Option<Batch>> {
        let mut count = count;
        while !self.done {
            let mut batch = Batch {
                keys: vec![0; count * self.size.key],
                values: vec![0; count * self.size.value],
                count: 0,
            };
            let mut next = [0_u8; 64];
            let mut attr = BatchAttr {
                in_batch: self.position.as_mut().map_or(0, |p| p.as_mut_ptr() as u64),
                out_batch: next.as_mut_ptr() as u64,
                keys: batch.keys.as_mut_ptr() as u64,
                values: batch.values.as_mut_ptr() as u64,
                count: count as u32,
                map_fd: raw(self.map),
                ..Default::default()
            };
            match bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) {
                Ok(_) => {}
                // The end; `count` is valid.
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => self.done = true,
                // One bucket of the hash does not fit: try again with more room.
                Err(e) if e.raw_os_error() == Some(libc::ENOSPC) && count < 1 << 20 => {
                    count *= 2;
                    continue;
                }
                Err(e) => return Err(e),
            }
            self.position = Some(next);
            batch.count = attr.count as usize;
            batch.keys.truncate(batch.count * self.size.key);
            batch.values.truncate(batch.count * self.size.value);
            if batch.count > 0 {
                return Ok(Some(batch));
            }
        }
        Ok(None)
    }
}

/// Writes the first `limit` entries; the number written comes with the error that stopped it, if one did.
pub fn update_batch(map: BorrowedFd<'_>, batch: &mut Batch, limit: usize) -> (usize, io::Result<()>) {
    let mut attr = BatchAttr {
        keys: batch.keys.as_mut_ptr() as u64,
        values: batch.values.as_mut_ptr() as u64,
        count: batch.count.min(limit) as u32,
        map_fd: raw(map),
        ..Default::default()
    };
    match bpf(BPF_MAP_UPDATE_BATCH, &mut attr) {
        Ok(_) => (attr.count as usize, Ok(())),
        Err(e) => (attr.count as usize, Err(e)),
    }
}

/// Takes the program off now. Dropping the last reference does so as well, but only after some RCU grace periods.
fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut link_fd = raw(link);
    bpf(BPF_LINK_DETACH, &mut link_fd).map(drop)
}

/// The same; one that is detached already, for want of the device or cgroup, is fine.
pub fn detach(link: &PinnedLink) -> io::Result<()> {
    match link_detach(link.fd.as_fd()) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOLINK | libc::ENODEV | libc::EINVAL)) => Ok(()),
        done => done,
    }
}

/// Detaches a pinned link and removes the pin; true if there was one.
pub fn remove_link(pin: &Path) -> io::Result<bool> {
    let Some(link) = PinnedLink::open(pin)? else { return Ok(false) };
    detach(&link)?;
    std::fs::remove_file(pin)?;
    Ok(true)
}

/// A link that is kept by a pin.
#[derive(Debug)]
pub struct PinnedLink {
    pub fd: OwnedFd,
    pub info: LinkInfo,
}

impl PinnedLink {
    /// Opens it; `None` where there is no pin.
    pub fn open(path: &Path) -> io::Result<Option<Self>> {
        match open_pin(path) {
            Ok(fd) => {
                let info = link_info(fd.as_fd())?;
                Ok(Some(Self { fd, info }))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }
}

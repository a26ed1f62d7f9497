//! bpf(2) for programs that exist only here: assembled by hand, so that aya, which loads ELF files, cannot load them.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, process::CommandExt as _},
    },
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::insn::Insn;

// enum bpf_cmd, include/uapi/linux/bpf.h.
const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;

/// enum bpf_map_type, as far as it is used here.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum MapType {
    Array = 2,
    ProgArray = 3,
    PerCpuArray = 6,
}

/// enum bpf_prog_type, as far as it is used here, with the attach type that aya loads such programs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgType {
    SchedCls,
    Xdp,
}

impl ProgType {
    const fn numbers(self) -> (u32, u32) {
        match self {
            Self::SchedCls => (3, 0),
            // BPF_XDP
            Self::Xdp => (6, 37),
        }
    }
}

fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<i32> {
    // SAFETY: `attr` is one of the repr(C) structs below, which start as the command's part of union bpf_attr does; the
    // kernel takes missing trailing fields as zero. Pointers in it are to live buffers of the stated size.
    let done = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>() as libc::c_uint)
    };
    match i32::try_from(done) {
        Ok(done) if done >= 0 => Ok(done),
        _ => Err(io::Error::last_os_error()),
    }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn address<T>(of: &[T]) -> u64 {
    of.as_ptr() as u64
}

/// A map with keys of four bytes.
pub fn map(kind: MapType, value_bytes: u32, entries: u32) -> Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        kind: u32,
        key_bytes: u32,
        value_bytes: u32,
        entries: u32,
    }
    let mut attr = Attr { kind: kind as u32, key_bytes: 4, value_bytes, entries };
    Ok(owned(bpf(BPF_MAP_CREATE, &mut attr).with_context(|| format!("BPF_MAP_CREATE {kind:?}"))?))
}

#[repr(C)]
struct Element {
    map: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

fn element<K>(command: libc::c_long, map: BorrowedFd, key: &K, value: u64) -> io::Result<i32> {
    let key = std::ptr::from_ref(key) as u64;
    let mut attr = Element { map: map.as_raw_fd() as u32, _pad: 0, key, value, flags: 0 };
    bpf(command, &mut attr)
}

/// Writes an element; `T` is the map's value.
pub fn update<T: bytemuck::Pod>(map: impl AsFd, key: u32, value: T) -> Result<()> {
    let value = [value];
    element(BPF_MAP_UPDATE_ELEM, map.as_fd(), &key, address(&value)).context("BPF_MAP_UPDATE_ELEM")?;
    Ok(())
}

/// Puts a program into a program array.
pub fn update_fd(map: impl AsFd, key: u32, program: BorrowedFd) -> Result<()> {
    update(map, key, program.as_raw_fd() as u32)
}

/// Reads an element of a map with these types; not of a per-CPU map.
pub fn lookup<K: bytemuck::Pod, V: bytemuck::Pod>(map: impl AsFd, key: K) -> io::Result<V> {
    let mut value = [V::zeroed()];
    element(BPF_MAP_LOOKUP_ELEM, map.as_fd(), &key, value.as_mut_ptr() as u64)?;
    Ok(value[0])
}

/// An element of an array, as bytes; of a per-CPU array, the values of all CPUs.
pub fn value(map: impl AsFd, key: u32, bytes: usize) -> Result<Vec<u8>> {
    let mut value = vec![0u8; bytes.next_multiple_of(8)];
    element(BPF_MAP_LOOKUP_ELEM, map.as_fd(), &key, value.as_mut_ptr() as u64)
        .context("BPF_MAP_LOOKUP_ELEM")?;
    value.truncate(bytes);
    Ok(value)
}

/// Writes the first value of an array, which is as long as `value` and a multiple of eight bytes.
pub fn set_value(map: impl AsFd, value: &[u8]) -> Result<()> {
    element(BPF_MAP_UPDATE_ELEM, map.as_fd(), &0u32, address(value)).context("BPF_MAP_UPDATE_ELEM")?;
    Ok(())
}

/// A pinned map.
pub fn pinned(path: &Path) -> Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = Attr { path: name.as_ptr() as u64, fd: 0, flags: 0 };
    Ok(owned(bpf(BPF_OBJ_GET, &mut attr).with_context(|| format!("BPF_OBJ_GET {}", path.display()))?))
}

/// Loads a program.
pub fn load(kind: ProgType, code: &[Insn]) -> Result<OwnedFd> {
    #[repr(C)]
    #[derive(Default)]
    struct Attr {
        kind: u32,
        insns: u32,
        code: u64,
        license: u64,
        log_level: u32,
        log_bytes: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        ifindex: u32,
        attach_type: u32,
    }
    let license = c"GPL".to_bytes_with_nul();
    let mut log = vec![0u8; 1 << 20];
    let (kind_number, attach_type) = kind.numbers();
    let mut attr = Attr {
        kind: kind_number,
        insns: u32::try_from(code.len())?,
        code: address(code),
        license: address(license),
        attach_type,
        ..Attr::default()
    };
    if let Ok(fd) = bpf(BPF_PROG_LOAD, &mut attr) {
        return Ok(owned(fd));
    }
    // Again, with the verifier's words: they cost time, so only when there is something to say.
    (attr.log_level, attr.log_bytes, attr.log) = (1, u32::try_from(log.len())?, log.as_mut_ptr() as u64);
    match bpf(BPF_PROG_LOAD, &mut attr) {
        Ok(fd) => Ok(owned(fd)),
        Err(error) => {
            let text = String::from_utf8_lossy(&log);
            let lines: Vec<_> = text.trim_end_matches('\0').lines().collect();
            bail!("BPF_PROG_LOAD: {error}\n{}", lines[lines.len().saturating_sub(30)..].join("\n"))
        }
    }
}

/// What `BPF_PROG_TEST_RUN` says: of the last run, but for the time, which is the mean of all.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub frame: Vec<u8>,
    pub ns: f64,
}

/// The part of union bpf_attr for BPF_PROG_TEST_RUN.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    program: u32,
    code: u32,
    bytes_in: u32,
    bytes_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_bytes_in: u32,
    context_bytes_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch: u32,
    _pad: u32,
}

/// Runs a program `repeat` times on one frame that came in by a device.
pub fn test_run(program: impl AsFd, kind: ProgType, frame: &[u8], ifindex: u32, repeat: u32) -> Result<Ran> {
    let mut out = vec![0u8; frame.len() + 256];
    let context: Vec<u32> = match kind {
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        ProgType::Xdp => vec![0, u32::try_from(frame.len())?, 0, ifindex, 0, 0],
        // struct __sk_buff: ifindex is the eleventh word.
        ProgType::SchedCls => {
            let mut words = vec![0; 48];
            words[10] = ifindex;
            words
        }
    };
    let mut attr = TestRun {
        program: program.as_fd().as_raw_fd() as u32,
        bytes_in: u32::try_from(frame.len())?,
        bytes_out: u32::try_from(out.len())?,
        data_in: address(frame),
        data_out: out.as_mut_ptr() as u64,
        repeat,
        context_bytes_in: u32::try_from(context.len() * 4)?,
        context_in: address(&context),
        ..TestRun::default()
    };
    bpf(BPF_PROG_TEST_RUN, &mut attr).context("BPF_PROG_TEST_RUN")?;
    out.truncate(attr.bytes_out as usize);
    Ok(Ran { code: attr.code as i32, frame: out, ns: f64::from(attr.duration) })
}

/// Attaches an XDP program to a device of the caller's network namespace, in the driver; until the link is dropped.
pub fn attach_xdp(program: BorrowedFd, ifindex: u32) -> Result<OwnedFd> {
    const BPF_XDP: u32 = 37;
    const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
    attach(program, ifindex, BPF_XDP, XDP_FLAGS_DRV_MODE)
}

/// Attaches a classifier to what comes in by a device of the caller's network namespace (Linux 6.6).
pub fn attach_tcx(program: BorrowedFd, ifindex: u32) -> Result<OwnedFd> {
    const BPF_TCX_INGRESS: u32 = 46;
    attach(program, ifindex, BPF_TCX_INGRESS, 0)
}

/// The same for what leaves.
pub fn attach_tcx_egress(program: BorrowedFd, ifindex: u32) -> Result<OwnedFd> {
    const BPF_TCX_EGRESS: u32 = 47;
    attach(program, ifindex, BPF_TCX_EGRESS, 0)
}

/// `kind`: enum bpf_attach_type.
fn attach(program: BorrowedFd, ifindex: u32, kind: u32, flags: u32) -> Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        program: u32,
        ifindex: u32,
        attach_type: u32,
        flags: u32,
        /// Of tcx: relative to no other program.
        rest: [u32; 4],
    }
    let program = program.as_raw_fd() as u32;
    let mut attr = Attr { program, ifindex, attach_type: kind, flags, rest: [0; 4] };
    Ok(owned(bpf(BPF_LINK_CREATE, &mut attr).context("BPF_LINK_CREATE")?))
}

/// Puts another program into a link.
pub fn replace(link: &OwnedFd, program: BorrowedFd) -> Result<()> {
    #[repr(C)]
    struct Attr {
        link: u32,
        program: u32,
        flags: u32,
        old: u32,
    }
    let mut attr =
        Attr { link: link.as_raw_fd() as u32, program: program.as_raw_fd() as u32, flags: 0, old: 0 };
    bpf(BPF_LINK_UPDATE, &mut attr).context("BPF_LINK_UPDATE")?;
    Ok(())
}

/// Runs an XDP program `repeat` times on a frame, and does with the frames what it says, after so many of them at once (0: as
/// many as the kernel likes).
pub fn live_run(program: BorrowedFd, frame: &[u8], repeat: u32, batch: u32) -> Result<()> {
    const BPF_F_TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;
    let mut attr = TestRun {
        program: program.as_raw_fd() as u32,
        bytes_in: u32::try_from(frame.len())?,
        data_in: address(frame),
        repeat,
        flags: BPF_F_TEST_XDP_LIVE_FRAMES,
        batch,
        ..TestRun::default()
    };
    bpf(BPF_PROG_TEST_RUN, &mut attr).context("BPF_PROG_TEST_RUN with live frames")?;
    Ok(())
}

/// Gives the calling thread namespaces of its own: `with` the flags of these, and one of mounts, which end with it and with what it
/// starts.
pub fn own_namespaces(with: libc::c_int) -> Result<()> {
    // SAFETY: changes the calling thread only; the strings end with a NUL.
    let done = unsafe {
        libc::unshare(with | libc::CLONE_NEWNS) == 0
            && libc::mount(
                c"none".as_ptr(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            ) == 0
    };
    ensure!(done, "cannot make namespaces: {} (needs root)", io::Error::last_os_error());
    Ok(())
}

/// Has the kernel kill a process when the thread that starts it ends.
pub fn ends_with_thread(command: &mut Command) {
    // SAFETY: prctl is async-signal-safe.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
}

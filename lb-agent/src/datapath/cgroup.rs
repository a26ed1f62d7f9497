//! The socket hooks: eight programs on one cgroup directory, each behind a link of its own, pinned under its name.

use std::{
    fs::{self, File},
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use lb_common::maps::program;
use tracing::info;

use super::{
    Error,
    bpf::{self, AttachType, LinkTarget, PinnedLink},
    load::Programs,
    state_dir::{StateDir, fs_magic},
};

/// f_type of a cgroup v2 mount (CGROUP2_SUPER_MAGIC).
const CGROUP2_MAGIC: u32 = 0x6367_7270;
const REMEDY: &str = "name a cgroup v2 directory with --cgroup-root, or use --socket-lb off";

const HOOKS: [(&str, AttachType); 8] = [
    (program::CONNECT4, AttachType::CgroupInet4Connect),
    (program::CONNECT6, AttachType::CgroupInet6Connect),
    (program::SENDMSG4, AttachType::CgroupUdp4Sendmsg),
    (program::SENDMSG6, AttachType::CgroupUdp6Sendmsg),
    (program::RECVMSG4, AttachType::CgroupUdp4Recvmsg),
    (program::RECVMSG6, AttachType::CgroupUdp6Recvmsg),
    (program::GETPEERNAME4, AttachType::CgroupInet4Getpeername),
    (program::GETPEERNAME6, AttachType::CgroupInet6Getpeername),
];

/// Attaches all hooks to `root` (or to the root of the mounted hierarchy), or takes over those that are there.
/// Returns the directory.
pub fn attach(root: Option<&Path>, programs: &Programs, state: &StateDir) -> Result<PathBuf, Error> {
    let root = match root {
        Some(named) => named.to_owned(),
        None => find_mount().ok_or(Error::NoCgroup)?,
    };
    let fail = |source| Error::Cgroup { path: root.clone(), remedy: REMEDY, source };
    if fs_magic(&root).map_err(fail)? != CGROUP2_MAGIC {
        return Err(fail(std::io::Error::other("it is not on a cgroup v2 file system")));
    }
    let directory = File::open(&root).map_err(fail)?;
    // A cgroup's id is the inode number of its directory (kernfs, 64-bit systems).
    let id = directory.metadata().map_err(fail)?.ino();
    // Answers must be translated before requests are, or the first ones would show the backend.
    for (name, attach_type) in HOOKS.into_iter().rev() {
        let program = programs.fd(name)?;
        let path = state.links().join(name);
        let fail = |source| Error::Attach { program: name, target: root.display().to_string(), source };
        if let Some(link) = PinnedLink::open(&path).map_err(fail)? {
            if link.info.cgroup_id() == id && bpf::link_update(link.fd.as_fd(), program).is_ok() {
                continue;
            }
            info!(program = name, cgroup = %root.display(), "socket hook moves to another cgroup");
            bpf::remove_link(&path).map_err(fail)?;
        }
        let target = LinkTarget::Cgroup(directory.as_fd());
        let link = bpf::link_create(program, target, attach_type).map_err(fail)?;
        bpf::pin(link.as_fd(), &path).map_err(fail)?;
    }
    Ok(root)
}

/// Takes all hooks away.
pub fn detach(state: &StateDir) -> Result<(), Error> {
    for (name, _) in HOOKS {
        let path = state.links().join(name);
        bpf::remove_link(&path).map_err(|source| Error::Pin { path, action: "BPF_LINK_DETACH", source })?;
    }
    Ok(())
}

/// The first cgroup v2 mount that shows the hierarchy from its root, else the first at all.
fn find_mount() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mut partial = None;
    for line in mounts.lines() {
        // 30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw (proc_pid_mountinfo(5))
        let Some((place, source)) = line.split_once(" - ") else { continue };
        if source.split(' ').next() != Some("cgroup2") {
            continue;
        }
        let mut fields = place.split(' ').skip(3);
        let (Some(root), Some(mount)) = (fields.next(), fields.next()) else { continue };
        if root == "/" {
            return Some(PathBuf::from(mount));
        }
        partial.get_or_insert_with(|| PathBuf::from(mount));
    }
    partial
}

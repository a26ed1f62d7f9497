//! Places: where a process runs, that is a network namespace, a cgroup and the addresses it has there.

use std::{
    env,
    fs::{self, File, OpenOptions},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use crate::netns::Netns;

/// An IP family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];
}

/// One address of each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

impl Pair {
    /// From text; for constants of the test bed.
    ///
    /// # Panics
    /// If either is not an address.
    pub fn new(v4: &str, v6: &str) -> Self {
        Self { v4: v4.parse().expect("an IPv4 address"), v6: v6.parse().expect("an IPv6 address") }
    }

    pub const fn ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => IpAddr::V4(self.v4),
            Family::V6 => IpAddr::V6(self.v6),
        }
    }

    pub const fn socket(&self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(family), port)
    }

    pub fn has(&self, ip: IpAddr) -> bool {
        ip == self.v4 || ip == self.v6
    }
}

/// A machine or pod of the test bed.
#[derive(Clone, Debug)]
pub struct Place {
    /// For people: `client`, `node1`, `pod-1a`.
    pub name: String,
    pub netns: Netns,
    /// Its cgroup v2 directory: socket hooks go by the cgroup of a process.
    pub cgroup: PathBuf,
    pub addrs: Pair,
}

impl Place {
    /// A command that will run here: moved into namespace and cgroup between fork and exec.
    pub fn command(&self, program: &Path) -> anyhow::Result<Command> {
        let netns = self.netns.open()?;
        let procs = self.cgroup.join("cgroup.procs");
        let cgroup = OpenOptions::new()
            .write(true)
            .open(&procs)
            .with_context(|| format!("cannot open {}", procs.display()))?;
        let mut command = Command::new(program);
        // SAFETY: between fork and exec only setns, write and the address of errno are used, all async-signal-safe; the
        // files are owned by the closure.
        unsafe { command.pre_exec(move || move_here(&netns, &cgroup)) };
        Ok(command)
    }
}

fn move_here(netns: &File, cgroup: &File) -> io::Result<()> {
    // SAFETY: both calls take open file descriptors; "0" (the writer itself) is one readable byte.
    let done = unsafe {
        libc::write(cgroup.as_raw_fd(), c"0".as_ptr().cast(), 1) == 1
            && libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A program that was built along with this one: in the same directory, or one up from `deps`.
pub fn sibling(program: &str) -> anyhow::Result<PathBuf> {
    let me = env::current_exe().context("cannot tell where this program is")?;
    let found = me.ancestors().skip(1).take(2).map(|dir| dir.join(program)).find(|p| p.is_file());
    match found {
        Some(path) => Ok(path),
        None => bail!("{program} is not built: `cargo xtask test` and `cargo xtask demo` build it"),
    }
}

/// Where cgroup v2 is mounted.
pub fn cgroup_mount() -> anyhow::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    mounts
        .lines()
        .map(|l| l.split(' ').collect::<Vec<_>>())
        .find(|f| f.get(2) == Some(&"cgroup2"))
        .and_then(|f| f.get(1).map(PathBuf::from))
        .context("cgroup v2 is not mounted")
}

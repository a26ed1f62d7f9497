//! What can go wrong in the data path's set-up, each with what was tried on what.

use std::{io, path::PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("kernel {found} is too old: {missing} (Linux 6.1 or newer is needed)")]
    KernelTooOld { found: String, missing: &'static str },
    #[error("this needs root, or at least CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON: {what} was refused")]
    NotPermitted {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(
        "there is no memory for map {map} with {entries} entries, which is allocated as a whole: lower {option}, or raise the limit \
         of the cgroup: {source}"
    )]
    NoMemory { map: String, entries: u32, option: &'static str, source: io::Error },
    #[error("state directory {path} cannot be used: {action} failed: {source}; {remedy}")]
    StateDir { path: PathBuf, action: &'static str, remedy: &'static str, source: io::Error },
    #[error(
        "state directory {0} is in use by another lb-agent; stop it, or give this one its own --state-dir"
    )]
    StateDirInUse(PathBuf),
    #[error("pin {path}: {action} failed: {source}")]
    Pin { path: PathBuf, action: &'static str, source: io::Error },
    #[error("the kernel object cannot be read")]
    Object(#[from] aya_obj::ParseError),
    #[error("the kernel object lacks the program {0}")]
    MissingProgram(&'static str),
    #[error("the log of the kernel programs cannot be read (--trace-flows)")]
    Trace(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the kernel object cannot be loaded: {0}")]
    Load(#[from] aya::EbpfError),
    #[error("the kernel's verifier refuses {program}: {tail}")]
    Verifier {
        program: &'static str,
        /// The last lines of the verifier's log.
        tail: String,
        #[source]
        source: io::Error,
    },
    #[error("program {program} cannot be loaded")]
    Program {
        program: &'static str,
        #[source]
        source: aya::programs::ProgramError,
    },
    #[error("map {map} cannot be copied to its new size: {source}")]
    Migrate { map: String, source: io::Error },
    #[error("flows cannot be moved to another table")]
    Clock(#[from] crate::maps::ClockError),
    #[error("flows cannot be moved to another table")]
    Map(#[from] crate::maps::MapError),
    #[error("cgroup directory {path} cannot be used for the socket hooks: {source}; {remedy}")]
    Cgroup { path: PathBuf, remedy: &'static str, source: io::Error },
    #[error(
        "no cgroup v2 hierarchy is mounted; mount one, name it with --cgroup-root, or use --socket-lb off"
    )]
    NoCgroup,
    #[error("{program} cannot be attached to {target}: {source}")]
    Attach { program: &'static str, target: String, source: io::Error },
    #[error("netlink: {what}: {source}")]
    Netlink { what: &'static str, source: io::Error },
    #[error("device list: {0}")]
    Devices(#[from] rtnetlink::Error),
    #[error("DEVICES entry of {device} cannot be written: {source}")]
    Sink { device: String, source: super::DeviceSinkError },
    #[error("the number of CPUs cannot be read from /sys/devices/system/cpu/possible: {0}")]
    PossibleCpus(io::Error),
    #[error("the cookie of this network namespace cannot be read: {0}")]
    NetnsCookie(io::Error),
}

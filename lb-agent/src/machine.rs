//! The node: its processors, pages and memory, and the defaults that follow them.

use std::{fs, path::Path};

use lb_common::maps::capacity;

/// Flows that fit by default: see [`capacity::flows`].
pub(crate) fn flows(cgroup2: Option<&Path>) -> u32 {
    capacity::flows(online_cpus(), memory_bytes(cgroup2))
}

/// Processors that run.
pub(crate) fn online_cpus() -> u32 {
    // SAFETY: no pointers.
    u32::try_from(unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }).unwrap_or(1)
}

/// Bytes of a page.
pub(crate) fn page_bytes() -> u32 {
    // SAFETY: no pointers.
    u32::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096).max(4096)
}

/// Memory that this process may use: all there is, or what its cgroup may, which maps count for as well. What cannot be read
/// sets no limit.
fn memory_bytes(cgroup2: Option<&Path>) -> u64 {
    let total = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_total(&text));
    let limit = cgroup2.and_then(|mount| {
        let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
        fs::read_to_string(mount.join(group(&groups)?).join("memory.max")).ok()?.trim().parse().ok()
    });
    total.unwrap_or(u64::MAX).min(limit.unwrap_or(u64::MAX))
}

/// MemTotal of /proc/meminfo, in bytes.
fn mem_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The path of a process in the unified hierarchy, from /proc/PID/cgroup (cgroups(7)).
fn group(cgroups: &str) -> Option<&str> {
    cgroups.lines().find_map(|line| line.strip_prefix("0::/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_understood() {
        assert_eq!(mem_total("MemTotal:       24620108 kB\nMemFree:   1 kB\n"), Some(24_620_108 * 1024));
        assert_eq!(mem_total("MemFree:   1 kB\n"), None);
        assert_eq!(group("12:cpu:/x\n0::/kubepods/pod1\n"), Some("kubepods/pod1"));
        assert_eq!(group("0::/\n"), Some(""));
        assert_eq!(group("12:cpu:/x\n"), None);
    }

    #[test]
    fn a_limit_of_the_cgroup_counts() {
        let mount = tempfile::tempdir().unwrap();
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap();
        let Some(own) = group(&groups) else { return };
        fs::create_dir_all(mount.path().join(own)).unwrap();
        let limit = |text| fs::write(mount.path().join(own).join("memory.max"), text).unwrap();
        limit("max\n");
        let all = memory_bytes(Some(mount.path()));
        assert_eq!(all, memory_bytes(None));
        limit("134217728\n");
        assert_eq!(memory_bytes(Some(mount.path())), 128 << 20);
    }
}

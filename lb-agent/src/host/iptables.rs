//! The FORWARD policy of legacy iptables, for nodes whose tools still use it.

use std::{
    fs, io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use super::netfilter::{Chain, Family};

// include/uapi/linux/netfilter_ipv4/ip_tables.h; the IPv6 numbers are the same.
const SO_GET_INFO: i32 = 64;
const SO_GET_ENTRIES: i32 = 65;
const NF_INET_FORWARD: usize = 2;
/// How a policy of DROP is written: -NF_DROP - 1.
const VERDICT_DROP: i32 = -1;
/// Size of struct xt_entry_target before the verdict.
const TARGET_HEADER: usize = 32;
/// More than any real rule set, to bound the copy.
const MAX_TABLE: u32 = 64 << 20;

/// struct ipt_getinfo.
#[repr(C)]
struct Info {
    name: [u8; 32],
    valid_hooks: u32,
    hook_entry: [u32; 5],
    underflow: [u32; 5],
    num_entries: u32,
    size: u32,
}

/// Asks the kernel. Only about tables that exist: a question would create others.
pub fn dropping_forward_chains() -> io::Result<Vec<Chain>> {
    let mut found = Vec::new();
    // Offset of `target_offset` in struct ipt_entry and struct ip6t_entry: after struct ipt_ip (84 bytes) or struct
    // ip6t_ip6 (136), and a word.
    let families = [
        (Family::Ip, "/proc/thread-self/net/ip_tables_names", libc::AF_INET, libc::IPPROTO_IP, 88),
        (Family::Ip6, "/proc/thread-self/net/ip6_tables_names", libc::AF_INET6, libc::IPPROTO_IPV6, 140),
    ];
    for (family, names, domain, level, target_offset) in families {
        let has_filter = fs::read_to_string(names).is_ok_and(|list| list.lines().any(|l| l == "filter"));
        if has_filter && forward_drops(domain, level, target_offset)? {
            found.push(Chain { family, table: "filter".into(), name: "FORWARD".into(), legacy: true });
        }
    }
    Ok(found)
}

fn forward_drops(domain: i32, level: i32, target_offset: usize) -> io::Result<bool> {
    let fail =
        |e: io::Error| io::Error::new(e.kind(), format!("reading the legacy iptables filter table: {e}"));
    // SAFETY: plain call; the result is checked before use.
    let raw = unsafe { libc::socket(domain, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW) };
    if raw < 0 {
        return Err(fail(io::Error::last_os_error()));
    }
    // SAFETY: a new descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    let mut name = [0_u8; 32];
    name[..6].copy_from_slice(b"filter");
    let mut info =
        Info { name, valid_hooks: 0, hook_entry: [0; 5], underflow: [0; 5], num_entries: 0, size: 0 };
    let size = size_of::<Info>();
    // SAFETY: `info` is as large as stated.
    unsafe { option(&socket, level, SO_GET_INFO, std::ptr::from_mut(&mut info).cast(), size) }
        .map_err(fail)?;
    if info.size > MAX_TABLE {
        return Ok(false);
    }
    // struct ipt_get_entries: name, size, padding to 8, entries.
    let mut entries = vec![0_u8; 40 + info.size as usize];
    entries[..32].copy_from_slice(&name);
    entries[32..36].copy_from_slice(&info.size.to_ne_bytes());
    let size = entries.len();
    // SAFETY: `entries` is as large as stated.
    match unsafe { option(&socket, level, SO_GET_ENTRIES, entries.as_mut_ptr().cast(), size) } {
        Ok(()) => {}
        // The table has changed since; the next check will see it.
        Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => return Ok(false),
        Err(e) => return Err(fail(e)),
    }
    let table = entries.get(40..).unwrap_or_default();
    let underflow = info.underflow.get(NF_INET_FORWARD).copied().unwrap_or_default() as usize;
    Ok(policy(table, underflow, target_offset) == Some(VERDICT_DROP))
}

/// The verdict of the rule at `underflow`, which is the chain's policy.
fn policy(table: &[u8], underflow: usize, target_offset: usize) -> Option<i32> {
    let rule = table.get(underflow..)?;
    let target = u16::from_ne_bytes(*rule.get(target_offset..)?.first_chunk()?) as usize;
    Some(i32::from_ne_bytes(*rule.get(target + TARGET_HEADER..)?.first_chunk()?))
}

/// # Safety
/// `value` points to `size` bytes that may be written.
unsafe fn option(
    socket: &OwnedFd,
    level: i32,
    name: i32,
    value: *mut libc::c_void,
    size: usize,
) -> io::Result<()> {
    let mut size = size as libc::socklen_t;
    // SAFETY: the caller vouches for `value` and `size`.
    let done = unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, value, &mut size) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

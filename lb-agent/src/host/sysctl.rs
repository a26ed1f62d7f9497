//! Kernel settings below /proc/sys. Those of the network are the ones of the calling thread's network namespace.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    path::PathBuf,
};

fn file(path: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(path)
}

fn with_path(path: &str) -> impl Fn(io::Error) -> io::Error + '_ {
    move |error| io::Error::new(error.kind(), format!("/proc/sys/{path}: {error}"))
}

/// The value of a setting that must exist.
pub fn read(path: &str) -> io::Result<String> {
    fs::read_to_string(file(path)).map(|value| value.trim().to_owned()).map_err(with_path(path))
}

/// The value of a list of ports.
///
/// By one call with a large buffer: the kernel gives what fits, and then says that this was all
/// (`proc_do_large_bitmap`). `fs::read_to_string` starts with 32 bytes.
pub fn read_ports(path: &str) -> io::Result<String> {
    /// All 65,536 ports as numbers, with commas.
    const LONGEST: usize = 65_536 * 6;
    let mut buffer = vec![0; LONGEST];
    let length = File::open(file(path)).and_then(|mut f| f.read(&mut buffer)).map_err(with_path(path))?;
    Ok(String::from_utf8_lossy(&buffer[..length]).trim().to_owned())
}

/// `None` where there is no such setting (a device that is gone, no IPv6).
pub fn read_optional(path: &str) -> io::Result<Option<String>> {
    match read(path) {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

pub fn write(path: &str, value: &str) -> io::Result<()> {
    fs::write(file(path), value)
}

/// Names in a directory of settings.
pub fn list(path: &str) -> io::Result<Vec<String>> {
    fs::read_dir(file(path))
        .map_err(with_path(path))?
        .map(|entry| entry.map(|e| e.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// As sysctl(8) writes it. A device's own dots force the form with slashes.
pub fn name(path: &str) -> String {
    if path.contains('.') { path.to_owned() } else { path.replace('/', ".") }
}

/// The command that sets it.
pub fn command(path: &str, value: &str) -> String {
    format!("sysctl -w {}={value}", name(path))
}

/// True if a list of ports such as `8080,9000-9010` holds all of `first..=last`.
pub fn covers(list: &str, first: u16, last: u16) -> bool {
    let mut ranges: Vec<(u16, u16)> = list
        .split(',')
        .filter_map(|part| {
            let (from, to) = part.trim().split_once('-').unwrap_or((part.trim(), part.trim()));
            Some((from.parse().ok()?, to.parse().ok()?))
        })
        .collect();
    ranges.sort_unstable();
    let mut missing = u32::from(first);
    for (from, to) in ranges {
        if u32::from(from) <= missing {
            missing = missing.max(u32::from(to) + 1);
        }
    }
    missing > u32::from(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_sysctl() {
        assert_eq!(name("net/ipv4/ip_forward"), "net.ipv4.ip_forward");
        assert_eq!(
            command("net/ipv4/conf/eth0.7/forwarding", "1"),
            "sysctl -w net/ipv4/conf/eth0.7/forwarding=1"
        );
    }

    #[test]
    fn reserved_ports_cover_a_range_together() {
        assert!(covers("10-20", 10, 20));
        assert!(covers("15-20,10-14", 10, 20));
        assert!(covers("1-65535", 1, 65535));
        assert!(covers("7,8", 7, 8));
        assert!(!covers("10-13,15-20", 10, 20));
        assert!(!covers("", 10, 20));
        assert!(!covers("10-19", 10, 20));
    }
}

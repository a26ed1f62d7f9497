//! How many files this process may have open: each health check server needs one per address.

use std::io;

/// Raises the soft limit to the hard one, as Go's runtime does for kube-proxy. Container runtimes give a soft limit of 1024 (for
/// programs that use select(2), of which this is none), which a few hundred Services use up.
pub fn raise() {
    if let Err(error) = try_raise() {
        tracing::warn!(%error, "cannot raise the limit of open files: with many Services, health checks may lack sockets");
    }
}

fn try_raise() -> io::Result<()> {
    let mut limit = get()?;
    if limit.rlim_cur < limit.rlim_max {
        limit.rlim_cur = limit.rlim_max;
        set(&limit)?;
    }
    Ok(())
}

fn get() -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes to `limit`, which is valid and of the right type.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } {
        0 => Ok(limit),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set(limit: &libc::rlimit) -> io::Result<()> {
    // SAFETY: reads `limit`, which is valid and of the right type.
    match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, limit) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h4_the_limit_of_sockets_is_the_hard_one() {
        let before = get().unwrap();
        // One less takes nothing from the tests beside this one.
        set(&libc::rlimit { rlim_cur: before.rlim_max - 1, ..before }).unwrap();
        raise();
        assert_eq!(get().unwrap().rlim_cur, before.rlim_max);
    }
}

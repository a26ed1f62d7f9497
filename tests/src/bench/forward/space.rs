//! Network namespaces without a name, which end with whoever holds them: nothing is left behind by a run that breaks off.

use std::{
    fs::{self, File},
    io::Write as _,
    os::fd::AsRawFd as _,
    process::{Command, Stdio},
    sync::Arc,
    thread,
};

use anyhow::{Context as _, Result, anyhow, ensure};

/// A network namespace.
#[derive(Clone, Debug)]
pub struct Space {
    file: Arc<File>,
}

impl Space {
    /// Makes one, with its loopback up.
    pub fn new() -> Result<Self> {
        let make = || -> Result<File> {
            // SAFETY: changes the calling thread only.
            let code = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            ensure!(code == 0, "unshare(CLONE_NEWNET): {} (needs root)", std::io::Error::last_os_error());
            Ok(File::open("/proc/thread-self/ns/net")?)
        };
        let made = thread::scope(|scope| scope.spawn(make).join());
        let file = made.map_err(|_| anyhow!("no thread for a namespace"))??;
        let space = Self { file: Arc::new(file) };
        space.ip(&["link set lo up"])?;
        Ok(space)
    }

    /// Moves the calling thread there.
    pub fn enter(&self) -> Result<()> {
        // SAFETY: setns takes a descriptor, open for as long as `self` lives, and touches no memory.
        let code = unsafe { libc::setns(self.file.as_raw_fd(), libc::CLONE_NEWNET) };
        ensure!(code == 0, "setns: {}", std::io::Error::last_os_error());
        Ok(())
    }

    /// Runs `f` there, on a thread of its own.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.enter()?;
                f()
            });
            inside.join().map_err(|_| anyhow!("the thread in a namespace panicked"))?
        })
    }

    /// What `ip` takes for the name of the namespace, while this process lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Runs a command there with `input`; its output.
    pub fn command(&self, words: &[&str], input: &str) -> Result<String> {
        self.run(|| {
            let (first, rest) = words.split_first().context("no command")?;
            let mut child = Command::new(first)
                .args(rest)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .with_context(|| format!("cannot run {first}"))?;
            child.stdin.take().context("no stdin")?.write_all(input.as_bytes())?;
            let out = child.wait_with_output()?;
            let complaint = String::from_utf8_lossy(&out.stderr);
            ensure!(out.status.success(), "{words:?} on\n{input}failed: {complaint}");
            Ok(String::from_utf8_lossy(&out.stdout).into_owned())
        })
    }

    /// Carries out lines of `ip` commands (each without the leading `ip`), in order.
    pub fn ip<S: AsRef<str>>(&self, lines: &[S]) -> Result<()> {
        let script: String = lines.iter().map(|l| format!("{}\n", l.as_ref())).collect();
        self.command(&["ip", "-batch", "-"], &script).map(|_| ())
    }

    /// Writes sysctls; names below /proc/sys/net with slashes.
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.run(|| {
            for (name, value) in settings {
                fs::write(format!("/proc/sys/net/{name}"), value)
                    .with_context(|| format!("cannot set {name}={value}"))?;
            }
            Ok(())
        })
    }

    pub fn ifindex(&self, device: &str) -> Result<u32> {
        let name = std::ffi::CString::new(device)?;
        self.run(|| {
            // SAFETY: a valid C string.
            match unsafe { libc::if_nametoindex(name.as_ptr()) } {
                0 => Err(std::io::Error::last_os_error()).with_context(|| format!("no device {device}")),
                index => Ok(index),
            }
        })
    }
}

//! Network namespaces: named, entered by threads, configured with `ip -batch`.

use std::{
    fs::{self, File},
    io::Write as _,
    os::fd::AsRawFd as _,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context as _, anyhow, bail};

/// A network namespace, named under /run/netns. Deleting it is the janitor's job.
#[derive(Clone, Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes the namespace, with its loopback up.
    pub fn create(name: &str) -> anyhow::Result<Self> {
        succeed(Command::new("ip").args(["netns", "add", name]))?;
        let ns = Self { name: name.to_owned() };
        ns.ip(&["link set lo up"])?;
        Ok(ns)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The namespace as a file, for setns(2).
    pub fn open(&self) -> anyhow::Result<File> {
        let path = PathBuf::from("/run/netns").join(&self.name);
        File::open(&path).with_context(|| format!("cannot open {}", path.display()))
    }

    /// Runs `f` in this namespace, on a thread of its own. The thread keeps the file systems of the process: unlike
    /// with `ip netns exec`, /sys/fs/bpf and cgroups stay in sight.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        let ns = self.open()?;
        thread::scope(|scope| {
            let inside = scope.spawn(move || -> anyhow::Result<T> {
                enter(&ns).with_context(|| format!("cannot enter namespace {}", self.name))?;
                Ok(f())
            });
            inside.join().map_err(|_| anyhow!("the thread in namespace {} panicked", self.name))?
        })
    }

    /// Carries out lines of `ip` commands (each without the leading `ip`), in order; the first failure ends it.
    pub fn ip<S: AsRef<str>>(&self, lines: &[S]) -> anyhow::Result<()> {
        let script = lines.iter().map(|l| format!("{}\n", l.as_ref())).collect::<String>();
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run `ip`")?;
        child.stdin.take().context("no stdin")?.write_all(script.as_bytes())?;
        let out = child.wait_with_output()?;
        if !out.status.success() {
            bail!(
                "`ip -n {} -batch` on\n{script}failed: {}",
                self.name,
                String::from_utf8_lossy(&out.stderr)
            );
        }
        Ok(())
    }

    /// Runs a command line (split at blanks) in this namespace and gives what it printed.
    pub fn exec(&self, line: &str) -> anyhow::Result<String> {
        let mut words = line.split_whitespace();
        let mut command = Command::new(words.next().context("empty command")?);
        command.args(words);
        self.run(move || succeed(&mut command))?
    }

    /// Writes sysctls; names below /proc/sys/net with slashes.
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> anyhow::Result<()> {
        self.run(|| {
            for (name, value) in settings {
                fs::write(format!("/proc/sys/net/{name}"), value)
                    .with_context(|| format!("cannot set {name}={value} in {}", self.name))?;
            }
            Ok(())
        })?
    }
}

/// Moves the calling thread into a namespace.
pub(crate) fn enter(ns: &File) -> std::io::Result<()> {
    // SAFETY: setns takes a file descriptor, open for as long as `ns` lives, and touches no memory.
    match unsafe { libc::setns(ns.as_raw_fd(), libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Runs a command and gives what it printed; what it complained about becomes the error.
pub fn succeed(command: &mut Command) -> anyhow::Result<String> {
    let out = command.output().with_context(|| format!("cannot run {command:?}"))?;
    if !out.status.success() {
        bail!("{command:?} failed ({}): {}", out.status, String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

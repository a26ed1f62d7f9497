//! Takes a test bed down: a process of its own that waits for the end of its input, which comes when the maker asks
//! for it and just as well when the maker panicked, was interrupted or was killed.

use std::{
    ffi::CString,
    fs,
    io::{BufRead as _, Write as _},
    os::unix::{ffi::OsStrExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use crate::{
    netns::succeed,
    place::sibling,
    traffic::task::{Task, argument},
    wait_for,
};

/// Something to remove. Told to the janitor before it is made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Thing {
    Netns(String),
    /// A cgroup directory, its children, and every process in them.
    Cgroup(PathBuf),
    /// A directory, with what is mounted below it.
    Dir(PathBuf),
}

/// The maker's end.
pub struct Janitor {
    child: Child,
}

impl Janitor {
    /// Starts the janitor.
    pub fn start() -> anyhow::Result<Self> {
        let mut command = Command::new(sibling("netproc")?);
        // A process group of its own: an interrupt from the terminal goes to the maker alone.
        command.arg(argument(&Task::Janitor)?).stdin(Stdio::piped()).process_group(0);
        Ok(Self { child: command.spawn().context("cannot start the janitor")? })
    }

    /// Entrusts a thing to the janitor.
    pub fn will_remove(&mut self, thing: &Thing) -> anyhow::Result<()> {
        let stdin = self.child.stdin.as_mut().context("the janitor is gone")?;
        let line = serde_json::to_string(thing)?;
        writeln!(stdin, "{line}").context("the janitor does not listen")
    }

    /// Has everything removed, and waits for that.
    pub fn finish(&mut self) -> anyhow::Result<()> {
        drop(self.child.stdin.take());
        let status = self.child.wait()?;
        if !status.success() {
            bail!("the janitor could not remove everything ({status})");
        }
        Ok(())
    }
}

/// The janitor's own end: waits, then removes. Processes first, since they hold the rest.
pub fn run() -> anyhow::Result<()> {
    let lines = std::io::stdin().lock().lines().map_while(Result::ok);
    let things: Vec<Thing> = lines.filter_map(|l| serde_json::from_str(&l).ok()).collect();
    let rank = |t: &Thing| matches!(t, Thing::Cgroup(_));
    let (first, then): (Vec<_>, Vec<_>) = things.into_iter().partition(rank);
    let mut failures = 0;
    for thing in first.iter().chain(&then) {
        if let Err(e) = remove(thing) {
            eprintln!("janitor: {e:#}");
            failures += 1;
        }
    }
    if failures > 0 {
        bail!("{failures} things are left behind");
    }
    Ok(())
}

fn remove(thing: &Thing) -> anyhow::Result<()> {
    match thing {
        Thing::Cgroup(dir) => remove_cgroup(dir),
        Thing::Netns(name) if !Path::new("/run/netns").join(name).exists() => Ok(()),
        Thing::Netns(name) => succeed(Command::new("ip").args(["netns", "delete", name])).map(|_| ()),
        Thing::Dir(dir) => remove_dir(dir),
    }
}

/// Kills what runs in the cgroup (`cgroup.kill`, Linux 5.14) and removes the directories, children first.
fn remove_cgroup(dir: &Path) -> anyhow::Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    fs::write(dir.join("cgroup.kill"), "1").with_context(|| format!("cannot kill {}", dir.display()))?;
    // Processes leave a cgroup some time after the signal.
    wait_for(&format!("{} to be empty", dir.display()), Duration::from_secs(10), || {
        remove_cgroup_dirs(dir);
        !dir.exists()
    })
}

fn remove_cgroup_dirs(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroup_dirs(&entry.path());
        }
    }
    // Fails while a process is in it: the caller tries again.
    fs::remove_dir(dir).ok();
}

fn remove_dir(dir: &Path) -> anyhow::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    let below =
        mounts.lines().filter_map(|l| l.split(' ').nth(1)).map(Path::new).filter(|p| p.starts_with(dir));
    for point in below {
        let path = CString::new(point.as_os_str().as_bytes())?;
        // SAFETY: `path` is a string with a terminator that lives across the call.
        if unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) } != 0 {
            return Err(std::io::Error::last_os_error())
                .with_context(|| format!("cannot unmount {}", point.display()));
        }
    }
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    Ok(())
}

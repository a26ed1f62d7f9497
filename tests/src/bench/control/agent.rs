//! The agent as a process of its own, and what it has written into its maps.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use lb_common::{
    Be16, LAYOUT_VERSION, V4,
    backend::Backend,
    frontend::{FrontendKey, FrontendValue, ServiceRecord},
    maps::name,
    proto,
};

use crate::bench::sys;

/// Cold starts take seconds; on a busy machine and in a debug build many of them.
const READY_WITHIN: Duration = Duration::from_secs(120);
/// Where it answers health checks.
const HEALTH: ([u8; 4], u16) = ([127, 0, 0, 1], 10256);

/// A running agent; killed when dropped.
pub struct Agent {
    child: Child,
    dir: PathBuf,
    pub started: Instant,
}

impl Agent {
    /// Starts it in the namespaces of the calling thread, which the agent does not outlive.
    pub fn start(program: &Path, dir: &Path, server: SocketAddr, node: &str) -> Result<Self> {
        Self::start_with(program, dir, server, node, &["--external-device=ext0"])
    }

    /// The same with other options.
    pub fn start_with(
        program: &Path,
        dir: &Path,
        server: SocketAddr,
        node: &str,
        options: &[&str],
    ) -> Result<Self> {
        let log = File::create(dir.join("log"))?;
        let mut command = Command::new(program);
        command
            .arg("run")
            .arg(format!("--master=http://{server}"))
            .arg(format!("--hostname-override={node}"))
            .arg("--socket-lb=off")
            .args(options)
            .arg(format!("--state-dir={}", dir.join("bpf").display()))
            .env("KUBECONFIG", dir.join("none"))
            .env("HOME", dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        sys::ends_with_thread(&mut command);
        let started = Instant::now();
        let child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Self { child, dir: dir.to_owned(), started })
    }

    /// Waits until everything listed is programmed; gives the time since the start.
    pub fn ready(&mut self) -> Result<Duration> {
        while !is_ready() {
            if let Some(status) = self.child.try_wait()? {
                bail!("the agent ended: {status}\n{}", self.log());
            }
            if self.started.elapsed() > READY_WITHIN {
                bail!("the agent is not ready after {READY_WITHIN:?}\n{}", self.log());
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(self.started.elapsed())
    }

    pub fn log(&self) -> String {
        let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Time on a processor so far, of all threads, those that have ended included.
    pub fn cpu(&self) -> Result<Duration> {
        let mut clock = 0;
        // SAFETY: writes the one integer.
        let code = unsafe { libc::clock_getcpuclockid(self.child.id().cast_signed(), &raw mut clock) };
        ensure!(code == 0, "no processor clock: {}", io::Error::from_raw_os_error(code));
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writes the one struct.
        let code = unsafe { libc::clock_gettime(clock, &raw mut time) };
        ensure!(code == 0, "the processor clock cannot be read: {}", io::Error::last_os_error());
        Ok(Duration::new(time.tv_sec.cast_unsigned(), u32::try_from(time.tv_nsec)?))
    }

    /// Resident memory, in bytes: now, the heap's and stacks' part of it, and at most.
    pub fn memory(&self) -> Result<[u64; 3]> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let kb = |key: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(key));
            line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok())
        };
        let bytes = |key: &'static str| kb(key).map(|kb| kb * 1024).context(key);
        Ok([bytes("VmRSS:")?, bytes("RssAnon:")?, bytes("VmHWM:")?])
    }

    pub fn maps(&self) -> Result<Maps> {
        let dir = self.dir.join(format!("bpf/v{LAYOUT_VERSION}/maps"));
        let map = |name: &str| sys::pinned(&dir.join(name));
        Ok(Maps {
            frontends: map(name::FRONTENDS4)?,
            services: map(name::SERVICES)?,
            slots: map(name::SLOTS)?,
            backends: map(name::BACKENDS4)?,
            others: vec![map(name::FRONTENDS6)?, map(name::BACKENDS6)?],
        })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn is_ready() -> bool {
    let answer = || -> io::Result<String> {
        let mut stream = TcpStream::connect(SocketAddr::from(HEALTH))?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    answer().is_ok_and(|text| text.starts_with("HTTP/1.1 200"))
}

/// The pinned maps of frontends and backends.
pub struct Maps {
    frontends: OwnedFd,
    services: OwnedFd,
    slots: OwnedFd,
    backends: OwnedFd,
    others: Vec<OwnedFd>,
}

impl Maps {
    /// The record that a ClusterIP names.
    pub fn record(&self, ip: Ipv4Addr) -> io::Result<u32> {
        let key = FrontendKey::<V4>::new(ip.into(), Be16::new(80), proto::TCP);
        sys::lookup::<_, FrontendValue>(&self.frontends, key).map(|value| value.service)
    }

    /// The endpoints that new connections get.
    pub fn endpoints(&self, record: u32) -> io::Result<Vec<Ipv4Addr>> {
        let range = sys::lookup::<_, ServiceRecord>(&self.services, record)?.cluster;
        let slots = range.base()..range.base() + range.len();
        let address = |slot| {
            let id: u32 = sys::lookup(&self.slots, slot)?;
            sys::lookup::<_, Backend<V4>>(&self.backends, id).map(|b| b.addr.into())
        };
        slots.map(address).collect()
    }

    /// Memory of the maps of both families, in bytes, as the kernel accounts it.
    pub fn memory(&self) -> Result<u64> {
        let fds = [&self.frontends, &self.services, &self.slots, &self.backends].into_iter();
        let mut bytes = 0;
        for fd in fds.chain(&self.others) {
            let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
            let line = info.lines().find_map(|l| l.strip_prefix("memlock:")).context("memlock")?;
            bytes += line.trim().parse::<u64>()?;
        }
        Ok(bytes)
    }
}

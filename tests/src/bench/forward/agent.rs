//! The node under test that counts: with the agent in it, which has everything from a server that lists and watches.

use std::{
    collections::HashMap,
    fs,
    net::IpAddr,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    sync::mpsc::{self, Sender},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use lb_common::{LAYOUT_VERSION, maps::name, verdict::Counter};
use tempfile::TempDir;

use super::{
    Node,
    cast::service_address,
    chain::Chain,
    objects::{self, ENDPOINTS, NODE},
    run::pin,
    space::Space,
    stream,
};
use crate::bench::{
    control::{
        agent::{Agent, Maps},
        server::{NODES, SERVICES, SLICES, Server},
    },
    sys,
};

/// The agent and its server leave the first CPU to the packets, where there is another.
const CPU: usize = 1;

/// An agent at work in a namespace, and what it is told by.
pub struct Agents {
    pub hook: Hook,
    server: Server,
    counters: OwnedFd,
    maps: Maps,
    /// What the agent needs to live: a thread, which ends when this is dropped.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
    /// Programs that let frames into the stack where the agent has none: a veth takes redirected frames only so.
    _doors: Vec<OwnedFd>,
    // Last: removed when the agent and its mounts are gone.
    dir: TempDir,
}

/// Which programs see the frames first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Xdp,
    Tc,
}

/// A node with an agent that knows `services` Services.
pub fn node(program: &Path, lanes: u8, services: u32, hook: Hook) -> Result<Node<Agents>> {
    Node::new(lanes, |chain| Agents::start(program, chain, services, hook))
}

impl Agents {
    fn start(program: &Path, chain: &Chain, services: u32, hook: Hook) -> Result<Self> {
        let dir = tempfile::tempdir().context("cannot make a directory")?;
        let (stop, stopped) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let (space, program, path) = (chain.node.clone(), program.to_owned(), dir.path().to_owned());
        let thread = thread::spawn(move || match serve(&space, &program, &path, services, hook) {
            Ok((agent, server, counters, maps)) => {
                tell.send(Ok((server, counters, maps))).ok();
                stopped.recv().ok();
                drop(agent);
            }
            Err(e) => drop(tell.send(Err(e))),
        });
        let (server, counters, maps) = told.recv().context("the agent's thread ended")??;
        // The kernel tells nobody of XDP programs that come by links: with the next event of the device the agent sees its own,
        // and sends by XDP what is to leave by it.
        for device in 0..2 * chain.lanes.len() {
            chain.node.ip(&[format!("link set d{device} alias bench")])?;
        }
        let mut doors = Vec::new();
        if hook == Hook::Tc {
            let pass = stream::verdict(stream::XDP_PASS)?;
            for pair in chain.lanes.iter().flat_map(|l| [l.client, l.server]) {
                doors.push(chain.attach(pair.node, pass.as_fd())?);
            }
        }
        Ok(Self { hook, server, counters, maps, stop: Some(stop), thread: Some(thread), _doors: doors, dir })
    }

    /// What the data path has counted so far.
    pub fn count(&self, counter: Counter) -> Result<u64> {
        let cpus = aya::util::nr_cpus().map_err(|(file, e)| anyhow!("{file}: {e}"))?;
        let bytes = sys::value(&self.counters, counter as u32, cpus * 8)?;
        Ok(bytes.chunks_exact(8).map(|c| c.try_into().map_or(0, u64::from_ne_bytes)).sum())
    }

    /// All counters that are not zero, for error messages.
    pub fn counts(&self) -> String {
        let all = Counter::ALL.iter().filter_map(|(c, name)| match self.count(*c) {
            Ok(0) | Err(_) => None,
            Ok(n) => Some(format!("{name}={n}")),
        });
        all.collect::<Vec<_>>().join(" ")
    }

    /// Sends changes of EndpointSlices, as lines of a watch.
    pub fn change(&self, lines: &str) -> Result<()> {
        self.server.send(SLICES, lines)
    }

    /// The IPv4 endpoints of a Service's TCP port, in order.
    pub fn endpoints(&self, service: u32) -> Result<Vec<IpAddr>> {
        let IpAddr::V4(ip) = service_address(service, false) else { bail!("not an IPv4 address") };
        let record = self.maps.record(ip)?;
        let mut found: Vec<_> = self.maps.endpoints(record)?.into_iter().map(IpAddr::V4).collect();
        found.sort_unstable();
        Ok(found)
    }

    /// The last lines that the agent logged.
    pub fn log(&self) -> String {
        let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

/// Starts server and agent in the namespace, and waits until the agent has programmed everything.
fn serve(
    space: &Space,
    program: &Path,
    dir: &Path,
    services: u32,
    hook: Hook,
) -> Result<(Agent, Server, OwnedFd, Maps)> {
    pin(CPU);
    space.enter()?;
    own_mounts()?;
    let all: Vec<u32> = (0..ENDPOINTS).collect();
    let slices = (0..services).flat_map(|s| [(s, false), (s, true)]);
    let server = Server::start(HashMap::from([
        (SERVICES, (0..services).map(|s| objects::service(s).to_string()).collect()),
        (SLICES, slices.map(|(s, is_v6)| objects::slice(s, is_v6, &all, 1).to_string()).collect()),
        (NODES, vec![objects::node().to_string()]),
    ]))?;
    let xdp = if hook == Hook::Xdp { "--xdp=native" } else { "--xdp=off" };
    let options = ["--external-device=d*", xdp];
    let mut agent = Agent::start_with(program, dir, server.address, NODE, &options)?;
    agent.ready()?;
    let counters = sys::pinned(&dir.join(format!("bpf/v{LAYOUT_VERSION}/maps")).join(name::COUNTERS))?;
    crate::wait_for("the agent to watch EndpointSlices", Duration::from_secs(30), || {
        server.is_watched(SLICES)
    })?;
    let maps = agent.maps()?;
    Ok((agent, server, counters, maps))
}

/// Mounts that end with this thread and the agent.
fn own_mounts() -> Result<()> {
    // SAFETY: changes the calling thread only; the strings end with a NUL.
    let done = unsafe {
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(
                c"none".as_ptr(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            ) == 0
    };
    ensure!(done, "cannot have mounts of its own: {}", std::io::Error::last_os_error());
    Ok(())
}

impl Drop for Agents {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

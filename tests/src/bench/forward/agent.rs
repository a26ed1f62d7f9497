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

use anyhow::{Context as _, Result, anyhow, bail};
use lb_common::{
    LAYOUT_VERSION,
    frontend::{ServiceStats, stats_index},
    maps::{capacity, name},
    verdict::Counter,
};
use tempfile::TempDir;

use super::{
    Node,
    cast::service_address,
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
    stats: OwnedFd,
    maps: Maps,
    /// What the agent needs to live: a thread, which ends when this is dropped.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
    /// Programs that let frames into the stack where the agent has none: a veth takes redirected frames only so.
    doors: Vec<OwnedFd>,
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
    let all: Vec<u32> = (0..ENDPOINTS).collect();
    let slices = (0..services).flat_map(|s| [(s, false), (s, true)]);
    let told = Told {
        services: (0..services).map(|s| objects::service(s).to_string()).collect(),
        slices: slices.map(|(s, is_v6)| objects::slice(s, is_v6, &all, 1).to_string()).collect(),
        options: vec![
            "--external-device=d*".into(),
            if hook == Hook::Xdp { "--xdp=native" } else { "--xdp=off" }.into(),
        ],
    };
    Node::new(lanes, |chain| {
        let mut agents = Agents::start(program, Some(chain.node.clone()), hook, told)?;
        if hook == Hook::Tc {
            let pass = stream::verdict(stream::XDP_PASS)?;
            for pair in chain.lanes.iter().flat_map(|l| [l.client, l.server]) {
                agents.doors.push(chain.attach(pair.node, pass.as_fd())?);
            }
        }
        Ok(agents)
    })
}

/// What an agent is started with: objects as text, and options.
pub struct Told {
    pub services: Vec<String>,
    pub slices: Vec<String>,
    pub options: Vec<String>,
}

impl Agents {
    /// Starts one in a namespace, or where the caller is, and waits until it has programmed everything.
    pub fn start(program: &Path, space: Option<Space>, hook: Hook, told: Told) -> Result<Self> {
        let dir = tempfile::tempdir().context("cannot make a directory")?;
        let (stop, stopped) = mpsc::channel();
        let (tell, ready) = mpsc::channel();
        let (program, path) = (program.to_owned(), dir.path().to_owned());
        let thread = thread::spawn(move || match serve(space.as_ref(), &program, &path, told) {
            Ok((agent, running)) => {
                tell.send(Ok(running)).ok();
                stopped.recv().ok();
                drop(agent);
            }
            Err(e) => drop(tell.send(Err(e))),
        });
        let Running { server, counters, stats, maps } =
            ready.recv().context("the agent's thread ended")??;
        let (stop, thread) = (Some(stop), Some(thread));
        Ok(Self { hook, server, counters, stats, maps, stop, thread, doors: Vec::new(), dir })
    }

    /// Packets of the first Services that XDP has translated so far.
    pub fn xdp_packets(&self, services: u32) -> Result<u64> {
        let mut sum = 0;
        for service in 0..services {
            for cpu in 0..cpus()? as u32 {
                // The agent runs with the default size.
                let index = stats_index(cpu, capacity::SERVICES, service);
                let stats = sys::value(&self.stats, index, size_of::<ServiceStats>())?;
                let stats: &ServiceStats =
                    bytemuck::try_from_bytes(&stats).map_err(|e| anyhow!("statistics of a Service: {e}"))?;
                sum += stats.xdp_packets;
            }
        }
        Ok(sum)
    }

    /// What the data path has counted so far.
    pub fn count(&self, counter: Counter) -> Result<u64> {
        let bytes = sys::value(&self.counters, counter as u32, cpus()? * 8)?;
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
    pub fn change(&self, lines: &str) {
        self.server.send(SLICES, lines);
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

/// CPUs that per-CPU maps have values for.
pub fn cpus() -> Result<usize> {
    aya::util::nr_cpus().map_err(|(file, e)| anyhow!("{file}: {e}"))
}

/// What is left to others when the agent runs.
struct Running {
    server: Server,
    counters: OwnedFd,
    stats: OwnedFd,
    maps: Maps,
}

/// Starts server and agent, and waits until the agent has programmed everything.
fn serve(space: Option<&Space>, program: &Path, dir: &Path, told: Told) -> Result<(Agent, Running)> {
    pin(CPU);
    if let Some(space) = space {
        space.enter()?;
    }
    sys::own_namespaces(0)?;
    let server = Server::start(HashMap::from([
        (SERVICES, told.services),
        (SLICES, told.slices),
        (NODES, vec![objects::node().to_string()]),
    ]))?;
    let options: Vec<&str> = told.options.iter().map(String::as_str).collect();
    let mut agent = Agent::start_with(program, dir, server.address, NODE, &options)?;
    agent.ready()?;
    let map = |name: &str| sys::pinned(&dir.join(format!("bpf/v{LAYOUT_VERSION}/maps")).join(name));
    let (counters, stats, maps) = (map(name::COUNTERS)?, map(name::SERVICE_STATS)?, agent.maps()?);
    crate::wait_for("the agent to watch EndpointSlices", Duration::from_secs(30), || {
        server.is_watched(SLICES)
    })?;
    Ok((agent, Running { server, counters, stats, maps }))
}

impl Drop for Agents {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

//! C1 to C5: the agent against a server that lists and watches, in namespaces of their own.

pub mod agent;
pub mod objects;
pub mod probe;
pub mod server;

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use self::{
    agent::{Agent, Maps},
    objects::{NODE, cluster_ip, endpoint, newcomer},
    probe::Prober,
    server::{LIST_VERSION, NODES, SERVICES, SLICES, Server},
};
use super::{Effort, measure, report::Row, sys};
use crate::{lab::ip, place::sibling};

/// A change that is not seen by then will not be.
const SEEN_WITHIN: Duration = Duration::from_secs(30);
/// Less than what is measured by far, and leaves the processor to the agent.
const LOOK_EVERY: Duration = Duration::from_micros(50);

/// What there is no baseline of in the table.
const KUBE_PROXY: &str = "kube-proxy v1.36.2 is not run here";

struct Size {
    services: u32,
    endpoints: u32,
    changes: u32,
    burst: u32,
    /// Changes that are looked for with packets.
    probes: u32,
    idle: Duration,
}

const fn size(effort: Effort) -> Size {
    let (services, endpoints) = (10_000, 10);
    match effort {
        Effort::Full => Size {
            services,
            endpoints,
            changes: 1_000,
            burst: 1_000,
            probes: 200,
            idle: Duration::from_secs(10),
        },
        Effort::Short => {
            Size { services, endpoints, changes: 100, burst: 1_000, probes: 50, idle: Duration::from_secs(2) }
        }
        Effort::Small => Size {
            services: 20,
            endpoints: 3,
            changes: 5,
            burst: 10,
            probes: 3,
            idle: Duration::from_millis(50),
        },
    }
}

/// In a thread of its own: it changes its namespaces.
pub fn run(effort: Effort, agent: Option<PathBuf>) -> Result<Vec<Row>> {
    let program = agent.map_or_else(|| sibling("lb-agent"), Ok)?;
    match thread::spawn(move || measure_all(&size(effort), &program)).join() {
        Ok(rows) => rows,
        Err(_) => bail!("the thread of the control plane's benchmark panicked"),
    }
}

/// Network and mounts that end with this thread and the agent.
fn enter_namespaces() -> Result<()> {
    sys::own_namespaces(libc::CLONE_NEWNET)?;
    ip("link set lo up")?;
    ip("link add ext0 type veth peer name ext0p")?;
    ip("addr add 192.0.2.1/24 dev ext0")?;
    ip("link set ext0p up")?;
    ip("link set ext0 up")
}

/// The agent, the server that it listens to, and what it is to know.
struct Bed {
    agent: Agent,
    server: Server,
    maps: Maps,
    endpoints: Vec<Vec<Ipv4Addr>>,
    version: u64,
    newcomers: u32,
}

fn measure_all(size: &Size, program: &Path) -> Result<Vec<Row>> {
    enter_namespaces()?;
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let (mut bed, cold) = start(size, program, dir.path())?;
    let cold_cpu = bed.agent.cpu()?;
    for s in 0..size.services {
        ensure!(bed.is_programmed(s)?, "Service {s} is not as listed when the agent is ready");
    }
    let shape = format!("{} x {}", size.services, size.endpoints);
    let release = if program.components().any(|c| c.as_os_str() == "release") { "" } else { "debug build" };
    let row = |id, what: &str, unit, value: f64| {
        let row = Row::value(id, format!("{what}, {shape}"), unit, value);
        if release.is_empty() { row } else { row.noted(release) }
    };
    let mb = |bytes: u64| bytes as f64 / 1e6;
    let [rss, heap, peak] = bed.agent.memory()?;
    let mut rows = vec![
        row("C1", "cold start until everything is programmed", "s", cold.as_secs_f64())
            .at_most(1.5)
            .noted(KUBE_PROXY),
        row("C4", "resident memory after the cold start", "MB", mb(rss)).at_most(50.0),
        row("C4", "of it heap and stacks, without program text and mapped maps", "MB", mb(heap)),
        row("C4", "resident memory at most", "MB", mb(peak)),
        row(
            "C4",
            "maps of frontends, Services, slots and backends, both families",
            "MB",
            mb(bed.maps.memory()?),
        )
        .at_most(16.0),
        row("C5", "CPU of the cold start", "s", cold_cpu.as_secs_f64()).at_most(1.0),
    ];
    rows.extend(changes(&mut bed, size, &row)?);
    rows.extend(burst(&mut bed, size, &row)?);
    rows.push(idle(&bed, size, &row)?);
    rows.push(first_packets(&mut bed, size, &row)?);
    for s in 0..size.services {
        ensure!(bed.is_programmed(s)?, "Service {s} is not as the server says after all changes");
    }
    Ok(rows)
}

/// Serves the objects and starts the agent; gives the time until it has programmed all of them.
fn start(size: &Size, program: &Path, dir: &Path) -> Result<(Bed, Duration)> {
    let endpoints: Vec<Vec<Ipv4Addr>> = (0..size.services)
        .map(|s| (0..size.endpoints).map(|i| endpoint(s, i, size.endpoints)).collect())
        .collect();
    let text = |n: &dyn Fn(u32) -> serde_json::Value| (0..size.services).map(|s| n(s).to_string()).collect();
    let server = Server::start(HashMap::from([
        (SERVICES, text(&objects::service)),
        (SLICES, text(&|s| objects::slice(s, &endpoints[s as usize], 1))),
        (NODES, vec![objects::node().to_string()]),
    ]))?;
    let mut agent = Agent::start(program, dir, server.address, NODE)?;
    let cold = agent.ready()?;
    let maps = agent.maps()?;
    let bed = Bed { agent, server, maps, endpoints, version: LIST_VERSION, newcomers: 0 };
    Ok((bed, cold))
}

impl Bed {
    fn is_programmed(&self, service: u32) -> Result<bool> {
        let record = self.maps.record(cluster_ip(service)).context("no frontend")?;
        let mut found = self.maps.endpoints(record)?;
        let mut wanted = self.endpoints[service as usize].clone();
        found.sort_unstable();
        wanted.sort_unstable();
        Ok(found == wanted)
    }

    /// Another pod in the place of one of the Service's; the line that tells of it.
    fn replace_one(&mut self, service: u32) -> String {
        self.version += 1;
        self.newcomers += 1;
        let addresses = &mut self.endpoints[service as usize];
        let at = self.newcomers as usize % addresses.len();
        addresses[at] = newcomer(self.newcomers);
        let slice = objects::slice(service, addresses, self.version);
        server::modified(&slice, "EndpointSlice", "discovery.k8s.io/v1")
    }

    /// Sends lines, and waits until the maps are as they say; gives the time from before the first byte.
    fn send(&self, lines: &str, services: &[u32]) -> Result<Duration> {
        let mut waiting = services.to_vec();
        let from = Instant::now();
        self.server.send(SLICES, lines);
        while let Some(service) = waiting.last() {
            if self.is_programmed(*service)? {
                waiting.pop();
            } else if from.elapsed() > SEEN_WITHIN {
                bail!("{} changes are not in the maps\n{}", waiting.len(), self.agent.log());
            } else {
                thread::sleep(LOOK_EVERY);
            }
        }
        Ok(from.elapsed())
    }
}

type Labelled<'a> = &'a dyn Fn(&'static str, &str, &'static str, f64) -> Row;

/// C2: one endpoint after the other.
fn changes(bed: &mut Bed, size: &Size, row: Labelled) -> Result<Vec<Row>> {
    crate::wait_for("the agent to watch EndpointSlices", SEEN_WITHIN, || bed.server.is_watched(SLICES))?;
    let mut times = Vec::new();
    let before = bed.agent.cpu()?;
    for n in 0..size.changes {
        let service = n.wrapping_mul(7919) % size.services;
        let line = bed.replace_one(service);
        times.push(bed.send(&line, &[service])?.as_secs_f64() * 1e3);
        // So that each change is one of its own.
        thread::sleep(Duration::from_millis(2));
    }
    let cpu = (bed.agent.cpu()? - before).as_secs_f64() * 1e3 / f64::from(size.changes);
    let of = |row: Row| Row { rounds: size.changes, spread: Some(measure::spread(&times)), ..row };
    Ok(vec![
        of(row("C2", "one endpoint change, event to map, p50", "ms", measure::median(&times))),
        of(row("C2", "one endpoint change, event to map, p99", "ms", measure::quantile(&times, 0.99))
            .at_most(2.0)),
        row("C5", "CPU of one endpoint change", "ms", cpu).at_most(0.3),
    ])
}

/// C2, as clients see it: the time from before the first byte of the change until a new connection, through the device and
/// the attached programs, is sent to the new backend.
fn first_packets(bed: &mut Bed, size: &Size, row: Labelled) -> Result<Row> {
    let mut prober = Prober::open()?;
    let mut times = Vec::new();
    for n in 0..size.probes {
        let service = n.wrapping_mul(7919) % size.services;
        let line = bed.replace_one(service);
        let from = Instant::now();
        bed.server.send(SLICES, &line);
        prober.reach(cluster_ip(service), newcomer(bed.newcomers), SEEN_WITHIN)?;
        times.push(from.elapsed().as_secs_f64() * 1e3);
        thread::sleep(Duration::from_millis(2));
    }
    let what = "one endpoint change until a first packet goes to the new backend, p99";
    let row = row("C2", what, "ms", measure::quantile(&times, 0.99)).at_most(20.0);
    Ok(Row { rounds: size.probes, spread: Some(measure::spread(&times)), ..row })
}

/// C3: many slices at once.
fn burst(bed: &mut Bed, size: &Size, row: Labelled) -> Result<Vec<Row>> {
    let services: Vec<u32> = (0..size.burst).collect();
    let lines: String = services.iter().map(|s| bed.replace_one(*s)).collect();
    let before = bed.agent.cpu()?;
    let time = bed.send(&lines, &services)?.as_secs_f64() * 1e3;
    let cpu = (bed.agent.cpu()? - before).as_secs_f64() * 1e3 / f64::from(size.burst);
    let what = format!("{} slices at once, all programmed", size.burst);
    Ok(vec![
        row("C3", &what, "ms", time).at_most(100.0),
        row("C5", "CPU of one change among many at once", "ms", cpu).at_most(0.3),
    ])
}

/// C5, while nothing happens.
fn idle(bed: &Bed, size: &Size, row: Labelled) -> Result<Row> {
    let before = bed.agent.cpu()?;
    thread::sleep(size.idle);
    let part = (bed.agent.cpu()? - before).as_secs_f64() / size.idle.as_secs_f64() * 100.0;
    Ok(row("C5", "idle CPU", "%", part).at_most(0.1))
}

//! P2 and P3: requests from outside to backends on other nodes, few flows over and over, and many.

use std::{
    fs,
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use lb_common::verdict::Counter;

use super::{
    Bench, Node,
    agent::{self, Agents, Hook},
    cast::{ACK, Flows},
    chain::End,
    run::{self, Exit, Times},
    stream::{self, Shape},
};
use crate::bench::{Effort, report::Row};

const HOT_FLOWS: u32 = 1 << 10;
const COLD_FLOWS: u32 = 1 << 17;
const TAKEN_OVER_WITHIN: Duration = Duration::from_secs(10);
const COLD_SERVICES: u32 = 8_000;

/// Empty redirect / ours, at least.
const HOT: f64 = 0.88;
const COLD_WITHOUT_STATE: f64 = 0.75;
const COLD_WITH_STATE: f64 = 0.55;

pub const UDP4: Shape = Shape { is_v6: false, is_tcp: false };
pub const UDP6: Shape = Shape { is_v6: true, is_tcp: false };

/// What a node does with requests, ready to be timed; the table gets the backend of each flow.
pub fn requests<'a>(
    node: &'a Node<Agents>,
    lane: usize,
    flows: &Flows,
    flags: u8,
    table: &Arc<OwnedFd>,
) -> Result<run::Path<'a>> {
    let stream = flows.requests(&node.chain, lane, flags);
    node.path(lane, End::Client, &[&stream], Exit::Outside(End::Server), &flows.translated(lane, Some(table)))
}

/// The same frames, sent on as they are.
pub fn untouched<'a, T>(
    node: &'a Node<T>,
    lane: usize,
    flows: &Flows,
    flags: u8,
    exit: Exit,
) -> Result<run::Path<'a>> {
    let stream = flows.requests(&node.chain, lane, flags);
    node.path(lane, End::Client, &[&stream], exit, &flows.untouched())
}

/// Opens the flows of a path and looks at every one of them twice, and waits until XDP has taken over.
pub fn open(node: &Node<Agents>, path: &run::Path, flows: u32) -> Result<()> {
    let sent = || -> Result<()> {
        path.deliver(flows, true)?;
        path.deliver(flows, true)?;
        // The agent learns of its own XDP programs from the kernel; until then tc sends the packets.
        let left = || node.what.count(Counter::XdpLeftToTc);
        let mut is_waiting = node.what.hook == Hook::Xdp;
        let deadline = Instant::now() + TAKEN_OVER_WITHIN;
        while is_waiting {
            let before = left()?;
            path.deliver(flows, true)?;
            // One packet of each neighbour and second goes by tc in any case.
            is_waiting = left()? - before >= u64::from(flows);
            ensure!(!is_waiting || Instant::now() < deadline, "XDP leaves all packets to tc");
        }
        Ok(())
    };
    sent().with_context(|| format!("counted: {}\n{}", node.what.counts(), node.what.log()))
}

/// Rounds in which the data path opens no flow.
pub fn rounds(node: &Node<Agents>, rounds: u32, frames: u32, paths: &[&run::Path]) -> Result<Vec<Times>> {
    let before = node.what.count(Counter::FlowCreated)?;
    let times = run::rounds(rounds, frames, paths)?;
    let opened = node.what.count(Counter::FlowCreated)? - before;
    ensure!(opened == 0, "{opened} flows were opened while established ones were timed");
    Ok(times)
}

pub fn hot(bench: &Bench) -> Result<Vec<Row>> {
    let services = bench.services;
    let mut rows = Vec::new();
    for shape in [UDP4, UDP6] {
        let flows = Flows::new(shape, HOT_FLOWS, services);
        let what = format!("{}, {HOT_FLOWS} flows, {services} Services", shape.name());
        let ours = requests(&bench.node, 0, &flows, ACK, &stream::table(flows.count)?)?;
        open(&bench.node, &ours, HOT_FLOWS)?;
        let gone = untouched(&bench.bare, 0, &flows, ACK, Exit::Entrance)?;
        let back = untouched(&bench.tx, 0, &flows, ACK, Exit::Outside(End::Client))?;
        let forth = untouched(&bench.redirect, 0, &flows, ACK, Exit::Outside(End::Server))?;
        let paths = [&gone, &back, &forth, &ours];
        paths[..3].iter().try_for_each(|p| p.deliver(HOT_FLOWS, true).map(|_| ()))?;
        let times = rounds(&bench.node, bench.effort.rounds(), run::frames(bench.effort), &paths)?;
        let row = run::row("P2", format!("{what}: XDP"), &times[3], Some(&times[2]));
        rows.push(if shape.is_v6 { run::share(row) } else { run::share_at_least(row, HOT) });
        for (what, times) in ["XDP_DROP at the node", "empty XDP_TX"].iter().zip(&times) {
            rows.push(run::row("P2", format!("{}: {what}", shape.name()), times, None));
        }
    }
    rows.push(by_tc(bench)?);
    rows.push(katran(bench.katran.as_deref())?);
    Ok(rows)
}

/// What can be said of Katran here.
fn katran(object: Option<&Path>) -> Result<Row> {
    let row = |note: &str| Row::missing("P2", "Katran's object in the same chain", "", note);
    let Some(path) = object else { return Ok(row("no object given (--katran OBJECT)")) };
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let object = aya_obj::Object::parse(&bytes)
        .with_context(|| format!("{} is no object with BPF programs", path.display()))?;
    let programs = object.programs.keys().cloned().collect::<Vec<_>>().join(", ");
    Ok(row(&format!(
        "object given, with the programs {programs}; not run: the suite cannot fill its maps yet"
    )))
}

/// The same without XDP: frames enter the stack.
fn by_tc(bench: &Bench) -> Result<Row> {
    let node = agent::node(&bench.program, 1, bench.services, Hook::Tc)?;
    let flows = Flows::new(UDP4, HOT_FLOWS, bench.services);
    let ours = requests(&node, 0, &flows, ACK, &stream::table(flows.count)?)?;
    open(&node, &ours, HOT_FLOWS)?;
    let forth = untouched(&bench.redirect, 0, &flows, ACK, Exit::Outside(End::Server))?;
    let times = rounds(&node, bench.effort.rounds(), run::frames(bench.effort) / 4, &[&forth, &ours])?;
    let what = format!("{}, {HOT_FLOWS} flows, {} Services: tc only", UDP4.name(), bench.services);
    Ok(run::share(run::row("P2", what, &times[1], Some(&times[0]))))
}

pub fn cold(bench: &Bench) -> Result<Vec<Row>> {
    let (count, services) = match bench.effort {
        Effort::Small => (4096, bench.services),
        Effort::Full | Effort::Short => (COLD_FLOWS, COLD_SERVICES),
    };
    // A flow's first packet in a second goes by tc: runs are longer than a second, so that no more do than in steady traffic.
    let (rounds_of, frames) = match bench.effort {
        Effort::Full => (4, 1 << 21),
        Effort::Short => (1, 1 << 21),
        Effort::Small => (1, run::frames(bench.effort)),
    };
    let mut rows = Vec::new();
    for shape in [UDP4, UDP6] {
        let flows = Flows::new(shape, count, services);
        let what = format!("{}, {count} flows, {services} Services: XDP", shape.name());
        let ours = requests(&bench.node, 0, &flows, ACK, &stream::table(flows.count)?)?;
        open(&bench.node, &ours, count)?;
        let forth = untouched(&bench.redirect, 0, &flows, ACK, Exit::Outside(End::Server))?;
        forth.deliver(count, true)?;
        let left = || bench.node.what.count(Counter::XdpLeftToTc);
        let (before, sent) = (left()?, u64::from(2 * rounds_of * frames));
        let times = rounds(&bench.node, rounds_of, frames, &[&forth, &ours])?;
        let by_tc = (left()? - before) as f64 / sent as f64 * 100.0;
        let row = run::row("P3", what, &times[1], Some(&times[0]))
            .noted(&format!("{by_tc:.0} % of the packets by tc"));
        rows.push(if shape.is_v6 { run::share(row) } else { run::share_at_least(row, COLD_WITH_STATE) });
    }
    rows.push(Row::missing(
        "P3",
        "without flow state",
        &format!("empty redirect / ours >= {COLD_WITHOUT_STATE}"),
        "packets in transit always have flow state: their answers need it",
    ));
    Ok(rows)
}

//! L3: how long the first packet of a flow is on its way through the node, by number of Services.
//!
//! Frames leave one by one, each after the one before has arrived: the generator writes the time into the flow's place of
//! a table before it lets the frame go, and the sink writes beside it how long ago that was.

use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::{Context as _, Result, ensure};

use super::kernel::Kernel;
use crate::bench::{
    Effort,
    forward::{
        Bench, Node,
        agent::{self, Agents, Hook},
        cast::{ACK, BACKEND_PORT, Flows},
        chain::Chain,
        code::Code,
        hot::{self, UDP4},
        run::{Doors, cpu_of, pin},
        stream::{Generator, Shape, table},
    },
    insn::{self, Insn, Size},
    kube_proxy::Mode,
    measure,
    report::Row,
    sys::{self, MapType, ProgType},
};

const XDP: &str = "XDP";
const TC: &str = "tc";

const XDP_DROP: i32 = 1;
const BPF_KTIME_GET_NS: i32 = 5;
/// When the frame left, and how long it took.
const PLACE_BYTES: u32 = 16;

/// Flows that are there before: programs and tables are warm, the agent has its XDP programs at work.
const BEFORE: u32 = 1 << 10;

/// Of nftables, at most.
const OF_NFTABLES: f64 = 0.25;

struct Shares {
    services: [u32; 3],
    /// Frames of each way and round; a power of two, as is the number of rounds.
    frames: u32,
    rounds: u32,
}

const fn size(effort: Effort, most: u32) -> Shares {
    match effort {
        Effort::Full => Shares { services: [10, 1_000, most], frames: 1 << 10, rounds: 8 },
        Effort::Short => Shares { services: [10, 1_000, most], frames: 1 << 9, rounds: 4 },
        Effort::Small => Shares { services: [5, 10, most], frames: 64, rounds: 1 },
    }
}

/// One way through one node, with the times that its frames took.
struct Way<'a> {
    name: &'static str,
    chain: &'a Chain,
    generator: Generator,
    times: OwnedFd,
    flows: u32,
}

/// Adds to a program: r8 = the place of the flow whose number is in the frame at r7.
fn place(code: &mut Code, shape: Shape, flows: u32, times: &OwnedFd) {
    code.put([
        Insn::load(Size::Word, 1, 7, shape.payload()),
        Insn::be(1, 32),
        Insn::and(1, (flows - 1) as i32),
    ]);
    code.shift_left(1, PLACE_BYTES.trailing_zeros() as i32);
    code.map_value(8, times.as_fd());
    code.add_reg(8, 1);
}

/// Takes the time of every frame to a backend.
fn sink(shape: Shape, flows: u32, times: &OwnedFd) -> Result<OwnedFd> {
    /// Subtracts a register, 64 bits (instruction-set.rst).
    const SUB_REG: u8 = 0x1f;
    let mut code = Code::default();
    code.put(insn::bounds(ProgType::Xdp, shape.frame_bytes() as i32));
    let other = code.label();
    code.put([Insn::load(Size::Half, 1, 7, shape.dport())]);
    code.if_not(1, BACKEND_PORT.to_be().into(), other);
    place(&mut code, shape, flows, times);
    code.put([
        Insn::call(BPF_KTIME_GET_NS),
        Insn::load(Size::Double, 1, 8, 0),
        Insn::new(SUB_REG, 0, 1, 0, 0),
        Insn::store(Size::Double, 8, 0, 8),
    ]);
    code.place(other);
    code.put([Insn::mov(0, XDP_DROP), Insn::exit()]);
    sys::load(ProgType::Xdp, &code.done())
}

impl<'a> Way<'a> {
    /// The last thing that is done with a chain: its sink stays there.
    fn new(name: &'static str, (chain, doors): (&'a Chain, &Doors), flows: &Flows) -> Result<Self> {
        let times = sys::map(MapType::Array, flows.count * PLACE_BYTES, 1)?;
        let lane = &chain.lanes[0];
        let stream = flows.requests(chain, 0, ACK);
        let generator = Generator::with(&[&stream], lane.client.outside, |code| {
            place(code, flows.shape, flows.count, &times);
            code.put([Insn::call(BPF_KTIME_GET_NS), Insn::store(Size::Double, 8, 0, 0)]);
        })?;
        doors.put(lane.server.outside, sink(flows.shape, flows.count, &times)?.as_fd())?;
        Ok(Self { name, chain, generator, times, flows: flows.count })
    }

    fn send(&self, frames: u32) -> Result<()> {
        self.chain.outside.run(|| {
            pin(cpu_of(0));
            self.generator.send_one_by_one(frames)
        })
    }

    /// Of all flows, in microseconds.
    fn took(&self) -> Result<Vec<f64>> {
        let bytes = sys::value(&self.times, 0, (self.flows * PLACE_BYTES) as usize)?;
        let number = |at: &[u8]| at.try_into().map_or(0, u64::from_ne_bytes);
        let all = bytes.chunks_exact(PLACE_BYTES as usize).map(|place| number(&place[8..]));
        let took: Vec<_> = all.filter(|ns| *ns > 0).map(|ns| ns as f64 / 1e3).collect();
        ensure!(took.len() == self.flows as usize, "{}: {} of {} arrived", self.name, took.len(), self.flows);
        Ok(took)
    }
}

/// All nodes at one number of Services.
struct Nodes<'a> {
    services: u32,
    agents: [Node<Agents>; 2],
    made: Vec<Kernel>,
    kept: &'a [Kernel],
}

impl<'a> Nodes<'a> {
    fn new(bench: &'a Bench, services: u32) -> Result<Self> {
        let agent = |hook| agent::node(&bench.program, 1, services, hook);
        let agents = [agent(Hook::Xdp)?, agent(Hook::Tc)?];
        // Those that take long are there already.
        let kept = if services == bench.services { bench.stack.rules(services)?.as_slice() } else { &[] };
        let made = if kept.is_empty() { Mode::ALL.to_vec() } else { Vec::new() };
        let made = made.into_iter().map(|mode| Kernel::serving(mode, services)).collect::<Result<_>>()?;
        Ok(Self { services, agents, made, kept })
    }

    /// Ours by XDP and tc, nftables, iptables.
    fn ways(&self, count: u32) -> Result<Vec<Way<'_>>> {
        // Of clients that no other item has.
        let before = Flows { first_client: 2_048, ..Flows::new(UDP4, BEFORE, self.services) };
        let flows = Flows { first_client: 2_049, ..Flows::new(UDP4, count, self.services) };
        let mut ways = Vec::new();
        for (node, name) in self.agents.iter().zip([XDP, TC]) {
            let path = hot::requests(node, 0, &before, ACK, &table(BEFORE)?)?;
            hot::open(node, &path, BEFORE)?;
            ways.push(Way::new(name, (&node.chain, &node.doors), &flows)?);
        }
        for (kernel, mode) in self.kept.iter().chain(&self.made).zip(Mode::ALL) {
            kernel.requests(&before)?.deliver(BEFORE, true)?;
            ways.push(Way::new(mode.name(), (&kernel.node.chain, &kernel.node.doors), &flows)?);
        }
        Ok(ways)
    }
}

pub fn first_packet(bench: &Bench) -> Result<Vec<Row>> {
    let size = size(bench.effort, bench.services);
    let nodes: Vec<_> =
        size.services.iter().map(|n| Nodes::new(bench, *n)).collect::<Result<_>>().context("nodes")?;
    let ways: Vec<Vec<Way>> =
        nodes.iter().map(|n| n.ways(size.frames * size.rounds)).collect::<Result<_>>()?;
    for round in 0..size.rounds {
        let mut order: Vec<&Way> = ways.iter().flatten().collect();
        if round % 2 == 1 {
            order.reverse();
        }
        order.into_iter().try_for_each(|way| way.send(size.frames))?;
    }
    let mut rows = Vec::new();
    let mut first: Option<Vec<f64>> = None;
    for (services, ways) in size.services.iter().zip(&ways) {
        let took = ways.iter().map(Way::took).collect::<Result<Vec<_>>>()?;
        let p99: Vec<f64> = took.iter().map(|t| measure::quantile(t, 0.99)).collect();
        rows.extend(at(*services, size.rounds, ways, &took));
        let is_last = Some(services) == size.services.last();
        if let Some(first) = first.as_ref().filter(|_| is_last) {
            for ((way, p99), first) in ways.iter().zip(&p99).zip(first) {
                let what = format!("{}: p99 at {services} Services, against {}", way.name, size.services[0]);
                rows.push(Row::value("L3", what, "us", *p99).against(*first));
            }
        }
        first.get_or_insert(p99);
    }
    Ok(rows)
}

/// Median and 99th percentile of ours beside those of the rules.
fn at(services: u32, rounds: u32, ways: &[Way], took: &[Vec<f64>]) -> Vec<Row> {
    let mut rows = Vec::new();
    let (ours, rules) = took.split_at(2.min(took.len()));
    for (part, q) in [("p50", 0.5), ("p99", 0.99)] {
        for (way, ours) in ways.iter().zip(ours) {
            // tc beside nftables only, which is the quicker of the two everywhere.
            let beside = if way.name == TC { 1 } else { Mode::ALL.len() };
            for (mode, theirs) in Mode::ALL.into_iter().zip(rules).take(beside) {
                let what = format!("{services} Services: {}, {part}, against {}", way.name, mode.name());
                let row = Row::value("L3", what, "us", measure::quantile(ours, q));
                let row = Row { rounds, spread: Some(measure::spread(ours)), ..row };
                let row = row.against(measure::quantile(theirs, q));
                let is_judged = part == "p99" && mode == Mode::Nftables && way.name == XDP;
                rows.push(if is_judged { row.ratio_at_most(OF_NFTABLES) } else { row });
            }
        }
    }
    rows
}

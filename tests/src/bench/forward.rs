//! P2, P3, P7 to P9: packets through devices. A [`chain`] of veth pairs leads from a generator ([`stream`]) through a node to
//! a [`sink`]; [`run`] sends frames down it and takes the time; [`cast`] says who speaks to whom.

pub mod agent;
pub mod cast;
pub mod chain;
pub mod code;
pub mod cores;
pub mod device;
pub mod generate;
pub mod hot;
pub mod objects;
pub mod reverse;
pub mod run;
pub mod sink;
pub mod space;
pub mod steady;
pub mod stream;

use std::{
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
};

use anyhow::{Context as _, Result};

use self::{
    agent::{Agents, Hook},
    chain::{Chain, End},
    run::{Doors, Exit, Path},
    stream::XDP_TX,
};
use super::{Effort, Plan, report::Row, stack};
use crate::place::sibling;

/// As many CPUs as send at the same time.
const LANES: u8 = 2;

/// A node under test, in a chain of its own.
pub struct Node<T> {
    pub chain: Chain,
    pub doors: Doors,
    /// What makes it forward; gone when dropped.
    pub what: T,
}

impl<T> Node<T> {
    /// A chain with so many lanes, and whatever `set_up` puts into its node.
    pub fn new(lanes: u8, set_up: impl FnOnce(&Chain) -> Result<T>) -> Result<Self> {
        let chain = Chain::new(lanes)?;
        let doors = Doors::open(&chain)?;
        let what = set_up(&chain).context("cannot set up the node under test")?;
        Ok(Self { chain, doors, what })
    }

    /// Frames go on as they are.
    pub fn path(
        &self,
        lane: usize,
        from: End,
        streams: &[&stream::Stream],
        exit: Exit,
        expect: &sink::Expect,
    ) -> Result<Path<'_>> {
        Path::new((&self.chain, &self.doors), lane, from, streams, exit, expect)
    }
}

/// A node that sends every frame on by the other device of its lane.
pub fn empty_redirect(lanes: u8) -> Result<Node<Vec<OwnedFd>>> {
    Node::new(lanes, |chain| {
        let mut links = Vec::new();
        for lane in &chain.lanes {
            for (from, to) in [(lane.client.node, lane.server.node), (lane.server.node, lane.client.node)] {
                links.push(chain.attach(from, stream::redirecting(to)?.as_fd())?);
            }
        }
        Ok(links)
    })
}

/// A node that sends every frame back.
pub fn empty_tx() -> Result<Node<OwnedFd>> {
    Node::new(1, |chain| chain.attach(chain.lanes[0].client.node, stream::verdict(XDP_TX)?.as_fd()))
}

/// A node without anything: what its first device gets, a sink there takes.
pub fn bare() -> Result<Node<()>> {
    Node::new(1, |_| Ok(()))
}

/// What the items share.
pub struct Bench {
    pub effort: Effort,
    pub program: PathBuf,
    pub services: u32,
    pub katran: Option<PathBuf>,
    pub kube_proxy: Option<PathBuf>,
    pub node: Node<Agents>,
    pub redirect: Node<Vec<OwnedFd>>,
    pub tx: Node<OwnedFd>,
    pub bare: Node<()>,
    pub stack: stack::Kept,
}

/// How to run it, beyond what all parts take.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Only these items; empty: all.
    pub only: Vec<String>,
    /// Measure on this device instead.
    pub device: Option<device::Device>,
    /// Katran's balancer, to stand beside ours.
    pub katran: Option<PathBuf>,
    /// kube-proxy, to stand beside the rules that the suite writes.
    pub kube_proxy: Option<PathBuf>,
}

impl Options {
    /// Everything, in the chain of devices.
    pub const NONE: Self = Self { only: Vec::new(), device: None, katran: None, kube_proxy: None };
}

type Item = fn(&Bench) -> Result<Vec<Row>>;
/// In the order that they run: the last one leaves a full flow table.
const ITEMS: [(&str, Item); 8] = [
    ("P2", hot::hot),
    ("P3", hot::cold),
    ("P4", stack::established),
    ("P5", stack::fresh),
    ("L3", stack::first_packet),
    ("P7", reverse::run),
    ("P9", cores::run),
    ("P8", steady::run),
];

/// The row of an item that this run leaves out.
fn left_out(id: &'static str, note: &str) -> Row {
    let item = super::ITEMS.iter().find(|(i, ..)| *i == id);
    let (what, bar) = item.map_or(("", ""), |(_, what, bar)| (*what, *bar));
    Row::missing(id, what, bar, note)
}

pub fn run(plan: &Plan) -> Result<Vec<Row>> {
    let program = plan.agent.clone().map_or_else(|| sibling("lb-agent"), Ok)?;
    if let Some(device) = &plan.forward.device {
        let mut rows = device::run(plan, &program, device)?;
        rows.extend(ITEMS[1..].iter().map(|(id, _)| left_out(id, "not measured on a device")));
        return Ok(rows);
    }
    run::clock_sees_softirqs()?;
    let effort = plan.effort;
    let services = if effort == Effort::Small { 20 } else { 10_000 };
    let node = agent::node(&program, LANES, services, Hook::Xdp)?;
    let (redirect, tx, bare) = (empty_redirect(LANES)?, empty_tx()?, bare()?);
    let (katran, kube_proxy) = (plan.forward.katran.clone(), plan.forward.kube_proxy.clone());
    let bench = Bench {
        effort,
        program,
        services,
        katran,
        kube_proxy,
        node,
        redirect,
        tx,
        bare,
        stack: stack::Kept::default(),
    };
    let mut rows = Vec::new();
    for (id, item) in ITEMS {
        if plan.forward.only.is_empty() || plan.forward.only.iter().any(|o| o == id) {
            rows.extend(item(&bench).with_context(|| id)?);
        } else {
            rows.push(left_out(id, "not asked for in this run"));
        }
    }
    Ok(rows)
}

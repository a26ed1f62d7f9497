//! P2, P3, P7 to P9: packets through devices. A [`chain`] of veth pairs leads from a generator ([`stream`]) through a node to
//! a [`sink`]; [`run`] sends frames down it and takes the time; [`cast`] says who speaks to whom.

pub mod cast;
pub mod chain;
pub mod code;
pub mod run;
pub mod sink;
pub mod space;
pub mod stream;

use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::{Context as _, Result};

use self::{
    cast::{ACK, Flows},
    chain::{Chain, End},
    run::{Doors, Exit, Path},
    stream::{Shape, XDP_TX},
};
use super::{Plan, report::Row};

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

pub fn run(plan: &Plan) -> Result<Vec<Row>> {
    run::clock_sees_softirqs()?;
    let effort = plan.effort;
    let (redirect, tx, bare) = (empty_redirect(1)?, empty_tx()?, bare()?);
    let mut rows = Vec::new();
    for shape in [Shape { is_v6: false, is_tcp: false }, Shape { is_v6: true, is_tcp: false }] {
        let flows = Flows::new(shape, 1024, 10_000);
        let requests = |chain: &Chain| flows.requests(chain, 0, ACK);
        let as_sent = flows.untouched();
        let to = |exit| (End::Client, exit);
        let (from, out) = to(Exit::Outside(End::Server));
        let forth = redirect.path(0, from, &[&requests(&redirect.chain)], out, &as_sent)?;
        let back = tx.path(0, from, &[&requests(&tx.chain)], Exit::Outside(End::Client), &as_sent)?;
        let gone = bare.path(0, from, &[&requests(&bare.chain)], Exit::Entrance, &as_sent)?;
        let paths = [&gone, &back, &forth];
        for path in paths {
            path.deliver(4096, true)?;
        }
        let times = run::rounds(effort, run::frames(effort), &paths)?;
        for (what, times) in ["XDP_DROP at the node", "empty XDP_TX", "empty redirect"].iter().zip(&times) {
            rows.push(run::row("P2", format!("{} {what}", shape.name()), times, None));
        }
    }
    Ok(rows)
}

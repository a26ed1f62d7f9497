//! P5: every packet opens a flow.

use anyhow::{Context as _, Result, ensure};
use lb_common::verdict::Counter;

use super::{at, kernel::Kernel, no_kube_proxy, times_cheaper};
use crate::bench::{
    Effort,
    forward::{
        Bench, Node,
        agent::{self, Agents, Hook},
        cast::{ACK, Flows},
        chain::End,
        hot::{self, UDP4},
        run::{self, Exit, Path, Times},
        stream,
    },
    report::Row,
};

/// Flows that XDP is seen to take before flows are opened.
const SEEN: u32 = 1 << 10;

/// nftables / ours, at least.
const OF_NFTABLES: f64 = 6.0;
/// iptables / ours, at least, with 10,000 Services: their rules are looked at one after the other, and as packets go to
/// all Services alike, the mean is that of the rule in the middle.
const OF_IPTABLES: f64 = 80.0;

/// Packets of a round. All rounds of a node together must fit into what it may track, or what is measured is the search
/// for flows to drop: 262,144 in the kernel by default, and in ours.
const fn frames(effort: Effort) -> [u32; 3] {
    let (ours, nft, iptables) = (1 << 13, 1 << 13, 1 << 11);
    match effort {
        Effort::Full | Effort::Short => [ours, nft, iptables],
        Effort::Small => [256; 3],
    }
}

pub fn fresh(bench: &Bench) -> Result<Vec<Row>> {
    let kernels = bench.stack.rules(bench.services)?;
    let flows = Flows { recorded: true, ..Flows::flood(UDP4, bench.services) };
    let nodes = [Hook::Xdp, Hook::Tc].map(|hook| agent::node(&bench.program, 1, bench.services, hook));
    let [xdp, tc] = nodes;
    let nodes = [xdp?, tc?];
    let [ours, of_nft, of_iptables] = frames(bench.effort);
    let mut timed = Vec::new();
    for node in &nodes {
        let known = Flows::new(UDP4, SEEN, bench.services);
        let path = hot::requests(node, 0, &known, ACK, &stream::table(SEEN)?)?;
        hot::open(node, &path, SEEN)?;
        let stream = flows.requests(&node.chain, 0, ACK);
        let exit = Exit::Outside(End::Server);
        timed.push((node.path(0, End::Client, &[&stream], exit, &flows.translated(0, None))?, ours));
    }
    for (kernel, frames) in kernels.iter().zip([of_nft, of_iptables]) {
        timed.push((kernel.requests(&flows)?, frames));
    }
    let empty = hot::untouched(&bench.redirect, 0, &flows, ACK, Exit::Outside(End::Server))?;
    timed.push((empty, ours));
    let real = bench.stack.kube_proxy(bench)?;
    if let Some(real) = real {
        timed.push((real.requests(&flows)?, of_nft));
    }
    let times = rounds(bench.effort, &timed, &nodes, kernels)?;
    let what = format!("{}, every packet a new flow, {}", UDP4.name(), at(bench));
    let row = |name: &str, ours: &Times, baseline| run::row("P5", format!("{what}: {name}"), ours, baseline);
    let [xdp, tc, nft, iptables, empty, own @ ..] = &times[..] else {
        anyhow::bail!("{} times", times.len())
    };
    let of_kube_proxy = own.first().map_or_else(
        || no_kube_proxy("P5"),
        |own| {
            times_cheaper(
                row("XDP, against kube-proxy's own rules (nftables)", xdp, Some(own)),
                "kube-proxy",
                None,
            )
        },
    );
    Ok(vec![
        times_cheaper(row("XDP, against nftables", xdp, Some(nft)), "nftables", Some(OF_NFTABLES)),
        times_cheaper(row("XDP, against iptables", xdp, Some(iptables)), "iptables", Some(OF_IPTABLES)),
        times_cheaper(row("tc, against nftables", tc, Some(nft)), "nftables", None),
        row("XDP, against an empty redirect", xdp, Some(empty)),
        of_kube_proxy,
    ])
}

/// Rounds in which every packet opens a flow, and no node runs out of room for them.
fn rounds(
    effort: Effort,
    timed: &[(Path, u32)],
    nodes: &[Node<Agents>; 2],
    kernels: &[Kernel; 2],
) -> Result<Vec<Times>> {
    let opened = || nodes.iter().map(|n| n.what.count(Counter::FlowCreated)).collect::<Result<Vec<_>>>();
    let tracked = || kernels.iter().map(Kernel::tracks).collect::<Result<Vec<_>>>();
    // Everything is looked at in the first packets.
    for (n, (path, _)) in timed.iter().enumerate() {
        path.deliver(64, true).with_context(|| format!("of way {n}"))?;
    }
    let (before, tracked_before) = (opened()?, tracked()?);
    let mut times = vec![Times::default(); timed.len()];
    for _ in 0..effort.rounds() {
        for ((path, frames), times) in timed.iter().zip(&mut times) {
            times.there.push(path.deliver(*frames, false)?);
        }
        for ((path, frames), times) in timed.iter().zip(&mut times).rev() {
            times.back.push(path.deliver(*frames, false)?);
        }
    }
    let sent: Vec<u64> = timed.iter().map(|(_, frames)| u64::from(frames * 2 * effort.rounds())).collect();
    for ((after, before), sent) in opened()?.iter().zip(&before).zip(&sent) {
        ensure!(after - before == *sent, "{} flows were opened by {sent} packets", after - before);
    }
    for (([after, most], [before, _]), sent) in tracked()?.iter().zip(&tracked_before).zip(&sent[2..]) {
        ensure!(after < most, "the kernel tracks as many flows as it may ({most})");
        let new = u64::from(after.saturating_sub(*before));
        // Entries end after 30 s without an answer, in this run or before it.
        ensure!(new <= *sent, "{new} flows are tracked after {sent} packets");
    }
    Ok(times)
}

//! P4: packets of flows that everybody knows.

use std::os::fd::OwnedFd;

use anyhow::{Result, ensure};
use lb_common::verdict::Counter;

use super::{
    at,
    kernel::{self, Kernel, SERVICES_V6, Way},
    no_kube_proxy, times_cheaper,
};
use crate::bench::{
    Effort,
    forward::{
        Bench, Node,
        agent::{self, Agents, Hook},
        cast::{ACK, Flows},
        chain::End,
        hot::{self, UDP4, UDP6},
        run::{self, Exit, Path, Times},
        stream::{self, Shape},
    },
    kube_proxy::Mode,
    report::Row,
};

const FLOWS: u32 = 1 << 10;

/// nftables / ours, at least.
const XDP: f64 = 7.0;
const TC: f64 = 2.5;
/// tc / plain forwarding, at most.
const TC_OF_PLAIN: f64 = 0.9;

/// Packets of a path in a round: the stack takes microseconds for each.
const fn frames(effort: Effort) -> u32 {
    match effort {
        Effort::Full => 1 << 17,
        Effort::Short => 1 << 16,
        Effort::Small => 1 << 11,
    }
}

pub fn established(bench: &Bench) -> Result<Vec<Row>> {
    let [nft, iptables] = bench.stack.rules(bench.services)?;
    let tc = agent::node(&bench.program, 1, bench.services, Hook::Tc)?;
    let (plain, tracked) = (Kernel::forwarding(Way::Plain)?, Kernel::forwarding(Way::Conntrack)?);
    let floor = kernel::empty_tc();
    let real = bench.stack.kube_proxy(bench)?;
    let all =
        Nodes { bench, tc: &tc, plain: &plain, tracked: &tracked, nft, floor: floor.as_ref().ok(), real };
    let mut rows = all.rows(UDP4, bench.services, Some(iptables))?;
    rows.extend(all.rows(UDP6, bench.services.min(SERVICES_V6), None)?);
    for kernel in [nft, iptables] {
        if let Way::Rules(mode) = kernel.way {
            let what = format!("{} with its rules for {} made in", mode.name(), at(bench));
            rows.push(Row::value("P4", what, "s", kernel.loaded_in.as_secs_f64()));
        }
    }
    if let Err(e) = &floor {
        let why = format!("no tcx here (Linux 6.6): {e:#}");
        rows.push(Row::missing("P4", "empty redirect by tc", "", &why));
    }
    if all.real.is_none() {
        rows.push(no_kube_proxy("P4"));
    }
    Ok(rows)
}

struct Nodes<'a> {
    bench: &'a Bench,
    tc: &'a Node<Agents>,
    plain: &'a Kernel,
    tracked: &'a Kernel,
    nft: &'a Kernel,
    /// What is left of tc when its program does nothing but send on.
    floor: Option<&'a Node<Vec<OwnedFd>>>,
    real: Option<&'a Kernel>,
}

impl Nodes<'_> {
    fn rows(&self, shape: Shape, services: u32, iptables: Option<&Kernel>) -> Result<Vec<Row>> {
        let bench = self.bench;
        let flows = Flows::new(shape, FLOWS, services);
        let kernels: Vec<_> = [self.plain, self.tracked, self.nft].into_iter().chain(iptables).collect();
        let mut paths = Vec::new();
        for node in [&bench.node, self.tc] {
            let path = hot::requests(node, 0, &flows, ACK, &stream::table(flows.count)?)?;
            hot::open(node, &path, flows.count)?;
            kernel::answer(node, &path, &flows)?;
            paths.push(path);
        }
        for kernel in &kernels {
            let path = kernel.requests(&flows)?;
            kernel.open(&path, &flows)?;
            paths.push(path);
        }
        if let Some(floor) = self.floor.filter(|_| iptables.is_some()) {
            let path = hot::untouched(floor, 0, &flows, ACK, Exit::Outside(End::Server))?;
            path.deliver(flows.count, true)?;
            paths.push(path);
        }
        let real_at = paths.len();
        if let Some(real) = self.real.filter(|_| iptables.is_some()) {
            let path = real.requests(&flows)?;
            real.open(&path, &flows)?;
            paths.push(path);
        }
        let times = self.timed(&paths.iter().collect::<Vec<_>>())?;
        let what = format!("{}, {FLOWS} flows, {} Services", shape.name(), services);
        let row =
            |name: &str, ours: &Times, baseline| run::row("P4", format!("{what}: {name}"), ours, baseline);
        let [xdp, tc, plain, tracked, nft] = &times[..5] else { anyhow::bail!("{} times", times.len()) };
        let is_required = !shape.is_v6;
        let least = |least: f64| is_required.then_some(least);
        let nftables = Mode::Nftables.name();
        let mut rows = vec![
            times_cheaper(row("XDP, against nftables", xdp, Some(nft)), nftables, least(XDP)),
            times_cheaper(row("tc, against nftables", tc, Some(nft)), nftables, least(TC)),
        ];
        let of_plain = row("tc, against plain forwarding", tc, Some(plain));
        rows.push(if is_required { of_plain.ratio_at_most(TC_OF_PLAIN) } else { of_plain });
        if let Some(iptables) = times.get(5) {
            let name = Mode::Iptables.name();
            rows.push(times_cheaper(row("XDP, against iptables", xdp, Some(iptables)), name, None));
            rows.push(times_cheaper(row("tc, against iptables", tc, Some(iptables)), name, None));
        }
        if let Some(real) = times.get(real_at) {
            let name = "kube-proxy";
            rows.push(times_cheaper(
                row("XDP, against kube-proxy's own rules (nftables)", xdp, Some(real)),
                name,
                None,
            ));
            rows.push(times_cheaper(
                row("tc, against kube-proxy's own rules (nftables)", tc, Some(real)),
                name,
                None,
            ));
        }
        if let Some(floor) = times.get(6).filter(|_| self.floor.is_some()) {
            rows.push(row("tc, against an empty redirect by tc", tc, Some(floor)));
        }
        rows.push(row("forwarding with conntrack, against plain", tracked, Some(plain)));
        Ok(rows)
    }

    /// Rounds in which no flow is opened.
    fn timed(&self, paths: &[&Path]) -> Result<Vec<Times>> {
        let opened = || -> Result<u64> {
            let by = |node: &Node<Agents>| node.what.count(Counter::FlowCreated);
            Ok(by(&self.bench.node)? + by(self.tc)?)
        };
        let before = opened()?;
        let times = run::rounds(self.bench.effort.rounds(), frames(self.bench.effort), paths)?;
        let new = opened()? - before;
        ensure!(new == 0, "{new} flows were opened while established ones were timed");
        Ok(times)
    }
}

//! P8: what established flows notice of a thousand endpoint changes per second, and of a flood of new flows.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use lb_common::verdict::Counter;

use super::{
    Bench,
    cast::{ACK, Flows, backend_address},
    chain::End,
    hot,
    objects::{self, ENDPOINTS, WITH_TCP},
    run::{self, Exit, Path, Times, pin},
    sink::Arrived,
    stream,
};
use crate::bench::{control::server::modified, report::Row};

const FLOWS: u32 = 1 << 10;
const OF_QUIET: f64 = 0.97;
/// Endpoint changes per second.
const CHANGES: u32 = 1000;
const SETTLED_WITHIN: Duration = Duration::from_secs(30);

/// What became of packets of established flows.
#[derive(Clone, Copy, Debug, Default)]
struct Fate {
    sent: u64,
    lost: u64,
    elsewhere: u64,
}

impl Fate {
    fn add(&mut self, sent: u64, arrived: Arrived) {
        self.sent += sent;
        self.lost += sent - arrived.right.min(sent);
        self.elsewhere += arrived.moved + arrived.wrong;
    }

    /// Packets that were at another backend were not lost on the way.
    fn rows(&self, during: &str) -> Vec<Row> {
        let lost = self.lost.saturating_sub(self.elsewhere);
        let row = |what: &str, n: u64| {
            let what = format!("packets of established flows {what} during {during}, of {}", self.sent);
            let row = Row::value("P8", what, "packets", n as f64);
            Row { bar: "0".into(), met: Some(n == 0), ..row }
        };
        vec![row("lost", lost), row("at a wrong backend or changed", self.elsewhere)]
    }
}

pub fn run(bench: &Bench) -> Result<Vec<Row>> {
    let flows = Flows::new(hot::UDP4, FLOWS, bench.services);
    let table = stream::table(FLOWS)?;
    let path = hot::requests(&bench.node, 0, &flows, ACK, &table)?;
    hot::open(&bench.node, &path, FLOWS)?;
    let mut rows = churn(bench, &path).context("endpoint changes")?;
    rows.extend(flood(bench, &flows, &path, &table).context("a flood of new flows")?);
    Ok(rows)
}

/// Endpoint changes, in the order that they are sent.
struct Changes {
    services: u32,
    sent: u32,
    version: u64,
}

impl Changes {
    fn next(&mut self) -> (u32, String) {
        self.sent += 1;
        self.version += 1;
        let n = self.sent;
        // By turns a Service with an established flow, and one without.
        let measured = self.services.min(FLOWS);
        let is_measured = n.is_multiple_of(2) || self.services <= FLOWS;
        let service =
            if is_measured { n / 2 % measured } else { measured + n / 2 % (self.services - measured) };
        let slice = objects::slice(service, false, &self.endpoints(service, n), self.version);
        (service, modified(&slice, "EndpointSlice", "discovery.k8s.io/v1"))
    }

    /// Measured Services get another one beside those that they have: flows to a UDP endpoint that goes have to go too. Of
    /// other Services one is replaced.
    fn endpoints(&self, service: u32, n: u32) -> Vec<u32> {
        let newcomer = ENDPOINTS + n / 2 % 6;
        let mut endpoints: Vec<u32> = (0..ENDPOINTS).collect();
        if service < FLOWS {
            endpoints.push(newcomer);
        } else {
            endpoints[(n % ENDPOINTS) as usize] = newcomer;
        }
        endpoints
    }
}

fn churn(bench: &Bench, path: &Path) -> Result<Vec<Row>> {
    let frames = run::frames(bench.effort) * 2;
    let mut changes = Changes { services: bench.services, sent: 0, version: 100 };
    let (mut quiet, mut busy, mut fate) = (Times::default(), Times::default(), Fate::default());
    for _ in 0..bench.effort.rounds().min(7) {
        quiet.there.push(path.deliver(frames, true)?);
        for half in [&mut busy.there, &mut busy.back] {
            let ((ns, arrived), log) = with_churn(bench, &mut changes, || path.send(frames, true))?;
            fate.add(frames.into(), arrived);
            half.push(ns);
            settle(bench, &changes, log)?;
        }
        quiet.back.push(path.deliver(frames, true)?);
    }
    let during = format!("{CHANGES} endpoint changes per second");
    let mut rows = fate.rows(&during);
    let what = format!("established flows during {during}, verified at the sink");
    let row = run::share(run::row("P8", what, &busy, Some(&quiet)));
    let met = row.ratio.map(|ratio| ratio >= OF_QUIET);
    let row = Row { met, bar: format!("quiet / ours >= {OF_QUIET}"), ..row };
    rows.push(row.noted(&format!("{} changes", changes.sent)));
    Ok(rows)
}

/// Runs `f` while endpoints change; gives its result, and the last change of a Service that has a TCP port too.
fn with_churn<T>(
    bench: &Bench,
    changes: &mut Changes,
    f: impl FnOnce() -> Result<T>,
) -> Result<(T, Option<u32>)> {
    let stop = AtomicBool::new(false);
    let first = changes.sent;
    thread::scope(|scope| {
        let sender = scope.spawn(|| -> Result<Option<u32>> {
            pin(1);
            let start = Instant::now();
            let mut last = None;
            while !stop.load(Ordering::Relaxed) || changes.sent == first {
                let due = start + Duration::from_secs(1) * (changes.sent - first) / CHANGES;
                thread::sleep(due.saturating_duration_since(Instant::now()));
                let (service, line) = changes.next();
                bench.node.what.change(&line);
                if service < FLOWS.min(WITH_TCP) {
                    last = Some(changes.sent);
                }
            }
            Ok(last)
        });
        let result = f();
        stop.store(true, Ordering::Relaxed);
        let last = sender.join().map_err(|_| anyhow!("the sender of changes panicked"))??;
        Ok((result?, last))
    })
}

/// Waits until the agent has programmed a change, and with it all before.
fn settle(bench: &Bench, changes: &Changes, last: Option<u32>) -> Result<()> {
    let Some(n) = last else { return Ok(()) };
    let service = n / 2 % bench.services.min(FLOWS);
    let mut wanted: Vec<_> =
        changes.endpoints(service, n).iter().map(|i| backend_address(service, *i, false)).collect();
    wanted.sort_unstable();
    crate::wait_for("the agent to program the last change", SETTLED_WITHIN, || {
        bench.node.what.endpoints(service).is_ok_and(|found| found == wanted)
    })
    .with_context(|| bench.node.what.log())
}

/// Every other packet is one of a flow that nobody has seen before.
fn flood(
    bench: &Bench,
    flows: &Flows,
    path: &Path,
    table: &std::sync::Arc<std::os::fd::OwnedFd>,
) -> Result<Vec<Row>> {
    let frames = run::frames(bench.effort);
    let rounds = bench.effort.rounds().min(5);
    let lane = &bench.node.chain;
    let flood = Flows::flood(hot::UDP4, bench.services);
    let (known, new) = (flows.requests(lane, 0, ACK), flood.requests(lane, 0, ACK));
    let expect = flows.translated(0, Some(table));
    let mixed = bench.node.path(0, End::Client, &[&known, &new], Exit::Outside(End::Server), &expect)?;
    let quiet = run::rounds(rounds, frames, &[path])?.remove(0);
    let opened = || bench.node.what.count(Counter::FlowCreated);
    let full = || bench.node.what.count(Counter::DropFlowTableFull);
    let (before, before_full) = (opened()?, full()?);
    let (mut busy, mut after, mut fate, mut arrived_new) =
        (Times::default(), Times::default(), Fate::default(), 0);
    for _ in 0..rounds {
        for (busy, after) in [(&mut busy.there, &mut after.there), (&mut busy.back, &mut after.back)] {
            let (ns, arrived) = mixed.send(2 * frames, true)?;
            fate.add(frames.into(), arrived);
            arrived_new += arrived.unrecorded;
            busy.push(ns);
            after.push(path.deliver(frames, false)?);
        }
    }
    let (opened, refused) = (opened()? - before, full()? - before_full);
    // So that nobody takes a flood that never was for one that did no harm.
    ensure!(
        opened > 0 && arrived_new == opened,
        "{opened} flows opened, {arrived_new} of their packets arrived"
    );
    let note = format!("{opened} flows opened, {refused} refused: table full");
    let mut rows = fate.rows("a flood of new flows");
    rows.push(
        run::share(run::row("P8", "a flood: half of the packets of new flows", &busy, Some(&quiet)))
            .noted(&note),
    );
    let what = "established flows between waves of it, the flow table as the flood left it";
    let row = run::share(run::row("P8", what, &after, Some(&quiet)));
    let met = row.ratio.map(|ratio| ratio >= OF_QUIET);
    rows.push(Row { met, bar: format!("quiet / ours >= {OF_QUIET}"), ..row });
    Ok(rows)
}

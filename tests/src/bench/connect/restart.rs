//! C6: the agent is killed, comes back, and is replaced by one with maps of other sizes, while connections are open, calls
//! are made and datagrams are sent from every side.
//!
//! A call over UDP is one packet there and one back, and nobody sends it again: a lost packet is a failed call.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};

use super::flag;
use crate::{
    bench::{Effort, report::Row},
    cluster::Cluster,
    manifests::Service,
    place::Place,
    traffic::{Call, Load, Outcome, Proto, Session},
};

/// Of the Service that is asked; the measured ones have 1 and 2.
const NUMBER: u8 = 60;
/// One of each node: one for packets that stay here, one for those that leave.
const BACKENDS: [&str; 2] = ["pod-1a", "pod-2a"];

/// Other sizes than the defaults; larger and smaller ones.
const SIZES: [&str; 5] = [
    "--max-backends=50000",
    "--max-services=50000",
    "--max-frontends=200000",
    "--max-slots=300000",
    "--max-flows=300000",
];

/// A flow, and who answered it first.
struct Flow {
    what: String,
    session: Session,
    first: String,
}

/// What happened to traffic.
#[derive(Default)]
struct Tally {
    asked: u64,
    failed: u64,
    moved: u64,
    first_failure: Option<String>,
}

impl Tally {
    fn fail(&mut self, count: u64, what: &str, why: &str) {
        self.failed += count;
        if count > 0 {
            self.first_failure.get_or_insert_with(|| format!("{what}: {why}"));
        }
    }
}

struct Traffic {
    flows: Vec<Flow>,
    loads: Vec<(String, Load)>,
}

pub fn run(effort: Effort, mut cluster: Cluster) -> Result<Vec<Row>> {
    let rows = restarts(effort, &mut cluster).with_context(|| cluster.logs())?;
    cluster.finish()?;
    Ok(rows)
}

fn restarts(effort: Effort, cluster: &mut Cluster) -> Result<Vec<Row>> {
    let service = Service::on(cluster, "restarted", NUMBER, &BACKENDS);
    cluster.serve(&service)?;
    let times = effort.at_most(3, 1);
    let mut rows = Vec::new();
    let tally = under_traffic(effort, cluster, &service, |cluster, traffic, tally| {
        for number in [1, 2].into_iter().cycle().take(2 * times as usize) {
            cluster.agent(number).kill()?;
            traffic.ask_all(tally)?;
            cluster.restart_agent(number, &[flag(number)])?;
            traffic.ask_all(tally)?;
        }
        Ok(())
    })?;
    rows.extend(said(&format!("kill -9 and restart, {times} x on 2 nodes"), &tally));
    let tally = under_traffic(effort, cluster, &service, |cluster, traffic, tally| {
        for number in [1, 2] {
            cluster.agent(number).terminate()?;
            traffic.ask_all(tally)?;
            let flags: Vec<_> = SIZES.into_iter().chain([flag(number)]).collect();
            cluster.restart_agent(number, &flags)?;
            traffic.ask_all(tally)?;
        }
        Ok(())
    })?;
    rows.extend(said("upgrade with maps of other sizes, on 2 nodes", &tally));
    Ok(rows)
}

/// Traffic, and meanwhile `what`.
fn under_traffic(
    effort: Effort,
    cluster: &mut Cluster,
    service: &Service,
    what: impl FnOnce(&mut Cluster, &mut Traffic, &mut Tally) -> Result<()>,
) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut traffic = Traffic::start(effort, cluster, service)?;
    what(cluster, &mut traffic, &mut tally)?;
    traffic.stop(&mut tally)?;
    Ok(tally)
}

/// From everywhere to every address that the Service has there.
fn ends<'a>(effort: Effort, cluster: &'a Cluster, service: &Service) -> Vec<(&'a Place, SocketAddr)> {
    let sides = [
        (&cluster.client, 1),
        (cluster.pod("pod-1b"), 1),
        (cluster.pod("pod-2b"), 2),
        (&cluster.node(1).place, 1),
    ];
    let all = sides.into_iter().flat_map(|(place, number)| {
        let frontends = service.frontends(cluster.node(number)).into_iter();
        frontends.map(move |(_, to)| (place, to))
    });
    // Of the six addresses, every fifth is one of another kind or family each time.
    all.step_by(if effort == Effort::Small { 5 } else { 1 }).collect()
}

impl Traffic {
    fn start(effort: Effort, cluster: &Cluster, service: &Service) -> Result<Self> {
        let mut traffic = Self { flows: Vec::new(), loads: Vec::new() };
        for (i, (place, to)) in ends(effort, cluster, service).into_iter().enumerate() {
            for proto in [Proto::Tcp, Proto::Udp] {
                let what = format!("{} to {to}, {proto:?}", place.name);
                let mut session = place.session(&Call::new(proto, to))?;
                match session.ask()? {
                    Ok(answer) => traffic.flows.push(Flow { what, session, first: answer.by }),
                    Err(failure) => anyhow::bail!("{what}, before anything happened: {}", failure.message),
                }
            }
            // Two processors have to do all this: half of the combinations, each of them in turn.
            let proto = if (i + i / 2).is_multiple_of(2) { Proto::Udp } else { Proto::Tcp };
            let what = format!("{} to {to}, calls over {proto:?}", place.name);
            traffic.loads.push((what, place.load(&Call::new(proto, to))?));
        }
        Ok(traffic)
    }

    /// Every open connection and flow still works, with the same backend.
    fn ask_all(&mut self, tally: &mut Tally) -> Result<()> {
        for Flow { what, session, first } in &mut self.flows {
            let outcome: Outcome = session.ask().with_context(|| what.clone())?;
            tally.asked += 1;
            match outcome {
                Ok(answer) if answer.by == *first => {}
                Ok(_) => tally.moved += 1,
                Err(failure) => tally.fail(1, what, &failure.message),
            }
        }
        Ok(())
    }

    fn stop(self, tally: &mut Tally) -> Result<()> {
        for (what, load) in self.loads {
            let calls = load.stop()?;
            ensure!(calls.total() > 1, "{what}: hardly any traffic");
            tally.asked += calls.total();
            let why = calls.failures.first().map(|(_, failure)| failure.message.as_str());
            tally.fail(calls.failed, &what, why.unwrap_or_default());
        }
        Ok(())
    }
}

fn said(what: &str, tally: &Tally) -> [Row; 2] {
    let row = |counted: &str, unit, count: u64| {
        let what = format!("{what}: {counted}");
        Row::value("C6", what, unit, count as f64).at_most(0.0).noted(&format!("of {}", tally.asked))
    };
    let failed = row("questions in open flows and new connections that failed", "failed", tally.failed);
    let failed = match &tally.first_failure {
        Some(first) => failed.noted(&format!("the first: {first}")),
        None => failed,
    };
    [failed, row("flows that changed their backend", "moved", tally.moved)]
}

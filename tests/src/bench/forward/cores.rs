//! P9: one agent's maps, used by one CPU, and by two at once, each with devices of its own.

use std::sync::Barrier;

use anyhow::{Result, anyhow};

use super::{
    Bench, LANES,
    cast::{ACK, ENDPOINT_BITS, Flows},
    chain::End,
    hot,
    run::{self, Exit, Path},
    stream,
};
use crate::bench::{Effort, measure, report::Row};

const FLOWS: u32 = 1 << 10;
const TWO_TO_ONE: f64 = 1.95;
const BAR: &str = ">= 1.95 x one core";

pub fn run(bench: &Bench) -> Result<Vec<Row>> {
    if std::thread::available_parallelism()?.get() < usize::from(LANES) {
        return Ok(vec![Row::missing("P9", "two cores", BAR, "this machine has one")]);
    }
    // Services of the second lane: their backends are behind it.
    let half: u32 = if bench.effort == Effort::Small { 8 } else { 4096 };
    let bits = half.trailing_zeros() + u32::from(ENDPOINT_BITS);
    let net = |is_v6: bool| {
        let first = super::cast::backend_address(half, 0, is_v6);
        format!("{first}/{}", if is_v6 { 128 - bits } else { 32 - bits })
    };
    let (net4, net6) = (net(false), net(true));
    bench.node.chain.route_to(1, End::Server, &net4, &net6)?;
    let rows = measured(bench, half);
    bench.node.chain.unroute(&net4, &net6)?;
    rows
}

fn measured(bench: &Bench, half: u32) -> Result<Vec<Row>> {
    let flows = |lane: usize| Flows::of_lane(hot::UDP4, FLOWS, half, lane as u32);
    let lanes = 0..usize::from(LANES);
    let (mut ours, mut empty) = (Vec::new(), Vec::new());
    for lane in lanes {
        let flows = flows(lane);
        let path = hot::requests(&bench.node, lane, &flows, ACK, &stream::table(FLOWS)?)?;
        hot::open(&bench.node, &path, FLOWS)?;
        ours.push(path);
        let exit = Exit::Outside(End::Server);
        let path = hot::untouched(&bench.redirect, lane, &flows, ACK, exit)?;
        path.deliver(FLOWS, true)?;
        empty.push(path);
    }
    let frames = run::frames(bench.effort) * 4;
    let (mut one, mut two) = ([vec![], vec![]], [vec![], vec![]]);
    for _ in 0..bench.effort.rounds().min(3) {
        for (paths, (one, two)) in [&empty, &ours].into_iter().zip(one.iter_mut().zip(&mut two)) {
            let mut alone = || -> Result<()> {
                let rates: Vec<f64> = paths.iter().map(|p| rate(p, frames)).collect::<Result<_>>()?;
                one.push(rates.iter().sum::<f64>() / rates.len() as f64);
                Ok(())
            };
            alone()?;
            two.push(together(paths, frames)?);
            two.push(together(paths, frames)?);
            alone()?;
        }
    }
    let row = |i: usize, what: &str| {
        let row = Row::value("P9", what, "Mpps", measure::median(&two[i])).against(measure::median(&one[i]));
        Row { rounds: two[i].len() as u32 / 2, spread: Some(measure::spread(&two[i])), ..row }
    };
    let ours = row(1, "XDP, both CPUs at once against one");
    let met = ours.ratio.map(|ratio| ratio >= TWO_TO_ONE);
    Ok(vec![Row { met, bar: BAR.into(), ..ours }, row(0, "empty redirect, both CPUs at once against one")])
}

/// Packets per microsecond of processor time.
fn rate(path: &Path, frames: u32) -> Result<f64> {
    Ok(1e3 / path.deliver(frames, false)?)
}

/// The sum of all lanes at the same time.
fn together(paths: &[Path], frames: u32) -> Result<f64> {
    let ready = Barrier::new(paths.len());
    std::thread::scope(|scope| {
        let start = |path| {
            let ready = &ready;
            scope.spawn(move || {
                ready.wait();
                rate(path, frames)
            })
        };
        let lanes: Vec<_> = paths.iter().map(start).collect();
        let join = |lane: std::thread::ScopedJoinHandle<'_, Result<f64>>| {
            lane.join().map_err(|_| anyhow!("a generator panicked"))?
        };
        lanes.into_iter().map(join).sum()
    })
}

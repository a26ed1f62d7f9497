//! Rounds over all ways, there and back, and the ratios of each to the direct one.

use anyhow::{Context as _, Result};

use super::{
    Route, Way,
    worker::{Order, Sample},
};
use crate::bench::{
    Effort,
    measure::{median, spread},
    report::Row,
};

/// Halves of the direct way may differ by this much; more, and something else ran on the machine.
const STEADY: f64 = 0.10;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// L1.
    Connections,
    /// L2.
    Requests,
}

/// Both halves of a round, of one way.
type Halves = [Sample; 2];

impl Kind {
    /// What a pair does in half a round: about a tenth of a second.
    const fn order(self, effort: Effort) -> Order {
        match self {
            Self::Connections => Order::Connections(effort.at_most(2_500, 20)),
            Self::Requests => Order::Requests(effort.at_most(10_000, 50)),
        }
    }

    const fn rounds(effort: Effort) -> usize {
        match effort {
            Effort::Full => 20,
            Effort::Short => 5,
            Effort::Small => 1,
        }
    }
}

/// Measures all `routes`, of which the first is the direct one.
pub fn measure(effort: Effort, kind: Kind, routes: &mut [Route]) -> Result<Vec<Row>> {
    let order = kind.order(effort);
    let mut ask = |route: &mut Route| {
        route.pair.order(order).with_context(|| format!("{kind:?}, {}", route.way.name()))
    };
    // What happens once (neighbours, buckets of hashes) is not what is measured.
    for route in routes.iter_mut() {
        ask(route)?;
    }
    let mut samples: Vec<Vec<Halves>> = vec![Vec::new(); routes.len()];
    for _ in 0..Kind::rounds(effort) {
        let first = routes.iter_mut().map(&mut ask).collect::<Result<Vec<_>>>()?;
        let second = routes.iter_mut().rev().map(&mut ask).collect::<Result<Vec<_>>>()?;
        for ((of_way, first), second) in samples.iter_mut().zip(first).zip(second.into_iter().rev()) {
            of_way.push([first, second]);
        }
    }
    let Some((direct, others)) = samples.split_first() else { return Ok(Vec::new()) };
    let ways = routes.iter().skip(1).map(|route| route.way);
    Ok(ways.zip(others).flat_map(|(way, of_way)| rows(kind, way, of_way, direct)).collect())
}

/// What is taken from a sample.
struct Figure {
    what: &'static str,
    unit: &'static str,
    of: fn(&Sample) -> f64,
}

const RATE: Figure = Figure { what: "connections on one processor", unit: "/s", of: |s| 1e9 / s.wall_ns };
const CPU: Figure = Figure { what: "CPU per connection", unit: "ns", of: |s| s.cpu_ns };
const P50: Figure = Figure { what: "p50", unit: "ns", of: |s| s.p50_ns };
const P99: Figure = Figure { what: "p99", unit: "ns", of: |s| s.p99_ns };

fn rows(kind: Kind, way: Way, of_way: &[Halves], direct: &[Halves]) -> Vec<Row> {
    let row = |id, what: &str, figure: Figure| {
        row(id, format!("{what}, {}: {}", way.name(), figure.what), &figure, of_way, direct)
    };
    match kind {
        Kind::Connections => {
            let what = "connect, one byte, close";
            vec![row("L1", what, CPU), row("L1", what, RATE)]
        }
        Kind::Requests => {
            let what = "request and response";
            vec![row("L2", what, P50), row("L2", what, P99)]
        }
    }
}

fn row(id: &'static str, what: String, figure: &Figure, of_way: &[Halves], direct: &[Halves]) -> Row {
    let c = compare(of_way, direct, figure.of);
    let row = Row::value(id, what, figure.unit, c.ours);
    let row = Row {
        baseline: Some(c.baseline),
        ratio: Some(c.ratio),
        rounds: of_way.len() as u32,
        spread: Some(c.spread),
        ..row
    };
    if c.steady { row } else { row.noted("unsteady: the direct way drifted by over 10 %") }
}

/// A way beside the direct one.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Comparison {
    ours: f64,
    baseline: f64,
    /// Median of the ratios of each round.
    ratio: f64,
    /// Of these ratios: distance of the quartiles, as a part of the median.
    spread: f64,
    steady: bool,
}

fn compare(ours: &[Halves], direct: &[Halves], of: fn(&Sample) -> f64) -> Comparison {
    let half = |all: &[Halves], i: usize| all.iter().map(|h| of(&h[i])).collect::<Vec<_>>();
    let mean = |h: &Halves| (of(&h[0]) + of(&h[1])) / 2.0;
    let ratios: Vec<f64> = ours.iter().zip(direct).map(|(ours, direct)| mean(ours) / mean(direct)).collect();
    let (first, last) = (median(&half(direct, 0)), median(&half(direct, 1)));
    let all = |of_way: &[Halves]| median(&of_way.iter().map(mean).collect::<Vec<_>>());
    Comparison {
        ours: all(ours),
        baseline: all(direct),
        ratio: median(&ratios),
        spread: spread(&ratios),
        steady: (first - last).abs() <= STEADY * first.min(last),
    }
}

//! Rounds over all ways, there and back, and the ratios of each to the direct one.

use anyhow::{Context as _, Result};

use super::{
    CRR, RULES, Route, Way,
    worker::{Order, Sample, Work},
};
use crate::bench::{
    Effort,
    kube_proxy::Mode,
    measure::{median, spread},
    report::Row,
};

/// Halves of the direct way may differ by this much; more, and something else ran on the machine.
const STEADY: f64 = 0.10;
const UNSTEADY: &str = "unsteady: the direct way drifted by over 10 %";

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// L1.
    Connections,
    /// L2.
    Requests,
    /// Both, on a processor each.
    ConnectionsApart,
    RequestsApart,
}

/// Both halves of a round, of one way.
type Halves = [Sample; 2];

impl Kind {
    /// Of the item, and of what is done.
    pub const fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Connections => ("L1", CRR),
            Self::Requests => ("L2", "request and response"),
            Self::ConnectionsApart => ("L1", "on two processors: connect, one byte, close"),
            Self::RequestsApart => ("L2", "on two processors: request and response"),
        }
    }

    /// What a pair does in half a round: less than a tenth of a second.
    pub fn order(self, effort: Effort) -> Order {
        let connections = |n| Work::Connections(effort.at_most(n, 20));
        let requests = |n| Work::Requests(effort.at_most(n, 50));
        match self {
            Self::Connections => Order { work: connections(1_200), apart: false },
            Self::Requests => Order { work: requests(8_000), apart: false },
            Self::ConnectionsApart => Order { work: connections(200), apart: true },
            Self::RequestsApart => Order { work: requests(1_000), apart: true },
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
    let ways: Vec<Way> = routes.iter().map(|route| route.way).collect();
    Ok(rows(kind, &Results { ways: &ways, samples: &samples }))
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

/// Of all ways.
struct Results<'a> {
    ways: &'a [Way],
    samples: &'a [Vec<Halves>],
}

/// Ours first.
fn rows(kind: Kind, results: &Results) -> Vec<Row> {
    let (ours, others): (Vec<Way>, Vec<Way>) =
        results.ways.iter().partition(|way| matches!(way, Way::Sockets | Way::Packets));
    let others = others.into_iter().filter(|way| *way != Way::Direct);
    let mut rows = Vec::new();
    for way in ours.into_iter().chain(others) {
        let against = |base, figure: &_| results.row(kind, (way, base), figure);
        match kind {
            Kind::Connections => {
                let row = against(Way::Direct, &CPU);
                rows.extend(row.map(|row| match way {
                    Way::Sockets => at_least(row, "direct / ours", 0.98),
                    Way::Packets => at_least(row, "direct / ours", 0.95),
                    _ => row,
                }));
                rows.extend(against(Way::Direct, &RATE));
            }
            Kind::ConnectionsApart => rows.extend(against(Way::Direct, &P50)),
            Kind::Requests | Kind::RequestsApart => {
                let [p50, p99] = [&P50, &P99].map(|figure| against(Way::Direct, figure));
                // Waking up a processor takes so long, and so differently, that a ratio of 1.02 is not to be told from 1.
                let is_judged = kind == Kind::Requests && matches!(way, Way::Sockets | Way::Packets);
                let judged = |row: Row, most| if is_judged { row.ratio_at_most(most) } else { row };
                rows.extend(p50.map(|row| judged(row, 1.02)));
                rows.extend(p99.map(|row| judged(row, 1.05)));
            }
        }
    }
    if kind == Kind::Connections {
        rows.extend(beside_rules(results));
    }
    rows
}

/// Ours beside kube-proxy's rules for few and for many Services.
fn beside_rules(results: &Results) -> Vec<Row> {
    let [few, .., many] = RULES;
    let is_shown = |way: &&Way| matches!(way, Way::Rules(_, services) if [few, many].contains(services));
    let mut rows = Vec::new();
    for way in [Way::Sockets, Way::Packets] {
        for rules in results.ways.iter().filter(is_shown) {
            let row = results.row(Kind::Connections, (way, *rules), &CPU);
            // Never below these: the smallest cluster is where they do best.
            let is_judged = *rules == Way::Rules(Mode::Iptables, RULES[0]);
            rows.extend(row.map(|row| if is_judged { row.ratio_at_most(1.0) } else { row }));
        }
    }
    rows
}

/// Bars of rates, for what is taken in time: the other way round.
fn at_least(row: Row, what: &str, least: f64) -> Row {
    let met = row.ratio.map(|ratio| 1.0 / ratio >= least);
    Row { bar: format!("{what} >= {least}"), met, ..row }
}

impl Results<'_> {
    fn of(&self, way: Way) -> Option<&[Halves]> {
        let at = self.ways.iter().position(|w| *w == way)?;
        self.samples.get(at).map(Vec::as_slice)
    }

    /// One way beside another one. None if either was not measured.
    fn row(&self, kind: Kind, (way, base): (Way, Way), figure: &Figure) -> Option<Row> {
        let (ours, direct) = (self.of(way)?, self.of(Way::Direct)?);
        let c = compare(ours, self.of(base)?, figure.of);
        let (id, what) = kind.names();
        let beside = if base == Way::Direct { String::new() } else { format!(" against {}", base.name()) };
        let what = format!("{what}, {}{beside}: {}", way.name(), figure.what);
        let row = Row {
            baseline: Some(c.baseline),
            ratio: Some(c.ratio),
            rounds: ours.len() as u32,
            spread: Some(c.spread),
            ..Row::value(id, what, figure.unit, c.ours)
        };
        Some(if is_steady(direct, figure.of) { row } else { row.noted(UNSTEADY) })
    }
}

/// A way beside another one.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Comparison {
    ours: f64,
    baseline: f64,
    /// Median of the ratios of each round.
    ratio: f64,
    /// Of these ratios: distance of the quartiles, as a part of the median.
    spread: f64,
}

fn compare(ours: &[Halves], base: &[Halves], of: fn(&Sample) -> f64) -> Comparison {
    let mean = |h: &Halves| (of(&h[0]) + of(&h[1])) / 2.0;
    let ratios: Vec<f64> = ours.iter().zip(base).map(|(ours, base)| mean(ours) / mean(base)).collect();
    let all = |of_way: &[Halves]| median(&of_way.iter().map(mean).collect::<Vec<_>>());
    Comparison { ours: all(ours), baseline: all(base), ratio: median(&ratios), spread: spread(&ratios) }
}

/// Whether the direct way was as good on the way there as on the way back.
fn is_steady(direct: &[Halves], of: fn(&Sample) -> f64) -> bool {
    let half = |i: usize| median(&direct.iter().map(|halves| of(&halves[i])).collect::<Vec<_>>());
    let (first, last) = (half(0), half(1));
    (first - last).abs() <= STEADY * first.min(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn halves(first: f64, second: f64) -> Halves {
        [first, second].map(|ns| Sample {
            cpu_ns: ns,
            wall_ns: ns,
            p50_ns: ns,
            p99_ns: ns,
            accepted: 1,
            answered: 1,
        })
    }

    #[test]
    fn ratios_are_taken_in_each_round() {
        // The machine gets slower by half from round to round; the way takes a tenth more in each.
        let direct = [halves(10.0, 10.0), halves(14.5, 15.5), halves(22.0, 23.0)];
        let ours = [halves(11.0, 11.0), halves(16.0, 17.0), halves(24.0, 25.5)];
        let c = compare(&ours, &direct, CPU.of);
        assert!((c.ratio - 1.1).abs() < 1e-9 && c.spread < 1e-9, "{c:?}");
        assert_eq!((c.ours, c.baseline), (16.5, 15.0));
        assert!(is_steady(&direct, CPU.of));
        assert!(!is_steady(&[halves(10.0, 11.5)], CPU.of));
    }

    #[test]
    fn bars_of_rates_hold_for_times_the_other_way_round() {
        let bar = |ours| at_least(Row::value("L1", "", "ns", ours).against(100.0), "direct / ours", 0.95);
        assert_eq!(bar(105.0).met, Some(true));
        assert_eq!(bar(106.0).met, Some(false));
        assert_eq!(bar(105.0).bar, "direct / ours >= 0.95");
    }
}

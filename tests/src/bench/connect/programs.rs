//! What of a connection is our programs: how often each runs, and how long, as the kernel counts it (Linux 5.8). Taken
//! apart from the rounds, since counting costs as much as a small program.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use aya::{
    programs::loaded_programs,
    sys::{Stats, enable_stats},
};

use super::{Route, Way, rounds::Kind, worker::Work};
use crate::bench::{Effort, report::Row};

/// Runs and ns.
#[derive(Clone, Copy, Debug, Default)]
struct Runs {
    count: u64,
    ns: u64,
}

/// Of all programs of the machine, by id; other than ours rest while ours are looked at, or have other names.
fn all() -> Result<BTreeMap<u32, (String, Runs)>> {
    let mut all = BTreeMap::new();
    for program in loaded_programs() {
        // One that went away meanwhile.
        let Ok(info) = program else { continue };
        let runs = Runs { count: info.run_count(), ns: info.run_time().as_nanos() as u64 };
        all.insert(info.id(), (info.name_as_str().unwrap_or_default().to_owned(), runs));
    }
    Ok(all)
}

/// What our programs take of each connection or request, where there are any.
pub fn share(effort: Effort, kind: Kind, routes: &mut [Route]) -> Result<Vec<Row>> {
    let _counting = enable_stats(Stats::RunTime).context("cannot count runs of programs")?;
    let mut rows = Vec::new();
    for route in routes.iter_mut().filter(|route| matches!(route.way, Way::Sockets | Way::Packets)) {
        let order = kind.order(effort);
        let (Work::Connections(n) | Work::Requests(n)) = order.work;
        let before = all()?;
        route.pair.order(order)?;
        let mut by_name = BTreeMap::<String, Runs>::new();
        for (id, (name, after)) in all()? {
            let Some((_, before)) = before.get(&id) else { continue };
            let runs = by_name.entry(name).or_default();
            runs.count += after.count - before.count;
            runs.ns += after.ns - before.ns;
        }
        // Other traffic (neighbours, the agent's health) is less than one packet for each.
        by_name.retain(|_, runs| runs.count >= u64::from(n));
        rows.push(said(kind, route.way, n, &by_name));
    }
    Ok(rows)
}

fn said(kind: Kind, way: Way, n: u32, by_name: &BTreeMap<String, Runs>) -> Row {
    let (id, what) = kind.names();
    let each = |count: u64| count as f64 / f64::from(n);
    let parts: Vec<String> = by_name
        .iter()
        .map(|(name, r)| format!("{name} {:.1} x {:.0} ns", each(r.count), r.ns as f64 / r.count as f64))
        .collect();
    let ns = each(by_name.values().map(|runs| runs.ns).sum());
    Row::value(id, format!("{what}, {}: of it in our programs", way.name()), "ns", ns)
        .noted(&parts.join(", "))
}

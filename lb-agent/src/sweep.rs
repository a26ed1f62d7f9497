//! Expiry of flows: walks the flow tables, judges both entries of each flow together, deletes both.
//!
//! The tables never evict, and the programs delete only a connection that has ended and whose ports are wanted again, so
//! everything else is freed here. [`judge`] holds the rules, [`Schedule`] says when to look, [`Sweeper`] does it.

mod judge;
mod retired;
mod schedule;

use std::{
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytemuck::Pod;
pub use judge::{Judgement, Rules, judge};
use lb_common::{
    Addr,
    addr::ToIp,
    conntrack::{Flow, Timeouts, flags},
    frontend::ServiceRecord,
    maps::name,
    tuple::Tuple,
    verdict::Counter,
};
use retired::{Serving, purge};
pub use schedule::{Depth, Schedule};
use tokio::sync::mpsc;

use crate::{
    maps::{ClockError, Counters, FlowTable, FlowTables, KernelClock, MapError, MmapArray, read_error},
    metrics::kube_proxy::KubeProxy,
    plan::{Retired, op::Family},
};

#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    #[error(transparent)]
    Clock(#[from] ClockError),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("cannot delete a flow")]
    Delete(#[source] io::Error),
    #[error("the sweep was cut off")]
    Cancelled(#[source] tokio::task::JoinError),
}

/// How many entries the flow tables had when they were last walked. Counting them takes a walk.
#[derive(Debug, Default)]
pub struct FlowEntries {
    pub v4: AtomicU64,
    pub v6: AtomicU64,
}

/// What a pass over one table found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Entries seen and left in place.
    pub entries: u64,
    /// Flows deleted because they were silent.
    pub expired: u64,
    /// Entries deleted because their other half was missing.
    pub orphans: u64,
}

/// Deletes flows whose time is over.
pub struct Sweeper {
    clock: KernelClock,
    flows: FlowTables,
    counters: Counters,
    services: MmapArray<ServiceRecord>,
    timeouts: Timeouts,
    entries: Arc<FlowEntries>,
    metrics: Option<KubeProxy>,
}

impl Sweeper {
    /// Opens what is pinned below `dir` (`<state_dir>/v<LAYOUT_VERSION>`).
    pub fn open(dir: &Path, timeouts: Timeouts, entries: Arc<FlowEntries>) -> Result<Self, SweepError> {
        let maps = dir.join("maps");
        Ok(Self {
            clock: KernelClock::open(dir)?,
            flows: FlowTables::open(&maps)?,
            counters: Counters::open(&maps)?,
            services: MmapArray::open(&maps, name::SERVICES)?,
            timeouts,
            entries,
            metrics: None,
        })
    }

    /// Has it count there what it purges.
    #[must_use]
    pub fn counting(self, metrics: KubeProxy) -> Self {
        Self { metrics: Some(metrics), ..self }
    }

    /// One pass over both tables. Blocks.
    pub fn pass(&self, depth: Depth, pressure: bool) -> Result<[Pass; 2], SweepError> {
        let timeouts = if pressure { judge::under_pressure(self.timeouts) } else { self.timeouts };
        let rules = Rules { timeouts, jiffies_per_s: self.clock.jiffies_per_s(), now: self.clock.jiffies()? };
        let v4 = sweep(&self.flows.v4, &rules, depth)?;
        self.entries.v4.store(v4.entries, Ordering::Relaxed);
        let v6 = sweep(&self.flows.v6, &rules, depth)?;
        self.entries.v6.store(v6.entries, Ordering::Relaxed);
        Ok([v4, v6])
    }

    /// Deletes the UDP flows of these records to backends that no longer serve, and those of records that nobody uses; how
    /// many there were. Blocks.
    pub fn purge(&self, retired: &[Retired]) -> Result<u64, SweepError> {
        let now = self.clock.jiffies()?;
        let in_use = |id| self.services.load(id).is_some_and(|record| record.in_use != 0);
        let v4 = Serving::of(Family::V4, retired, &in_use, now);
        let v4 = self.purge_table(&self.flows.v4, &v4, Family::V4)?;
        let v6 = Serving::of(Family::V6, retired, &in_use, now);
        Ok(v4 + self.purge_table(&self.flows.v6, &v6, Family::V6)?)
    }

    fn purge_table<A: Addr + ToIp>(
        &self,
        table: &FlowTable<A>,
        serving: &Serving<'_>,
        family: Family,
    ) -> Result<u64, SweepError>
    where
        Tuple<A>: Pod,
        Flow<A>: Pod,
    {
        let begun = Instant::now();
        let flows = purge(table, serving)?;
        if let Some(metrics) = &self.metrics {
            metrics.purged(family, begun.elapsed(), flows);
        }
        Ok(flows)
    }

    /// Sweeps for ever, as often as the tables need it, and as soon as backends are `retired`.
    pub async fn run(self, mut retired: mpsc::UnboundedReceiver<Vec<Retired>>) {
        let mut schedule = Schedule::new(self.flows.v4.capacity().min(self.flows.v6.capacity()));
        let sweeper = Arc::new(self);
        let mut failing = false;
        let mut tick = tokio::time::interval(Schedule::TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut records = Vec::new();
        loop {
            let result = tokio::select! {
                _ = tick.tick() => Self::turn(&sweeper, &mut schedule).await,
                1.. = retired.recv_many(&mut records, usize::MAX) => {
                    Self::retire(&sweeper, std::mem::take(&mut records).concat()).await
                }
            };
            match result {
                Ok(()) => failing = false,
                // Once per change: the next tick tries again.
                Err(e) if !failing => {
                    failing = true;
                    tracing::error!(error = %crate::chain(&e), "cannot expire flows; trying again");
                }
                Err(_) => {}
            }
        }
    }

    async fn retire(sweeper: &Arc<Self>, retired: Vec<Retired>) -> Result<(), SweepError> {
        let worker = sweeper.clone();
        let records = retired.len();
        let begun = Instant::now();
        let purge = tokio::task::spawn_blocking(move || worker.purge(&retired));
        let flows = purge.await.map_err(SweepError::Cancelled)??;
        tracing::debug!(records, flows, "flows to retired UDP backends deleted");
        // Changes that come meanwhile share the next walk; walks of large tables leave room for other work.
        tokio::time::sleep(begun.elapsed() * 2).await;
        Ok(())
    }

    async fn turn(sweeper: &Arc<Self>, schedule: &mut Schedule) -> Result<(), SweepError> {
        let created = sweeper.counters.sum(Counter::FlowCreated)?;
        let Some(due) = schedule.due(Instant::now(), created) else { return Ok(()) };
        let worker = sweeper.clone();
        let begun = Instant::now();
        let pass = tokio::task::spawn_blocking(move || worker.pass(due.depth, due.pressure));
        let [v4, v6] = pass.await.map_err(SweepError::Cancelled)??;
        let took = begun.elapsed();
        schedule.done(Instant::now(), took, v4.entries.max(v6.entries), created);
        log(v4, v6, took, due.pressure);
        Ok(())
    }
}

fn log(v4: Pass, v6: Pass, took: Duration, pressure: bool) {
    tracing::debug!(
        entries4 = v4.entries,
        entries6 = v6.entries,
        expired = v4.expired + v6.expired,
        orphans = v4.orphans + v6.orphans,
        pressure,
        ?took,
        "flows swept"
    );
}

/// One pass over one table, chunk by chunk.
pub fn sweep<A: Addr>(table: &FlowTable<A>, rules: &Rules, depth: Depth) -> Result<Pass, SweepError>
where
    Tuple<A>: Pod,
    Flow<A>: Pod,
{
    let mut pass = Pass::default();
    let mut walk = table.walk();
    while let Some((keys, flows)) = walk.next_chunk().map_err(read_error::<A>)? {
        for (key, flow) in keys.iter().zip(flows) {
            let verdict = if rules.is_clearly_alive(key.proto, flow, depth) {
                Judgement::Keep
            } else {
                look_closer(table, rules, key, flow)?
            };
            match verdict {
                Judgement::Keep => pass.entries += 1,
                Judgement::Expired => pass.expired += 1,
                Judgement::Orphan => pass.orphans += 1,
                Judgement::Gone => {}
            }
        }
    }
    Ok(pass)
}

/// Judges an entry by both halves, and deletes what is over after another look: a packet may have refreshed it since the
/// walk copied it.
fn look_closer<A: Addr>(
    table: &FlowTable<A>,
    rules: &Rules,
    key: &Tuple<A>,
    copied: &Flow<A>,
) -> Result<Judgement, SweepError>
where
    Tuple<A>: Pod,
    Flow<A>: Pod,
{
    let partner_of = |flow: &Flow<A>| {
        let key = flow.rewritten(key.proto).reversed();
        table.get(&key).map_err(read_error::<A>).map(|partner| (key, partner))
    };
    if judge(rules, key.proto, copied, partner_of(copied)?.1.as_ref()) == Judgement::Keep {
        return Ok(Judgement::Keep);
    }
    let Some(flow) = table.get(key).map_err(read_error::<A>)? else { return Ok(Judgement::Gone) };
    let (partner_key, partner) = partner_of(&flow)?;
    let verdict = judge(rules, key.proto, &flow, partner.as_ref());
    match verdict {
        Judgement::Keep | Judgement::Gone => {}
        Judgement::Orphan => drop(table.delete(key).map_err(SweepError::Delete)?),
        Judgement::Expired => {
            // The client's entry goes first: a packet that comes in between finds no flow and starts a new one, instead
            // of one half being translated for a flow that no longer exists.
            let (forward, reply) =
                if flow.flags & flags::REPLY == 0 { (key, &partner_key) } else { (&partner_key, key) };
            table.delete(forward).map_err(SweepError::Delete)?;
            let judged = if flow.flags & flags::REPLY == 0 { partner.as_ref() } else { Some(&flow) };
            let created = judged.map(|r| r.created);
            // That new one takes over the entry of the answers, with its own beginning.
            if table.get(reply).map_err(read_error::<A>)?.map(|r| r.created) == created {
                table.delete(reply).map_err(SweepError::Delete)?;
                // Should it have begun since the look: its next packet starts it once more, with both halves.
                table.delete(forward).map_err(SweepError::Delete)?;
            }
        }
    }
    Ok(verdict)
}

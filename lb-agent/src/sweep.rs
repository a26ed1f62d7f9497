//! What becomes of flows and sockets: those that are silent expire, those whose backend is gone find a new one.
//!
//! The tables never evict, and the programs delete only a connection that has ended and whose ports are wanted again, so
//! everything else is freed here: [`judge()`] holds the rules, [`Schedule`] says when to look, [`Sweeper`] walks the tables,
//! judges both entries of each flow together, deletes both. `retired`, `gone` and `sockets` are about backends that
//! are no endpoints any more.

mod gone;
mod judge;
mod retired;
mod schedule;
mod sockets;

use std::{
    io,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytemuck::Pod;
use gone::Connections;
pub use judge::{Judgement, Rules, judge};
use lb_common::{
    Addr, V4, V6,
    addr::ToIp,
    conntrack::{Flow, Timeouts, flags},
    frontend::ServiceRecord,
    maps::name,
    tuple::Tuple,
    verdict::Counter,
};
use retired::{Serving, purge};
pub use schedule::{Depth, Schedule};
use sockets::Sockets;
use tokio::sync::mpsc;

use crate::{
    maps::{
        ClockError, Counters, FlowTable, FlowTables, KernelClock, MapError, MmapArray, ServiceCounters,
        read_error,
    },
    metrics::kube_proxy::KubeProxy,
    plan::{
        Departures,
        op::{Family, Protocol},
    },
};

#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    #[error(transparent)]
    Clock(#[from] ClockError),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("cannot delete a flow")]
    Delete(#[source] io::Error),
    #[error("cannot mark a flow whose backend is gone")]
    Mark(#[source] io::Error),
    #[error("cannot list sockets")]
    Diag(#[source] io::Error),
    #[error("cannot destroy a socket whose backend is gone")]
    Destroy(#[source] io::Error),
    #[error("the sweep was cut off")]
    Cancelled(#[source] tokio::task::JoinError),
}

/// Records whose counts are read, one system call each, in less time than another thread takes to wake up.
const FEW: usize = 32;

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

/// What is watched because its backend is no endpoint any more.
struct Watch {
    v4: Connections<V4>,
    v6: Connections<V6>,
    sockets: Sockets,
}

impl Watch {
    fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty() && !self.sockets.is_watching()
    }
}

/// Deletes flows whose time is over.
pub struct Sweeper {
    clock: KernelClock,
    flows: FlowTables,
    services: MmapArray<ServiceRecord>,
    counters: Counters,
    served: ServiceCounters,
    timeouts: Timeouts,
    entries: Arc<FlowEntries>,
    reset_gone: bool,
    /// Locked by one blocking thread at a time, all of which [`Self::run`] waits for.
    watch: Mutex<Watch>,
    metrics: Option<KubeProxy>,
}

impl Sweeper {
    /// Opens what is pinned below `dir` (`<state_dir>/v<LAYOUT_VERSION>`). `reset_gone`: clients of TCP backends that are
    /// gone for good are to get a reset.
    pub fn open(
        dir: &Path,
        timeouts: Timeouts,
        reset_gone: bool,
        entries: Arc<FlowEntries>,
    ) -> Result<Self, SweepError> {
        let maps = dir.join("maps");
        let sockets = Sockets::open(&maps, reset_gone)?;
        Ok(Self {
            reset_gone,
            watch: Mutex::new(Watch { v4: Connections::default(), v6: Connections::default(), sockets }),
            clock: KernelClock::open(dir)?,
            flows: FlowTables::open(&maps)?,
            services: MmapArray::open(&maps, name::SERVICES)?,
            counters: Counters::open(&maps)?,
            served: ServiceCounters::open(&maps)?,
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

    /// Looks for flows and sockets that lead to retired backends: deletes those of UDP, begins to watch those of TCP. Returns
    /// how many flows and sockets it ended. Blocks.
    pub fn purge(&self, Departures { retired, recovered }: &Departures) -> Result<(u64, u64), SweepError> {
        let now = Instant::now();
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        let Watch { v4, v6, sockets } = &mut *watch;
        v4.endpoints(Family::V4, retired);
        v6.endpoints(Family::V6, retired);
        let sockets = sockets.retire(retired, now);
        // All of UDP; of TCP only what would be watched.
        let concerning = || {
            retired.iter().filter(|r| match r.protocol {
                Protocol::Udp => true,
                Protocol::Tcp => self.reset_gone,
                Protocol::Sctp => false,
            })
        };
        let until = self.clock.jiffies()?;
        // What cannot be read is left alone.
        let in_use =
            |id| self.services.load(id).map_or(true, |found| found.is_some_and(|record| record.in_use != 0));
        let in_use = recovered.then_some(&in_use as &dyn Fn(u32) -> bool);
        let of = |family| Serving::of(family, concerning(), in_use, until);
        let (serving4, serving6) = (of(Family::V4), of(Family::V6));
        let flows = self.purge_table(&self.flows.v4, &serving4, |k, f| v4.watch(k, f, until, now))?
            + self.purge_table(&self.flows.v6, &serving6, |k, f| v6.watch(k, f, until, now))?;
        Ok((flows, sockets?))
    }

    /// Without the records that nobody ever opened a flow or socket to: most of a large cluster's on any one node. A walk
    /// through the tables takes longer than tens of changes.
    ///
    /// A record without endpoints may be gone, and its id somebody else's, whose counts begin anew.
    pub fn concerned(&self, departures: Departures) -> Departures {
        let Departures { mut retired, recovered } = departures;
        // What cannot be read may be anything.
        let is_used = |id| self.served.sum(id).map_or(true, |s| s.connections != 0 || s.packets != 0);
        retired.retain(|r| recovered || r.serving.is_empty() || is_used(r.service));
        Departures { retired, recovered }
    }

    fn purge_table<A: Addr + ToIp>(
        &self,
        table: &FlowTable<A>,
        serving: &Serving<'_>,
        connection: impl FnMut(&Tuple<A>, &Flow<A>),
    ) -> Result<u64, SweepError>
    where
        Tuple<A>: Pod,
        Flow<A>: Pod,
    {
        if serving.is_empty() {
            return Ok(0);
        }
        let begun = Instant::now();
        let flows = purge(table, serving, connection)?;
        if let Some(metrics) = self.metrics.as_ref().filter(|_| serving.has_udp()) {
            let family = if A::IS_V6 { Family::V6 } else { Family::V4 };
            metrics.purged(family, begun.elapsed(), flows);
        }
        Ok(flows)
    }

    /// Looks once at everything that is watched. Returns how many flows were marked and sockets destroyed. Blocks.
    pub fn look(&self) -> Result<(u64, u64), SweepError> {
        let now = Instant::now();
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        let per_s = self.clock.jiffies_per_s();
        let v4 = watch.v4.look(&self.flows.v4, per_s, now);
        let v6 = watch.v6.look(&self.flows.v6, per_s, now);
        let sockets = watch.sockets.look(now);
        Ok((v4? + v6?, sockets?))
    }

    fn is_watching(&self) -> bool {
        !self.watch.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Sweeps for ever, as often as the tables need it, and as soon as endpoints change.
    pub async fn run(self, mut retired: mpsc::UnboundedReceiver<Departures>) {
        let mut schedule = Schedule::new(self.flows.v4.capacity().min(self.flows.v6.capacity()));
        let sweeper = Arc::new(self);
        let mut failing = false;
        let mut tick = tokio::time::interval(Schedule::TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut records = Vec::new();
        let mut rest_until = Instant::now();
        let mut result = Self::begin(&sweeper).await;
        loop {
            match result {
                Ok(()) => failing = false,
                // Once per change: the next tick tries again.
                Err(e) if !failing => {
                    failing = true;
                    tracing::error!(error = %crate::chain(&e), "cannot sweep flows and sockets; trying again");
                }
                Err(_) => {}
            }
            result = tokio::select! {
                _ = tick.tick() => {
                    let looked = Self::look_if_due(&sweeper, &mut rest_until).await;
                    Self::turn(&sweeper, &mut schedule).await.and(looked)
                }
                1.. = retired.recv_many(&mut records, usize::MAX) => {
                    Self::retire(&sweeper, Departures::together(std::mem::take(&mut records))).await
                }
            };
        }
    }

    async fn begin(sweeper: &Arc<Self>) -> Result<(), SweepError> {
        sweeper
            .blocking(|s| s.watch.lock().unwrap_or_else(PoisonError::into_inner).sockets.check_support())
            .await
    }

    /// Works on a thread where waiting for the kernel is allowed.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Result<T, SweepError> {
        let worker = self.clone();
        tokio::task::spawn_blocking(move || work(&worker)).await.map_err(SweepError::Cancelled)
    }

    async fn retire(sweeper: &Arc<Self>, departures: Departures) -> Result<(), SweepError> {
        let begun = Instant::now();
        let few = departures.retired.len() <= FEW;
        let departures = if few {
            sweeper.concerned(departures)
        } else {
            sweeper.blocking(move |s| s.concerned(departures)).await?
        };
        if departures.is_empty() {
            return Ok(());
        }
        let records = departures.retired.len();
        let (flows, sockets) = sweeper.blocking(move |s| s.purge(&departures)).await??;
        tracing::debug!(records, flows, sockets, "flows and sockets to retired UDP backends ended");
        // Changes that come meanwhile share the next walk; walks of large tables leave room for other work.
        tokio::time::sleep(begun.elapsed() * schedule::REST).await;
        Ok(())
    }

    /// A tick is a second, so this is a look per second, and less often if looks take long.
    async fn look_if_due(sweeper: &Arc<Self>, rest_until: &mut Instant) -> Result<(), SweepError> {
        let begun = Instant::now();
        if begun < *rest_until || !sweeper.is_watching() {
            return Ok(());
        }
        let (flows, sockets) = sweeper.blocking(|s| s.look()).await??;
        *rest_until = Instant::now() + begun.elapsed() * schedule::REST;
        if flows + sockets > 0 {
            tracing::info!(flows, sockets, "connections to backends that are gone for good are reset");
        }
        Ok(())
    }

    async fn turn(sweeper: &Arc<Self>, schedule: &mut Schedule) -> Result<(), SweepError> {
        let created = sweeper.counters.sum(Counter::FlowCreated)?;
        let Some(due) = schedule.due(Instant::now(), created) else { return Ok(()) };
        let begun = Instant::now();
        let [v4, v6] = sweeper.blocking(move |s| s.pass(due.depth, due.pressure)).await??;
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
            table.delete_silent(forward).map_err(SweepError::Delete)?;
            let judged = if flow.flags & flags::REPLY == 0 { partner.as_ref() } else { Some(&flow) };
            let created = judged.map(|r| r.created);
            // That new one takes over the entry of the answers, with its own beginning.
            if table.get(reply).map_err(read_error::<A>)?.map(|r| r.created) == created {
                table.delete_silent(reply).map_err(SweepError::Delete)?;
                // Should it have begun since the look: its next packet starts it once more, with both halves.
                table.delete(forward).map_err(SweepError::Delete)?;
            }
        }
    }
    Ok(verdict)
}

//! The loop: objects in, map operations out.
//!
//! [`Core`] holds the model, the planner and the maps, and does the work without waiting for anything but grace periods;
//! [`Reconciler`] feeds it, on a thread of its own where a turn may be long: it coalesces events, starts audits, tries again
//! after failures, and reports to health and metrics.

mod changes;
mod core;
mod intake;
mod later;
mod rejections;

use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

pub use core::{Core, Kernel, NodeRules, Outcome, SyncError};
use tokio::{
    sync::{Notify, mpsc, watch},
    task::{JoinError, JoinHandle},
    time::{MissedTickBehavior, interval, sleep, sleep_until, timeout},
};

use crate::{
    health::Status,
    maps, memory,
    metrics::Metrics,
    plan::{Departures, no_local::NoLocalEndpoints},
    source::Event,
};

/// Least time from the end of a turn to the next one: where changes come one after the other, they share turns.
const COALESCE: Duration = Duration::from_millis(1);
/// Most events taken in before they are programmed.
const BATCH: usize = 4096;
/// How often the loop shows that it is alive (health::PENDING_LIMIT is a minute).
const BEAT: Duration = Duration::from_secs(10);
/// How often the maps are compared with what they should hold (SEMANTICS I7: at most an hour).
const AUDIT: Duration = Duration::from_secs(3000);
/// First and longest pause after a failure.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(15);
/// Least time from the beginning of a grace period to that of the next one: where changes come one after the other, they
/// share grace periods, which other threads wait for.
const GRACE: Duration = Duration::from_millis(20);
/// How long the first plan waits for the node's addresses before it says so.
const ADDRESSES: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 5000 });

/// Why the loop ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the source of objects ended")]
    SourceEnded,
    #[error("the thread that programs the maps ended")]
    Cancelled(#[source] tokio::task::JoinError),
}

/// What the loop is connected to.
pub struct Wiring {
    pub events: mpsc::Receiver<Event>,
    /// The addresses of this network namespace.
    pub addresses: watch::Receiver<BTreeSet<IpAddr>>,
    /// Asks for an audit now.
    pub audit: Arc<Notify>,
    /// Records whose endpoints changed.
    pub retired: mpsc::UnboundedSender<Departures>,
    pub status: Arc<Status>,
    pub metrics: Arc<Metrics>,
}

/// The loop that owns everything that is planned and programmed.
pub struct Reconciler<K> {
    /// Always there between two turns.
    core: Option<Box<Core<K>>>,
    wiring: Wiring,
    node_name: String,
    retry: Retry,
    changes: changes::Changes,
    /// When the last turn ended.
    turned: Instant,
    /// The grace period that has begun.
    grace: Option<JoinHandle<()>>,
    /// None begins before.
    next_grace: tokio::time::Instant,
    /// The source has sent everything that it knew at start.
    listened: bool,
    /// As last told to the metrics.
    no_local: Option<NoLocalEndpoints>,
}

/// When to try again after a failure.
#[derive(Default)]
struct Retry {
    pause: Option<Duration>,
    at: Option<tokio::time::Instant>,
}

impl Retry {
    fn failed(&mut self) {
        let pause = self.pause.map_or(RETRY_FIRST, |p| (p * 2).min(RETRY_MAX));
        self.pause = Some(pause);
        self.at = Some(tokio::time::Instant::now() + pause);
    }
}

impl<K: Kernel + Send + 'static> Reconciler<K> {
    /// Runs until the source ends. Nothing is programmed before the source has sent everything it knew at start.
    pub async fn run(mut self) -> Result<(), Error> {
        self.listen().await?;
        self.await_addresses().await;
        self.queued();
        self.sync().await?;
        self.give_memory_back().await?;
        let mut beat = interval(BEAT);
        let mut audit = interval(AUDIT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        audit.set_missed_tick_behavior(MissedTickBehavior::Delay);
        audit.reset();
        let requested = self.wiring.audit.clone();
        loop {
            let (retry_at, grace_at) = (self.retry.at, self.grace_at()?);
            tokio::select! {
                event = self.wiring.events.recv() => {
                    self.take(event.ok_or(Error::SourceEnded)?)?;
                    self.drain().await?;
                    self.sync_unless_waiting().await?;
                }
                changed = self.wiring.addresses.changed() => {
                    if changed.is_err() {
                        // The watcher is gone with the rest of the agent, or will be started again by it.
                        sleep(BEAT).await;
                    }
                    self.sync_unless_waiting().await?;
                }
                _ = beat.tick() => self.wiring.status.beat(Instant::now()),
                _ = audit.tick() => self.audit().await?,
                () = requested.notified() => self.audit().await?,
                () = until(retry_at) => self.sync().await?,
                () = until(grace_at) => {}
                passed = passed(&mut self.grace) => {
                    passed.map_err(Error::Cancelled)?;
                    self.grace = None;
                    self.settle().await?;
                }
            }
            self.begin_grace()?;
        }
    }

    /// NodePorts need the node's addresses, which the device watcher tells once it has looked. Unknown is not none: a plan
    /// without them would take the NodePorts of an earlier run away.
    async fn await_addresses(&mut self) {
        let mut warned = false;
        while self.wiring.addresses.borrow().is_empty() {
            match timeout(ADDRESSES, self.wiring.addresses.changed()).await {
                // Told, perhaps that there is none; or nobody will tell any more.
                Ok(_) => break,
                Err(_) if !warned => {
                    warned = true;
                    tracing::warn!(
                        "the addresses of this node are still unknown: nothing is programmed yet, and what an earlier run \
                         programmed stays"
                    );
                }
                Err(_) => {}
            }
        }
    }

    /// Takes in what else has come, and what comes within a moment.
    async fn drain(&mut self) -> Result<(), Error> {
        let rested = self.turned.elapsed();
        if rested < COALESCE {
            sleep(COALESCE - rested).await;
        }
        for _ in 0..BATCH {
            match self.wiring.events.try_recv() {
                Ok(event) => drop(self.take(event)?),
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// After a failure everything is read again, which is too much work for every event: it waits for the retry.
    async fn sync_unless_waiting(&mut self) -> Result<(), Error> {
        if self.retry.at.is_none() { self.sync().await } else { Ok(()) }
    }

    async fn sync(&mut self) -> Result<(), Error> {
        // New addresses may concern every Service.
        let brief = !self.wiring.addresses.has_changed().unwrap_or(true) && self.core()?.is_brief();
        let addresses = self.wiring.addresses.borrow_and_update().clone();
        if brief {
            self.at_once(&addresses)
        } else {
            self.blocking(move |core| core.sync_early(&addresses)).await
        }
    }

    /// Another thread would take longer to wake up than the turn takes.
    fn at_once(&mut self, addresses: &BTreeSet<IpAddr>) -> Result<(), Error> {
        let begun = Instant::now();
        let result = self.core()?.sync_early(addresses);
        self.turned = Instant::now();
        self.report(self.turned - begun, result);
        Ok(())
    }

    /// Has the kernel say when no packet uses what was replaced, if anything was and its time has come.
    fn begin_grace(&mut self) -> Result<(), Error> {
        let now = tokio::time::Instant::now();
        if self.grace.is_none() && now >= self.next_grace && self.core()?.begin_grace() {
            self.next_grace = now + GRACE;
            self.grace = Some(tokio::task::spawn_blocking(maps::wait_for_packets));
        }
        Ok(())
    }

    /// When [`Self::begin_grace`] has something to do that it has not now.
    fn grace_at(&mut self) -> Result<Option<tokio::time::Instant>, Error> {
        let waits = self.grace.is_none() && self.core()?.needs_grace();
        Ok(waits.then_some(self.next_grace))
    }

    /// Stores only, so it waits for nothing.
    async fn settle(&mut self) -> Result<(), Error> {
        match self.core()?.settle() {
            Ok(outcome) => self.carried_out(outcome),
            Err(error) => self.failed(&error),
        }
        if self.core()?.is_dirty() { self.sync_unless_waiting().await } else { Ok(()) }
    }

    async fn audit(&mut self) -> Result<(), Error> {
        let addresses = self.wiring.addresses.borrow_and_update().clone();
        self.blocking(move |core| core.audit(&addresses)).await?;
        self.give_memory_back().await
    }

    /// After the first lists, and after everything was read again: most of what that took is free by now.
    async fn give_memory_back(&self) -> Result<(), Error> {
        tokio::task::spawn_blocking(memory::give_back).await.map_err(Error::Cancelled)
    }

    /// Works on a thread where waiting for the kernel is allowed.
    async fn blocking(
        &mut self,
        work: impl FnOnce(&mut Core<K>) -> Result<Outcome, SyncError> + Send + 'static,
    ) -> Result<(), Error> {
        let Some(mut core) = self.core.take() else { return Ok(()) };
        let begun = Instant::now();
        let task = tokio::task::spawn_blocking(move || {
            let result = work(&mut core);
            (core, result)
        });
        let (core, result) = task.await.map_err(Error::Cancelled)?;
        self.core = Some(core);
        self.turned = Instant::now();
        self.report(begun.elapsed(), result);
        Ok(())
    }

    fn report(&mut self, took: Duration, result: Result<Outcome, SyncError>) {
        let Wiring { status, metrics, .. } = &self.wiring;
        let (kube_proxy, now) = (metrics.kube_proxy(), SystemTime::now());
        status.beat(Instant::now());
        match result {
            Ok(mut outcome) => {
                self.retry = Retry::default();
                status.programmed(now);
                status.mark_ready();
                if outcome.ran {
                    metrics.synced(took, true);
                    kube_proxy.synced(took, Some(outcome.full));
                }
                kube_proxy.set_last_sync(now);
                if self.no_local.replace(outcome.no_local) != Some(outcome.no_local) {
                    kube_proxy.set_no_local(outcome.no_local);
                }
                self.changes.programmed(now, kube_proxy);
                metrics.set_rejected(std::mem::take(&mut outcome.rejected));
                self.carried_out(outcome);
            }
            Err(error) => {
                metrics.synced(took, false);
                kube_proxy.synced(took, None);
                self.failed(&error);
            }
        }
    }

    fn carried_out(&self, outcome: Outcome) {
        for (kind, count) in &outcome.operations {
            self.wiring.metrics.operations(kind, *count);
        }
        let departures = Departures { retired: outcome.retired, recovered: outcome.recovered };
        if !departures.is_empty() {
            // Without a sweeper the flows run into their timeouts.
            let _ = self.wiring.retired.send(departures);
        }
    }

    fn failed(&mut self, error: &SyncError) {
        self.retry.failed();
        tracing::error!(error = %crate::chain(error), "cannot program the maps; trying again");
    }
}

async fn passed(grace: &mut Option<JoinHandle<()>>) -> Result<(), JoinError> {
    match grace {
        Some(grace) => grace.await,
        None => std::future::pending().await,
    }
}

async fn until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
#[path = "reconcile/loop_tests.rs"]
mod tests;

//! The whole agent, from settings to its end: starts every part, connects them, waits for a signal.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use lb_common::{LAYOUT_VERSION, nat::PortRange};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{Notify, mpsc, oneshot, watch},
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    configz,
    datapath::{self, Datapath, Role},
    health::Status,
    healthcheck, host, http,
    maps::{Devices, MapError, Maps, Scrape},
    metrics::Metrics,
    plan::Departures,
    reconcile::{self, Core, NodeRules, Reconciler, Wiring},
    settings::Settings,
    source::{self, status::SourceStatus},
    sweep::{FlowEntries, SweepError, Sweeper},
};

/// Events that a source can be ahead of the loop.
const EVENTS: usize = 256;
/// Pause before devices are watched again after that failed.
const WATCH_AGAIN: Duration = Duration::from_secs(5);
/// How long expiry waits for devices at the start, at most.
const FLOWS_MOVE: Duration = Duration::from_secs(60);
/// How often the number of devices is told to the metrics.
const DEVICE_GAUGES: Duration = Duration::from_secs(5);

/// Why the agent ended. The data path stays in place in any case.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the data path cannot be set up")]
    Datapath(#[from] datapath::Error),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("flows cannot be expired")]
    Sweep(#[from] SweepError),
    #[error("objects cannot be read")]
    Source(#[from] source::Error),
    #[error(transparent)]
    Reconcile(#[from] reconcile::Error),
    #[error("signals cannot be received")]
    Signals(#[source] io::Error),
    #[error("a part of the agent ended unexpectedly")]
    Ended,
    #[error("a part of the agent broke down")]
    Broken(#[source] tokio::task::JoinError),
}

/// Runs the agent until it is told to stop (SIGTERM, SIGINT). SIGUSR1 asks for an audit of the maps.
pub async fn run(settings: Settings) -> Result<(), Error> {
    let signals = Signals::listen().map_err(Error::Signals)?;
    let settings = Arc::new(settings);
    let early = Early::start(&settings);
    let for_start = settings.clone();
    // Loading runs the verifier, which takes as long as large lists take to read, and seconds on a slow machine.
    let started = tokio::task::spawn_blocking(move || Datapath::start(&for_start)).await;
    let datapath = Arc::new(started.map_err(Error::Broken)??);
    let audit = early.audit.clone();
    let mut parts = early.complete(&settings, &datapath)?;
    tracing::info!(node = settings.node_name, state_dir = %settings.state_dir.display(), "running");
    let result = tokio::select! {
        signal = signals.wait(&audit) => {
            tracing::info!(signal, "stopping; Services stay as they are");
            Ok(())
        }
        ended = parts.join_next() => match ended {
            Some(Ok(Err(error))) => Err(error),
            Some(Err(error)) => Err(Error::Broken(error)),
            // None of the parts ends by itself.
            Some(Ok(Ok(()))) | None => Err(Error::Ended),
        },
    };
    // Ends at the next await; a plan that is being carried out is finished, as its thread is waited for.
    parts.shutdown().await;
    result
}

type Parts = JoinSet<Result<(), Error>>;

/// The agent while its kernel programs are being loaded: the source is listened to, and that is all.
struct Early {
    parts: Parts,
    /// What the reconciler waits for.
    maps: oneshot::Sender<Maps>,
    /// Listened to once there are devices.
    addresses: watch::Sender<BTreeSet<IpAddr>>,
    retired: mpsc::UnboundedReceiver<Departures>,
    health_checks: watch::Receiver<healthcheck::Desired>,
    audit: Arc<Notify>,
    status: Arc<Status>,
    metrics: Arc<Metrics>,
}

impl Early {
    /// Starts the source and the reconciler.
    fn start(settings: &Settings) -> Self {
        let (source_status, status) = (Arc::new(SourceStatus::default()), Arc::new(Status::default()));
        let metrics = Arc::new(Metrics::new(source_status.clone(), status.clone()));
        let (events_in, events) = mpsc::channel(EVENTS);
        let (retired_in, retired) = mpsc::unbounded_channel();
        let (addresses, of_node) = watch::channel(Default::default());
        let (maps, maps_out) = oneshot::channel();
        let audit = Arc::new(Notify::new());
        let rules = NodeRules {
            name: settings.node_name.clone(),
            nodeport_addresses: settings.nodeport_addresses.clone(),
            allow_external_ips: settings.allow_external_ips.clone(),
            localhost_nodeports: settings.localhost_nodeports,
            service_cidrs: settings.service_cidrs.clone(),
        };
        let wiring = Wiring {
            events,
            addresses: of_node,
            audit: audit.clone(),
            retired: retired_in,
            status: status.clone(),
            metrics: metrics.clone(),
        };
        let core = Core::without_maps(rules);
        let health_checks = core.health_checks();
        let reconciler = Reconciler::new(core, &settings.node_name, wiring);
        let mut parts = Parts::new();
        parts.spawn(reconcile(reconciler, maps_out));
        let (from, node) = (settings.source.clone(), settings.node_name.clone());
        parts.spawn(async move { Ok(source::run(from, node, events_in, source_status).await?) });
        Self { parts, maps, addresses, retired, health_checks, audit, status, metrics }
    }

    /// Opens the maps and starts every other part as a task.
    fn complete(self, settings: &Settings, datapath: &Arc<Datapath>) -> Result<Parts, Error> {
        let Self { mut parts, status, metrics, .. } = self;
        let dir = settings.state_dir.join(format!("v{LAYOUT_VERSION}"));
        let pins = dir.join("maps");
        let flow_entries = Arc::new(FlowEntries::default());
        metrics.set_datapath(Arc::new(Scrape::open(&pins, flow_entries.clone())?));
        let sweeper = Sweeper::open(&dir, settings.timeouts, settings.reset_gone_backends, flow_entries)?;
        let sweeper = sweeper.counting(metrics.kube_proxy().clone());
        let devices = Arc::new(Devices::open(&pins)?);
        // If it has ended, joining it tells why.
        let _ = self.maps.send(Maps::open(&pins)?);

        let addresses = self.addresses.subscribe();
        let (failures_in, failures) = mpsc::channel(healthcheck::events::PENDING);
        parts.spawn(forever(http::serve(
            settings.healthz_bind_address,
            settings.metrics_bind_address,
            status.clone(),
            metrics.clone(),
            configz::configz(settings),
        )));
        parts.spawn(forever(healthcheck::run(self.health_checks, status, failures_in)));
        parts.spawn(forever(watch_devices(datapath.clone(), devices, self.addresses)));
        parts.spawn(forever(count_devices(datapath.clone(), metrics.clone())));
        parts.spawn(forever(watch_host(datapath.clone(), settings.snat_ports, addresses.clone(), metrics)));
        let (mut devices_done, retired) = (addresses, self.retired);
        parts.spawn(forever(async move {
            // Until then flows may be moving to another table: what expired in one would live on in the other.
            let _ = timeout(FLOWS_MOVE, devices_done.changed()).await;
            sweeper.run(retired).await;
        }));
        let (from, node) = (settings.source.clone(), settings.node_name.clone());
        parts.spawn(forever(healthcheck::events::report(from, node, failures)));
        Ok(parts)
    }
}

/// Takes in what the source knows at start, and programs it, and all that comes later, once there are maps.
async fn reconcile(mut reconciler: Reconciler<()>, maps: oneshot::Receiver<Maps>) -> Result<(), Error> {
    if reconciler.listen().await.is_err() {
        // The source has ended, and says why.
        return std::future::pending().await;
    }
    match maps.await {
        Ok(maps) => Ok(reconciler.with(maps).run().await?),
        // The agent is about to end for want of them.
        Err(_) => std::future::pending().await,
    }
}

async fn forever(part: impl Future<Output = ()>) -> Result<(), Error> {
    part.await;
    // With all addresses turned off there is nothing to serve, which is fine.
    std::future::pending().await
}

/// Follows the devices. What is attached stays so when that fails: it is tried again.
async fn watch_devices(
    datapath: Arc<Datapath>,
    devices: Arc<Devices>,
    addresses: watch::Sender<BTreeSet<IpAddr>>,
) {
    loop {
        let Err(error) = datapath.follow_devices(devices.clone(), addresses.clone()).await;
        tracing::error!(error = %crate::chain(&error), "devices cannot be watched; trying again");
        sleep(WATCH_AGAIN).await;
    }
}

/// Follows what the node's own settings allow.
async fn watch_host(
    datapath: Arc<Datapath>,
    snat_ports: PortRange,
    addresses: watch::Receiver<BTreeSet<IpAddr>>,
    metrics: Arc<Metrics>,
) {
    let (findings_in, mut findings) = watch::channel(Vec::<host::Finding>::new());
    let tell = async {
        let mut counts: BTreeMap<&'static str, i64> = BTreeMap::new();
        while findings.changed().await.is_ok() {
            counts.values_mut().for_each(|n| *n = 0);
            for finding in findings.borrow_and_update().iter().filter(|f| !f.fixed) {
                *counts.entry(finding.kind.as_str()).or_default() += 1;
            }
            for (kind, n) in &counts {
                metrics.set_host_findings(kind, *n);
            }
        }
    };
    tokio::join!(host::watch(datapath, snat_ports, addresses, findings_in), tell);
}

async fn count_devices(datapath: Arc<Datapath>, metrics: Arc<Metrics>) {
    let mut counts: BTreeMap<&'static str, i64> = BTreeMap::new();
    loop {
        counts.values_mut().for_each(|n| *n = 0);
        for device in datapath.attached() {
            let role = match device.role {
                Role::External => "external",
                Role::Pod => "pod",
            };
            *counts.entry(role).or_default() += 1;
        }
        for (role, n) in &counts {
            metrics.set_devices(role, *n);
        }
        sleep(DEVICE_GAUGES).await;
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    user1: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            user1: signal(SignalKind::user_defined1())?,
        })
    }

    /// Waits for the one that ends the agent.
    async fn wait(mut self, audit: &Notify) -> &'static str {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return "SIGTERM",
                _ = self.interrupt.recv() => return "SIGINT",
                // Not the end of a daemon whose terminal goes; nothing to reload either, sources are watched.
                _ = self.hangup.recv() => {}
                _ = self.user1.recv() => audit.notify_one(),
            }
        }
    }
}

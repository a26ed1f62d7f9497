//! Metrics in the OpenMetrics text format. What is cheap to keep is kept here; what lives elsewhere (maps, sources,
//! health) is read at the moment of a scrape.

pub mod kube_proxy;
pub mod probes;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, OnceLock, PoisonError, RwLock, atomic::AtomicU64},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use self::kube_proxy::KubeProxy;
use crate::{health::Status, source::status::SourceStatus};

/// Content type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// One Service port in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceSample {
    /// The name of its record in `SERVICE_NAMES`; no two samples share one.
    pub service: String,
    /// Packets translated, both directions.
    pub packets: u64,
    pub bytes: u64,
    pub connections: u64,
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapSample {
    /// Its name in the kernel object.
    pub map: &'static str,
    pub entries: u64,
    pub capacity: u64,
}

/// What the maps can tell at a scrape. Called on a thread where system calls may block.
pub trait DatapathStats: Send + Sync {
    /// The per-reason counters, summed over CPUs: names of `lb_common::verdict::Counter`.
    fn counters(&self) -> Vec<(&'static str, u64)>;
    fn services(&self) -> Vec<ServiceSample>;
    fn maps(&self) -> Vec<MapSample>;
}

type FloatGauge = Gauge<f64, AtomicU64>;
type Labels = [(&'static str, String); 1];

/// All metrics of the agent.
pub struct Metrics {
    registry: Registry,
    kube_proxy_registry: Registry,
    kube_proxy: KubeProxy,
    datapath: Arc<OnceLock<Arc<dyn DatapathStats>>>,
    syncs: Family<Labels, Counter>,
    sync_duration: Histogram,
    last_sync: FloatGauge,
    operations: Family<Labels, Counter>,
    rejected: Arc<RwLock<BTreeMap<&'static str, i64>>>,
    devices: Family<Labels, Gauge>,
    host_findings: Family<Labels, Gauge>,
}

impl Metrics {
    pub fn new(source: Arc<SourceStatus>, status: Arc<Status>) -> Self {
        let datapath = Arc::new(OnceLock::new());
        let rejected = Arc::new(RwLock::new(BTreeMap::new()));
        let mut registry = Registry::with_prefix("lb");
        let version = vec![("version", env!("CARGO_PKG_VERSION"))];
        registry.register("build", "The agent", prometheus_client::metrics::info::Info::new(version));

        let syncs = Family::<Labels, Counter>::default();
        registry.register("syncs", "Reconciliations of maps with objects, by result", syncs.clone());
        // 0.1 ms to 26 s: one endpoint is far below a millisecond, a full sync of 100,000 backends is about a second.
        let sync_duration = Histogram::new(exponential_buckets(0.0001, 4.0, 10));
        registry.register(
            "sync_duration_seconds",
            "Time to plan and apply one reconciliation",
            sync_duration.clone(),
        );
        let last_sync = FloatGauge::default();
        registry.register(
            "last_sync_timestamp_seconds",
            "When a reconciliation last succeeded, in seconds since 1970; 0 before the first",
            last_sync.clone(),
        );
        let operations = Family::<Labels, Counter>::default();
        registry.register("map_operations", "Writes to maps, by kind of operation", operations.clone());
        let devices = Family::<Labels, Gauge>::default();
        registry.register("devices", "Network devices with programs attached, by role", devices.clone());
        let host_findings = Family::<Labels, Gauge>::default();
        let help =
            "Settings of the node that stand in the way of Services, by kind; the log has the remedies";
        registry.register("host_findings", help, host_findings.clone());
        registry.register_collector(Box::new(SourceCollector { source, rejected: rejected.clone() }));
        registry.register_collector(Box::new(StatusCollector { status }));
        registry.register_collector(Box::new(DatapathCollector { stats: datapath.clone() }));
        let mut kube_proxy_registry = Registry::default();
        let kube_proxy = KubeProxy::register(&mut kube_proxy_registry);
        Self {
            registry,
            kube_proxy_registry,
            kube_proxy,
            datapath,
            syncs,
            sync_duration,
            last_sync,
            operations,
            rejected,
            devices,
            host_findings,
        }
    }

    /// From now on scrapes also show the maps. The first call wins.
    pub fn set_datapath(&self, stats: Arc<dyn DatapathStats>) {
        // A second call would mean two owners of the maps; the first one is right then.
        let _ = self.datapath.set(stats);
    }

    /// kube-proxy's metrics.
    pub fn kube_proxy(&self) -> &KubeProxy {
        &self.kube_proxy
    }

    /// A reconciliation ended.
    pub fn synced(&self, took: Duration, succeeded: bool) {
        let result = if succeeded { "ok" } else { "error" };
        self.syncs.get_or_create(&[("result", result.into())]).inc();
        self.sync_duration.observe(took.as_secs_f64());
        if succeeded {
            self.last_sync.set(unix_seconds(SystemTime::now()));
        }
    }

    /// `count` operations of this kind (snake case, such as `put_frontend`) were carried out.
    pub fn operations(&self, kind: &str, count: u64) {
        self.operations.get_or_create(&[("op", kind.into())]).inc_by(count);
    }

    /// How many objects (or parts of them) are ignored now, by reason. Replaces what was said before.
    pub fn set_rejected(&self, by_reason: BTreeMap<&'static str, i64>) {
        *self.rejected.write().unwrap_or_else(PoisonError::into_inner) = by_reason;
    }

    /// How many devices of this role (such as `pod`, `external`) have programs attached.
    pub fn set_devices(&self, role: &str, count: i64) {
        self.devices.get_or_create(&[("role", role.into())]).set(count);
    }

    /// How many settings of the node of this kind (such as `rp_filter`) stand in the way.
    pub fn set_host_findings(&self, kind: &str, count: i64) {
        self.host_findings.get_or_create(&[("kind", kind.into())]).set(count);
    }

    /// Everything, as text of type [`CONTENT_TYPE`]. Reads the maps: may block.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode_registry(&mut out, &self.registry)?;
        text::encode_registry(&mut out, &self.kube_proxy_registry)?;
        text::encode_eof(&mut out)?;
        Ok(out)
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

fn unix_seconds(t: SystemTime) -> f64 {
    t.duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Writes a counter without labels.
fn counter(e: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    let metric = ConstCounter::new(value);
    metric.encode(e.encode_descriptor(name, help, None, metric.metric_type())?)
}

/// Writes a gauge without labels.
fn gauge(e: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: f64) -> fmt::Result {
    let metric = ConstGauge::new(value);
    metric.encode(e.encode_descriptor(name, help, None, metric.metric_type())?)
}

/// Writes one metric with one label: a sample for each of `samples`, and nothing at all if there are none.
fn labelled<M: EncodeMetric>(
    e: &mut DescriptorEncoder<'_>,
    (name, help, label): (&str, &str, &'static str),
    samples: impl IntoIterator<Item = (String, M)>,
) -> fmt::Result {
    let mut samples = samples.into_iter().peekable();
    let Some((_, first)) = samples.peek() else { return Ok(()) };
    let mut family = e.encode_descriptor(name, help, None, first.metric_type())?;
    for (value, metric) in samples {
        metric.encode(family.encode_family(&[(label, value)])?)?;
    }
    Ok(())
}

#[derive(Debug)]
struct SourceCollector {
    source: Arc<SourceStatus>,
    rejected: Arc<RwLock<BTreeMap<&'static str, i64>>>,
}

impl Collector for SourceCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (e, s) = (&mut encoder, &self.source);
        counter(e, "source_events", "Objects received: added, changed or gone", s.events())?;
        counter(e, "source_rejected_documents", "Documents or objects that could not be read", s.rejected())?;
        counter(e, "source_reconnects", "Failed requests for objects that were tried again", s.reconnects())?;
        counter(e, "source_lists", "Complete lists of a kind of objects read", s.relists())?;
        let connected = f64::from(u8::from(s.connected()));
        gauge(e, "source_connected", "1 while the source hears of changes", connected)?;
        let last = s.last_event().map_or(0.0, unix_seconds);
        let help = "When the last object was received, in seconds since 1970; 0 before the first";
        gauge(e, "source_last_event_timestamp_seconds", help, last)?;
        let rejected = self.rejected.read().unwrap_or_else(PoisonError::into_inner);
        let description = ("rejected_objects", "Objects, or parts of them, ignored now", "reason");
        labelled(
            e,
            description,
            rejected.iter().map(|(reason, n)| ((*reason).to_owned(), ConstGauge::new(*n))),
        )
    }
}

#[derive(Debug)]
struct StatusCollector {
    status: Arc<Status>,
}

impl Collector for StatusCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (e, s) = (&mut encoder, &self.status);
        let flag = |b: bool| f64::from(u8::from(b));
        gauge(e, "ready", "1 once everything known at start is programmed", flag(s.is_ready()))?;
        let help = "Age of the oldest change that is not programmed yet; 0 without one";
        let age = s.oldest_pending(std::time::Instant::now()).unwrap_or_default();
        gauge(e, "pending_change_age_seconds", help, age.as_secs_f64())?;
        let description = ("http_listening", "1 while the server has its port", "server");
        labelled(
            e,
            description,
            s.listening().into_iter().map(|(name, up)| (name.to_owned(), ConstGauge::new(i64::from(up)))),
        )
    }
}

struct DatapathCollector {
    stats: Arc<OnceLock<Arc<dyn DatapathStats>>>,
}

impl fmt::Debug for DatapathCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DatapathCollector")
    }
}

impl Collector for DatapathCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(stats) = self.stats.get() else { return Ok(()) };
        let e = &mut encoder;
        let events = stats.counters().into_iter().map(|(name, n)| (name.to_owned(), ConstCounter::new(n)));
        labelled(e, ("datapath_events", "Packets and sockets, by what became of them", "event"), events)?;
        encode_services(e, &stats.services())?;
        encode_maps(e, &stats.maps())
    }
}

fn encode_services(e: &mut DescriptorEncoder<'_>, services: &[ServiceSample]) -> fmt::Result {
    let by = |value: fn(&ServiceSample) -> u64| {
        services.iter().map(move |s| (s.service.clone(), ConstCounter::new(value(s))))
    };
    let help = "Packets translated, both directions";
    labelled(e, ("service_packets", help, "service"), by(|s| s.packets))?;
    let help = "Bytes of the packets translated, from the IP header on";
    labelled(e, ("service_bytes", help, "service"), by(|s| s.bytes))?;
    let help = "New flows, and sockets connected through the socket hooks";
    labelled(e, ("service_connections", help, "service"), by(|s| s.connections))
}

fn encode_maps(e: &mut DescriptorEncoder<'_>, maps: &[MapSample]) -> fmt::Result {
    use lb_common::maps::name::{FLOWS4, FLOWS6};
    let gauge = |value: u64| ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
    let entries = maps.iter().map(|m| (m.map.to_owned(), gauge(m.entries)));
    labelled(e, ("map_entries", "Entries in use", "map"), entries)?;
    let capacity = maps.iter().map(|m| (m.map.to_owned(), gauge(m.capacity)));
    labelled(e, ("map_capacity", "Entries that fit", "map"), capacity)?;
    // A flow has one entry per direction.
    let flows = [(FLOWS4, "ipv4"), (FLOWS6, "ipv6")].into_iter().filter_map(|(map, family)| {
        maps.iter().find(|m| m.map == map).map(|m| (family.to_owned(), gauge(m.entries / 2)))
    });
    labelled(e, ("flows", "Flows in the table", "family"), flows)
}

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;

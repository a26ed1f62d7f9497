//! kube-proxy's metrics, as far as they mean the same here: same names, types, labels and buckets
//! (pkg/proxy/metrics/metrics.go, v1.36), so dashboards and alerts go on working. docs/metrics.md says which ones are left
//! out, and why.

use std::time::{Duration, SystemTime};

use prometheus_client::{
    metrics::{
        counter::Counter,
        family::{Family, MetricConstructor},
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets, linear_buckets},
    },
    registry::Registry,
};

use super::{FloatGauge, unix_seconds};
use crate::plan::{no_local::NoLocalEndpoints, op};

type Label = (&'static str, &'static str);
type PerFamily<M, C = fn() -> M> = Family<[Label; 1], M, C>;

/// Buckets of a histogram.
#[derive(Clone, Copy, Debug)]
enum Buckets {
    Sync,
    NetworkProgramming,
}

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        match self {
            // 1 ms to 16 s
            Self::Sync => Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            // 0 (kube-proxy's merging of buckets begins with it), then to 5 minutes in coarser and coarser steps
            Self::NetworkProgramming => Histogram::new(
                [0.0]
                    .into_iter()
                    .chain(linear_buckets(0.25, 0.25, 2))
                    .chain(linear_buckets(1.0, 1.0, 59))
                    .chain(linear_buckets(60.0, 5.0, 12))
                    .chain(linear_buckets(120.0, 30.0, 7)),
            ),
        }
    }
}

type Durations = PerFamily<Histogram, Buckets>;

/// Which health probe was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    Healthz,
    Livez,
}

/// The metrics. Clones are handles on the same ones.
#[derive(Clone, Debug)]
pub struct KubeProxy {
    sync: Durations,
    full_sync: Durations,
    partial_sync: Durations,
    last_sync: Family<[Label; 1], FloatGauge>,
    last_queued: Family<[Label; 1], FloatGauge>,
    network_programming: Durations,
    endpoint_changes: Counter,
    endpoint_changes_pending: Gauge,
    service_changes: Counter,
    service_changes_pending: Gauge,
    no_local: Family<[Label; 2], Gauge>,
    healthz: Family<[(&'static str, String); 1], Counter>,
    livez: Family<[(&'static str, String); 1], Counter>,
    purges: Durations,
    purged: Family<[Label; 1], Counter>,
}

const FAMILIES: [op::Family; 2] = [op::Family::V4, op::Family::V6];

fn ip_family(family: op::Family) -> [Label; 1] {
    // v1.IPFamily
    let name = match family {
        op::Family::V4 => "IPv4",
        op::Family::V6 => "IPv6",
    };
    [("ip_family", name)]
}

impl KubeProxy {
    /// Registers all of them. The registry must have no prefix of its own.
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            sync: Family::new_with_constructor(Buckets::Sync),
            full_sync: Family::new_with_constructor(Buckets::Sync),
            partial_sync: Family::new_with_constructor(Buckets::Sync),
            last_sync: Family::default(),
            last_queued: Family::default(),
            network_programming: Family::new_with_constructor(Buckets::NetworkProgramming),
            endpoint_changes: Counter::default(),
            endpoint_changes_pending: Gauge::default(),
            service_changes: Counter::default(),
            service_changes_pending: Gauge::default(),
            no_local: Family::default(),
            healthz: Family::default(),
            livez: Family::default(),
            purges: Family::new_with_constructor(Buckets::Sync),
            purged: Family::default(),
        };
        metrics.register_syncs(registry);
        metrics.register_changes(registry);
        metrics.register_rest(registry);
        metrics.initialize();
        metrics
    }

    fn register_syncs(&self, registry: &mut Registry) {
        let mut histogram = |name, help, family: &Durations| registry.register(name, help, family.clone());
        let name = "kubeproxy_sync_proxy_rules_duration_seconds";
        histogram(name, "Time of one reconciliation, which serves both families", &self.sync);
        let name = "kubeproxy_sync_full_proxy_rules_duration_seconds";
        histogram(name, "The same, of those that looked at every Service", &self.full_sync);
        let name = "kubeproxy_sync_partial_proxy_rules_duration_seconds";
        histogram(name, "The same, of those that looked at what had changed", &self.partial_sync);
        let help = "From the change of an EndpointSlice, as its annotation tells, to its being programmed";
        histogram("kubeproxy_network_programming_duration_seconds", help, &self.network_programming);
        let help = "Time to look for UDP flows to endpoints that are gone";
        histogram("kubeproxy_conntrack_reconciler_sync_duration_seconds", help, &self.purges);

        let mut gauge = |name, help, family: &Family<[Label; 1], FloatGauge>| {
            registry.register(name, help, family.clone());
        };
        let name = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";
        gauge(name, "When a reconciliation last succeeded, in seconds since 1970", &self.last_sync);
        let name = "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds";
        gauge(name, "When a change last came, in seconds since 1970", &self.last_queued);
    }

    fn register_changes(&self, registry: &mut Registry) {
        let prefix = "kubeproxy_sync_proxy_rules_";
        let mut counter = |name, help, counter: &Counter| {
            registry.register(format!("{prefix}{name}"), help, counter.clone());
        };
        counter("endpoint_changes", "EndpointSlices received: new, changed or gone", &self.endpoint_changes);
        counter("service_changes", "Services received: new, changed or gone", &self.service_changes);
        let mut gauge = |name, help, gauge: &Gauge| {
            registry.register(format!("{prefix}{name}"), help, gauge.clone());
        };
        let help = "Changes of EndpointSlices that are not programmed yet";
        gauge("endpoint_changes_pending", help, &self.endpoint_changes_pending);
        let help = "Services whose changes are not programmed yet";
        gauge("service_changes_pending", help, &self.service_changes_pending);
    }

    fn register_rest(&self, registry: &mut Registry) {
        // A gauge, in spite of its name.
        let name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total";
        let help = "Service ports with a policy Local and endpoints, but none on this node";
        registry.register(name, help, self.no_local.clone());
        let help = "Answers of /healthz on its own address, by HTTP status";
        registry.register("kubeproxy_proxy_healthz", help, self.healthz.clone());
        let help = "Answers of /livez on the address of /healthz, by HTTP status";
        registry.register("kubeproxy_proxy_livez", help, self.livez.clone());
        let help = "UDP flows deleted because their endpoint is gone";
        registry.register("kubeproxy_conntrack_reconciler_deleted_entries", help, self.purged.clone());
    }

    /// Counts that nothing has been counted of yet are 0, not missing: the rate of the first event shows.
    fn initialize(&self) {
        self.set_no_local(NoLocalEndpoints::default());
        for family in FAMILIES {
            drop(self.purged.get_or_create(&ip_family(family)));
        }
        for probe in [Probe::Healthz, Probe::Livez] {
            for code in [200, 503] {
                drop(self.probes(probe).get_or_create(&[("code", code.to_string())]));
            }
        }
    }

    /// A reconciliation ended; `full`: it looked at every Service, `None`: it failed before that was known.
    pub fn synced(&self, took: Duration, full: Option<bool>) {
        for family in FAMILIES.map(ip_family) {
            self.sync.get_or_create(&family).observe(took.as_secs_f64());
            match full {
                Some(true) => self.full_sync.get_or_create(&family).observe(took.as_secs_f64()),
                Some(false) => self.partial_sync.get_or_create(&family).observe(took.as_secs_f64()),
                None => {}
            }
        }
    }

    /// What is queued was programmed, or there was nothing to do.
    pub fn set_last_sync(&self, at: SystemTime) {
        for family in FAMILIES {
            self.last_sync.get_or_create(&ip_family(family)).set(unix_seconds(at));
        }
    }

    /// A change came that has to be programmed.
    pub fn set_last_queued(&self, at: SystemTime) {
        for family in FAMILIES {
            self.last_queued.get_or_create(&ip_family(family)).set(unix_seconds(at));
        }
    }

    /// An EndpointSlice came or went that changed so long ago and is programmed now.
    pub fn network_programmed(&self, family: op::Family, took: Duration) {
        self.network_programming.get_or_create(&ip_family(family)).observe(took.as_secs_f64());
    }

    pub fn count_service_change(&self) {
        self.service_changes.inc();
    }

    pub fn count_endpoint_change(&self) {
        self.endpoint_changes.inc();
    }

    /// What is not programmed yet: Services, and changes of EndpointSlices.
    pub fn set_pending(&self, services: usize, endpoints: usize) {
        self.service_changes_pending.set(i64::try_from(services).unwrap_or(i64::MAX));
        self.endpoint_changes_pending.set(i64::try_from(endpoints).unwrap_or(i64::MAX));
    }

    /// Rule C8.
    pub fn set_no_local(&self, counts: NoLocalEndpoints) {
        for (family, counts) in [(op::Family::V4, counts.v4), (op::Family::V6, counts.v6)] {
            let [family] = ip_family(family);
            for (policy, count) in [("internal", counts.internal), ("external", counts.external)] {
                let labels = [family, ("traffic_policy", policy)];
                self.no_local.get_or_create(&labels).set(count.into());
            }
        }
    }

    /// A probe was answered with this HTTP status.
    pub fn count_probe(&self, probe: Probe, code: u16) {
        self.probes(probe).get_or_create(&[("code", code.to_string())]).inc();
    }

    /// The UDP flows of one family were looked through; so many went to endpoints that are gone.
    pub fn purged(&self, family: op::Family, took: Duration, flows: u64) {
        self.purges.get_or_create(&ip_family(family)).observe(took.as_secs_f64());
        self.purged.get_or_create(&ip_family(family)).inc_by(flows);
    }

    fn probes(&self, probe: Probe) -> &Family<[(&'static str, String); 1], Counter> {
        match probe {
            Probe::Healthz => &self.healthz,
            Probe::Livez => &self.livez,
        }
    }
}

#[cfg(test)]
#[path = "kube_proxy_tests.rs"]
mod tests;

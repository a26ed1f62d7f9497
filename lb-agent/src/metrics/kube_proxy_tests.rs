use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::*;
use crate::{
    health::Status,
    http::healthz_routes,
    metrics::{Metrics, probes::counted},
    plan::no_local::ByPolicy,
    source::status::SourceStatus,
};

/// kube-proxy's own metrics of v1.36 on Linux: name, type, labels. From pkg/proxy/metrics/metrics.go and Kubernetes'
/// reference of metrics (instrumentation/metrics).
const KUBE_PROXY: &str = "\
kubeproxy_conntrack_reconciler_deleted_entries_total counter ip_family
kubeproxy_conntrack_reconciler_sync_duration_seconds histogram ip_family
kubeproxy_iptables_ct_state_invalid_dropped_packets_total counter
kubeproxy_iptables_localhost_nodeports_accepted_packets_total counter
kubeproxy_network_programming_duration_seconds histogram ip_family
kubeproxy_proxy_healthz_total counter code
kubeproxy_proxy_livez_total counter code
kubeproxy_sync_full_proxy_rules_duration_seconds histogram ip_family
kubeproxy_sync_partial_proxy_rules_duration_seconds histogram ip_family
kubeproxy_sync_proxy_rules_duration_seconds histogram ip_family
kubeproxy_sync_proxy_rules_endpoint_changes_pending gauge
kubeproxy_sync_proxy_rules_endpoint_changes_total counter
kubeproxy_sync_proxy_rules_iptables_last gauge ip_family table
kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total counter ip_family
kubeproxy_sync_proxy_rules_iptables_restore_failures_total counter ip_family
kubeproxy_sync_proxy_rules_iptables_total gauge ip_family table
kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds gauge ip_family
kubeproxy_sync_proxy_rules_last_timestamp_seconds gauge ip_family
kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total counter ip_family
kubeproxy_sync_proxy_rules_nftables_sync_failures_total counter ip_family
kubeproxy_sync_proxy_rules_no_local_endpoints_total gauge ip_family traffic_policy
kubeproxy_sync_proxy_rules_service_changes_pending gauge
kubeproxy_sync_proxy_rules_service_changes_total counter";

/// What has no meaning here.
const LEFT_OUT: [&str; 8] = [
    "kubeproxy_iptables_ct_state_invalid_dropped_packets_total",
    "kubeproxy_iptables_localhost_nodeports_accepted_packets_total",
    "kubeproxy_sync_proxy_rules_iptables_last",
    "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total",
    "kubeproxy_sync_proxy_rules_iptables_restore_failures_total",
    "kubeproxy_sync_proxy_rules_iptables_total",
    "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total",
    "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
];

fn metrics() -> Metrics {
    Metrics::new(Arc::new(SourceStatus::default()), Arc::new(Status::default()))
}

/// Everything has happened once.
fn busy() -> Metrics {
    let metrics = metrics();
    let m = metrics.kube_proxy();
    m.synced(Duration::from_millis(3), Some(true));
    m.synced(Duration::from_millis(3), Some(false));
    m.set_last_sync(SystemTime::now());
    m.set_last_queued(SystemTime::now());
    m.network_programmed(op::Family::V4, Duration::from_millis(700));
    m.network_programmed(op::Family::V6, Duration::from_millis(700));
    m.purged(op::Family::V4, Duration::from_millis(1), 2);
    metrics
}

/// A scrape as Prometheus reads it: what each sample is called, and with which labels, by the type of its metric.
#[derive(Debug, Default)]
struct Scrape {
    /// Name (of counters with `_total`) to type.
    types: BTreeMap<String, String>,
    /// The same to the names of labels, but for `le`.
    labels: BTreeMap<String, BTreeSet<String>>,
    /// The same to the upper bounds of buckets, in the order they come.
    bounds: BTreeMap<String, Vec<String>>,
}

impl Scrape {
    fn of(metrics: &Metrics) -> Self {
        let mut scrape = Self::default();
        let text = metrics.encode().unwrap();
        assert!(text.ends_with("# EOF\n") && text.matches("# EOF").count() == 1, "{text}");
        for line in text.lines() {
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["#", "TYPE", name, kind] => {
                    let suffix = if kind == "counter" { "_total" } else { "" };
                    scrape.types.insert(format!("{name}{suffix}"), kind.to_owned());
                }
                ["#", ..] => {}
                _ => scrape.sample(line),
            }
        }
        scrape
    }

    fn sample(&mut self, line: &str) {
        let (series, _) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s));
        let base = base.filter(|b| self.types.contains_key(*b)).unwrap_or(name).to_owned();
        for label in labels.trim_end_matches('}').split(',').filter(|l| !l.is_empty()) {
            let (key, value) = label.split_once('=').unwrap();
            if key != "le" {
                self.labels.entry(base.clone()).or_default().insert(key.to_owned());
            } else if series.contains("IPv4") {
                self.bounds.entry(base.clone()).or_default().push(value.trim_matches('"').to_owned());
            }
        }
    }
}

#[test]
fn names_types_and_labels_are_those_of_kube_proxy() {
    let scrape = Scrape::of(&busy());
    let mut expected = BTreeMap::new();
    for line in KUBE_PROXY.lines() {
        let mut words = line.split(' ');
        let (name, kind) = (words.next().unwrap(), words.next().unwrap());
        if !LEFT_OUT.contains(&name) {
            expected.insert(name.to_owned(), (kind.to_owned(), words.map(str::to_owned).collect()));
        }
    }
    let exported: BTreeMap<String, (String, BTreeSet<String>)> = scrape
        .types
        .iter()
        .filter(|(name, _)| name.starts_with("kubeproxy_"))
        .map(|(name, kind)| {
            let labels = scrape.labels.get(name).cloned().unwrap_or_default();
            (name.clone(), (kind.clone(), labels))
        })
        .collect();
    assert_eq!(exported, expected);
    // The agent's own keep their prefix.
    assert!(scrape.types.keys().all(|n| n.starts_with("kubeproxy_") || n.starts_with("lb_")), "{scrape:?}");
}

#[test]
fn buckets_are_those_of_kube_proxy() {
    let scrape = Scrape::of(&busy());
    let sync =
        "0.001 0.002 0.004 0.008 0.016 0.032 0.064 0.128 0.256 0.512 1.024 2.048 4.096 8.192 16.384 +Inf";
    for name in [
        "kubeproxy_sync_proxy_rules_duration_seconds",
        "kubeproxy_sync_full_proxy_rules_duration_seconds",
        "kubeproxy_sync_partial_proxy_rules_duration_seconds",
        "kubeproxy_conntrack_reconciler_sync_duration_seconds",
    ] {
        assert_eq!(scrape.bounds[name].join(" "), sync, "{name}");
    }
    let bounds = &scrape.bounds["kubeproxy_network_programming_duration_seconds"];
    let seconds: Vec<f64> = bounds.iter().map(|b| b.replace("+Inf", "inf").parse().unwrap()).collect();
    let mut expected = vec![0.0, 0.25, 0.5];
    expected.extend((1..60).map(f64::from));
    expected.extend((60..120).step_by(5).map(f64::from));
    expected.extend((120..=300).step_by(30).map(f64::from));
    expected.push(f64::INFINITY);
    assert_eq!(seconds, expected);
}

/// docs/metrics.md has a row for each metric of a scrape, and for each of kube-proxy's that is left out.
#[test]
fn the_documentation_has_a_row_for_every_metric() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    let text = std::fs::read_to_string(path).unwrap();
    let row =
        |name: &str| text.lines().filter(|l| l.starts_with(&format!("| `{name}` |"))).collect::<Vec<_>>();
    let metrics = busy();
    metrics.set_datapath(Arc::new(crate::metrics::tests::Fixed));
    metrics.synced(Duration::from_millis(1), true);
    metrics.operations("put_frontend", 1);
    metrics.set_rejected(BTreeMap::from([("bad_port", 1)]));
    metrics.set_devices("pod", 1);
    metrics.set_host_findings("rp_filter", 1);
    for (name, kind) in Scrape::of(&metrics).types {
        // The suffix of the sample of an info metric.
        let name = if kind == "info" { format!("{name}_info") } else { name };
        let rows = row(&name);
        assert!(rows.len() == 1 && rows[0].contains(&format!("| {kind} |")), "{name} {kind}: {rows:?}");
    }
    for name in LEFT_OUT {
        assert_eq!(row(name).len(), 1, "{name}");
    }
}

#[test]
fn c8_one_gauge_per_family_and_policy() {
    let metrics = metrics();
    let counts = NoLocalEndpoints {
        v4: ByPolicy { internal: 3, external: 2 },
        v6: ByPolicy { internal: 1, external: 0 },
    };
    metrics.kube_proxy().set_no_local(counts);
    let text = metrics.encode().unwrap();
    for (family, policy, n) in
        [("IPv4", "internal", 3), ("IPv4", "external", 2), ("IPv6", "internal", 1), ("IPv6", "external", 0)]
    {
        let line = format!(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{{ip_family=\"{family}\",traffic_policy=\"{policy}\"}} {n}"
        );
        assert!(text.lines().any(|l| l == line), "{line} not in\n{text}");
    }
}

/// The status line of the answer.
async fn get(address: std::net::SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.lines().next().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn answers_of_probes_are_counted_by_status() {
    let (metrics, status) = (metrics(), Arc::new(Status::default()));
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let routes = counted(healthz_routes(status.clone()), metrics.kube_proxy().clone());
    let server = tokio::spawn(async move { axum::serve(listener, routes).await });
    assert!(get(address, "/healthz").await.contains("200"));
    assert!(get(address, "/livez").await.contains("200"));
    // A node that is going away is not healthy, but its agent lives.
    status.node_deleted();
    assert!(get(address, "/healthz").await.contains("503"));
    assert!(get(address, "/livez").await.contains("200"));
    get(address, "/readyz").await;
    get(address, "/healthz/x").await;
    server.abort();
    let text = metrics.encode().unwrap();
    for line in [
        "kubeproxy_proxy_healthz_total{code=\"200\"} 1",
        "kubeproxy_proxy_healthz_total{code=\"503\"} 1",
        "kubeproxy_proxy_livez_total{code=\"200\"} 2",
        "kubeproxy_proxy_livez_total{code=\"503\"} 0",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} not in\n{text}");
    }
}

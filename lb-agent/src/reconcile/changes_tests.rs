use std::{sync::Arc, time::Duration};

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};

use super::*;
use crate::{
    health::Status,
    metrics::Metrics,
    source::{Object, status::SourceStatus, strip::Strip as _},
};

fn metrics() -> Metrics {
    Metrics::new(Arc::new(SourceStatus::default()), Arc::new(Status::default()))
}

fn named(name: &str) -> ObjectMeta {
    ObjectMeta { name: Some(name.into()), namespace: Some("ns".into()), ..ObjectMeta::default() }
}

fn service(name: &str) -> Event {
    Event::Apply(Service { metadata: named(name), ..Service::default() }.into())
}

/// A slice with this trigger time.
fn slice(address_type: &str, trigger: Option<&str>) -> Event {
    let mut metadata = named("s");
    metadata.annotations = trigger.map(|t| [(TRIGGER_TIME_ANNOTATION.to_owned(), t.to_owned())].into());
    let slice = EndpointSlice { metadata, address_type: address_type.into(), ..EndpointSlice::default() };
    Event::Apply(slice.into())
}

fn at(text: &str) -> SystemTime {
    text.parse::<Timestamp>().unwrap().into()
}

fn value(metrics: &Metrics, name: &str) -> Option<f64> {
    let text = metrics.encode().unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned));
    line.map(|value| value.parse().unwrap())
}

#[test]
fn services_are_pending_once_and_changes_of_slices_each() {
    let metrics = metrics();
    let mut changes = Changes::new(SystemTime::UNIX_EPOCH);
    let count = |name: &str| value(&metrics, &format!("kubeproxy_sync_proxy_rules_{name}")).unwrap();
    let counts = || {
        [
            "service_changes_total",
            "service_changes_pending",
            "endpoint_changes_total",
            "endpoint_changes_pending",
        ]
        .map(|name| count(name) as u32)
    };
    for (event, changed, expected) in [
        (service("a"), true, [1, 1, 0, 0]),
        (service("a"), true, [2, 1, 0, 0]),
        (service("b"), true, [3, 2, 0, 0]),
        // Received again as it was.
        (service("c"), false, [4, 2, 0, 0]),
        (slice("IPv4", None), true, [4, 2, 1, 1]),
        (slice("IPv4", None), true, [4, 2, 2, 2]),
        (slice("IPv4", None), false, [4, 2, 3, 2]),
        (Event::Apply(Node { metadata: named("n"), ..Node::default() }.into()), true, [4, 2, 3, 2]),
        (Event::Synced, false, [4, 2, 3, 2]),
    ] {
        changes.note(&event, changed, metrics.kube_proxy());
        assert_eq!(counts(), expected, "{event:?}");
    }
    let gone = ObjectRef { kind: Kind::EndpointSlice, namespace: "ns".into(), name: "s".into() };
    changes.note(&Event::Delete(gone), true, metrics.kube_proxy());
    assert_eq!(counts(), [4, 2, 4, 3]);
    changes.programmed(SystemTime::now(), metrics.kube_proxy());
    assert_eq!(counts(), [4, 0, 4, 0]);
}

/// From the annotation to the end of the turn, per family of the slice; not for changes from before the agent.
#[test]
fn network_programming_is_counted_from_the_trigger_time() {
    let metrics = metrics();
    let mut changes = Changes::new(at("2026-01-01T00:00:00Z"));
    for (address_type, trigger, changed) in [
        ("IPv4", Some("2026-01-01T00:00:10.5Z"), true),
        ("IPv4", Some("2026-01-01T00:00:11Z"), true),
        ("IPv6", Some("2026-01-01T00:00:12+00:00"), true),
        // Nothing came of it; from before; not a time; not an address; a clock ahead of ours.
        ("IPv4", Some("2026-01-01T00:00:11Z"), false),
        ("IPv4", Some("2025-12-31T23:59:59Z"), true),
        ("IPv4", Some("yesterday"), true),
        ("IPv4", None, true),
        ("FQDN", Some("2026-01-01T00:00:11Z"), true),
        ("IPv6", Some("2026-01-01T01:00:00Z"), true),
    ] {
        changes.note(&slice(address_type, trigger), changed, metrics.kube_proxy());
    }
    changes.programmed(at("2026-01-01T00:00:12Z"), metrics.kube_proxy());
    let sample =
        |suffix: &str| value(&metrics, &format!("kubeproxy_network_programming_duration_seconds_{suffix}"));
    assert_eq!(sample("count{ip_family=\"IPv4\"}"), Some(2.0));
    assert_eq!(sample("sum{ip_family=\"IPv4\"}"), Some(2.5));
    assert_eq!(sample("bucket{le=\"1.0\",ip_family=\"IPv4\"}"), Some(1.0));
    assert_eq!(sample("count{ip_family=\"IPv6\"}"), Some(2.0));
    assert_eq!(sample("sum{ip_family=\"IPv6\"}"), Some(0.0));
    // Each counts once.
    changes.programmed(at("2026-01-01T00:00:12Z") + Duration::from_secs(1), metrics.kube_proxy());
    assert_eq!(sample("count{ip_family=\"IPv4\"}"), Some(2.0));
}

/// Objects are cut down before they get here.
#[test]
fn the_trigger_time_is_kept_of_a_slice() {
    let Event::Apply(Object::EndpointSlice(mut slice)) = slice("IPv4", Some("2026-01-01T00:00:11Z")) else {
        panic!()
    };
    slice.metadata.annotations.as_mut().unwrap().insert("example.com/note".into(), "long".into());
    slice.strip();
    assert_eq!(slice.metadata.annotations.as_ref().unwrap().len(), 1);
    assert_eq!(
        trigger(&Event::Apply(Object::EndpointSlice(slice))),
        Some((Family::V4, at("2026-01-01T00:00:11Z")))
    );
}

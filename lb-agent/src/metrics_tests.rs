use super::*;

pub(in crate::metrics) struct Fixed;

impl DatapathStats for Fixed {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("forward", 7), ("drop_no_route", 0)]
    }
    fn services(&self) -> Vec<ServiceSample> {
        vec![ServiceSample { service: "ns/\"odd\"\\name:p".into(), packets: 3, bytes: 180, connections: 1 }]
    }
    fn maps(&self) -> Vec<MapSample> {
        vec![MapSample { map: "FLOWS4", entries: 6, capacity: 2_000_000 }]
    }
}

fn metrics() -> Metrics {
    Metrics::new(Arc::new(SourceStatus::default()), Arc::new(Status::default()))
}

/// The lines of a scrape that are samples.
fn samples(text: &str) -> Vec<&str> {
    text.lines().filter(|l| !l.starts_with('#')).collect()
}

#[test]
fn a_scrape_before_the_maps_exist_has_everything_else() {
    let text = metrics().encode().unwrap();
    for line in ["lb_source_events_total 0", "lb_source_connected 0.0", "lb_ready 0.0"] {
        assert!(samples(&text).contains(&line), "{line} not in\n{text}");
    }
    assert!(!text.contains("lb_datapath"), "{text}");
    assert!(text.ends_with("# EOF\n"), "{text}");
}

#[test]
fn maps_are_read_at_the_scrape() {
    let m = metrics();
    m.set_datapath(Arc::new(Fixed));
    let text = m.encode().unwrap();
    for line in [
        "lb_datapath_events_total{event=\"forward\"} 7",
        "lb_datapath_events_total{event=\"drop_no_route\"} 0",
        "lb_service_packets_total{service=\"ns/\\\"odd\\\"\\\\name:p\"} 3",
        "lb_service_bytes_total{service=\"ns/\\\"odd\\\"\\\\name:p\"} 180",
        "lb_map_entries{map=\"FLOWS4\"} 6",
        "lb_map_capacity{map=\"FLOWS4\"} 2000000",
        // Two entries a flow.
        "lb_flows{family=\"ipv4\"} 3",
    ] {
        assert!(samples(&text).contains(&line), "{line} not in\n{text}");
    }
}

#[test]
fn reconciliations_are_counted_by_result() {
    let m = metrics();
    m.synced(Duration::from_millis(3), true);
    m.synced(Duration::from_millis(3), false);
    m.operations("put_frontend", 5);
    m.set_rejected(BTreeMap::from([("bad_port", 2)]));
    m.set_devices("pod", 4);
    let text = m.encode().unwrap();
    for line in [
        "lb_syncs_total{result=\"ok\"} 1",
        "lb_syncs_total{result=\"error\"} 1",
        "lb_sync_duration_seconds_count 2",
        "lb_map_operations_total{op=\"put_frontend\"} 5",
        "lb_rejected_objects{reason=\"bad_port\"} 2",
        "lb_devices{role=\"pod\"} 4",
    ] {
        assert!(samples(&text).contains(&line), "{line} not in\n{text}");
    }
    m.set_rejected(BTreeMap::new());
    assert!(!m.encode().unwrap().contains("bad_port"));
}

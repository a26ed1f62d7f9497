//! Topology hints.

use lb_tests::{
    cluster::Cluster,
    place::Family,
    rule::{
        cluster,
        fixture::{Fixture, ready},
        probe::{To, flows},
    },
    shared::Shared,
    traffic::{Call, Proto},
};
use serde_json::json;

use crate::options;

static CLUSTER: Shared = Shared::new(|| cluster(options()));

const ZONE: &str = "topology.kubernetes.io/zone";

/// Hints of a pod's endpoints, as the controller writes them.
fn hint(fixture: &mut Fixture, pod: &str, zone: &str, node: Option<&str>) {
    let all = fixture.slices().filter_map(|s| s["endpoints"].as_array_mut()).flatten();
    for endpoint in all.filter(|e| e["targetRef"]["name"] == pod) {
        endpoint["hints"] = json!({ "forZones": [{ "name": zone }] });
        if let Some(node) = node {
            endpoint["hints"]["forNodes"] = json!([{ "name": node }]);
        }
    }
}

#[test]
fn b1_same_node_needs_a_hint_on_every_ready_endpoint_and_one_for_this_node() {
    let mut rule = CLUSTER.rule("b1");
    rule.check([
        flows("pod-1b", To::ClusterIp).get(&["pod-1a", "pod-1b"]),
        flows("node1", To::NodePort).get(&["pod-1a", "pod-1b"]),
        flows("client", To::LoadBalancer).get(&["pod-1a", "pod-1b"]),
        flows("pod-2b", To::ClusterIp).get(&["pod-2a"]),
        flows("client", To::NodePortOf(2)).get(&["pod-2a"]),
    ]);
    // One without a node hint: zones decide, on every node.
    rule.change(|f| hint(f, "pod-1b", "zone-b", None));
    rule.check([
        flows("pod-1b", To::ClusterIp).get(&["pod-1a"]),
        flows("pod-2b", To::ClusterIp).get(&["pod-1b", "pod-2a"]),
    ]);
    // None for node1: its zone decides; node2 goes by nodes again.
    rule.change(|f| {
        hint(f, "pod-1a", "zone-a", Some("node3"));
        hint(f, "pod-1b", "zone-b", Some("node3"));
    });
    rule.check([
        flows("pod-1b", To::ClusterIp).get(&["pod-1a"]),
        flows("pod-2b", To::ClusterIp).get(&["pod-2a"]),
    ]);
}

#[test]
fn b2_same_zone_needs_a_hint_on_every_ready_endpoint_and_one_for_this_zone() {
    let mut rule = CLUSTER.rule("b2");
    rule.check([
        flows("pod-1b", To::ClusterIp).get(&["pod-1a", "pod-2a"]),
        flows("client", To::LoadBalancer).get(&["pod-1a", "pod-2a"]),
        flows("node1", To::NodePort).get(&["pod-1a", "pod-2a"]),
        flows("pod-2b", To::ClusterIp).get(&["pod-1b", "pod-2b"]),
        flows("client", To::NodePortOf(2)).get(&["pod-1b", "pod-2b"]),
    ]);
    // Nobody for zone-a any more.
    rule.change(|f| {
        f.endpoints(&["pod-1b", "pod-2b"]);
    });
    rule.check([
        flows("pod-1b", To::ClusterIp).get(&["pod-1b", "pod-2b"]),
        flows("pod-2a", To::ClusterIp).get(&["pod-1b", "pod-2b"]),
    ]);
    rule.change(|f| {
        f.endpoints(&["pod-1b"]);
    });
    rule.check([flows("pod-1a", To::ClusterIp).get(&["pod-1b"])]);
}

#[test]
fn b3_one_ready_endpoint_without_hints_switches_them_off() {
    let mut rule = CLUSTER.rule("b3");
    rule.check([
        flows("pod-1b", To::ClusterIp).get(&["pod-1a"]),
        flows("client", To::LoadBalancer).get(&["pod-1a"]),
        flows("pod-2b", To::ClusterIp).get(&["pod-2a"]),
    ]);
    rule.change(|f| {
        f.condition("pod-2b", ready());
    });
    for (from, to) in [("pod-1b", To::ClusterIp), ("client", To::LoadBalancer), ("node2", To::NodePort)] {
        rule.check([flows(from, to).get(&["pod-1a", "pod-2a", "pod-2b"])]);
    }
}

/// Writes the Nodes with this zone for node1.
fn set_zone(cluster: &Cluster, zone: Option<&str>) {
    let mut nodes = Fixture::load("nodes").unwrap();
    let labels = &mut nodes.object("Node", "node1")["metadata"]["labels"];
    match zone {
        Some(zone) => labels[ZONE] = json!(zone),
        None => drop(labels.as_object_mut().map(|l| l.remove(ZONE))),
    }
    cluster.manifests.write("nodes", &nodes.documents).unwrap();
}

#[test]
fn b4_the_nodes_zone_label_is_followed_at_run_time() {
    let rule = CLUSTER.rule("b4");
    let lines = |pods: &[&str]| {
        [flows("pod-1b", To::ClusterIp).get(pods), flows("client", To::LoadBalancer).get(pods)]
    };
    rule.check(lines(&["pod-1a"]));
    set_zone(&rule.cluster, None);
    rule.check_soon(lines(&["pod-1a", "pod-2a"]));
    set_zone(&rule.cluster, Some("zone-b"));
    rule.check_soon(lines(&["pod-2a"]));
    set_zone(&rule.cluster, Some("zone-a"));
    rule.check_soon(lines(&["pod-1a"]));
    rule.check([flows("pod-2b", To::ClusterIp).get(&["pod-2a"])]);
}

#[test]
fn b5_hints_never_filter_the_local_set() {
    let rule = CLUSTER.rule("b5");
    rule.check([
        flows("pod-1b", To::ClusterIp).get(&["pod-1a"]),
        flows("node1", To::ClusterIp).get(&["pod-1a"]),
        flows("client", To::LoadBalancer).get(&["pod-1a"]),
        flows("client", To::NodePortOf(2)).get(&["pod-2a"]),
        // The Cluster set goes by the hints.
        flows("pod-1b", To::NodePort).get(&["pod-2a"]),
        flows("node2", To::LoadBalancer).get(&["pod-1a"]),
    ]);
}

#[test]
fn b6_hints_count_and_wishes_do_not() {
    let mut rule = CLUSTER.rule("b6");
    rule.check([
        flows("pod-1b", To::ClusterIp).get(&["pod-1a", "pod-2a"]),
        flows("client", To::LoadBalancer).get(&["pod-1a", "pod-2a"]),
        flows("pod-1b", To::ClusterIp).of("b6-hinted").get(&["pod-1a"]),
        flows("pod-2b", To::ClusterIp).of("b6-hinted").get(&["pod-2a"]),
    ]);
    rule.change(|f| {
        f.object("Service", "b6")["spec"]["trafficDistribution"] = json!("PreferSameNode");
        f.object("Service", "b6-hinted")["metadata"]["annotations"] =
            json!({ "service.kubernetes.io/topology-mode": "Disabled" });
    });
    rule.check([
        flows("pod-1b", To::ClusterIp).get(&["pod-1a", "pod-2a"]),
        flows("pod-1b", To::ClusterIp).of("b6-hinted").get(&["pod-1a"]),
    ]);
}

#[test]
fn b7_traffic_moves_from_node_to_zone_to_anywhere_without_a_failure() {
    let mut rule = CLUSTER.rule("b7");
    let lines = |pods: &[&str]| {
        [flows("pod-1b", To::ClusterIp).get(pods), flows("client", To::LoadBalancer).get(pods)]
    };
    rule.check(lines(&["pod-1a"]));
    let mut loads = Vec::new();
    for (from, to) in [("pod-1b", To::ClusterIp), ("client", To::LoadBalancer), ("node1", To::NodePort)] {
        for (family, proto) in [(Family::V4, Proto::Tcp), (Family::V6, Proto::Udp)] {
            let call = Call::new(proto, rule.frontend(from, to, family, proto));
            loads.push((format!("{from} {to:?} {proto:?}"), rule.place(from).load(&call).unwrap()));
        }
    }
    for (rest, expected) in [(&["pod-2a", "pod-2b"][..], "pod-2a"), (&["pod-2b"], "pod-2b")] {
        rule.change(|f| {
            f.endpoints(rest);
        });
        rule.check(lines(&[expected]));
    }
    for (what, load) in loads {
        let tally = load.stop().unwrap();
        assert_eq!(tally.failed, 0, "{what}: {tally:?}");
        let servers: Vec<&str> = tally.answered.keys().map(String::as_str).collect();
        assert_eq!(servers, ["pod-1a", "pod-2a", "pod-2b"], "{what}");
    }
    // Back to the node.
    rule.change(|f| {
        f.endpoints(&["pod-1a", "pod-2a", "pod-2b"]);
    });
    rule.check(lines(&["pod-1a"]));
}

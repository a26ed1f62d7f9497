//! Which endpoints.

use lb_tests::{
    place::Family,
    rule::{
        cluster,
        fixture::{draining, ended, ready, unready},
        probe::{To, flows},
    },
    shared::Shared,
    traffic::{Proto, Server},
};

use crate::options;

static CLUSTER: Shared = Shared::new(|| cluster(options()));

const EVERYWHERE: [(&str, To); 7] = [
    ("client", To::ClusterIp),
    ("client", To::NodePort),
    ("client", To::LoadBalancer),
    ("pod-1b", To::ClusterIp),
    ("pod-1b", To::LoadBalancer),
    ("node1", To::ClusterIp),
    ("node2", To::NodePort),
];

#[test]
fn a1_cluster_set_falls_back_to_serving_terminating() {
    let mut rule = CLUSTER.rule("a1");
    rule.check(EVERYWHERE.map(|(from, to)| flows(from, to).get(&["pod-1a", "pod-2a", "pod-2b"])));
    // One that is ready is enough.
    rule.change(|f| {
        f.condition("pod-2b", ready());
    });
    rule.check(EVERYWHERE.map(|(from, to)| flows(from, to).get(&["pod-2b"])));
    // Of the ready ones those that survive the topology filter.
    rule.change(|f| {
        f.condition("pod-1a", ready()).condition("pod-2a", ready()).condition("pod-2b", unready());
    });
    rule.check([
        flows("pod-1b", To::ClusterIp).get(&["pod-1a"]),
        flows("client", To::LoadBalancer).get(&["pod-1a"]),
        flows("pod-2b", To::ClusterIp).get(&["pod-2a"]),
    ]);
}

#[test]
fn a2_local_set_falls_back_independently() {
    let mut rule = CLUSTER.rule("a2");
    rule.check([
        flows("client", To::NodePortOf(1)).get(&["pod-1a"]),
        flows("client", To::NodePortOf(2)).get(&["pod-2a"]),
        flows("client", To::LoadBalancer).get(&["pod-1a"]),
        flows("pod-1b", To::ClusterIp).get(&["pod-1a"]),
        flows("node1", To::ClusterIp).get(&["pod-1a"]),
        flows("pod-2b", To::ClusterIp).get(&["pod-2a"]),
        // The Cluster set has a ready one, so it does not fall back.
        flows("pod-1b", To::NodePort).get(&["pod-2a"]),
        flows("node1", To::LoadBalancer).get(&["pod-2a"]),
    ]);
    rule.change(|f| {
        f.condition("pod-1a", ready()).condition("pod-2a", ended());
    });
    rule.check([
        // Local on node2 falls back now, the Cluster set still does not.
        flows("client", To::NodePortOf(2)).get(&["pod-2b"]),
        flows("pod-2a", To::ClusterIp).get(&["pod-2b"]),
        flows("pod-2a", To::NodePort).get(&["pod-1a"]),
        flows("client", To::NodePortOf(1)).get(&["pod-1a"]),
    ]);
    rule.change(|f| {
        f.condition("pod-1a", draining());
    });
    rule.check([
        flows("pod-1b", To::NodePort).get(&["pod-1a", "pod-2b"]),
        flows("client", To::NodePortOf(1)).get(&["pod-1a"]),
        flows("client", To::NodePortOf(2)).get(&["pod-2b"]),
    ]);
}

#[test]
fn a3_outside_traffic_drains_locally_while_pods_use_remote_ready_endpoints() {
    let rule = CLUSTER.rule("a3");
    rule.check([
        flows("client", To::LoadBalancer).get(&["pod-1a"]),
        flows("client", To::NodePort).get(&["pod-1a"]),
        flows("pod-1b", To::ClusterIp).get(&["pod-2a"]),
        flows("node1", To::ClusterIp).get(&["pod-2a"]),
    ]);
}

#[test]
fn a4_terminating_endpoints_get_nothing_new_beside_local_ready_ones() {
    let mut rule = CLUSTER.rule("a4");
    let outside = [("client", To::LoadBalancer), ("client", To::NodePort)];
    rule.check(outside.map(|(from, to)| flows(from, to).get(&["pod-1b"])));
    rule.change(|f| {
        f.condition("pod-1b", unready());
    });
    rule.check(outside.map(|(from, to)| flows(from, to).get(&["pod-1a"])));
}

#[test]
fn a5_terminating_endpoints_that_do_not_serve_are_as_good_as_none() {
    let mut rule = CLUSTER.rule("a5");
    for (from, to) in [
        ("client", To::LoadBalancer),
        ("client", To::NodePort),
        ("pod-1b", To::ClusterIp),
        ("node2", To::NodePort),
    ] {
        rule.check([flows(from, to).are_refused()]);
    }
    rule.change(|f| {
        f.condition("pod-2a", draining());
    });
    rule.check([
        flows("pod-1b", To::ClusterIp).get(&["pod-2a"]),
        // The policy is Local, and the one on this node serves no more.
        flows("client", To::LoadBalancer).are_dropped(),
    ]);
}

#[test]
fn a6_missing_conditions_mean_ready_serving_and_not_terminating() {
    let mut rule = CLUSTER.rule("a6");
    let sides = [("client", To::LoadBalancer), ("pod-2b", To::ClusterIp), ("node2", To::NodePort)];
    rule.check(sides.map(|(from, to)| flows(from, to).get(&["pod-1a", "pod-1b"])));
    // pod-2a is neither ready nor terminating: no last resort either.
    rule.change(|f| {
        f.condition("pod-1a", unready()).condition("pod-1b", unready());
    });
    rule.check(sides.map(|(from, to)| flows(from, to).get(&["pod-2b"])));
}

#[test]
fn a7_published_endpoints_count_as_ready_whatever_else_they_are() {
    let mut rule = CLUSTER.rule("a7");
    let sides = [("client", To::LoadBalancer), ("pod-1b", To::ClusterIp), ("node2", To::NodePort)];
    rule.check(sides.map(|(from, to)| flows(from, to).get(&["pod-1a", "pod-2a"])));
    rule.change(|f| {
        f.endpoints(&["pod-1a"]);
    });
    rule.check(sides.map(|(from, to)| flows(from, to).get(&["pod-1a"])));
}

#[test]
fn a8_only_first_addresses_in_slices_of_the_service_and_family_count() {
    let rule = CLUSTER.rule("a8");
    for (from, to) in [("client", To::NodePort), ("pod-1b", To::ClusterIp), ("node1", To::LoadBalancer)] {
        rule.check([
            flows(from, to).only(Family::V4).get(&["pod-1a"]),
            flows(from, to).only(Family::V6).get(&["pod-1a", "pod-1b"]),
        ]);
    }
}

#[test]
fn a9_of_two_copies_the_one_that_is_not_terminating_wins_in_either_order() {
    let rule = CLUSTER.rule("a9");
    for service in ["a9", "a9-reverse"] {
        rule.check([
            flows("pod-1b", To::ClusterIp).of(service).get(&["pod-1a", "pod-2a"]),
            flows("node2", To::ClusterIp).of(service).get(&["pod-1a", "pod-2a"]),
        ]);
    }
}

#[test]
fn a10_local_is_what_the_node_name_says() {
    let mut rule = CLUSTER.rule("a10");
    rule.check([
        flows("pod-1b", To::ClusterIp).get(&["pod-2a"]),
        flows("node1", To::ClusterIp).get(&["pod-2a"]),
        flows("pod-2b", To::ClusterIp).get(&["pod-1a"]),
        flows("pod-1b", To::NodePort).get(&["pod-1a", "pod-1b", "pod-2a"]),
    ]);
    // Whose node is not said is local nowhere.
    rule.change(|f| {
        f.endpoints(&["pod-1b"]);
    });
    rule.check([
        flows("pod-1a", To::ClusterIp).are_dropped(),
        flows("client", To::LoadBalancer).are_dropped(),
        flows("pod-1a", To::NodePort).get(&["pod-1b"]),
    ]);
}

#[test]
fn a11_a_named_target_port_may_be_another_number_in_each_pod() {
    let rule = CLUSTER.rule("a11");
    let pod = rule.place("pod-2a");
    let _second =
        Server::start(pod, "pod-2a:9090", &Family::BOTH.map(|f| pod.addrs.socket(f, 9090))).unwrap();
    rule.check(EVERYWHERE.map(|(from, to)| flows(from, to).get(&["pod-1a", "pod-2a:9090"])));
}

#[test]
fn a12_ports_of_sidecars_are_served_by_number_and_by_name() {
    let rule = CLUSTER.rule("a12");
    let sidecar = |pod: &str| {
        let place = rule.place(pod);
        let addrs = Family::BOTH.map(|f| place.addrs.socket(f, 9091));
        Server::start(place, &format!("{pod}:sidecar"), &addrs).unwrap()
    };
    let _sidecars = [sidecar("pod-1a"), sidecar("pod-2a")];
    for from in ["pod-1b", "node2", "client"] {
        let tcp = || flows(from, To::ClusterIp).over(Proto::Tcp);
        rule.check([
            tcp().port("tcp").get(&["pod-1a", "pod-2a"]),
            tcp().port("number").get(&["pod-1a:sidecar", "pod-2a:sidecar"]),
            tcp().port("name").get(&["pod-1a:sidecar", "pod-2a:sidecar"]),
        ]);
    }
}

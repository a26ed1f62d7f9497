//! UDP flows while servers come and go (I1 to I3).

use std::collections::BTreeMap;

use lb_tests::{
    place::Family,
    rule::{
        Rule,
        fixture::{draining, ended, ready, unready},
        probe::{To, flows},
    },
    shared::SOON,
    traffic::{Call, Proto, Session},
    wait_for,
};
use serde_json::json;

use super::{CLUSTER, serve};

/// For datagrams that may go to a backend that is gone.
const LOST_MS: u64 = 200;

/// Somebody who sends datagrams to a Service for ever, from one source port.
enum Sender {
    /// Through one socket.
    Open(Session),
    /// Through a socket of its own for each, as the Kubernetes e2e tests do with `nc -p`.
    Fresh { place: String, call: Call },
}

impl Sender {
    /// Who answers, if somebody does.
    fn ask(&mut self, rule: &Rule<'_>) -> Option<String> {
        let outcome = match self {
            Self::Open(session) => session.ask().unwrap(),
            Self::Fresh { place, call } => rule.place(place).call(call).unwrap(),
        };
        outcome.ok().map(|answer| answer.by)
    }
}

/// Senders of every kind from these places to these frontends, in both families. Connected sockets of a node's own
/// processes have a test of their own.
fn senders(rule: &Rule<'_>, ways: &[(&str, To)]) -> Vec<(String, Sender)> {
    let mut all = Vec::new();
    let mut port = 45_000;
    for (place, to) in ways {
        for family in Family::BOTH {
            let call = |proto| {
                let call = Call::new(proto, rule.frontend(place, *to, family, Proto::Udp));
                call.timeout_ms(LOST_MS)
            };
            let mut add =
                |kind: &str, sender| all.push((format!("{place} -> {to:?} {family:?} {kind}"), sender));
            let open = |call: &Call| Sender::Open(rule.place(place).session(call).unwrap());
            add("unconnected", open(&call(Proto::UdpUnconnected)));
            if !place.starts_with("node") {
                add("connected", open(&call(Proto::Udp)));
            }
            port += 1;
            let any = if family == Family::V4 { "0.0.0.0" } else { "::" };
            let from = (any.parse::<std::net::IpAddr>().unwrap(), port).into();
            add("fresh", Sender::Fresh { place: (*place).to_owned(), call: call(Proto::Udp).from(from) });
        }
    }
    all
}

/// Each comes to be answered by one of these.
#[track_caller]
fn answered_soon(rule: &Rule<'_>, senders: &mut [(String, Sender)], by: &[&str]) {
    for (what, sender) in senders {
        let mut last = None;
        let waited = wait_for("it", SOON, || {
            last = sender.ask(rule);
            last.as_deref().is_some_and(|last| by.contains(&last))
        });
        assert!(waited.is_ok(), "{what} is to be answered by {by:?}, last: {last:?}");
    }
}

/// Each is answered by one of these at once.
#[track_caller]
fn answered(rule: &Rule<'_>, senders: &mut [(String, Sender)], by: &[&str]) {
    for (what, sender) in senders {
        // A datagram may be lost on a busy machine: a few more never hurt.
        let answer = (0..5).find_map(|_| sender.ask(rule));
        assert!(answer.as_deref().is_some_and(|a| by.contains(&a)), "{what}: {answer:?}, not {by:?}");
    }
}

/// Open UDP sessions of which each of these pods has at least one, in each family.
fn sessions_on(
    rule: &Rule<'_>,
    place: &str,
    to: To,
    pods: &[&str],
) -> BTreeMap<String, Vec<(String, Sender)>> {
    let mut found: BTreeMap<String, Vec<_>> = BTreeMap::new();
    for family in Family::BOTH {
        let call = Call::udp(rule.frontend(place, to, family, Proto::Udp)).timeout_ms(LOST_MS);
        let mut missing: Vec<&str> = pods.into();
        for _ in 0..60 {
            let mut session = rule.place(place).session(&call).unwrap();
            let by = session.ask().unwrap().unwrap().by;
            missing.retain(|pod| *pod != by);
            found
                .entry(by)
                .or_default()
                .push((format!("{place} -> {to:?} {family:?}"), Sender::Open(session)));
            if missing.is_empty() {
                break;
            }
        }
        assert!(missing.is_empty(), "no session came to {missing:?}");
    }
    found
}

#[test]
fn i1_udp_flows_leave_backends_that_do_not_serve_and_no_others() {
    let mut rule = CLUSTER.prepare("i1");
    rule.change(|f| {
        f.endpoints(&["pod-1a", "pod-2b"]);
    });
    let places = [("client", To::LoadBalancer), ("pod-1b", To::ClusterIp), ("client", To::NodePortOf(2))];
    let mut sessions: Vec<_> =
        places.iter().map(|(place, to)| sessions_on(&rule, place, *to, &["pod-1a", "pod-2b"])).collect();
    // One drains, the other is gone.
    rule.change(|f| {
        f.endpoints(&["pod-1a", "pod-2a"]).condition("pod-1a", draining());
    });
    for sessions in &mut sessions {
        answered_soon(&rule, sessions.get_mut("pod-2b").unwrap(), &["pod-2a"]);
        answered(&rule, sessions.get_mut("pod-1a").unwrap(), &["pod-1a"]);
    }
    // Policies and hints take it out of the sets, and mean nothing to its flows.
    rule.change(|f| {
        f.condition("pod-1a", ready());
        for pod in f.slices().filter_map(|s| s["endpoints"].as_array_mut()).flatten() {
            let (node, zone) =
                if pod["targetRef"]["name"] == "pod-2a" { (1, "zone-a") } else { (2, "zone-c") };
            pod["hints"] = json!({
                "forNodes": [{ "name": format!("node{node}") }], "forZones": [{ "name": zone }],
            });
        }
    });
    rule.check([flows("pod-1b", To::ClusterIp).get(&["pod-2a"])]);
    for sessions in &mut sessions {
        answered(&rule, sessions.get_mut("pod-1a").unwrap(), &["pod-1a"]);
    }
    rule.change(|f| {
        f.endpoints(&["pod-1a", "pod-2a"]).condition("pod-1a", ended());
    });
    for sessions in &mut sessions {
        answered_soon(&rule, sessions.get_mut("pod-1a").unwrap(), &["pod-2a"]);
    }
}

/// Senders on these ways are answered by `before`, then, after a change of endpoints, by `after`; with `nobody` in
/// between if wanted.
fn cycle(rule: &mut Rule<'_>, ways: &[(&str, To)], before: &[&str], after: &[&str], nobody: bool) {
    rule.change(|f| {
        f.endpoints(before);
    });
    let mut all = senders(rule, ways);
    answered_soon(rule, &mut all, before);
    if nobody {
        rule.change(|f| {
            f.endpoints(&[]);
        });
        for (what, sender) in &mut all {
            wait_for("it to be left alone", SOON, || sender.ask(rule).is_none())
                .unwrap_or_else(|e| panic!("{what}: {e:#}"));
        }
    }
    rule.change(|f| {
        f.endpoints(after);
    });
    answered_soon(rule, &mut all, after);
}

const OUTSIDE_AND_PODS: [(&str, To); 3] =
    [("client", To::NodePort), ("pod-1b", To::NodePort), ("pod-2b", To::NodePort)];

#[test]
fn i2_udp_to_a_node_port_survives_server_pod_cycling() {
    let mut rule = CLUSTER.prepare("i2");
    cycle(&mut rule, &OUTSIDE_AND_PODS, &["pod-1a"], &["pod-2a"], false);
}

#[test]
fn i2_udp_to_a_cluster_ip_survives_server_pod_cycling() {
    let mut rule = CLUSTER.prepare("i2");
    let ways = [("pod-1b", To::ClusterIp), ("pod-2b", To::ClusterIp)];
    cycle(&mut rule, &ways, &["pod-1a"], &["pod-2a"], false);
}

#[test]
fn i2_udp_of_host_network_clients_survives_server_pod_cycling() {
    let mut rule = CLUSTER.prepare("i2");
    let ways = [("node1", To::ClusterIp), ("node2", To::ClusterIp), ("node1", To::NodePort)];
    cycle(&mut rule, &ways, &["pod-1a"], &["pod-2a"], false);
}

#[test]
fn i2_udp_reaches_backends_that_become_ready_late() {
    let mut rule = CLUSTER.prepare("i2");
    rule.change(|f| {
        f.endpoints(&["pod-2a"]).condition("pod-2a", unready());
    });
    let ways = [("client", To::NodePort), ("pod-1b", To::ClusterIp), ("node1", To::ClusterIp)];
    let mut all = senders(&rule, &ways);
    for (what, sender) in &mut all {
        assert_eq!(sender.ask(&rule), None, "{what}: nobody is ready");
    }
    rule.change(|f| {
        f.condition("pod-2a", ready());
    });
    answered_soon(&rule, &mut all, &["pod-2a"]);
}

#[test]
fn i2_udp_with_internal_policy_local_survives_server_pod_cycling() {
    let mut rule = CLUSTER.prepare("i2");
    rule.spec()["internalTrafficPolicy"] = json!("Local");
    let ways = [("pod-2b", To::ClusterIp), ("node2", To::ClusterIp)];
    cycle(&mut rule, &ways, &["pod-2a"], &["pod-2b"], false);
}

#[test]
fn i2_udp_to_a_load_balancer_survives_server_pod_cycling_on_the_same_node() {
    let mut rule = CLUSTER.prepare("i2");
    let ways = [("client", To::LoadBalancer), ("pod-2b", To::LoadBalancer)];
    for policy in ["Cluster", "Local"] {
        rule.spec()["externalTrafficPolicy"] = json!(policy);
        cycle(&mut rule, &ways, &["pod-1a"], &["pod-1b"], false);
    }
}

#[test]
fn i2_udp_to_a_load_balancer_survives_server_pod_cycling_on_different_nodes() {
    let mut rule = CLUSTER.prepare("i2");
    let ways = [("client", To::LoadBalancer), ("pod-2b", To::LoadBalancer)];
    cycle(&mut rule, &ways, &["pod-1a"], &["pod-2a"], false);
    cycle(&mut rule, &ways, &["pod-2a"], &["pod-1a"], false);
}

#[test]
fn i2_udp_survives_a_time_without_any_server() {
    let mut rule = CLUSTER.prepare("i2");
    let ways = [
        ("client", To::LoadBalancer),
        ("client", To::NodePort),
        ("pod-1b", To::ClusterIp),
        ("node1", To::ClusterIp),
    ];
    cycle(&mut rule, &ways, &["pod-1a"], &["pod-2a"], true);
}

#[test]
fn i3_a_new_target_port_moves_live_udp_senders() {
    let mut rule = CLUSTER.rule("i3");
    let _servers = serve(&rule, &["pod-1a"], 9090);
    let mut all =
        senders(&rule, &[("client", To::NodePort), ("pod-2b", To::NodePort), ("node1", To::NodePort)]);
    answered(&rule, &mut all, &["pod-1a"]);
    for (target, by) in [(9090, "pod-1a:9090"), (8080, "pod-1a")] {
        for port in 0..2 {
            rule.spec()["ports"][port]["targetPort"] = json!(target);
        }
        rule.change(|f| {
            f.slices().for_each(|s| (0..2).for_each(|port| s["ports"][port]["port"] = json!(target)))
        });
        answered_soon(&rule, &mut all, &[by]);
    }
}

use k8s_openapi::{
    api::core::v1::{NodeSpec, Taint},
    apimachinery::pkg::apis::meta::v1::Time,
};

use super::*;

fn at(start: Instant, seconds: u64) -> Instant {
    start + Duration::from_secs(seconds)
}

/// Whether /healthz says 200.
fn healthy(status: &Status, now: Instant) -> bool {
    status.health(now, SystemTime::now()).is_ok()
}

#[test]
fn h5_an_idle_agent_stays_healthy() {
    let (status, t) = (Status::default(), Instant::now());
    assert!(healthy(&status, at(t, 0)));
    assert!(healthy(&status, at(t, 1_000_000)));
    assert!(!status.is_ready());
}

#[test]
fn h5_a_change_that_waits_a_minute_is_unhealthy_until_programmed() {
    let (status, t) = (Status::default(), Instant::now());
    status.queued(t);
    // A later change does not make the first one younger.
    status.queued(at(t, 50));
    assert!(healthy(&status, at(t, 59)));
    assert!(!healthy(&status, at(t, 60)));
    assert!(!status.liveness(at(t, 60), SystemTime::now()).is_ok());
    assert!(status.is_healthy(at(t, 59)) && !status.is_healthy(at(t, 60)));
    assert_eq!(status.oldest_pending(at(t, 60)), Some(Duration::from_secs(60)));
    status.programmed(SystemTime::now());
    assert!(healthy(&status, at(t, 61)));
    assert_eq!(status.oldest_pending(at(t, 61)), None);
}

#[test]
fn h5_a_family_that_fails_is_named() {
    let (status, t) = (Status::default(), Instant::now());
    status.queued(t);
    status.programmed_family(Family::V4, SystemTime::now());
    let health = status.health(at(t, 60), SystemTime::now());
    assert!(!health.healthy);
    assert!(health.status["IPv4"].healthy);
    assert!(!health.status["IPv6"].healthy);
    assert!(!status.is_healthy(at(t, 60)));
}

#[test]
fn h6_a_loop_that_stops_beating_is_dead() {
    let (status, t) = (Status::default(), Instant::now());
    status.beat(t);
    assert!(status.liveness(at(t, 59), SystemTime::now()).healthy);
    assert!(!status.liveness(at(t, 60), SystemTime::now()).healthy);
    assert!(status.is_healthy(at(t, 59)) && !status.is_healthy(at(t, 60)));
}

fn tainted(key: &str) -> Node {
    let taint = Taint { key: key.into(), effect: "NoSchedule".into(), ..Default::default() };
    Node { spec: Some(NodeSpec { taints: Some(vec![taint]), ..Default::default() }), ..Default::default() }
}

#[test]
fn h5_a_node_about_to_go_is_not_eligible() {
    let (status, t) = (Status::default(), Instant::now());
    let eligible = || status.health(t, SystemTime::now()).node_eligible;

    status.node_applied(&tainted("node.kubernetes.io/unschedulable"));
    assert_eq!(eligible(), Some(true));
    status.node_applied(&tainted("ToBeDeletedByClusterAutoscaler"));
    assert_eq!(eligible(), Some(false));
    assert!(!healthy(&status, t));
    // The autoscaler changed its mind.
    status.node_applied(&Node::default());
    assert!(healthy(&status, t));
    let mut deleted = Node::default();
    deleted.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    status.node_applied(&deleted);
    assert!(!healthy(&status, t));
    status.node_applied(&Node::default());
    status.node_deleted();
    assert!(!healthy(&status, t));
}

#[test]
fn h6_liveness_knows_no_node() {
    let (status, t) = (Status::default(), Instant::now());
    for gone in [true, false] {
        if gone {
            status.node_deleted();
        } else {
            status.node_applied(&tainted("ToBeDeletedByClusterAutoscaler"));
        }
        let liveness = status.liveness(t, SystemTime::now());
        assert!(liveness.is_ok() && status.is_healthy(t));
        let json = serde_json::to_value(liveness).unwrap();
        assert_eq!(json.get("nodeEligible"), None, "{json}");
    }
}

/// 2023-11-14T22:13:20Z: `date -u -d @1700000000 +%FT%TZ`.
fn wall(plus: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + plus)
}

fn json(health: Health) -> serde_json::Value {
    serde_json::to_value(health).unwrap()
}

#[test]
fn h5_answers_are_those_of_kube_proxy() {
    let (status, t) = (Status::default(), Instant::now());
    // Nothing has been programmed yet: no families, and healthy.
    assert_eq!(
        json(status.health(t, wall(0))),
        serde_json::json!({
            "lastUpdated": "2023-11-14T22:13:20Z", "currentTime": "2023-11-14T22:13:20Z",
            "nodeEligible": true, "healthy": true,
        })
    );
    // Healthy: `lastUpdated` is now, whenever the last change was; families tell the truth.
    status.programmed(wall(0));
    let families = |v6: bool| {
        serde_json::json!({
            "IPv4": { "lastUpdated": "2023-11-14T22:13:20Z", "healthy": true },
            "IPv6": { "lastUpdated": "2023-11-14T22:13:20Z", "healthy": v6 },
        })
    };
    let expected = serde_json::json!({
        "lastUpdated": "2023-11-14T22:14:20Z", "currentTime": "2023-11-14T22:14:20Z",
        "nodeEligible": true, "healthy": true, "status": families(true),
    });
    assert_eq!(json(status.health(t, wall(60))), expected);
    // Not: `lastUpdated` is when something was programmed last. `healthy` is about the proxy, the node has its own field.
    status.node_deleted();
    let expected = serde_json::json!({
        "lastUpdated": "2023-11-14T22:13:20Z", "currentTime": "2023-11-14T22:14:20Z",
        "nodeEligible": false, "healthy": true, "status": families(true),
    });
    assert_eq!(json(status.health(t, wall(60))), expected);
}

#[test]
fn h6_answers_are_those_of_kube_proxy() {
    let (status, t) = (Status::default(), Instant::now());
    status.programmed(wall(0));
    status.queued(t);
    status.programmed_family(Family::V4, wall(30));
    assert_eq!(
        json(status.liveness(at(t, 60), wall(60))),
        serde_json::json!({
            "lastUpdated": "2023-11-14T22:13:50Z", "currentTime": "2023-11-14T22:14:20Z", "healthy": false,
            "status": {
                "IPv4": { "lastUpdated": "2023-11-14T22:13:50Z", "healthy": true },
                "IPv6": { "lastUpdated": "2023-11-14T22:13:20Z", "healthy": false },
            },
        })
    );
}

/// Stricter than kube-proxy, which calls itself healthy until the first time that it is.
#[test]
fn h5_a_start_that_fails_is_unhealthy() {
    let (status, t) = (Status::default(), Instant::now());
    status.queued(t);
    let health = json(status.health(at(t, 60), wall(0)));
    assert_eq!((&health["healthy"], &health["lastUpdated"]), (&false.into(), &"0001-01-01T00:00:00Z".into()));
    assert_eq!(health["status"]["IPv4"]["lastUpdated"], "0001-01-01T00:00:00Z");
}

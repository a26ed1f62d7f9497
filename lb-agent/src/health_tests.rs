use k8s_openapi::{
    api::core::v1::{NodeSpec, Taint},
    apimachinery::pkg::apis::meta::v1::Time,
};

use super::*;

fn at(start: Instant, seconds: u64) -> Instant {
    start + Duration::from_secs(seconds)
}

fn healthy(status: &Status, now: Instant) -> bool {
    status.health(now, SystemTime::now()).healthy
}

#[test]
fn an_idle_agent_stays_healthy() {
    let (status, t) = (Status::default(), Instant::now());
    assert!(healthy(&status, at(t, 0)));
    assert!(healthy(&status, at(t, 1_000_000)));
    assert!(!status.is_ready());
}

#[test]
fn a_change_that_waits_a_minute_is_unhealthy_until_programmed() {
    let (status, t) = (Status::default(), Instant::now());
    status.queued(t);
    // A later change does not make the first one younger.
    status.queued(at(t, 50));
    assert!(healthy(&status, at(t, 59)));
    assert!(!healthy(&status, at(t, 60)));
    assert!(!status.liveness(at(t, 60), SystemTime::now()).healthy);
    assert_eq!(status.oldest_pending(at(t, 60)), Some(Duration::from_secs(60)));
    status.programmed(SystemTime::now());
    assert!(healthy(&status, at(t, 61)));
    assert_eq!(status.oldest_pending(at(t, 61)), None);
}

#[test]
fn a_family_that_fails_is_named() {
    let (status, t) = (Status::default(), Instant::now());
    status.queued(t);
    status.programmed_family(Family::V4, SystemTime::now());
    let health = status.health(at(t, 60), SystemTime::now());
    assert!(!health.healthy);
    assert!(health.status["IPv4"].healthy);
    assert!(!health.status["IPv6"].healthy);
}

#[test]
fn a_loop_that_stops_beating_is_dead() {
    let (status, t) = (Status::default(), Instant::now());
    status.beat(t);
    assert!(status.liveness(at(t, 59), SystemTime::now()).healthy);
    assert!(!status.liveness(at(t, 60), SystemTime::now()).healthy);
}

#[test]
fn a_node_about_to_go_is_not_eligible_but_alive() {
    let (status, t) = (Status::default(), Instant::now());
    let taint = |key: &str| Taint { key: key.into(), effect: "NoSchedule".into(), ..Default::default() };
    let tainted = |key: &str| Node {
        spec: Some(NodeSpec { taints: Some(vec![taint(key)]), ..Default::default() }),
        ..Default::default()
    };
    let eligible = || status.health(t, SystemTime::now()).node_eligible;

    status.node_applied(&tainted("node.kubernetes.io/unschedulable"));
    assert_eq!(eligible(), Some(true));
    status.node_applied(&tainted("ToBeDeletedByClusterAutoscaler"));
    assert_eq!(eligible(), Some(false));
    assert!(!healthy(&status, t));
    assert!(status.liveness(t, SystemTime::now()).healthy);
    assert_eq!(status.liveness(t, SystemTime::now()).node_eligible, None);

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
fn answers_use_the_names_of_kube_proxy() {
    let status = Status::default();
    status.programmed(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000));
    let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_060);
    let json = serde_json::to_value(status.health(Instant::now(), wall)).unwrap();
    assert_eq!(
        json,
        serde_json::json!({
            // date -u -d @1700000000 +%FT%TZ
            "lastUpdated": "2023-11-14T22:13:20Z",
            "currentTime": "2023-11-14T22:14:20Z",
            "nodeEligible": true,
            "healthy": true,
            "status": {
                "IPv4": { "lastUpdated": "2023-11-14T22:13:20Z", "healthy": true },
                "IPv6": { "lastUpdated": "2023-11-14T22:13:20Z", "healthy": true },
            },
        })
    );
}

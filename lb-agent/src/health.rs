//! What /healthz, /livez and /readyz say. The reconcile loop reports to [`Status`]; `http.rs` shows it.
//!
//! The rules are kube-proxy's (pkg/proxy/healthcheck/proxy_health.go): a proxy is healthy while it starts, while it has
//! nothing to do, and while what it has to do is younger than a minute. Stricter than kube-proxy's in two ways: a first plan
//! that cannot be carried out counts like every other, and a loop that hangs is dead even with nothing to do.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use k8s_openapi::{api::core::v1::Node, jiff::Timestamp};
use serde::Serialize;

use crate::plan::op::Family;

/// A change that is older than this and not programmed means trouble (kube-proxy: twice its syncPeriod).
pub const PENDING_LIMIT: Duration = Duration::from_secs(60);

/// The cluster autoscaler is about to delete a node with this taint (KEP-3836).
const TAINT_TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// Shared by the reconcile loop (which writes) and the HTTP servers (which read). Never held across I/O.
#[derive(Debug, Default)]
pub struct Status {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    families: BTreeMap<Family, Progress>,
    ready: bool,
    last_beat: Option<Instant>,
    node_ineligible: bool,
    listening: BTreeMap<&'static str, bool>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    /// When the oldest change arrived that is not programmed yet.
    pending_since: Option<Instant>,
    programmed: Option<SystemTime>,
}

impl Progress {
    fn is_healthy(&self, now: Instant) -> bool {
        self.pending_since.is_none_or(|since| now.saturating_duration_since(since) < PENDING_LIMIT)
    }
}

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

impl Status {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A change arrived that has to be programmed. Call it only once the source is in sync: before that nothing may be
    /// programmed, however long it takes.
    pub fn queued(&self, now: Instant) {
        let mut inner = self.lock();
        for family in FAMILIES {
            inner.families.entry(family).or_default().pending_since.get_or_insert(now);
        }
    }

    /// Everything queued so far is programmed in both families.
    pub fn programmed(&self, at: SystemTime) {
        for family in FAMILIES {
            self.programmed_family(family, at);
        }
    }

    /// Everything queued so far is programmed in this family; the other one may have failed.
    pub fn programmed_family(&self, family: Family, at: SystemTime) {
        self.lock().families.insert(family, Progress { pending_since: None, programmed: Some(at) });
    }

    /// Everything known at start is programmed. Stays so.
    pub fn mark_ready(&self) {
        self.lock().ready = true;
    }

    /// The reconcile loop is running. Once called, it must be called more often than [`PENDING_LIMIT`], or the agent
    /// counts as dead.
    pub fn beat(&self, now: Instant) {
        self.lock().last_beat = Some(now);
    }

    /// This node's object is new or has changed.
    pub fn node_applied(&self, node: &Node) {
        self.lock().node_ineligible = !is_eligible(node);
    }

    /// This node's object is gone.
    pub fn node_deleted(&self) {
        self.lock().node_ineligible = true;
    }

    /// A server got, or has lost, its port.
    pub(crate) fn set_listening(&self, server: &'static str, up: bool) {
        self.lock().listening.insert(server, up);
    }

    pub fn is_ready(&self) -> bool {
        self.lock().ready
    }

    /// Which servers have their ports.
    pub fn listening(&self) -> BTreeMap<&'static str, bool> {
        self.lock().listening.clone()
    }

    /// How old the oldest change is that is not programmed yet.
    pub fn oldest_pending(&self, now: Instant) -> Option<Duration> {
        let inner = self.lock();
        let since = inner.families.values().filter_map(|p| p.pending_since).min()?;
        Some(now.saturating_duration_since(since))
    }

    /// Everything that had to be programmed is, or is younger than [`PENDING_LIMIT`], in all families. Says nothing about the
    /// node: the judgement of [`Status::liveness`], and what health checks of Services go by.
    pub fn is_healthy(&self, now: Instant) -> bool {
        let inner = self.lock();
        inner.beats(now) && inner.families.values().all(|progress| progress.is_healthy(now))
    }

    /// What /livez says: nothing about the node, since an agent on a node that is going away must not be restarted (H6).
    pub fn liveness(&self, now: Instant, wall: SystemTime) -> Health {
        self.lock().judge(now, wall, None)
    }

    /// What /healthz says: whether load balancers may send traffic to this node (H5).
    pub fn health(&self, now: Instant, wall: SystemTime) -> Health {
        let inner = self.lock();
        inner.judge(now, wall, Some(!inner.node_ineligible))
    }
}

impl Inner {
    fn beats(&self, now: Instant) -> bool {
        self.last_beat.is_none_or(|at| now.saturating_duration_since(at) < PENDING_LIMIT)
    }

    fn judge(&self, now: Instant, wall: SystemTime, node_eligible: Option<bool>) -> Health {
        let beats = self.beats(now);
        let family = |(family, progress): (&Family, &Progress)| {
            let last_updated = progress.programmed.map_or_else(never, timestamp);
            (family_name(*family), FamilyHealth { last_updated, healthy: beats && progress.is_healthy(now) })
        };
        let status: BTreeMap<_, _> = self.families.iter().map(family).collect();
        let programmed = self.families.values().filter_map(|p| p.programmed).max();
        let mut health = Health {
            last_updated: programmed.map_or_else(never, timestamp),
            current_time: timestamp(wall),
            node_eligible,
            healthy: beats && status.values().all(|f| f.healthy),
            status,
        };
        if health.is_ok() {
            // kube-proxy does so for readers that know its old releases: where all is well this time is always recent,
            // although there may have been nothing to do for days.
            health.last_updated.clone_from(&health.current_time);
        }
        health
    }
}

/// Whether load balancers may send new traffic to this node.
fn is_eligible(node: &Node) -> bool {
    let taints = node.spec.as_ref().and_then(|s| s.taints.as_deref()).unwrap_or_default();
    node.metadata.deletion_timestamp.is_none() && taints.iter().all(|t| t.key != TAINT_TO_BE_DELETED)
}

fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

/// RFC 3339 as the Kubernetes API writes it.
fn timestamp(at: SystemTime) -> String {
    Timestamp::try_from(at).map_or_else(|_| String::new(), |t| t.to_string())
}

/// Go's zero time, which kube-proxy's readers know as "not yet".
fn never() -> String {
    "0001-01-01T00:00:00Z".to_owned()
}

/// The answer of /healthz and /livez, with kube-proxy's field names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Health {
    pub last_updated: String,
    pub current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_eligible: Option<bool>,
    /// Of the agent; a node that is going away does not change it.
    pub healthy: bool,
    /// Of each family that something was to be programmed for.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub status: BTreeMap<&'static str, FamilyHealth>,
}

impl Health {
    /// Whether the answer is 200; 503 otherwise.
    pub fn is_ok(&self) -> bool {
        self.healthy && self.node_eligible != Some(false)
    }
}

/// One family's part of [`Health`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FamilyHealth {
    pub last_updated: String,
    pub healthy: bool,
}

#[cfg(test)]
#[path = "health_tests.rs"]
mod tests;

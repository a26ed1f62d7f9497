//! How many Service ports have endpoints, but none that their policy Local allows on this node (rule C8). Kept up to date by
//! the plans, in proportion to what they look at.

use std::collections::BTreeMap;

use super::{desired::Desired, op::Family};
use crate::model::{ExternalPolicy, InternalPolicy, Service, ServiceKey, ServiceType};

/// Service ports of one family whose traffic is dropped for want of local endpoints, by the policy that says so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ByPolicy {
    /// `internalTrafficPolicy`.
    pub internal: u32,
    /// `externalTrafficPolicy`.
    pub external: u32,
}

/// The same for both families.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoLocalEndpoints {
    pub v4: ByPolicy,
    pub v6: ByPolicy,
}

impl NoLocalEndpoints {
    fn of(&mut self, family: Family) -> &mut ByPolicy {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }
}

/// The counts of the Services that have any, and their sum.
#[derive(Clone, Debug, Default)]
pub(super) struct NoLocal {
    by_service: BTreeMap<ServiceKey, NoLocalEndpoints>,
    sum: NoLocalEndpoints,
}

impl NoLocal {
    pub(super) const fn sum(&self) -> NoLocalEndpoints {
        self.sum
    }

    /// `wanted` is what `service` wants now; `None`: it is gone.
    pub(super) fn update(&mut self, key: &ServiceKey, service: Option<&Service>, wanted: &Desired) {
        let now = service.map(|service| count(service, wanted)).unwrap_or_default();
        let before = if now == NoLocalEndpoints::default() {
            self.by_service.remove(key)
        } else {
            self.by_service.insert(key.clone(), now)
        };
        let before = before.unwrap_or_default();
        for (sum, before, now) in
            [(&mut self.sum.v4, before.v4, now.v4), (&mut self.sum.v6, before.v6, now.v6)]
        {
            sum.internal = sum.internal + now.internal - before.internal;
            sum.external = sum.external + now.external - before.external;
        }
    }
}

/// kube-proxy's condition (pkg/proxy/iptables/proxier.go): there are endpoints, the policy is Local, and no endpoint is
/// local. The external one is asked for only where there is a way in from outside.
fn count(service: &Service, wanted: &Desired) -> NoLocalEndpoints {
    let internal = service.internal_policy == InternalPolicy::Local;
    let is_reachable = matches!(service.kind, ServiceType::NodePort | ServiceType::LoadBalancer)
        || !service.external_ips.is_empty();
    let external = service.external_policy == ExternalPolicy::Local && is_reachable;
    let mut counts = NoLocalEndpoints::default();
    // The Cluster set is empty only if nobody can take flows anywhere.
    let without = wanted.records.iter().filter(|r| r.sets.local.is_empty() && !r.sets.cluster.is_empty());
    for record in without {
        let count = counts.of(record.family);
        count.internal += u32::from(internal);
        count.external += u32::from(external);
    }
    counts
}

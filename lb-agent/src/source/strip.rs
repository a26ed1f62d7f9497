//! Drops what the agent never reads from objects as soon as they arrive: on a large cluster that is most of their size.

use k8s_openapi::{
    api::{
        core::v1::{Node, NodeSpec, NodeStatus, Service, ServiceStatus},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

/// Objects with one of these labels are not ours (kube-proxy rule: headless Services program nothing, and
/// `service-proxy-name` hands a Service to another proxy). The API server filters with the same keys.
pub const FOREIGN_LABELS: [&str; 2] =
    ["service.kubernetes.io/headless", "service.kubernetes.io/service-proxy-name"];

/// When the pod or Service changed that the EndpointSlice controller wrote a slice for, in RFC 3339.
pub const TRIGGER_TIME_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// True if the object belongs to another proxy or to nobody.
pub fn is_foreign(meta: &ObjectMeta) -> bool {
    meta.labels.as_ref().is_some_and(|labels| FOREIGN_LABELS.iter().any(|key| labels.contains_key(*key)))
}

/// An object that can be cut down to what the agent reads.
pub trait Strip {
    fn strip(&mut self);
}

/// Keeps names, labels, `deletionTimestamp`, and the annotations that the agent reads.
fn strip_meta(meta: &mut ObjectMeta) {
    meta.managed_fields = None;
    meta.owner_references = None;
    meta.finalizers = None;
    meta.self_link = None;
    if let Some(annotations) = &mut meta.annotations {
        annotations
            .retain(|key, _| key.starts_with("service.kubernetes.io/") || key == TRIGGER_TIME_ANNOTATION);
    }
    meta.annotations.take_if(|a| a.is_empty());
}

impl Strip for Service {
    fn strip(&mut self) {
        strip_meta(&mut self.metadata);
        self.status = self
            .status
            .take()
            .map(|status| ServiceStatus { load_balancer: status.load_balancer, ..Default::default() });
    }
}

impl Strip for EndpointSlice {
    fn strip(&mut self) {
        strip_meta(&mut self.metadata);
        for endpoint in &mut self.endpoints {
            endpoint.target_ref = None;
            endpoint.deprecated_topology = None;
            endpoint.hostname = None;
        }
    }
}

impl Strip for Node {
    fn strip(&mut self) {
        strip_meta(&mut self.metadata);
        self.spec = self.spec.take().map(|spec| NodeSpec {
            pod_cidr: spec.pod_cidr,
            pod_cidrs: spec.pod_cidrs,
            taints: spec.taints,
            unschedulable: spec.unschedulable,
            ..Default::default()
        });
        self.status =
            self.status.take().map(|status| NodeStatus { addresses: status.addresses, ..Default::default() });
    }
}

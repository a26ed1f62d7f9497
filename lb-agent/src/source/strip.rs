//! Drops what the agent never reads from objects as soon as they arrive: on a large cluster that is most of their size.

use k8s_openapi::{
    api::{
        core::v1::{Node, NodeSpec, NodeStatus, Service, ServiceStatus},
        discovery::v1::EndpointSlice,
        networking::v1::ServiceCIDR,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use crate::{model::convert::SERVICE_NAME_LABEL, source::Kind};

/// Of a Service: clients find its pods by DNS alone.
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
/// Hands a Service to another proxy.
const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";

/// Objects of a kind with one of these labels are not ours (kube-proxy rule I9). The API server filters with the same keys.
///
/// Services of other proxies are read nevertheless: packets to their ClusterIPs are not to be dropped as unassigned.
pub const fn foreign_labels(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::Service => &[HEADLESS_LABEL],
        Kind::EndpointSlice => &[HEADLESS_LABEL, PROXY_NAME_LABEL],
        Kind::Node | Kind::ServiceCidr => &[],
    }
}

/// When the pod or Service changed that the EndpointSlice controller wrote a slice for, in RFC 3339.
pub const TRIGGER_TIME_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// True for labels and annotations that the agent reads on Services and EndpointSlices.
pub fn is_read(key: &str) -> bool {
    key == SERVICE_NAME_LABEL || key == TRIGGER_TIME_ANNOTATION || key.starts_with("service.kubernetes.io/")
}

/// True if the object belongs to another proxy or to nobody.
pub fn is_foreign(kind: Kind, meta: &ObjectMeta) -> bool {
    let has = |key: &&str| meta.labels.as_ref().is_some_and(|labels| labels.contains_key(*key));
    foreign_labels(kind).iter().any(has)
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

impl Strip for ServiceCIDR {
    fn strip(&mut self) {
        strip_meta(&mut self.metadata);
        self.status = None;
    }
}

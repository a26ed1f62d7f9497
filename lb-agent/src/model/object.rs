//! The objects themselves: only what planning reads, so that equal means "nothing to do".

use std::{fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;

use crate::plan::op::{Family, Protocol};

/// What a Service is called. Ordered by namespace, then name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl ServiceKey {
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What an EndpointSlice is called.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SliceKey {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl SliceKey {
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

/// `spec.type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ServiceType {
    #[default]
    ClusterIp,
    NodePort,
    LoadBalancer,
    ExternalName,
}

/// `spec.internalTrafficPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum InternalPolicy {
    #[default]
    Cluster,
    Local,
}

/// `spec.externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExternalPolicy {
    #[default]
    Cluster,
    Local,
}

/// A Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub key: ServiceKey,
    pub kind: ServiceType,
    /// `spec.clusterIP` is `None` (the word): clients find the pods by DNS alone.
    pub headless: bool,
    /// At most one per family.
    pub cluster_ips: Vec<IpAddr>,
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress` entries that packets arrive at unchanged: those with an `ip` whose `ipMode` is not
    /// `Proxy` (a proxy sends to the node's own addresses).
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`, sorted, each once. `None`: not given. Empty: given, and none can be understood, so
    /// nobody is known to be admitted.
    pub source_ranges: Option<Vec<IpNet>>,
    pub internal_policy: InternalPolicy,
    pub external_policy: ExternalPolicy,
    /// `sessionAffinity: ClientIP` and its timeout.
    pub affinity_timeout_s: Option<u32>,
    /// Label `service.kubernetes.io/service-proxy-name`: another proxy serves this one.
    pub proxy_name: Option<Arc<str>>,
    /// Only a Service of type LoadBalancer with external policy Local can have one.
    pub health_check: Option<HealthCheck>,
    /// Sorted by (name, protocol), which is unique.
    pub ports: Vec<ServicePort>,
}

impl Service {
    /// False for Services that have no packets to balance here, whatever their fields say.
    pub fn is_programmed(&self) -> bool {
        !self.headless && self.kind != ServiceType::ExternalName && self.proxy_name.is_none()
    }

    /// True for Services whose ClusterIP another proxy serves.
    pub fn is_foreign(&self) -> bool {
        !self.headless && self.kind != ServiceType::ExternalName && self.proxy_name.is_some()
    }

    /// The ClusterIP of a family. A Service without one does not exist in that family (kube-proxy does the same).
    pub fn cluster_ip(&self, family: Family) -> Option<IpAddr> {
        self.cluster_ips.iter().copied().find(|ip| Family::of(*ip) == family)
    }
}

/// Where load balancers ask a node whether it has endpoints of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// `spec.healthCheckNodePort`.
    pub node_port: u16,
    /// `metadata.uid`: Events name the object that they are about by it. A manifest may not say.
    pub uid: Option<Arc<str>>,
}

/// One of `spec.ports`. Where it leads to is resolved per EndpointSlice, so `targetPort` is not kept.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServicePort {
    /// Empty if the port has none.
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub port: u16,
    /// 0: none.
    pub node_port: u16,
}

/// `addressType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AddressType {
    Ip(Family),
    /// Names instead of addresses: ignored.
    Fqdn,
}

/// An EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    pub key: SliceKey,
    /// Label `kubernetes.io/service-name`; a slice without it, or of a headless Service, serves nobody here.
    pub service: Option<Arc<str>>,
    pub address_type: AddressType,
    pub ports: Box<[SlicePort]>,
    pub endpoints: Box<[Endpoint]>,
}

/// A port that every endpoint of a slice has.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SlicePort {
    /// Of the Service port that it belongs to.
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub port: u16,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The first of its addresses; the API says that the others are to be ignored.
    pub addr: IpAddr,
    pub conditions: Conditions,
    /// `nodeName`.
    pub node: Option<Arc<str>>,
    pub hints: Option<Box<Hints>>,
}

/// `conditions`, with the API's defaults filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conditions {
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
}

/// `hints`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hints {
    pub zones: Box<[Arc<str>]>,
    pub nodes: Box<[Arc<str>]>,
}

/// A Node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub name: Arc<str>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// `status.addresses` of type InternalIP.
    pub internal_ips: Vec<IpAddr>,
    /// `status.addresses` of type ExternalIP.
    pub external_ips: Vec<IpAddr>,
}

/// A ServiceCIDR: where ClusterIPs come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceCidr {
    pub name: Arc<str>,
    /// At most one per family in the API.
    pub cidrs: Vec<IpNet>,
}

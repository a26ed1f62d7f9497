//! What one Service needs in the kernel: a pure function of its objects and of the node.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use lb_common::frontend::{ServiceName, flags};

use super::{
    endpoints::{self, Sets},
    nodeport,
    op::{Family, Frontend},
    ranges::{self, Filter},
    rejection::Rejection,
};
use crate::{
    model::{EndpointSlice, ExternalPolicy, InternalPolicy, Model, Service, ServicePort},
    settings::NodePortAddresses,
};

/// What planning knows of the node it runs on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    /// As in `endpoint.nodeName`.
    pub name: Arc<str>,
    pub zone: Option<Arc<str>>,
    /// Addresses that serve NodePorts: see [`nodeport_addresses`](super::nodeport::nodeport_addresses).
    pub nodeport_addresses: BTreeSet<IpAddr>,
    /// Loopback addresses that serve NodePorts to sockets of the node: see
    /// [`loopback_addresses`](super::nodeport::loopback_addresses).
    pub loopback_addresses: BTreeSet<IpAddr>,
    /// All addresses that the node has or is known by, but for those of loopback and link-local ranges.
    pub own_addresses: BTreeSet<IpAddr>,
    /// externalIPs outside of these are not served.
    pub allow_external_ips: Vec<IpNet>,
    /// Where ClusterIPs come from, beside the ServiceCIDR objects.
    pub service_cidrs: Vec<IpNet>,
}

impl NodeView {
    /// This node as the model and the settings have it; `local` are the addresses of its devices. NodePorts on loopback
    /// addresses and ServiceCIDRs of the settings come on top.
    pub fn new<'a>(
        model: &Model,
        nodeport_addresses: &NodePortAddresses,
        allow_external_ips: &[IpNet],
        local: impl IntoIterator<Item = &'a IpAddr, IntoIter: Clone>,
    ) -> Self {
        let local = local.into_iter();
        Self {
            loopback_addresses: BTreeSet::new(),
            own_addresses: nodeport::own_addresses(local.clone(), model.node()),
            service_cidrs: Vec::new(),
            name: model.node_name().clone(),
            zone: model.node().and_then(|node| node.zone.clone()),
            nodeport_addresses: nodeport::nodeport_addresses(nodeport_addresses, local, model.node()),
            allow_external_ips: allow_external_ips.to_vec(),
        }
    }
}

/// What a Service wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// In the order of ports, then families.
    pub records: Vec<DesiredRecord>,
    /// What it says about addresses as a whole: `KIND_*` of `lb_common::frontend::flags`.
    pub addresses: BTreeSet<(IpAddr, u32)>,
    pub rejections: Vec<Rejection>,
}

/// One Service port in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredRecord {
    /// `namespace/name:port/TCP/v4`; without `:port` if the port has no name. Unique, and what finds the record again
    /// after a restart.
    pub name: String,
    pub family: Family,
    pub port: ServicePort,
    /// 0: no affinity.
    pub affinity_timeout_s: u32,
    /// Sorted, each once, with its `lb_common::frontend::flags`.
    pub frontends: Vec<(Frontend, u32)>,
    /// Clients that the LoadBalancer frontends admit if they ask for it. Sorted, each once.
    pub source_ranges: Vec<IpNet>,
    pub sets: Sets,
}

/// What `service` wants on this node. `slices` are all that name it.
pub fn desired<'a, S>(service: &Service, slices: impl Fn() -> S, node: &NodeView) -> Desired
where
    S: Iterator<Item = &'a EndpointSlice>,
{
    let mut desired = Desired::default();
    // I9: headless Services, ExternalName, and those of other proxies.
    if !service.is_programmed() {
        let foreign = service.is_foreign().then_some(&service.cluster_ips);
        desired.addresses.extend(foreign.into_iter().flatten().map(|ip| (*ip, flags::KIND_FOREIGN)));
        return desired;
    }
    // C7: also of a Service that has no ports, or none that fits.
    desired.addresses.extend(service.cluster_ips.iter().map(|ip| (*ip, flags::KIND_CLUSTER_IP)));
    let filters = [Family::V4, Family::V6]
        .map(|family| (family, ranges::filter(service, family, node, &mut desired.rejections)));
    let external_ips = allowed_external_ips(service, node, &mut desired.rejections);
    for port in &service.ports {
        for (family, filter) in &filters {
            let family = *family;
            // I11: each family is computed alone.
            if service.cluster_ip(family).is_none() {
                continue;
            }
            let name = record_name(service, port, family);
            if name.len() > ServiceName::CAPACITY_BYTES {
                desired.rejections.push(Rejection::NameTooLong {
                    service: service.key.clone(),
                    record: name,
                    capacity: ServiceName::CAPACITY_BYTES,
                });
                continue;
            }
            let frontends = frontends(service, port, family, &external_ips, filter, node);
            let addresses = frontends.iter().filter(|(_, bits)| bits & flags::LOOPBACK == 0);
            desired.addresses.extend(addresses.map(|(f, bits)| (f.addr, bits & flags::KIND_MASK)));
            desired.records.push(DesiredRecord {
                name,
                family,
                port: port.clone(),
                affinity_timeout_s: service.affinity_timeout_s.unwrap_or(0),
                frontends,
                source_ranges: filter.ranges.clone(),
                sets: endpoints::sets(port, family, slices(), node),
            });
        }
    }
    desired
}

fn record_name(service: &Service, port: &ServicePort, family: Family) -> String {
    let family = match family {
        Family::V4 => "v4",
        Family::V6 => "v6",
    };
    let (key, name, protocol) = (&service.key, &port.name, port.protocol);
    if name.is_empty() {
        format!("{key}/{protocol}/{family}")
    } else {
        format!("{key}:{name}/{protocol}/{family}")
    }
}

fn allowed_external_ips(service: &Service, node: &NodeView, rejections: &mut Vec<Rejection>) -> Vec<IpAddr> {
    let (allowed, refused): (Vec<_>, Vec<_>) = service
        .external_ips
        .iter()
        .partition(|ip| node.allow_external_ips.iter().any(|net| net.contains(*ip)));
    rejections.extend(
        refused
            .into_iter()
            .map(|ip: IpAddr| Rejection::ExternalIpNotAllowed { service: service.key.clone(), ip }),
    );
    allowed
}

/// Every address that the port is served at. If two kinds of one port meet on an address, the one inserted last wins:
/// an external kind never takes the place of the ClusterIP.
fn frontends(
    service: &Service,
    port: &ServicePort,
    family: Family,
    external_ips: &[IpAddr],
    filter: &Filter,
    node: &NodeView,
) -> Vec<(Frontend, u32)> {
    let (internal, external) = policy_flags(service);
    let mut frontends = BTreeMap::new();
    let mut add = |addr: IpAddr, number: u16, flags: u32| {
        if Family::of(addr) == family {
            frontends.insert(Frontend { addr, port: number, protocol: port.protocol }, flags);
        }
    };
    // E6: whether a Service has NodePorts shows in the port alone, not in its type.
    if port.node_port != 0 {
        for addr in &node.nodeport_addresses {
            add(*addr, port.node_port, external | flags::KIND_NODE_PORT);
        }
        for addr in &node.loopback_addresses {
            add(*addr, port.node_port, external | flags::KIND_NODE_PORT | flags::LOOPBACK);
        }
    }
    for addr in external_ips {
        add(*addr, port.port, external | flags::KIND_EXTERNAL_IP);
    }
    for addr in &service.load_balancer_ips {
        // E1: source ranges are for these alone.
        add(*addr, port.port, external | flags::KIND_LOAD_BALANCER | filter.flags);
    }
    if let Some(addr) = service.cluster_ip(family) {
        add(addr, port.port, internal | flags::KIND_CLUSTER_IP);
    }
    frontends.into_iter().collect()
}

/// Flags of ClusterIPs, and of every other kind.
fn policy_flags(service: &Service) -> (u32, u32) {
    let affinity = if service.affinity_timeout_s.is_some() { flags::AFFINITY } else { 0 };
    let internal = match service.internal_policy {
        InternalPolicy::Cluster => 0,
        // Whoever asks, and from wherever: the policy belongs to the address.
        InternalPolicy::Local => flags::INTERNAL_LOCAL | flags::EXTERNAL_LOCAL,
    };
    let external = match service.external_policy {
        ExternalPolicy::Cluster => 0,
        // C3, D: pods and the node itself still reach all endpoints, they need no hop saved.
        ExternalPolicy::Local => flags::EXTERNAL_LOCAL,
    };
    (internal | affinity, external | affinity)
}

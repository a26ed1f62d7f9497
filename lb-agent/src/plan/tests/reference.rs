//! What each frontend must do, decided as directly as the rules are written, without sets, ids or records.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use lb_common::{frontend::flags, select::Origin};

use super::kernel::Decision;
use crate::{
    model::{
        AddressType, Endpoint, ExternalPolicy, InternalPolicy, Model, Service, ServicePort, ServiceType,
    },
    plan::{
        NodeView,
        op::{Family, Frontend},
    },
};

pub type Answers = BTreeMap<Frontend, [Decision; 2]>;

pub const ORIGINS: [Origin; 2] = [Origin::Internal, Origin::External];

/// For each frontend that is served: what flows from inside and from outside get. Services are visited in order, so the
/// first claim wins.
pub fn answers(model: &Model, node: &NodeView) -> Answers {
    let mut answers = Answers::new();
    for (_, service) in model.services() {
        let mine =
            !service.headless && service.kind != ServiceType::ExternalName && service.proxy_name.is_none();
        if !mine {
            continue;
        }
        for port in &service.ports {
            for cluster_ip in &service.cluster_ips {
                let family = Family::of(*cluster_ip);
                let internal_local = service.internal_policy == InternalPolicy::Local;
                let external_local = service.external_policy == ExternalPolicy::Local;
                let endpoints = endpoints(model, service, port, family, node);
                let mut add = |addr, number, local: [bool; 2]| {
                    if Family::of(addr) != family {
                        return;
                    }
                    let frontend = Frontend { addr, port: number, protocol: port.protocol };
                    let decisions = local.map(|local| decide(&endpoints, local, node));
                    answers.entry(frontend).or_insert(decisions);
                };
                add(*cluster_ip, port.port, [internal_local; 2]);
                for ip in &service.load_balancer_ips {
                    add(*ip, port.port, [false, external_local]);
                }
                for ip in &service.external_ips {
                    if node.allow_external_ips.iter().any(|net| net.contains(ip)) {
                        add(*ip, port.port, [false, external_local]);
                    }
                }
                for ip in node.nodeport_addresses.iter().chain(&node.loopback_addresses) {
                    if port.node_port != 0 {
                        add(*ip, port.node_port, [false, external_local]);
                    }
                }
            }
        }
    }
    answers
}

type Endpoints = BTreeMap<(IpAddr, u16), Endpoint>;

fn endpoints(
    model: &Model,
    service: &Service,
    port: &ServicePort,
    family: Family,
    node: &NodeView,
) -> Endpoints {
    let mut endpoints = Endpoints::new();
    for slice in model.slices(&service.key) {
        if slice.address_type != AddressType::Ip(family) {
            continue;
        }
        for slice_port in &slice.ports {
            if slice_port.name != port.name || slice_port.protocol != port.protocol {
                continue;
            }
            for endpoint in &slice.endpoints {
                let kept =
                    endpoints.entry((endpoint.addr, slice_port.port)).or_insert_with(|| endpoint.clone());
                if liveness(endpoint, node) > liveness(kept, node) {
                    *kept = endpoint.clone();
                }
            }
        }
    }
    endpoints
}

/// A9; hints only make it total.
fn liveness<'a>(e: &'a Endpoint, node: &NodeView) -> impl Ord + use<'a> {
    let c = e.conditions;
    (!c.terminating, c.ready, c.serving, is_here(e, node), e.hints.clone())
}

fn is_here(e: &Endpoint, node: &NodeView) -> bool {
    e.node.as_ref() == Some(&node.name)
}

fn decide(endpoints: &Endpoints, local: bool, node: &NodeView) -> Decision {
    let nodes = |e: &Endpoint| e.hints.clone().map(|h| h.nodes.to_vec()).unwrap_or_default();
    let zones = |e: &Endpoint| e.hints.clone().map(|h| h.zones.to_vec()).unwrap_or_default();
    let all = |wanted: &dyn Fn(&Endpoint) -> bool| -> BTreeSet<_> {
        endpoints.iter().filter(|(_, e)| wanted(e)).map(|(at, _)| *at).collect()
    };
    let ready: Vec<&Endpoint> = endpoints.values().filter(|e| e.conditions.ready).collect();
    let last_resort = |e: &Endpoint| !e.conditions.ready && e.conditions.serving && e.conditions.terminating;
    let on_node = |e: &Endpoint| nodes(e).contains(&node.name);
    let in_zone = |e: &Endpoint| node.zone.as_ref().is_some_and(|z| zones(e).contains(z));

    let cluster = if ready.is_empty() {
        all(&last_resort)
    } else if ready.iter().all(|e| !nodes(e).is_empty()) && ready.iter().any(|e| on_node(e)) {
        all(&|e| e.conditions.ready && on_node(e))
    } else if ready.iter().all(|e| !zones(e).is_empty()) && ready.iter().any(|e| in_zone(e)) {
        all(&|e| e.conditions.ready && in_zone(e))
    } else {
        all(&|e| e.conditions.ready)
    };
    if cluster.is_empty() {
        return Decision::Refuse;
    }
    if !local {
        return Decision::To(cluster);
    }
    let here_ready = all(&|e| is_here(e, node) && e.conditions.ready);
    let here_last = all(&|e| is_here(e, node) && last_resort(e));
    match (here_ready.is_empty(), here_last.is_empty()) {
        (false, _) => Decision::To(here_ready),
        (true, false) => Decision::To(here_last),
        (true, true) => Decision::Drop,
    }
}

/// What each address is: the strongest of what Services say about it.
pub fn addresses(model: &Model, node: &NodeView) -> BTreeMap<IpAddr, u32> {
    let order = [
        flags::KIND_CLUSTER_IP,
        flags::KIND_LOAD_BALANCER,
        flags::KIND_EXTERNAL_IP,
        flags::KIND_NODE_PORT,
        flags::KIND_FOREIGN,
    ];
    let mut said: Vec<(IpAddr, u32)> = Vec::new();
    for (_, service) in model.services() {
        if service.headless || service.kind == ServiceType::ExternalName {
            continue;
        }
        let is_ours = service.proxy_name.is_none();
        let kind = if is_ours { flags::KIND_CLUSTER_IP } else { flags::KIND_FOREIGN };
        said.extend(service.cluster_ips.iter().map(|ip| (*ip, kind)));
        if !is_ours || service.ports.is_empty() {
            continue;
        }
        let has_family =
            |ip: &&IpAddr| service.cluster_ips.iter().any(|c| Family::of(*c) == Family::of(**ip));
        let allowed = |ip: &&IpAddr| node.allow_external_ips.iter().any(|net| net.contains(*ip));
        let lb = service.load_balancer_ips.iter().filter(has_family);
        said.extend(lb.map(|ip| (*ip, flags::KIND_LOAD_BALANCER)));
        let external = service.external_ips.iter().filter(allowed).filter(has_family);
        said.extend(external.map(|ip| (*ip, flags::KIND_EXTERNAL_IP)));
        if service.ports.iter().any(|p| p.node_port != 0) {
            let own = node.nodeport_addresses.iter().filter(has_family);
            said.extend(own.map(|ip| (*ip, flags::KIND_NODE_PORT)));
        }
    }
    let mut kinds = BTreeMap::new();
    for kind in order {
        for (ip, _) in said.iter().filter(|(_, k)| *k == kind) {
            kinds.entry(*ip).or_insert(kind);
        }
    }
    // What the node has itself is the node's.
    let cidrs: Vec<_> = model.service_cidrs().chain(&node.service_cidrs).collect();
    for ip in &node.own_addresses {
        if kinds.contains_key(ip) || cidrs.iter().any(|net| net.contains(ip)) {
            kinds.insert(*ip, flags::KIND_NODE_PORT);
        }
    }
    kinds
}

/// Whether `source` may use the LoadBalancer addresses of a Service in its family (E1 to E4).
pub fn admits(service: &Service, source: IpAddr, node: &NodeView) -> bool {
    let Some(all) = &service.source_ranges else { return true };
    let ranges: Vec<_> = all.iter().filter(|net| Family::of_net(net) == Family::of(source)).collect();
    if ranges.is_empty() {
        return !all.is_empty();
    }
    let is_node_in = node.own_addresses.iter().any(|ip| ranges.iter().any(|net| net.contains(ip)));
    ranges.iter().any(|net| net.contains(&source))
        || is_node_in && service.load_balancer_ips.contains(&source)
}

//! Services.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;

use super::{
    Converted, Reason, Rejection, Report, address_of, label, port_name_of, port_of, prefix_of, protocol_of,
    routed_address_of,
};
use crate::{
    model::{ExternalPolicy, HealthCheck, InternalPolicy, Service, ServiceKey, ServicePort, ServiceType},
    plan::op::Family,
    source::Kind,
};

/// Says which proxy serves a Service; any value means "not the usual one".
const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";

/// `sessionAffinityConfig.clientIP.timeoutSeconds`: the API's default and limit.
const AFFINITY_DEFAULT_S: u32 = 10_800;
const AFFINITY_MAX_S: u32 = 86_400;

/// A Service into the model's.
pub fn service(service: &core::Service) -> Result<Converted<Service>, Rejection> {
    let mut report = Report::new(Kind::Service, &service.metadata)?;
    let Some(spec) = &service.spec else { return Err(report.rejection("spec", Reason::Missing)) };
    let kind = kind(spec).map_err(|reason| report.rejection("spec.type", reason))?;
    let mut object = Service {
        key: ServiceKey::new(report.namespace, report.name),
        kind,
        headless: cluster_ip_texts(spec).any(|t| t == "None"),
        cluster_ips: Vec::new(),
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: None,
        internal_policy: InternalPolicy::default(),
        external_policy: ExternalPolicy::default(),
        affinity_timeout_s: None,
        proxy_name: label(&service.metadata, PROXY_NAME_LABEL).map(Arc::from),
        health_check: None,
        ports: Vec::new(),
    };
    // I9: whatever the others say is for somebody else to judge.
    if object.is_programmed() {
        object.cluster_ips = cluster_ips(spec, &mut report);
        object.external_ips = external_ips(spec, &mut report);
        object.load_balancer_ips = load_balancer_ips(kind, service.status.as_ref(), &mut report);
        object.source_ranges = source_ranges(spec, &mut report);
        object.internal_policy = internal_policy(spec, &mut report);
        object.external_policy = external_policy(spec, &mut report);
        if kind == ServiceType::LoadBalancer && object.external_policy == ExternalPolicy::Local {
            object.health_check = health_check(service, spec, &mut report);
        }
        object.affinity_timeout_s = affinity_timeout_s(spec, &mut report);
        object.ports = ports(spec, &mut report);
    } else if object.is_foreign() {
        // C7: packets to it are not ours to refuse. What is wrong with it is for its own proxy to say.
        object.cluster_ips = cluster_ips(spec, &mut report);
        report.rejections.clear();
    }
    Ok(report.converted(object))
}

fn kind(spec: &core::ServiceSpec) -> Result<ServiceType, Reason> {
    match spec.type_.as_deref() {
        None | Some("ClusterIP") => Ok(ServiceType::ClusterIp),
        Some("NodePort") => Ok(ServiceType::NodePort),
        Some("LoadBalancer") => Ok(ServiceType::LoadBalancer),
        Some("ExternalName") => Ok(ServiceType::ExternalName),
        Some(other) => Err(Reason::UnknownValue(other.to_owned())),
    }
}

/// `clusterIPs`, or the older `clusterIP` that is its first element.
fn cluster_ip_texts(spec: &core::ServiceSpec) -> impl Iterator<Item = &str> {
    let list = spec.cluster_ips.as_deref().unwrap_or_default();
    let single = if list.is_empty() { spec.cluster_ip.as_deref() } else { None };
    list.iter().map(String::as_str).chain(single).filter(|t| !t.is_empty())
}

fn cluster_ips(spec: &core::ServiceSpec, report: &mut Report) -> Vec<IpAddr> {
    let mut ips: Vec<IpAddr> = Vec::new();
    let mut found = false;
    for (i, text) in cluster_ip_texts(spec).enumerate() {
        found = true;
        let ip = address_of(text).and_then(|ip| {
            if ips.iter().any(|other| Family::of(*other) == Family::of(ip)) {
                return Err(Reason::SecondOfFamily(ip));
            }
            Ok(ip)
        });
        ips.extend(report.keep(|| format!("spec.clusterIPs[{i}]"), ip));
    }
    if !found {
        // The API server always assigns one; a manifest may not say.
        report.refuse("spec.clusterIP", Reason::Missing);
    }
    ips
}

fn external_ips(spec: &core::ServiceSpec, report: &mut Report) -> Vec<IpAddr> {
    let texts = spec.external_ips.iter().flatten().enumerate();
    texts
        .filter_map(|(i, text)| report.keep(|| format!("spec.externalIPs[{i}]"), routed_address_of(text)))
        .collect()
}

fn load_balancer_ips(
    kind: ServiceType,
    status: Option<&core::ServiceStatus>,
    report: &mut Report,
) -> Vec<IpAddr> {
    if kind != ServiceType::LoadBalancer {
        return Vec::new();
    }
    let ingress = status.and_then(|s| s.load_balancer.as_ref()?.ingress.as_deref()).unwrap_or_default();
    let mut ips = Vec::new();
    for (i, entry) in ingress.iter().enumerate() {
        let field = |name: &str| format!("status.loadBalancer.ingress[{i}].{name}");
        // Entries with a host name only are for DNS.
        let Some(text) = entry.ip.as_deref().filter(|t| !t.is_empty()) else { continue };
        match entry.ip_mode.as_deref() {
            None | Some("VIP") => ips.extend(report.keep(|| field("ip"), address_of(text))),
            // E5: the balancer sends to the nodes' own addresses; a frontend here would bypass it.
            Some("Proxy") => {}
            Some(other) => report.refuse(field("ipMode"), Reason::UnknownValue(other.to_owned())),
        }
    }
    ips
}

/// Invalid ones are ignored as in kube-proxy (`pkg/proxy/util: MapCIDRsByIPFamily`, which also trims them), except that a
/// list with nothing else in it admits nobody instead of everybody. The annotation
/// `service.beta.kubernetes.io/load-balancer-source-ranges` is for cloud controllers: kube-proxy does not read it.
fn source_ranges(spec: &core::ServiceSpec, report: &mut Report) -> Option<Vec<IpNet>> {
    let texts = spec.load_balancer_source_ranges.iter().flatten().map(|text| text.trim()).enumerate();
    let mut given = texts.filter(|(_, text)| !text.is_empty()).peekable();
    given.peek()?;
    let field = |i| move || format!("spec.loadBalancerSourceRanges[{i}]");
    let mut ranges: Vec<IpNet> =
        given.filter_map(|(i, text)| report.keep(field(i), prefix_of(text))).collect();
    ranges.sort_unstable();
    ranges.dedup();
    Some(ranges)
}

fn internal_policy(spec: &core::ServiceSpec, report: &mut Report) -> InternalPolicy {
    match spec.internal_traffic_policy.as_deref() {
        None | Some("" | "Cluster") => InternalPolicy::Cluster,
        Some("Local") => InternalPolicy::Local,
        Some(other) => {
            report.refuse("spec.internalTrafficPolicy", Reason::UnknownValue(other.to_owned()));
            InternalPolicy::default()
        }
    }
}

fn external_policy(spec: &core::ServiceSpec, report: &mut Report) -> ExternalPolicy {
    match spec.external_traffic_policy.as_deref() {
        None | Some("" | "Cluster") => ExternalPolicy::Cluster,
        Some("Local") => ExternalPolicy::Local,
        Some(other) => {
            report.refuse("spec.externalTrafficPolicy", Reason::UnknownValue(other.to_owned()));
            ExternalPolicy::default()
        }
    }
}

/// H1: the API server gives one to every such Service; a manifest without one merely has no health checks.
fn health_check(
    service: &core::Service,
    spec: &core::ServiceSpec,
    report: &mut Report,
) -> Option<HealthCheck> {
    let value = spec.health_check_node_port.filter(|n| *n != 0)?;
    let node_port = report.keep(|| "spec.healthCheckNodePort".to_owned(), port_of(value))?;
    let uid = service.metadata.uid.as_deref().filter(|u| !u.is_empty()).map(Arc::from);
    Some(HealthCheck { node_port, uid })
}

fn affinity_timeout_s(spec: &core::ServiceSpec, report: &mut Report) -> Option<u32> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return None,
        Some("ClientIP") => {}
        Some(other) => {
            report.refuse("spec.sessionAffinity", Reason::UnknownValue(other.to_owned()));
            return None;
        }
    }
    let config = spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref());
    let Some(value) = config.and_then(|c| c.timeout_seconds) else { return Some(AFFINITY_DEFAULT_S) };
    let timeout = match u32::try_from(value) {
        Ok(timeout) if (1..=AFFINITY_MAX_S).contains(&timeout) => Ok(timeout),
        _ => Err(Reason::OutOfRange { value: value.into(), min: 1, max: AFFINITY_MAX_S.into() }),
    };
    let field = || "spec.sessionAffinityConfig.clientIP.timeoutSeconds".to_owned();
    report.keep(field, timeout).or(Some(AFFINITY_DEFAULT_S))
}

fn ports(spec: &core::ServiceSpec, report: &mut Report) -> Vec<ServicePort> {
    let list = spec.ports.as_deref().unwrap_or_default();
    if list.is_empty() {
        report.refuse("spec.ports", Reason::Missing);
    }
    let mut ports: Vec<ServicePort> = Vec::with_capacity(list.len());
    for (i, port) in list.iter().enumerate() {
        let Some(converted) = service_port(port, i, report) else { continue };
        let same = |p: &ServicePort| {
            p.protocol == converted.protocol && (p.name == converted.name || p.port == converted.port)
        };
        if ports.iter().any(same) {
            report.refuse(format!("spec.ports[{i}]"), Reason::Duplicate);
        } else {
            ports.push(converted);
        }
    }
    ports.sort_unstable();
    ports
}

fn service_port(port: &core::ServicePort, i: usize, report: &mut Report) -> Option<ServicePort> {
    let field = |name: &'static str| move || format!("spec.ports[{i}].{name}");
    let protocol = report.keep(field("protocol"), protocol_of(port.protocol.as_deref()))?;
    let name = report.keep(field("name"), port_name_of(port.name.as_deref().unwrap_or_default()))?;
    let number = report.keep(field("port"), port_of(port.port))?;
    // A bad NodePort does not cost the ClusterIP.
    let node_port = match port.node_port {
        None | Some(0) => 0,
        Some(n) => report.keep(field("nodePort"), port_of(n)).unwrap_or(0),
    };
    Some(ServicePort { name, protocol, port: number, node_port })
}

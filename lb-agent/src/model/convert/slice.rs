//! EndpointSlices.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::api::discovery::v1 as discovery;

use super::{
    Converted, Reason, Rejection, Report, SERVICE_NAME_LABEL, label, port_name_of, port_of, protocol_of,
    routed_address_of,
};
use crate::{
    model::{AddressType, Conditions, Endpoint, EndpointSlice, Hints, SliceKey, SlicePort},
    plan::op::Family,
    source::Kind,
};
/// Set by the EndpointSlice controller on slices of headless Services.
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// An EndpointSlice into the model's.
pub fn slice(slice: &discovery::EndpointSlice) -> Result<Converted<EndpointSlice>, Rejection> {
    let mut report = Report::new(Kind::EndpointSlice, &slice.metadata)?;
    let address_type = match slice.address_type.as_str() {
        "IPv4" => AddressType::Ip(Family::V4),
        "IPv6" => AddressType::Ip(Family::V6),
        "FQDN" => AddressType::Fqdn,
        other => return Err(report.rejection("addressType", Reason::UnknownValue(other.to_owned()))),
    };
    // A8, I9: slices that are not for us.
    let service = label(&slice.metadata, SERVICE_NAME_LABEL)
        .filter(|name| !name.is_empty() && label(&slice.metadata, HEADLESS_LABEL).is_none())
        .map(Arc::from);
    let (ports, endpoints) = match address_type {
        AddressType::Ip(family) if service.is_some() => {
            (ports(slice, &mut report), endpoints(slice, family, &mut report))
        }
        _ => Default::default(),
    };
    let key = SliceKey::new(report.namespace, report.name);
    Ok(report.converted(EndpointSlice { key, service, address_type, ports, endpoints }))
}

fn ports(slice: &discovery::EndpointSlice, report: &mut Report) -> Box<[SlicePort]> {
    let mut ports = Vec::new();
    for (i, port) in slice.ports.iter().flatten().enumerate() {
        let field = |name: &'static str| move || format!("ports[{i}].{name}");
        // A8: a port without a number means "all ports", one without a name was not written by the API server, whose
        // default is the empty name.
        let name = port.name.as_deref().ok_or(Reason::Missing).and_then(port_name_of);
        let Some(name) = report.keep(field("name"), name) else { continue };
        let number = port.port.ok_or(Reason::Missing).and_then(port_of);
        let Some(number) = report.keep(field("port"), number) else { continue };
        let Some(protocol) = report.keep(field("protocol"), protocol_of(port.protocol.as_deref())) else {
            continue;
        };
        ports.push(SlicePort { name, protocol, port: number });
    }
    ports.into()
}

fn endpoints(slice: &discovery::EndpointSlice, family: Family, report: &mut Report) -> Box<[Endpoint]> {
    let mut endpoints = Vec::with_capacity(slice.endpoints.len());
    for (i, endpoint) in slice.endpoints.iter().enumerate() {
        // A8: the first address only, the API calls the others undefined.
        let addr = endpoint.addresses.first().ok_or(Reason::Missing).and_then(|t| endpoint_addr(t, family));
        let Some(addr) = report.keep(|| format!("endpoints[{i}].addresses[0]"), addr) else { continue };
        endpoints.push(Endpoint {
            addr,
            conditions: conditions(endpoint.conditions.as_ref()),
            node: endpoint.node_name.as_deref().filter(|n| !n.is_empty()).map(Arc::from),
            hints: endpoint.hints.as_ref().and_then(hints),
        });
    }
    endpoints.into()
}

fn endpoint_addr(text: &str, family: Family) -> Result<IpAddr, Reason> {
    let ip = routed_address_of(text)?;
    if Family::of(ip) == family { Ok(ip) } else { Err(Reason::WrongFamily { ip, expected: family }) }
}

/// A6: what is not said counts as ready, serving, not terminating.
fn conditions(conditions: Option<&discovery::EndpointConditions>) -> Conditions {
    Conditions {
        ready: conditions.and_then(|c| c.ready).unwrap_or(true),
        serving: conditions.and_then(|c| c.serving).unwrap_or(true),
        terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
    }
}

fn hints(hints: &discovery::EndpointHints) -> Option<Box<Hints>> {
    let zones: Box<[Arc<str>]> = hints.for_zones.iter().flatten().map(|z| z.name.as_str().into()).collect();
    let nodes: Box<[Arc<str>]> = hints.for_nodes.iter().flatten().map(|n| n.name.as_str().into()).collect();
    (!zones.is_empty() || !nodes.is_empty()).then(|| Box::new(Hints { zones, nodes }))
}

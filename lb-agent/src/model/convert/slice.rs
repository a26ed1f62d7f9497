//! EndpointSlices.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::{api::discovery::v1 as discovery, apimachinery::pkg::apis::meta::v1::ObjectMeta};

use super::{
    Converted, Reason, Rejection, Report, SERVICE_NAME_LABEL, destination, label, port_name_of, port_of,
    protocol_of, routed,
};
use crate::{
    model::{AddressType, Conditions, Endpoint, EndpointSlice, Hints, SliceKey, SlicePort},
    plan::op::Family,
    source::{
        Kind,
        slim::{Address, SlimSlice},
    },
};
/// Set by the EndpointSlice controller on slices of headless Services.
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// An EndpointSlice of the API, by whichever type it was decoded.
pub trait Fields {
    fn metadata(&self) -> &ObjectMeta;
    fn address_type(&self) -> &str;
    fn ports(&self) -> impl Iterator<Item = PortFields<'_>>;
    fn endpoints(&self) -> impl ExactSizeIterator<Item = EndpointFields<'_>>;
}

/// One of `ports`.
pub struct PortFields<'a> {
    name: Option<&'a str>,
    port: Option<i32>,
    protocol: Option<&'a str>,
}

/// One of `endpoints`.
pub struct EndpointFields<'a> {
    /// The first of `addresses`, or what is no address.
    address: Option<Result<IpAddr, &'a str>>,
    conditions: Option<&'a discovery::EndpointConditions>,
    node: Option<Arc<str>>,
    hints: Option<&'a discovery::EndpointHints>,
}

impl Fields for discovery::EndpointSlice {
    fn metadata(&self) -> &ObjectMeta {
        &self.metadata
    }
    fn address_type(&self) -> &str {
        &self.address_type
    }
    fn ports(&self) -> impl Iterator<Item = PortFields<'_>> {
        self.ports.iter().flatten().map(|p| PortFields {
            name: p.name.as_deref(),
            port: p.port,
            protocol: p.protocol.as_deref(),
        })
    }
    fn endpoints(&self) -> impl ExactSizeIterator<Item = EndpointFields<'_>> {
        self.endpoints.iter().map(|e| EndpointFields {
            address: e.addresses.first().map(|text| text.parse().map_err(|_| text.as_str())),
            conditions: e.conditions.as_ref(),
            node: e.node_name.as_deref().map(Arc::from),
            hints: e.hints.as_ref(),
        })
    }
}

impl Fields for SlimSlice {
    fn metadata(&self) -> &ObjectMeta {
        &self.metadata
    }
    fn address_type(&self) -> &str {
        &self.address_type
    }
    fn ports(&self) -> impl Iterator<Item = PortFields<'_>> {
        self.ports.iter().map(|p| PortFields {
            name: p.name.as_deref(),
            port: p.port,
            protocol: p.protocol.as_deref(),
        })
    }
    fn endpoints(&self) -> impl ExactSizeIterator<Item = EndpointFields<'_>> {
        self.endpoints.iter().map(|e| EndpointFields {
            address: e.address().map(|address| match address {
                Address::Ip(ip) => Ok(*ip),
                Address::Other(text) => Err(&**text),
            }),
            conditions: e.conditions.as_ref(),
            node: e.node_name().cloned(),
            hints: e.hints.as_ref(),
        })
    }
}

/// An EndpointSlice into the model's.
pub fn slice(slice: &impl Fields) -> Result<Converted<EndpointSlice>, Rejection> {
    let mut report = Report::new(Kind::EndpointSlice, slice.metadata())?;
    let address_type = match slice.address_type() {
        "IPv4" => AddressType::Ip(Family::V4),
        "IPv6" => AddressType::Ip(Family::V6),
        "FQDN" => AddressType::Fqdn,
        other => return Err(report.rejection("addressType", Reason::UnknownValue(other.to_owned()))),
    };
    // A8, I9: slices that are not for us.
    let service = label(slice.metadata(), SERVICE_NAME_LABEL)
        .filter(|name| !name.is_empty() && label(slice.metadata(), HEADLESS_LABEL).is_none())
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

fn ports(slice: &impl Fields, report: &mut Report) -> Box<[SlicePort]> {
    let mut ports = Vec::new();
    for (i, port) in slice.ports().enumerate() {
        let field = |name: &'static str| move || format!("ports[{i}].{name}");
        // A8: a port without a number means "all ports", one without a name was not written by the API server, whose
        // default is the empty name.
        let name = port.name.ok_or(Reason::Missing).and_then(port_name_of);
        let Some(name) = report.keep(field("name"), name) else { continue };
        let number = port.port.ok_or(Reason::Missing).and_then(port_of);
        let Some(number) = report.keep(field("port"), number) else { continue };
        let Some(protocol) = report.keep(field("protocol"), protocol_of(port.protocol)) else {
            continue;
        };
        ports.push(SlicePort { name, protocol, port: number });
    }
    ports.into()
}

fn endpoints(slice: &impl Fields, family: Family, report: &mut Report) -> Box<[Endpoint]> {
    let fields = slice.endpoints();
    let mut endpoints = Vec::with_capacity(fields.len());
    for (i, endpoint) in fields.enumerate() {
        // A8: the first address only, the API calls the others undefined.
        let addr = endpoint.address.ok_or(Reason::Missing).and_then(|a| endpoint_addr(a, family));
        let Some(addr) = report.keep(|| format!("endpoints[{i}].addresses[0]"), addr) else { continue };
        endpoints.push(Endpoint {
            addr,
            conditions: conditions(endpoint.conditions),
            node: endpoint.node.filter(|n| !n.is_empty()),
            hints: endpoint.hints.and_then(hints),
        });
    }
    endpoints.into()
}

fn endpoint_addr(address: Result<IpAddr, &str>, family: Family) -> Result<IpAddr, Reason> {
    let ip = address.map_err(|text| Reason::NotAnAddress(text.to_owned()))?;
    let ip = routed(destination(ip)?)?;
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

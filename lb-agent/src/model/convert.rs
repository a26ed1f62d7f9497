//! Kubernetes objects into the model. One bad field costs that part of the object, not the object, and one bad object
//! costs itself alone: whatever is left out comes back as a [`Rejection`].

use std::{fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use k8s_openapi::{
    api::{core::v1 as core, networking::v1 as networking},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::{Change, Node, ServiceCidr, ServiceKey, SliceKey};
use crate::{
    plan::op::{Family, Protocol},
    source::{Kind, Object, ObjectRef},
};

/// On an EndpointSlice: the Service that its endpoints are of.
pub(crate) const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

mod service;
mod slice;

pub use service::service;
pub use slice::slice;

/// A part of an object that was left out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} {}: {field}: {reason}", kind_name(self.object.kind), Name(&self.object))]
pub struct Rejection {
    pub object: ObjectRef,
    /// As in the API: `spec.ports[1].nodePort`.
    pub field: String,
    pub reason: Reason,
}

/// Why a field was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    #[error("is missing")]
    Missing,
    #[error("{0:?} is not an IP address")]
    NotAnAddress(String),
    #[error("{0:?} is not an address prefix (as 192.0.2.0/24 is)")]
    NotAPrefix(String),
    #[error("{0} cannot be reached from elsewhere (unspecified, loopback, link-local or multicast)")]
    SpecialAddress(IpAddr),
    #[error("{ip} is not of family {expected:?}")]
    WrongFamily { ip: IpAddr, expected: Family },
    #[error("{0} is a second address of its family")]
    SecondOfFamily(IpAddr),
    #[error("{value} is outside of {min}..={max}")]
    OutOfRange { value: i64, min: i64, max: i64 },
    #[error("{0:?} is none of the values that the API knows")]
    UnknownValue(String),
    #[error("{0:?} is not a valid name")]
    BadName(String),
    #[error("the same as an earlier port of this object")]
    Duplicate,
}

/// An object of the model, without the parts that were refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted<T> {
    pub object: T,
    pub rejections: Vec<Rejection>,
}

impl<T> Converted<T> {
    fn map<U>(self, f: impl FnOnce(T) -> U) -> Converted<U> {
        Converted { object: f(self.object), rejections: self.rejections }
    }
}

/// What a source sent, as a change of the model.
pub fn object(object: &Object) -> Result<Converted<Change>, Rejection> {
    Ok(match object {
        Object::Service(o) => service(o)?.map(Change::Service),
        Object::EndpointSlice(o) => slice(&**o)?.map(Change::Slice),
        Object::SlimSlice(o) => slice(&**o)?.map(Change::Slice),
        Object::Node(o) => node(o)?.map(Change::Node),
        Object::ServiceCidr(o) => service_cidr(o)?.map(Change::ServiceCidr),
    })
}

/// What a source says is gone, as a change of the model.
pub fn deleted(object: &ObjectRef) -> Change {
    match object.kind {
        Kind::Service => Change::DeleteService(ServiceKey::new(&object.namespace, &object.name)),
        Kind::EndpointSlice => Change::DeleteSlice(SliceKey::new(&object.namespace, &object.name)),
        Kind::Node => Change::DeleteNode(object.name.as_str().into()),
        Kind::ServiceCidr => Change::DeleteServiceCidr(object.name.as_str().into()),
    }
}

/// A Node into the model's.
pub fn node(node: &core::Node) -> Result<Converted<Node>, Rejection> {
    let mut report = Report::new(Kind::Node, &node.metadata)?;
    let zone = node.metadata.labels.as_ref().and_then(|l| l.get("topology.kubernetes.io/zone"));
    let addresses = node.status.as_ref().and_then(|s| s.addresses.as_deref()).unwrap_or_default();
    let (mut internal_ips, mut external_ips) = (Vec::new(), Vec::new());
    for (i, address) in addresses.iter().enumerate() {
        let list = match address.type_.as_str() {
            "InternalIP" => &mut internal_ips,
            "ExternalIP" => &mut external_ips,
            // Host and DNS names: nothing that packets carry.
            _ => continue,
        };
        list.extend(report.keep(|| format!("status.addresses[{i}]"), address_of(&address.address)));
    }
    let object = Node {
        name: report.name.into(),
        zone: zone.filter(|z| !z.is_empty()).map(|z| z.as_str().into()),
        internal_ips,
        external_ips,
    };
    Ok(report.converted(object))
}

/// A ServiceCIDR into the model's. One that is being deleted still counts: its ClusterIPs are in use.
pub fn service_cidr(object: &networking::ServiceCIDR) -> Result<Converted<ServiceCidr>, Rejection> {
    let mut report = Report::new(Kind::ServiceCidr, &object.metadata)?;
    let texts = object.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
    let texts = texts.iter().enumerate();
    let cidrs = texts
        .filter_map(|(i, text)| report.keep(|| format!("spec.cidrs[{i}]"), prefix_of(text.trim())))
        .collect();
    let object = ServiceCidr { name: report.name.into(), cidrs };
    Ok(report.converted(object))
}

/// Collects what is refused of one object.
struct Report<'a> {
    kind: Kind,
    namespace: &'a str,
    name: &'a str,
    rejections: Vec<Rejection>,
}

impl<'a> Report<'a> {
    /// Without a name an object is nothing.
    fn new(kind: Kind, metadata: &'a ObjectMeta) -> Result<Self, Rejection> {
        let namespace = match kind {
            _ if !kind.is_namespaced() => "",
            // The API server's own default for a manifest that does not say.
            _ => metadata.namespace.as_deref().unwrap_or("default"),
        };
        let name = metadata.name.as_deref().unwrap_or_default();
        let report = Self { kind, namespace, name, rejections: Vec::new() };
        report.check("metadata.name", name)?;
        if kind.is_namespaced() {
            report.check("metadata.namespace", namespace)?;
        }
        Ok(report)
    }

    fn check(&self, field: &str, name: &str) -> Result<(), Rejection> {
        let reason = match name {
            "" => Reason::Missing,
            _ if is_name(name) => return Ok(()),
            _ => Reason::BadName(name.to_owned()),
        };
        Err(self.rejection(field, reason))
    }

    fn rejection(&self, field: impl Into<String>, reason: Reason) -> Rejection {
        let object =
            ObjectRef { kind: self.kind, namespace: self.namespace.to_owned(), name: self.name.to_owned() };
        Rejection { object, field: field.into(), reason }
    }

    fn refuse(&mut self, field: impl Into<String>, reason: Reason) {
        self.rejections.push(self.rejection(field, reason));
    }

    /// The value, or a note of why there is none. `field` is a closure because most fields are fine.
    fn keep<T>(&mut self, field: impl FnOnce() -> String, value: Result<T, Reason>) -> Option<T> {
        match value {
            Ok(value) => Some(value),
            Err(reason) => {
                self.refuse(field(), reason);
                None
            }
        }
    }

    fn converted<T>(self, object: T) -> Converted<T> {
        Converted { object, rejections: self.rejections }
    }
}

/// Characters of names in the API (RFC 1123 subdomains): no separator of record names is among them.
fn is_name(name: &str) -> bool {
    name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
}

/// An address that packets can have as their destination. IPv4-mapped ones are IPv4, as in the API.
fn address_of(text: &str) -> Result<IpAddr, Reason> {
    destination(text.parse().map_err(|_| Reason::NotAnAddress(text.to_owned()))?)
}

fn destination(ip: IpAddr) -> Result<IpAddr, Reason> {
    let ip = ip.to_canonical();
    if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() {
        return Err(Reason::SpecialAddress(ip));
    }
    Ok(ip)
}

/// A prefix, without bits behind it. IPv4-mapped ones are of no family that packets have.
fn prefix_of(text: &str) -> Result<IpNet, Reason> {
    let net: IpNet = text.parse().map_err(|_| Reason::NotAPrefix(text.to_owned()))?;
    match net {
        IpNet::V6(v6) if v6.addr().to_ipv4_mapped().is_some() => Err(Reason::NotAPrefix(text.to_owned())),
        net => Ok(net.trunc()),
    }
}

/// As [`address_of`], and not link-local: the API refuses those as endpoints and externalIPs (cloud metadata servers
/// live there).
fn routed_address_of(text: &str) -> Result<IpAddr, Reason> {
    routed(address_of(text)?)
}

fn routed(ip: IpAddr) -> Result<IpAddr, Reason> {
    match ip {
        IpAddr::V4(a) if a.is_link_local() => Err(Reason::SpecialAddress(a.into())),
        IpAddr::V6(a) if a.is_unicast_link_local() => Err(Reason::SpecialAddress(a.into())),
        ip => Ok(ip),
    }
}

fn port_of(value: i32) -> Result<u16, Reason> {
    match u16::try_from(value) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(Reason::OutOfRange { value: value.into(), min: 1, max: 65_535 }),
    }
}

fn protocol_of(value: Option<&str>) -> Result<Protocol, Reason> {
    match value {
        None | Some("TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(other) => Err(Reason::UnknownValue(other.to_owned())),
    }
}

fn port_name_of(name: &str) -> Result<Arc<str>, Reason> {
    if is_name(name) { Ok(name.into()) } else { Err(Reason::BadName(name.to_owned())) }
}

fn label<'a>(metadata: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    metadata.labels.as_ref()?.get(name).map(String::as_str)
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Service => "Service",
        Kind::EndpointSlice => "EndpointSlice",
        Kind::Node => "Node",
        Kind::ServiceCidr => "ServiceCIDR",
    }
}

/// `namespace/name`, or the name alone.
struct Name<'a>(&'a ObjectRef);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.0.namespace.is_empty() {
            write!(f, "{}/", self.0.namespace)?;
        }
        f.write_str(&self.0.name)
    }
}

#[cfg(test)]
mod tests;

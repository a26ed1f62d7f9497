//! What could not be planned, or was found broken. None of it stops the rest.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;

use super::op::{Family, Frontend};
use crate::model::ServiceKey;

/// A part of a Service that the plan leaves out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Rejection {
    /// Two Services claim one frontend. The smaller (namespace, name) has it; this one gets it when that one goes.
    #[error("Service {service}: {frontend} already belongs to Service {owner}; change or remove one of them")]
    FrontendTaken { service: ServiceKey, frontend: Frontend, owner: ServiceKey },
    /// CVE-2020-8554: whoever may write a Service could take over any address.
    #[error("Service {service}: spec.externalIPs: {ip} is not in --allow-external-ips")]
    ExternalIpNotAllowed { service: ServiceKey, ip: IpAddr },
    /// `record` stays as it was, or without what does not fit. Tried again when something has been freed.
    #[error("{record}: {resource} are full ({capacity}): {}", resource.remedy())]
    Full { service: ServiceKey, record: String, resource: Resource, capacity: u32 },
    /// A record without its name could not be found again after a restart.
    #[error("Service {service}: the name {record} is longer than {capacity} bytes")]
    NameTooLong { service: ServiceKey, record: String, capacity: usize },
    /// E4: what kube-proxy does, and what hardly anybody means.
    #[error(
        "Service {service}: spec.loadBalancerSourceRanges has no {family} range, so its {family} LoadBalancer addresses \
         admit everybody; add one"
    )]
    UnfilteredFamily { service: ServiceKey, family: Family },
    /// Unassigned addresses in it are not dropped.
    #[error(
        "ServiceCIDR {cidr} is one too many: {capacity} of a family are told apart; packets to addresses in it that no \
         Service has are not dropped"
    )]
    TooManyCidrs { cidr: IpNet, capacity: u32 },
}

impl Rejection {
    /// The Service that is not programmed in full, if it is about one.
    pub fn service(&self) -> Option<&ServiceKey> {
        match self {
            Self::FrontendTaken { service, .. }
            | Self::ExternalIpNotAllowed { service, .. }
            | Self::Full { service, .. }
            | Self::NameTooLong { service, .. }
            | Self::UnfilteredFamily { service, .. } => Some(service),
            Self::TooManyCidrs { .. } => None,
        }
    }
}

/// What there is a limited number of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Resource {
    Frontends(Family),
    Services,
    Slots,
    Backends(Family),
    Members,
    SourceRanges(Family),
}

impl Resource {
    /// What to do about it.
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::Frontends(_) => "raise --max-frontends",
            Self::Services => "raise --max-services",
            Self::Slots => "raise --max-slots",
            // The map of members is made with as many entries as those of backends.
            Self::Backends(_) | Self::Members => "raise --max-backends",
            Self::SourceRanges(_) => "raise --max-source-ranges",
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Frontends(Family::V4) => "IPv4 frontends",
            Self::Frontends(Family::V6) => "IPv6 frontends",
            Self::Services => "service records",
            Self::Slots => "backend slots",
            Self::Backends(Family::V4) => "IPv4 backends",
            Self::Backends(Family::V6) => "IPv6 backends",
            Self::Members => "session affinity members",
            Self::SourceRanges(Family::V4) => "IPv4 loadBalancerSourceRanges",
            Self::SourceRanges(Family::V6) => "IPv6 loadBalancerSourceRanges",
        })
    }
}

/// Something in the kernel maps that no complete plan leaves behind. The first plan repairs it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Anomaly {
    #[error("service record {service} is outside of 1..{capacity}")]
    ServiceOutOfBounds { service: u32, capacity: u32 },
    #[error("service record {service} has no usable name (found {name:?})")]
    Unnamed { service: u32, name: Option<String> },
    #[error("service records {first} and {second} are both called {name}")]
    DuplicateName { name: String, first: u32, second: u32 },
    #[error("service record {service} names slots {base}+{len}, outside of the {capacity} there are")]
    SlotsOutOfBounds { service: u32, base: u32, len: u32, capacity: u32 },
    #[error("service record {service} names slots {base}+{len}, some of which belong to another record")]
    SlotsOverlap { service: u32, base: u32, len: u32 },
    #[error("service record {service} names {family:?} backend {backend}, which does not exist")]
    MissingBackend { service: u32, family: Family, backend: u32 },
    #[error("{family:?} backend {backend} is outside of 1..{capacity} or of another family")]
    BackendInvalid { family: Family, backend: u32, capacity: u32 },
    #[error("{family:?} backends {first} and {second} are the same endpoint")]
    DuplicateBackend { family: Family, first: u32, second: u32 },
    #[error("frontend {frontend} names service record {service}, which does not exist")]
    FrontendDangles { frontend: Frontend, service: u32 },
    #[error("an affinity member names service record {service}, which does not exist")]
    MemberDangles { service: u32, backend: u32 },
    #[error("the source range {net} is of service record {service}, which does not exist")]
    RangeDangles { service: u32, net: IpNet },
    #[error(
        "{family} ServiceCIDR element {index} is no prefix, beyond the end, or has unknown flags {flags:#x}"
    )]
    CidrInvalid { family: Family, index: u32, flags: u32 },
}

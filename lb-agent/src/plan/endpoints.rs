//! Which endpoints a Service port has, and which of them new flows may go to (Kubernetes' EndpointSlice conditions,
//! KEP-1669 terminating endpoints, KEP-2433 and KEP-3015 topology hints; kube-proxy's `CategorizeEndpoints`).

use std::{cmp::Ordering, net::IpAddr, sync::Arc};

use super::{
    desired::NodeView,
    op::{Family, Protocol},
};
use crate::model::{AddressType, Endpoint, EndpointSlice, ServicePort};

/// Where a backend listens.
pub type SocketAddr = (IpAddr, u16);

/// The sets of one Service port in one family, each sorted and without repetition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sets {
    /// For traffic policy Cluster.
    pub cluster: Vec<SocketAddr>,
    /// For traffic policy Local. Every endpoint of this node that is in `cluster` is also here: if it is ready, because
    /// hints never filter this set (B5); if it is terminating, because nobody is ready anywhere, so nobody is here.
    pub local: Vec<SocketAddr>,
    /// Those that established flows may go on to. UDP: all that serve, terminating or not (I1). TCP and SCTP: all that
    /// slices name, for connections end by themselves (I4) and a backend in no slice may be gone (J2).
    pub serving: Vec<SocketAddr>,
}

/// An endpoint at one of its ports.
#[derive(Clone, Copy)]
struct Candidate<'a> {
    at: SocketAddr,
    endpoint: &'a Endpoint,
    is_local: bool,
}

impl Candidate<'_> {
    fn is_ready(&self) -> bool {
        self.endpoint.conditions.ready
    }

    /// Takes flows only if no ready endpoint can (KEP-1669).
    fn is_last_resort(&self) -> bool {
        let c = self.endpoint.conditions;
        !c.ready && c.serving && c.terminating
    }

    /// A9: of the same endpoint in two slices the copy that is not terminating counts, whatever the order: the controller
    /// moves endpoints between slices, and a pod network may give the address of a terminating pod to a new one (also
    /// where the old one is published as ready). Of two such copies the more alive one; the rest only makes the order
    /// total.
    fn precedence(&self, other: &Self) -> Ordering {
        let alive = |c: &Self| {
            let conditions = c.endpoint.conditions;
            (!conditions.terminating, conditions.ready, conditions.serving, c.is_local)
        };
        alive(self).cmp(&alive(other)).then_with(|| self.endpoint.hints.cmp(&other.endpoint.hints))
    }
}

/// The sets of `port` in `family`.
pub fn sets<'a>(
    port: &ServicePort,
    family: Family,
    slices: impl Iterator<Item = &'a EndpointSlice>,
    node: &NodeView,
) -> Sets {
    let candidates = candidates(port, family, slices, node);
    let pick = |filter: &dyn Fn(&Candidate<'_>) -> bool| -> Vec<SocketAddr> {
        candidates.iter().filter(|c| filter(c)).map(|c| c.at).collect()
    };
    let topology = Topology::of(&candidates, node);
    let mut cluster = pick(&|c| c.is_ready() && topology.admits(c.endpoint, node));
    if cluster.is_empty() {
        // A1: each mode needs a ready endpoint of its own, so this means that nobody is ready anywhere.
        cluster = pick(&|c| c.is_last_resort());
    }
    let mut local = pick(&|c| c.is_local && c.is_ready());
    if local.is_empty() {
        local = pick(&|c| c.is_local && c.is_last_resort());
    }
    let serving = match port.protocol {
        Protocol::Udp => pick(&|c| c.is_ready() || c.endpoint.conditions.serving),
        Protocol::Tcp | Protocol::Sctp => pick(&|_| true),
    };
    Sets { cluster, local, serving }
}

/// The addresses of this node's ready endpoints, sorted: what health checks count (H3).
pub fn local_ready<'a>(
    port: &ServicePort,
    family: Family,
    slices: impl Iterator<Item = &'a EndpointSlice>,
    node: &NodeView,
) -> Vec<IpAddr> {
    let candidates = candidates(port, family, slices, node);
    candidates.iter().filter(|c| c.is_local && c.is_ready()).map(|c| c.at.0).collect()
}

/// Every endpoint of the port once, sorted by address and port.
fn candidates<'a>(
    port: &ServicePort,
    family: Family,
    slices: impl Iterator<Item = &'a EndpointSlice>,
    node: &NodeView,
) -> Vec<Candidate<'a>> {
    let mut candidates = Vec::new();
    for slice in slices.filter(|s| s.address_type == AddressType::Ip(family)) {
        // Slices carry resolved numbers, so a named targetPort may differ from slice to slice (A11).
        let matching = slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol);
        for number in matching.map(|p| p.port) {
            candidates.extend(slice.endpoints.iter().map(|endpoint| Candidate {
                at: (endpoint.addr, number),
                endpoint,
                // A10: the address says nothing about where an endpoint is.
                is_local: endpoint.node.as_deref() == Some(&*node.name),
            }));
        }
    }
    candidates.sort_by(|a, b| a.at.cmp(&b.at).then_with(|| b.precedence(a)));
    candidates.dedup_by_key(|c| c.at);
    candidates
}

/// Which hints count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology {
    SameNode,
    SameZone,
    Any,
}

impl Topology {
    /// A kind of hint counts only if every ready endpoint has it and one names this node: otherwise the controller and
    /// the endpoints are not of one mind (yet), or traffic from here would go nowhere (B1 to B4).
    fn of(candidates: &[Candidate<'_>], node: &NodeView) -> Self {
        let usable = |names: &dyn Fn(&Endpoint) -> Option<&[Arc<str>]>, own: &str| {
            let mut one_is_ours = false;
            for candidate in candidates.iter().filter(|c| c.is_ready()) {
                match names(candidate.endpoint) {
                    None | Some([]) => return false,
                    Some(names) => one_is_ours |= contains(names, own),
                }
            }
            one_is_ours
        };
        if usable(&node_hints, &node.name) {
            return Self::SameNode;
        }
        match &node.zone {
            Some(zone) if usable(&zone_hints, zone) => Self::SameZone,
            _ => Self::Any,
        }
    }

    fn admits(self, endpoint: &Endpoint, node: &NodeView) -> bool {
        match self {
            Self::Any => true,
            Self::SameNode => node_hints(endpoint).is_some_and(|names| contains(names, &node.name)),
            Self::SameZone => match &node.zone {
                Some(zone) => zone_hints(endpoint).is_some_and(|names| contains(names, zone)),
                None => true,
            },
        }
    }
}

fn node_hints(endpoint: &Endpoint) -> Option<&[Arc<str>]> {
    endpoint.hints.as_deref().map(|h| &*h.nodes)
}

fn zone_hints(endpoint: &Endpoint) -> Option<&[Arc<str>]> {
    endpoint.hints.as_deref().map(|h| &*h.zones)
}

fn contains(names: &[Arc<str>], name: &str) -> bool {
    names.iter().any(|n| &**n == name)
}

//! healthCheckNodePort: where load balancers ask a node whether it has endpoints of a Service with external policy Local.
//!
//! [`wanted`] says what one Service needs, a pure function of its objects. [`Tracker`] keeps that for all Services, with work
//! in proportion to what changed; the reconcile loop owns it and publishes after each turn. [`run`] follows with sockets,
//! [`events`] tells the API server what does not work.
//!
//! The rules are kube-proxy's (pkg/proxy/healthcheck/service_health.go). Each family has sockets and a count of its own (so
//! since 1.36, kubernetes#137370: before, the first family to get the port answered for both).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use tokio::sync::watch;

use crate::{
    model::{EndpointSlice, Model, Service, ServiceKey},
    plan::{NodeView, endpoints, op::Family},
    settings::NodePortAddresses,
};

pub mod events;
mod limit;
mod runner;
mod server;

pub use runner::run;

/// What a Service wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub port: u16,
    /// Of the Service, for Events.
    pub uid: Option<Arc<str>>,
    /// For each family that the Service has: on how many addresses of this node it is ready (H3).
    pub local_endpoints: BTreeMap<Family, u32>,
}

/// What `service` wants on this node. `slices` are all that name it.
pub fn wanted<'a, S>(service: &Service, slices: impl Fn() -> S, node: &NodeView) -> Option<Wanted>
where
    S: Iterator<Item = &'a EndpointSlice>,
{
    // H1: conversion leaves it out for all but type LoadBalancer with external policy Local.
    let check = service.health_check.as_ref()?;
    let families = [Family::V4, Family::V6].into_iter().filter(|f| service.cluster_ip(*f).is_some());
    let count = |family| {
        // H3: addresses, not endpoints: two ports of one pod are one place to send to.
        let ready: BTreeSet<IpAddr> = service
            .ports
            .iter()
            .flat_map(|port| endpoints::local_ready(port, family, slices(), node))
            .collect();
        (family, u32::try_from(ready.len()).unwrap_or(u32::MAX))
    };
    let local_endpoints = families.map(count).collect();
    Some(Wanted { port: check.node_port, uid: check.uid.clone(), local_endpoints })
}

/// Where health check servers listen, given `chosen`, the addresses that serve NodePorts (H4). The unspecified address stands
/// for all of its family: where no NodePort is refused, health checks answer on every address of the node.
pub fn listen_addresses(setting: &NodePortAddresses, chosen: &BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
    let everything = |family: Family| match setting {
        NodePortAddresses::All => true,
        NodePortAddresses::Primary => false,
        NodePortAddresses::Cidrs(cidrs) => {
            let mut of_family = cidrs.iter().filter(|c| Family::of(c.addr()) == family).peekable();
            // F2: a list that names no CIDR of a family means "all" for that family.
            of_family.peek().is_none() || of_family.any(|c| c.prefix_len() == 0)
        }
    };
    let mut addresses = BTreeSet::new();
    for (family, any) in
        [(Family::V4, Ipv4Addr::UNSPECIFIED.into()), (Family::V6, Ipv6Addr::UNSPECIFIED.into())]
    {
        if everything(family) {
            addresses.insert(any);
        } else {
            addresses.extend(chosen.iter().filter(|ip| Family::of(**ip) == family));
        }
    }
    addresses
}

/// All servers that this node is to have.
#[derive(Clone, Debug, Default)]
pub struct Desired {
    /// As [`listen_addresses`] gives them.
    pub addresses: BTreeSet<IpAddr>,
    pub servers: BTreeMap<ServiceKey, Server>,
}

/// A Service's server. Its counts change under the hands of whoever holds it, so that an endpoint that comes or goes costs one
/// store and wakes nobody.
#[derive(Clone, Debug)]
pub struct Server {
    pub port: u16,
    pub uid: Option<Arc<str>>,
    pub local_endpoints: BTreeMap<Family, Arc<AtomicU32>>,
}

impl Server {
    fn new(wanted: Wanted) -> Self {
        let counts = wanted.local_endpoints.into_iter();
        let local_endpoints = counts.map(|(family, n)| (family, Arc::new(AtomicU32::new(n)))).collect();
        Self { port: wanted.port, uid: wanted.uid, local_endpoints }
    }

    /// Takes new counts, if nothing else is different.
    fn accepts(&self, wanted: &Wanted) -> bool {
        let same = self.port == wanted.port
            && self.uid == wanted.uid
            && self.local_endpoints.keys().eq(wanted.local_endpoints.keys());
        if same {
            for (count, n) in self.local_endpoints.values().zip(wanted.local_endpoints.values()) {
                count.store(*n, Ordering::Relaxed);
            }
        }
        same
    }
}

/// Keeps [`Desired`] up to date and publishes it.
#[derive(Debug)]
pub struct Tracker {
    published: watch::Sender<Desired>,
    /// Services to look at, of turns that failed since the last publication, too.
    stale: BTreeSet<ServiceKey>,
    all_stale: bool,
}

impl Default for Tracker {
    fn default() -> Self {
        Self { published: watch::Sender::new(Desired::default()), stale: BTreeSet::new(), all_stale: true }
    }
}

impl Tracker {
    /// Sees every publication that changes what listens where.
    pub fn subscribe(&self) -> watch::Receiver<Desired> {
        self.published.subscribe()
    }

    /// These Services may have changed: look at them in the next [`Tracker::publish`].
    pub fn mark(&mut self, all: bool, services: &BTreeSet<ServiceKey>) {
        self.all_stale |= all;
        if !self.all_stale {
            self.stale.extend(services.iter().cloned());
        }
    }

    /// Says what is to listen now. Only once the maps hold the same: a node that answers 200 can take the traffic.
    pub fn publish(&mut self, model: &Model, node: &NodeView, addresses: BTreeSet<IpAddr>) {
        let mut stale = std::mem::take(&mut self.stale);
        if std::mem::take(&mut self.all_stale) {
            stale =
                model.services().filter(|(_, s)| s.health_check.is_some()).map(|(k, _)| k.clone()).collect();
            stale.extend(self.published.borrow().servers.keys().cloned());
        }
        self.published.send_if_modified(|desired| {
            let mut modified = desired.addresses != addresses;
            desired.addresses = addresses;
            for key in stale {
                modified |= update(desired, model, node, key);
            }
            modified
        });
    }
}

/// Brings one Service's server up to date; true if another one is to listen, or none.
fn update(desired: &mut Desired, model: &Model, node: &NodeView, key: ServiceKey) -> bool {
    let service = model.service(&key).filter(|service| service.health_check.is_some());
    let wanted = service.and_then(|service| {
        let slices = model.slices(&key);
        wanted(service, || slices.iter(), node)
    });
    match wanted {
        None => desired.servers.remove(&key).is_some(),
        Some(wanted) => {
            if desired.servers.get(&key).is_some_and(|server| server.accepts(&wanted)) {
                return false;
            }
            desired.servers.insert(key, Server::new(wanted));
            true
        }
    }
}

#[cfg(test)]
mod tests;

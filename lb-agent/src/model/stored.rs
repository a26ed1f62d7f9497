//! EndpointSlices as the model keeps them. There may be 100,000 endpoints, which are looked at when their Service is planned
//! and hardly ever otherwise: nine bytes each (IPv4) instead of 48.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use super::{
    AddressType, Conditions, Endpoint, EndpointSlice, Hints, ServiceKey, SliceKey, SlicePort, names::Ids,
};

/// Of an endpoint; the first byte of its record.
mod has {
    pub(super) const READY: u8 = 1;
    pub(super) const SERVING: u8 = 2;
    pub(super) const TERMINATING: u8 = 4;
    pub(super) const V6: u8 = 8;
    pub(super) const NODE: u8 = 16;
    pub(super) const HINTS: u8 = 32;
}

/// A slice of a Service whose key is known from where this is.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) name: Arc<str>,
    address_type: AddressType,
    ports: Box<[SlicePort]>,
    /// One after the other: a byte that says what there is, the address, the ids of the names of the node, and of the hints
    /// (the number of zones, of nodes, then both).
    endpoints: Box<[u8]>,
}

impl Stored {
    /// `names` are held until [`Stored::release`].
    pub(super) fn new(slice: EndpointSlice, names: &mut Ids) -> Self {
        let mut bytes = Vec::with_capacity(slice.endpoints.len() * 9);
        for endpoint in &slice.endpoints {
            store(endpoint, names, &mut bytes);
        }
        let EndpointSlice { key, address_type, ports, .. } = slice;
        Self { name: key.name, address_type, ports, endpoints: bytes.into() }
    }

    /// As it was before it was stored.
    pub(super) fn load(&self, service: &ServiceKey, names: &Ids) -> EndpointSlice {
        EndpointSlice {
            key: SliceKey { namespace: service.namespace.clone(), name: self.name.clone() },
            service: Some(service.name.clone()),
            address_type: self.address_type,
            ports: self.ports.clone(),
            endpoints: Records(&self.endpoints).map(|record| record.endpoint(names)).collect(),
        }
    }

    /// True if [`Stored::load`] would give this slice.
    pub(super) fn is(&self, slice: &EndpointSlice, names: &Ids) -> bool {
        let mut records = Records(&self.endpoints);
        self.name == slice.key.name
            && self.address_type == slice.address_type
            && self.ports == slice.ports
            && slice.endpoints.iter().all(|endpoint| {
                // Mostly it is an address that has changed: names are looked up only where that is the same.
                records.next().is_some_and(|r| r.addr == endpoint.addr && r.endpoint(names) == *endpoint)
            })
            && records.0.is_empty()
    }

    pub(super) fn release(self, names: &mut Ids) {
        for record in Records(&self.endpoints) {
            for id in record.node.into_iter().chain(record.zones).chain(record.nodes) {
                names.release(id);
            }
        }
    }
}

fn store(endpoint: &Endpoint, names: &mut Ids, bytes: &mut Vec<u8>) {
    let Conditions { ready, serving, terminating } = endpoint.conditions;
    let flags = [
        (ready, has::READY),
        (serving, has::SERVING),
        (terminating, has::TERMINATING),
        (endpoint.addr.is_ipv6(), has::V6),
        (endpoint.node.is_some(), has::NODE),
        (endpoint.hints.is_some(), has::HINTS),
    ];
    bytes.push(flags.into_iter().filter(|(is, _)| *is).map(|(_, flag)| flag).sum());
    match endpoint.addr {
        IpAddr::V4(a) => bytes.extend(a.octets()),
        IpAddr::V6(a) => bytes.extend(a.octets()),
    }
    let mut put = |n: u32| bytes.extend(n.to_ne_bytes());
    if let Some(node) = &endpoint.node {
        put(names.acquire(node));
    }
    if let Some(hints) = &endpoint.hints {
        // An object of the API has a megabyte or so.
        put(hints.zones.len() as u32);
        put(hints.nodes.len() as u32);
        for name in hints.zones.iter().chain(&hints.nodes) {
            put(names.acquire(name));
        }
    }
}

/// What [`store`] wrote of one endpoint.
struct Record {
    flags: u8,
    addr: IpAddr,
    node: Option<u32>,
    zones: Vec<u32>,
    nodes: Vec<u32>,
}

impl Record {
    fn endpoint(self, names: &Ids) -> Endpoint {
        let is = |flag| self.flags & flag != 0;
        let all = |ids: &[u32]| ids.iter().map(|id| names.name(*id)).collect();
        Endpoint {
            addr: self.addr,
            conditions: Conditions {
                ready: is(has::READY),
                serving: is(has::SERVING),
                terminating: is(has::TERMINATING),
            },
            node: self.node.map(|id| names.name(id)),
            hints: is(has::HINTS)
                .then(|| Box::new(Hints { zones: all(&self.zones), nodes: all(&self.nodes) })),
        }
    }
}

/// Reads records until there are none.
struct Records<'a>(&'a [u8]);

impl Records<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    fn number(&mut self) -> Option<u32> {
        self.take().map(u32::from_ne_bytes)
    }

    fn numbers(&mut self, n: u32) -> Option<Vec<u32>> {
        (0..n).map(|_| self.number()).collect()
    }
}

impl Iterator for Records<'_> {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        let [flags] = self.take()?;
        let has = |flag| flags & flag != 0;
        let addr = if has(has::V6) {
            Ipv6Addr::from(self.take::<16>()?).into()
        } else {
            Ipv4Addr::from(self.take::<4>()?).into()
        };
        let node = if has(has::NODE) { Some(self.number()?) } else { None };
        let (zones, nodes) = if has(has::HINTS) { (self.number()?, self.number()?) } else { (0, 0) };
        Some(Record { flags, addr, node, zones: self.numbers(zones)?, nodes: self.numbers(nodes)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::op::{Family, Protocol};

    fn endpoint(addr: &str, bits: u8, node: Option<&str>, hints: Option<(&[&str], &[&str])>) -> Endpoint {
        let shared = |names: &[&str]| names.iter().map(|name| (*name).into()).collect();
        Endpoint {
            addr: addr.parse().unwrap(),
            conditions: Conditions {
                ready: bits & 1 != 0,
                serving: bits & 2 != 0,
                terminating: bits & 4 != 0,
            },
            node: node.map(Arc::from),
            hints: hints.map(|(zones, nodes)| Box::new(Hints { zones: shared(zones), nodes: shared(nodes) })),
        }
    }

    fn slice(endpoints: Vec<Endpoint>) -> EndpointSlice {
        EndpointSlice {
            key: SliceKey::new("ns", "web-1"),
            service: Some("web".into()),
            address_type: AddressType::Ip(Family::V6),
            ports: [SlicePort { name: "http".into(), protocol: Protocol::Udp, port: 8080 }].into(),
            endpoints: endpoints.into(),
        }
    }

    #[test]
    fn an_endpoint_stays_small() {
        let mut names = Ids::default();
        let stored = Stored::new(slice(vec![endpoint("10.0.0.1", 3, Some("node-a"), None)]), &mut names);
        assert_eq!(stored.endpoints.len(), 9);
    }

    #[test]
    fn slices_come_back_as_they_were() {
        let mut endpoints: Vec<Endpoint> =
            (0..8).map(|bits| endpoint("10.0.0.1", bits, None, None)).collect();
        endpoints.extend([
            endpoint("2001:db8::1", 3, Some("node-a"), None),
            endpoint("10.0.0.2", 3, None, Some((&["zone-a", "zone-b"], &[]))),
            endpoint("2001:db8::2", 3, Some("node-b"), Some((&[], &["node-a"]))),
            endpoint("10.0.0.3", 3, Some("node-a"), Some((&["zone-a"], &["node-a", "node-b"]))),
        ]);
        let mut names = Ids::default();
        for endpoints in [endpoints, Vec::new()] {
            let stored = Stored::new(slice(endpoints.clone()), &mut names);
            assert_eq!(stored.load(&ServiceKey::new("ns", "web"), &names), slice(endpoints.clone()));
            assert!(stored.is(&slice(endpoints.clone()), &names));
            for i in 0..endpoints.len() {
                let mut others = endpoints.clone();
                others.remove(i);
                assert!(!stored.is(&slice(others.clone()), &names), "without endpoint {i}");
                others.insert(i, endpoint("10.0.0.9", 3, None, None));
                assert!(!stored.is(&slice(others.clone()), &names), "another endpoint {i}");
                others[i] = Endpoint { node: Some("node-c".into()), ..endpoints[i].clone() };
                assert!(!stored.is(&slice(others), &names), "endpoint {i} on another node");
            }
            let more = [endpoints, vec![endpoint("10.0.0.9", 3, None, None)]].concat();
            assert!(!stored.is(&slice(more), &names));
            stored.release(&mut names);
        }
        assert!(names.is_empty());
    }
}

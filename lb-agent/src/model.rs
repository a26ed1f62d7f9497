//! The cluster as far as it matters here: Services, their EndpointSlices, ServiceCIDRs, this node. No Kubernetes types, no I/O.
//!
//! [`convert`] makes these objects from the API's, [`Model::apply`] keeps them and tells which Services to plan again.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use ipnet::IpNet;

pub mod convert;
mod names;
mod object;
mod stored;

use names::{Ids, Names};
pub use object::{
    AddressType, Conditions, Endpoint, EndpointSlice, ExternalPolicy, HealthCheck, Hints, InternalPolicy,
    Node, Service, ServiceCidr, ServiceKey, ServicePort, ServiceType, SliceKey, SlicePort,
};
use stored::Stored;

/// One change of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Service(Service),
    DeleteService(ServiceKey),
    Slice(EndpointSlice),
    DeleteSlice(SliceKey),
    Node(Node),
    DeleteNode(Arc<str>),
    ServiceCidr(ServiceCidr),
    DeleteServiceCidr(Arc<str>),
}

/// What a change makes stale.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Dirty {
    /// Nothing: the object is as it was, or does not matter here.
    Nothing,
    /// These Services.
    Services(Vec<ServiceKey>),
    /// This node's own zone or addresses changed, and with them possibly every Service.
    All,
    /// No Service, but where ClusterIPs come from.
    ServiceCidrs,
}

/// All objects that matter to one node, by key.
#[derive(Clone, Debug)]
pub struct Model {
    node_name: Arc<str>,
    node: Option<Node>,
    /// Few: by name.
    service_cidrs: BTreeMap<Arc<str>, ServiceCidr>,
    services: BTreeMap<ServiceKey, Box<Service>>,
    /// Slices by the Service that their label names, sorted by name. Most Services have one: a tree for each would cost
    /// more memory than all endpoints.
    slices: BTreeMap<ServiceKey, Vec<Stored>>,
    /// Which Service (of its namespace) a slice belonged to when it was last seen: its label may change.
    slice_service: HashMap<SliceKey, Arc<str>>,
    names: Names,
    /// Names that endpoints have.
    ids: Ids,
}

impl Model {
    /// An empty model for the node that is called `node_name` in Node objects and in `endpoint.nodeName`.
    pub fn new(node_name: &str) -> Self {
        Self {
            node_name: node_name.into(),
            node: None,
            service_cidrs: BTreeMap::new(),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            slice_service: HashMap::new(),
            names: Names::default(),
            ids: Ids::default(),
        }
    }

    pub fn node_name(&self) -> &Arc<str> {
        &self.node_name
    }

    /// This node's own object, once it is known.
    pub fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    pub fn service(&self, key: &ServiceKey) -> Option<&Service> {
        self.services.get(key).map(|service| &**service)
    }

    /// In the order of their keys.
    pub fn services(&self) -> impl ExactSizeIterator<Item = (&ServiceKey, &Service)> {
        self.services.iter().map(|(key, service)| (key, &**service))
    }

    /// The slices of a Service, in the order of their names.
    pub fn slices(&self, service: &ServiceKey) -> Vec<EndpointSlice> {
        let stored = self.slices.get_key_value(service);
        stored.map(|(key, list)| list.iter().map(|s| s.load(key, &self.ids)).collect()).unwrap_or_default()
    }

    /// The Service has a slice.
    pub fn has_slices(&self, service: &ServiceKey) -> bool {
        self.slices.contains_key(service)
    }

    /// The prefixes of all ServiceCIDRs.
    pub fn service_cidrs(&self) -> impl Iterator<Item = &IpNet> {
        self.service_cidrs.values().flat_map(|object| &object.cidrs)
    }

    /// Takes the change in.
    pub fn apply(&mut self, change: Change) -> Dirty {
        match change {
            Change::Service(service) => self.apply_service(service),
            Change::DeleteService(key) => match self.services.remove(&key) {
                Some(_) => Dirty::Services(vec![key]),
                None => Dirty::Nothing,
            },
            Change::Slice(slice) => self.apply_slice(slice),
            Change::DeleteSlice(key) => self.delete_slice(&key),
            Change::Node(node) if node.name == self.node_name => self.replace_node(Some(node)),
            Change::DeleteNode(name) if name == self.node_name => self.replace_node(None),
            Change::ServiceCidr(object) => {
                let name = object.name.clone();
                match self.service_cidrs.insert(name, object.clone()) {
                    Some(known) if known == object => Dirty::Nothing,
                    _ => Dirty::ServiceCidrs,
                }
            }
            Change::DeleteServiceCidr(name) => match self.service_cidrs.remove(&name) {
                Some(_) => Dirty::ServiceCidrs,
                None => Dirty::Nothing,
            },
            // Other nodes' labels and addresses mean nothing here: slices carry the hints.
            Change::Node(_) | Change::DeleteNode(_) => Dirty::Nothing,
        }
    }

    fn apply_service(&mut self, mut service: Service) -> Dirty {
        self.names.share_key(&mut service.key);
        if self.service(&service.key) == Some(&service) {
            return Dirty::Nothing;
        }
        let key = service.key.clone();
        self.services.insert(key.clone(), Box::new(service));
        Dirty::Services(vec![key])
    }

    fn apply_slice(&mut self, mut slice: EndpointSlice) -> Dirty {
        let Some(name) = slice.service.clone() else { return self.delete_slice(&slice.key) };
        self.names.share_slice(&mut slice);
        let mut service = ServiceKey { namespace: slice.key.namespace.clone(), name };
        self.names.share_key(&mut service);
        let mut dirty = Vec::new();
        match self.slice_service.get_mut(&slice.key) {
            Some(known) if *known == service.name => {
                if self.is_stored(&service, &slice) {
                    return Dirty::Nothing;
                }
            }
            Some(known) => {
                let name = std::mem::replace(known, service.name.clone());
                let old = ServiceKey { namespace: service.namespace.clone(), name };
                self.remove_from(&old, &slice.key.name);
                dirty.push(old);
            }
            None => drop(self.slice_service.insert(slice.key.clone(), service.name.clone())),
        }
        let slices = self.slices.entry(service.clone()).or_default();
        let place = position(slices, &slice.key.name);
        let stored = Stored::new(slice, &mut self.ids);
        match place {
            Ok(i) => std::mem::replace(&mut slices[i], stored).release(&mut self.ids),
            Err(i) => {
                slices.reserve_exact(1);
                slices.insert(i, stored);
            }
        }
        dirty.push(service);
        Dirty::Services(dirty)
    }

    fn is_stored(&self, service: &ServiceKey, slice: &EndpointSlice) -> bool {
        let slices = self.slices.get(service).map(Vec::as_slice).unwrap_or_default();
        position(slices, &slice.key.name).is_ok_and(|i| slices[i].is(slice, &self.ids))
    }

    fn delete_slice(&mut self, key: &SliceKey) -> Dirty {
        let Some(name) = self.slice_service.remove(key) else { return Dirty::Nothing };
        let service = ServiceKey { namespace: key.namespace.clone(), name };
        self.remove_from(&service, &key.name);
        Dirty::Services(vec![service])
    }

    fn remove_from(&mut self, service: &ServiceKey, slice: &str) {
        if let Some(slices) = self.slices.get_mut(service) {
            if let Ok(i) = position(slices, slice) {
                slices.remove(i).release(&mut self.ids);
            }
            if slices.is_empty() {
                self.slices.remove(service);
            }
        }
    }

    fn replace_node(&mut self, node: Option<Node>) -> Dirty {
        if self.node == node {
            return Dirty::Nothing;
        }
        self.node = node;
        Dirty::All
    }
}

/// Where the slice of that name is, or would be.
fn position(slices: &[Stored], name: &str) -> Result<usize, usize> {
    slices.binary_search_by(|slice| (*slice.name).cmp(name))
}

#[cfg(test)]
mod tests;

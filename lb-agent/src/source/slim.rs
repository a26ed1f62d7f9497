//! Objects out of the API server's JSON, with only the fields that the agent reads.
//!
//! Most of a list is what nobody reads here (managedFields, targetRef, selectors): it is skipped where it stands instead
//! of being built and thrown away.

use std::{collections::BTreeMap, fmt, marker::PhantomData, net::IpAddr, sync::Arc};

use k8s_openapi::{
    Metadata, Resource,
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use super::{
    Object,
    strip::{self, Strip},
};

/// A Service of which only that was decoded.
#[derive(Clone, Debug)]
pub struct Slim<K>(K);

impl<K: Resource> Resource for Slim<K> {
    type Scope = K::Scope;
    const API_VERSION: &'static str = K::API_VERSION;
    const GROUP: &'static str = K::GROUP;
    const KIND: &'static str = K::KIND;
    const VERSION: &'static str = K::VERSION;
    const URL_PATH_SEGMENT: &'static str = K::URL_PATH_SEGMENT;
}

impl<K: Metadata<Ty = ObjectMeta>> Metadata for Slim<K> {
    type Ty = ObjectMeta;
    fn metadata(&self) -> &ObjectMeta {
        self.0.metadata()
    }
    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        self.0.metadata_mut()
    }
}

impl<K> Strip for Slim<K> {
    /// There is nothing to drop.
    fn strip(&mut self) {}
}

impl<K: Into<Object>> From<Slim<K>> for Object {
    fn from(slim: Slim<K>) -> Self {
        slim.0.into()
    }
}

impl<'de> Deserialize<'de> for Slim<core::Service> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let service = Service::deserialize(deserializer)?;
        Ok(Self(core::Service {
            metadata: service.metadata.unwrap_or_default().into(),
            spec: service.spec.map(Into::into),
            status: service.status.map(|status| core::ServiceStatus {
                load_balancer: status.load_balancer,
                ..Default::default()
            }),
        }))
    }
}

/// An EndpointSlice of which only that was decoded, and that as far as it goes: there may be 100,000 endpoints.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(from = "Slice")]
pub struct SlimSlice {
    pub metadata: ObjectMeta,
    pub address_type: String,
    pub endpoints: Vec<SlimEndpoint>,
    pub ports: Vec<Port>,
}

impl Resource for SlimSlice {
    type Scope = <discovery::EndpointSlice as Resource>::Scope;
    const API_VERSION: &'static str = discovery::EndpointSlice::API_VERSION;
    const GROUP: &'static str = discovery::EndpointSlice::GROUP;
    const KIND: &'static str = discovery::EndpointSlice::KIND;
    const VERSION: &'static str = discovery::EndpointSlice::VERSION;
    const URL_PATH_SEGMENT: &'static str = discovery::EndpointSlice::URL_PATH_SEGMENT;
}

impl Metadata for SlimSlice {
    type Ty = ObjectMeta;
    fn metadata(&self) -> &ObjectMeta {
        &self.metadata
    }
    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl Strip for SlimSlice {
    /// There is nothing to drop.
    fn strip(&mut self) {}
}

impl From<SlimSlice> for Object {
    fn from(slice: SlimSlice) -> Self {
        Self::SlimSlice(Box::new(slice))
    }
}

impl From<Slice> for SlimSlice {
    fn from(slice: Slice) -> Self {
        Self {
            metadata: slice.metadata.unwrap_or_default().into(),
            address_type: slice.address_type.unwrap_or_default(),
            endpoints: slice.endpoints.unwrap_or_default(),
            ports: slice.ports.unwrap_or_default(),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Slice {
    metadata: Option<Meta>,
    address_type: Option<String>,
    endpoints: Option<Vec<SlimEndpoint>>,
    ports: Option<Vec<Port>>,
}

/// One of `endpoints`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SlimEndpoint {
    addresses: Option<First>,
    pub conditions: Option<discovery::EndpointConditions>,
    pub hints: Option<discovery::EndpointHints>,
    node_name: Option<Text<Arc<str>>>,
}

impl SlimEndpoint {
    /// The first of its addresses.
    pub fn address(&self) -> Option<&Address> {
        self.addresses.as_ref()?.0.as_ref()
    }

    pub fn node_name(&self) -> Option<&Arc<str>> {
        self.node_name.as_ref().map(|name| &name.0)
    }
}

/// An address, or what stands in its place.
#[derive(Clone, Debug, PartialEq)]
pub enum Address {
    Ip(IpAddr),
    Other(Box<str>),
}

impl From<&str> for Address {
    fn from(text: &str) -> Self {
        text.parse().map_or_else(|_| Self::Other(text.into()), Self::Ip)
    }
}

/// A port of a slice or of a Service.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    pub name: Option<String>,
    node_port: Option<i32>,
    pub port: Option<i32>,
    pub protocol: Option<String>,
}

#[derive(Deserialize)]
struct Service {
    metadata: Option<Meta>,
    spec: Option<Spec>,
    status: Option<Status>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    load_balancer: Option<core::LoadBalancerStatus>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    #[serde(rename = "type")]
    type_: Option<String>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    #[serde(rename = "externalIPs")]
    external_ips: Option<Vec<String>>,
    external_traffic_policy: Option<String>,
    health_check_node_port: Option<i32>,
    internal_traffic_policy: Option<String>,
    load_balancer_source_ranges: Option<Vec<String>>,
    ports: Option<Vec<Port>>,
    session_affinity: Option<String>,
    session_affinity_config: Option<core::SessionAffinityConfig>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Meta {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    deletion_timestamp: Option<Time>,
    labels: Option<Kept>,
    annotations: Option<Kept>,
}

impl From<Meta> for ObjectMeta {
    fn from(meta: Meta) -> Self {
        let texts = |kept: Option<Kept>| kept.map(|kept| kept.0).filter(|texts| !texts.is_empty());
        Self {
            name: meta.name,
            namespace: meta.namespace,
            uid: meta.uid,
            resource_version: meta.resource_version,
            deletion_timestamp: meta.deletion_timestamp,
            labels: texts(meta.labels),
            annotations: texts(meta.annotations),
            ..Default::default()
        }
    }
}

impl From<Port> for core::ServicePort {
    fn from(port: Port) -> Self {
        Self {
            name: port.name,
            node_port: port.node_port,
            port: port.port.unwrap_or_default(),
            protocol: port.protocol,
            ..Default::default()
        }
    }
}

impl From<Spec> for core::ServiceSpec {
    fn from(spec: Spec) -> Self {
        Self {
            type_: spec.type_,
            cluster_ip: spec.cluster_ip,
            cluster_ips: spec.cluster_ips,
            external_ips: spec.external_ips,
            external_traffic_policy: spec.external_traffic_policy,
            health_check_node_port: spec.health_check_node_port,
            internal_traffic_policy: spec.internal_traffic_policy,
            load_balancer_source_ranges: spec.load_balancer_source_ranges,
            ports: spec.ports.map(|ports| ports.into_iter().map(Into::into).collect()),
            session_affinity: spec.session_affinity,
            session_affinity_config: spec.session_affinity_config,
            ..Default::default()
        }
    }
}

/// Labels or annotations that somebody here reads.
struct Kept(BTreeMap<String, String>);

/// The key of one of those; `None` for any other.
struct KeptKey(Option<String>);

impl<'de> Deserialize<'de> for KeptKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Key;
        impl Visitor<'_> for Key {
            type Value = KeptKey;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }
            fn visit_str<E>(self, key: &str) -> Result<KeptKey, E> {
                Ok(KeptKey(strip::is_read(key).then(|| key.to_owned())))
            }
        }
        deserializer.deserialize_str(Key)
    }
}

impl<'de> Deserialize<'de> for Kept {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Texts;
        impl<'de> Visitor<'de> for Texts {
            type Value = Kept;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of texts")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Kept, A::Error> {
                let mut kept = BTreeMap::new();
                while let Some(KeptKey(key)) = map.next_key()? {
                    match key {
                        Some(key) => drop(kept.insert(key, map.next_value()?)),
                        None => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(Kept(kept))
            }
        }
        deserializer.deserialize_map(Texts)
    }
}

/// The first of a list of addresses: the API calls an endpoint's other ones undefined.
#[derive(Clone, Debug, PartialEq)]
struct First(Option<Address>);

impl<'de> Deserialize<'de> for First {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = First;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of texts")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<First, A::Error> {
                let first = list.next_element::<Text<Address>>()?;
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(First(first.map(|address| address.0)))
            }
        }
        deserializer.deserialize_seq(List)
    }
}

/// What is made of a text without copying that first.
#[derive(Clone, Debug, PartialEq)]
struct Text<T>(T);

impl<'de, T: for<'a> From<&'a str>> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Into<T>(PhantomData<T>);
        impl<T: for<'a> From<&'a str>> Visitor<'_> for Into<T> {
            type Value = Text<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }
            fn visit_str<E>(self, text: &str) -> Result<Text<T>, E> {
                Ok(Text(T::from(text)))
            }
        }
        deserializer.deserialize_str(Into(PhantomData))
    }
}

#[cfg(test)]
#[path = "slim_tests.rs"]
mod tests;

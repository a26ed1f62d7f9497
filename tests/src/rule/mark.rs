//! Services that mark a write of manifests: once a node's maps have the new mark with its endpoint and not the last one,
//! everything else that was written to the same file has been programmed too.
//!
//! An agent hears of Services before EndpointSlices and of each in the order of names, and may plan between any two: the
//! mark's slice is the last. A plan adds frontends in the order of addresses, of which the mark's is the last; and it clears
//! records of Services after everything else, the last mark's among them.

use std::{
    net::Ipv6Addr,
    sync::atomic::{AtomicU32, Ordering},
};

use aya::maps::{Array, HashMap, Map, MapData, MapError};
use lb_common::{
    Be16, LAYOUT_VERSION, V6, addr,
    frontend::{FrontendKey, FrontendValue, ServiceRecord},
    maps::name,
    proto,
};
use serde_json::{Value, json};

use crate::cluster::Node;

/// A Service at an address that nobody asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(u32);

impl Mark {
    /// One that no other write in this process has.
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    fn address(self) -> Ipv6Addr {
        let [high, low] = [(self.0 >> 16) as u16, self.0 as u16];
        Ipv6Addr::new(0xfdff, 0, 0, 0, 0, 0, high, low)
    }

    pub fn documents(self) -> [Value; 2] {
        let name = format!("zzz-mark-{}", self.0);
        let service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "name": name, "namespace": "default" },
            "spec": { "clusterIP": self.address(), "ports": [{ "port": 1, "protocol": "TCP" }] },
        });
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": name, "namespace": "default", "labels": { "kubernetes.io/service-name": name },
            },
            "addressType": "IPv6",
            "endpoints": [{ "addresses": ["fdfe::1"] }],
            "ports": [{ "name": "", "port": 1, "protocol": "TCP" }],
        });
        [service, slice]
    }

    /// The number of its record on a node; `None` while it has none there, or one without its endpoint.
    pub fn record(self, node: &Node) -> anyhow::Result<Option<u32>> {
        let frontends: HashMap<_, FrontendKey<V6>, FrontendValue> =
            Map::HashMap(pinned(node, name::FRONTENDS6)?).try_into()?;
        match frontends.get(&FrontendKey::new(addr::v6(self.address()), Be16::new(1), proto::TCP), 0) {
            Ok(value) => {
                Ok(Some(value.service).filter(|id| record(node, *id).is_ok_and(|r| !r.cluster.is_empty())))
            }
            Err(MapError::KeyNotFound) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

impl Default for Mark {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether a Service uses this record.
pub fn in_use(node: &Node, id: u32) -> anyhow::Result<bool> {
    Ok(record(node, id)?.in_use != 0)
}

fn record(node: &Node, id: u32) -> anyhow::Result<ServiceRecord> {
    let records: Array<_, ServiceRecord> = Map::Array(pinned(node, name::SERVICES)?).try_into()?;
    Ok(records.get(&id, 0)?)
}

fn pinned(node: &Node, map: &str) -> Result<MapData, MapError> {
    MapData::from_pin(node.state_dir().join(format!("v{LAYOUT_VERSION}/maps/{map}")))
}

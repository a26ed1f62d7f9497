//! The objects that agents read: values that become Service, EndpointSlice and Node documents.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::{
    cluster::{Cluster, Node, POD_PORT},
    place::{Family, Pair, Place},
};

/// A directory of manifests.
pub struct Manifests {
    dir: PathBuf,
}

impl Manifests {
    pub fn create(dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self { dir: dir.to_owned() })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes (or replaces, in one step) the file `name.yaml`. JSON is YAML.
    pub fn write(&self, name: &str, documents: &[Value]) -> anyhow::Result<()> {
        let text = documents.iter().map(|d| format!("---\n{d}\n")).collect::<String>();
        self.write_text(&format!("{name}.yaml"), &text)
    }

    /// Writes a file of any name and content.
    pub fn write_text(&self, file: &str, text: &str) -> anyhow::Result<()> {
        let (draft, path) = (self.dir.join(format!(".{file}.draft")), self.dir.join(file));
        fs::write(&draft, text)
            .and_then(|()| fs::rename(&draft, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    pub fn remove(&self, name: &str) -> anyhow::Result<()> {
        let path = self.dir.join(format!("{name}.yaml"));
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
    }

    /// Copies every file of another directory.
    pub fn copy_from(&self, other: &Path) -> anyhow::Result<()> {
        let entries = fs::read_dir(other).with_context(|| format!("cannot read {}", other.display()))?;
        for entry in entries {
            let entry = entry?;
            fs::copy(entry.path(), self.dir.join(entry.file_name()))
                .with_context(|| format!("cannot copy {}", entry.path().display()))?;
        }
        Ok(())
    }
}

/// A Service with one port number for TCP and UDP, and its EndpointSlices of both families.
#[derive(Clone, Debug)]
pub struct Service {
    pub name: String,
    pub cluster_ips: Pair,
    pub port: u16,
    pub node_port: Option<u16>,
    /// `status.loadBalancer.ingress`.
    pub load_balancer: Option<Pair>,
    pub external_ips: Vec<IpAddr>,
    /// Fields of `spec` that replace the usual ones.
    pub spec: BTreeMap<&'static str, Value>,
    pub endpoints: Vec<Endpoint>,
}

/// Where a Service leads.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub addrs: Pair,
    pub node: String,
    pub port: u16,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
}

impl Endpoint {
    /// A ready pod.
    pub fn pod(pod: &Place) -> Self {
        let number = pod.name.chars().find(char::is_ascii_digit).unwrap_or('1');
        Self::at(pod.addrs, &format!("node{number}"), POD_PORT)
    }

    /// A ready endpoint anywhere.
    pub fn at(addrs: Pair, node: &str, port: u16) -> Self {
        Self { addrs, node: node.to_owned(), port, ready: true, serving: true, terminating: false }
    }
}

impl Service {
    /// A ClusterIP Service. `number` makes its addresses and ports unique.
    pub fn new(name: &str, number: u8, endpoints: Vec<Endpoint>) -> Self {
        Self {
            name: name.to_owned(),
            cluster_ips: Pair::new(&format!("10.96.1.{number}"), &format!("fd00:10:96::1:{number}")),
            port: 80,
            node_port: None,
            load_balancer: None,
            external_ips: Vec::new(),
            spec: BTreeMap::new(),
            endpoints,
        }
    }

    /// A Service of type LoadBalancer on these pods of a [`Cluster`], with a ClusterIP, a NodePort and a LoadBalancer
    /// address. `number` makes them unique.
    pub fn on(cluster: &Cluster, name: &str, number: u8, pods: &[&str]) -> Self {
        let mut service =
            Self::new(name, number, pods.iter().map(|p| Endpoint::pod(cluster.pod(p))).collect());
        service.node_port = Some(30000 + u16::from(number));
        service.load_balancer =
            Some(Pair::new(&format!("192.0.2.{number}"), &format!("2001:db8:192::{number}")));
        service
    }

    /// Its addresses in both families, for a client whose packets come to `node`.
    pub fn frontends(&self, node: &Node) -> Vec<(&'static str, SocketAddr)> {
        let all = [
            ("ClusterIP", Some(self.cluster_ips), Some(self.port)),
            ("NodePort", Some(node.place.addrs), self.node_port),
            ("LoadBalancer", self.load_balancer, Some(self.port)),
        ];
        let pairs = all.into_iter().filter_map(|(kind, addrs, port)| Some((kind, addrs?, port?)));
        pairs.flat_map(|(kind, addrs, port)| Family::BOTH.map(|f| (kind, addrs.socket(f, port)))).collect()
    }

    /// The ClusterIP of one family, with the port.
    pub const fn cluster_ip(&self, family: Family) -> SocketAddr {
        self.cluster_ips.socket(family, self.port)
    }

    /// Sets a field of `spec`.
    #[must_use]
    pub fn with(mut self, field: &'static str, value: Value) -> Self {
        self.spec.insert(field, value);
        self
    }

    /// The Service and its slices.
    pub fn documents(&self) -> Vec<Value> {
        let mut documents = vec![self.service()];
        documents.extend(Family::BOTH.map(|family| self.slice(family)));
        documents
    }

    fn service(&self) -> Value {
        let port = |name: &str, protocol: &str| {
            let mut port =
                json!({ "name": name, "protocol": protocol, "port": self.port, "targetPort": POD_PORT });
            if let Some(number) = self.node_port {
                port["nodePort"] = json!(number);
            }
            port
        };
        let kind = match (self.load_balancer, self.node_port) {
            (Some(_), _) => "LoadBalancer",
            (None, Some(_)) => "NodePort",
            (None, None) => "ClusterIP",
        };
        let mut service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "name": self.name, "namespace": "default" },
            "spec": {
                "type": kind,
                "clusterIP": self.cluster_ips.v4,
                "clusterIPs": [self.cluster_ips.v4, self.cluster_ips.v6],
                "ipFamilies": ["IPv4", "IPv6"],
                "ipFamilyPolicy": "RequireDualStack",
                "externalIPs": self.external_ips,
                "ports": [port("tcp", "TCP"), port("udp", "UDP")],
            },
        });
        for (field, value) in &self.spec {
            service["spec"][*field] = value.clone();
        }
        if let Some(Pair { v4, v6 }) = self.load_balancer {
            service["status"] = json!({ "loadBalancer": { "ingress": [{ "ip": v4 }, { "ip": v6 }] } });
        }
        service
    }

    /// Endpoints whose port differs from that of the others get slices of their own in a real cluster; here the first
    /// one's port counts for all.
    fn slice(&self, family: Family) -> Value {
        let target = self.endpoints.first().map_or(POD_PORT, |e| e.port);
        let (suffix, address_type) = match family {
            Family::V4 => ("v4", "IPv4"),
            Family::V6 => ("v6", "IPv6"),
        };
        let endpoints: Vec<_> = self
            .endpoints
            .iter()
            .map(|e| {
                json!({
                    "addresses": [e.addrs.ip(family)],
                    "nodeName": e.node,
                    "conditions": { "ready": e.ready, "serving": e.serving, "terminating": e.terminating },
                })
            })
            .collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{}-{suffix}", self.name), "namespace": "default",
                "labels": { "kubernetes.io/service-name": self.name },
            },
            "addressType": address_type,
            "endpoints": endpoints,
            "ports": [
                { "name": "tcp", "protocol": "TCP", "port": target },
                { "name": "udp", "protocol": "UDP", "port": target },
            ],
        })
    }
}

/// The Node objects of a cluster.
pub fn nodes<'a>(places: impl IntoIterator<Item = &'a Place>) -> Vec<Value> {
    let node = |place: &Place| {
        let address = |ip: IpAddr| json!({ "type": "InternalIP", "address": ip });
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": { "name": place.name },
            "status": { "addresses": [address(place.addrs.v4.into()), address(place.addrs.v6.into())] },
        })
    };
    places.into_iter().map(node).collect()
}

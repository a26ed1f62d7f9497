//! What the agent under test is told: Services of both families with ten endpoints each, on other nodes. All have a UDP port,
//! the first thousand also a TCP port: each port's endpoints are backends of their own, and the agent's maps hold 131,072 of
//! them by default.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::cast::{BACKEND_PORT, SERVICE_PORT, backend_address, service_address};

pub const NODE: &str = "node-1";
pub const ENDPOINTS: u32 = 10;
/// Services that have a TCP port.
pub const WITH_TCP: u32 = 1000;

fn ports(service: u32, port: impl Fn(&str) -> Value) -> Vec<Value> {
    let protocols: &[&str] = if service < WITH_TCP { &["UDP", "TCP"] } else { &["UDP"] };
    protocols.iter().map(|p| port(p)).collect()
}

fn metadata(name: &str, service: u32, version: u64) -> Value {
    json!({
        "name": name, "namespace": "bench", "uid": format!("6f1d2c00-0000-4000-8000-{service:012x}"),
        "resourceVersion": version.to_string(), "generation": 1,
        "labels": {"kubernetes.io/service-name": format!("svc-{service}")},
    })
}

pub fn service(n: u32) -> Value {
    let ips = [false, true].map(|is_v6| service_address(n, is_v6).to_string());
    let port = |protocol: &str| json!({"name": protocol.to_lowercase(), "port": SERVICE_PORT, "protocol": protocol, "targetPort": BACKEND_PORT});
    json!({
        "metadata": metadata(&format!("svc-{n}"), n, 1),
        "spec": {
            "clusterIP": ips[0], "clusterIPs": ips, "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
            "internalTrafficPolicy": "Cluster", "sessionAffinity": "None", "type": "ClusterIP",
            "ports": ports(n, port),
        },
        "status": {"loadBalancer": {}},
    })
}

/// The endpoints of one family: those of these numbers, of which each Service has sixteen.
pub fn slice(service: u32, is_v6: bool, endpoints: &[u32], version: u64) -> Value {
    let family = if is_v6 { "IPv6" } else { "IPv4" };
    let endpoint = |index: &u32| {
        json!({
            "addresses": [backend_address(service, *index, is_v6).to_string()],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": format!("node-{}", index + 2),
        })
    };
    let port =
        |protocol: &str| json!({"name": protocol.to_lowercase(), "port": BACKEND_PORT, "protocol": protocol});
    json!({
        "metadata": metadata(&format!("svc-{service}-{}", family.to_lowercase()), service, version),
        "addressType": family,
        "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
        "ports": ports(service, port),
    })
}

pub fn node() -> Value {
    json!({
        "metadata": {"name": NODE, "uid": "8b3f4e00-0000-4000-8000-000000000001", "resourceVersion": "1"},
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    })
}

/// One Service at an address of its own, with one endpoint: as text, with its EndpointSlice.
pub fn single(target: SocketAddr, backend: SocketAddr) -> (String, String) {
    let (ip, family) = (target.ip().to_string(), if target.is_ipv6() { "IPv6" } else { "IPv4" });
    let ports = |port: u16| {
        let one = |p: &str| json!({"name": p.to_lowercase(), "port": port, "protocol": p, "targetPort": backend.port()});
        vec![one("UDP"), one("TCP")]
    };
    let service = json!({
        "metadata": metadata("svc-0", 0, 1),
        "spec": {
            "clusterIP": ip, "clusterIPs": [ip], "ipFamilies": [family], "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster", "sessionAffinity": "None", "type": "ClusterIP",
            "ports": ports(target.port()),
        },
        "status": {"loadBalancer": {}},
    });
    let slice = json!({
        "metadata": metadata("svc-0-slice", 0, 1),
        "addressType": family,
        "endpoints": [{
            "addresses": [backend.ip().to_string()],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": "node-2",
        }],
        "ports": ports(backend.port()),
    });
    (service.to_string(), slice.to_string())
}

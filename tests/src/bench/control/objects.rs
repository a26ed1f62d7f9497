//! Objects as the API server's JSON has them, with the metadata that it sends and nobody reads.

use std::net::Ipv4Addr;

use serde_json::{Value, json};

pub const NODE: &str = "node-1";
const NAMESPACE: &str = "bench";

/// The ClusterIP of a Service.
pub fn cluster_ip(service: u32) -> Ipv4Addr {
    (u32::from(Ipv4Addr::new(10, 96, 0, 0)) + 1 + service).into()
}

/// A pod that no other Service has.
pub fn endpoint(service: u32, index: u32, each: u32) -> Ipv4Addr {
    (u32::from(Ipv4Addr::new(10, 128, 0, 0)) + service * each + index).into()
}

/// A pod that takes the place of another.
pub fn newcomer(n: u32) -> Ipv4Addr {
    (u32::from(Ipv4Addr::new(10, 192, 0, 0)) + n).into()
}

fn metadata(name: &str, n: u32, version: u64, manager: &str) -> Value {
    let label = name.split("-slice").next().unwrap_or(name);
    json!({
        "name": name,
        "namespace": NAMESPACE,
        "uid": format!("6f1d2c00-0000-4000-8000-{n:012x}"),
        "resourceVersion": version.to_string(),
        "generation": 1,
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "labels": {"app": label, "kubernetes.io/service-name": label},
        "managedFields": [{
            "manager": manager, "operation": "Update", "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1",
            "fieldsV1": {
                "f:metadata": {"f:labels": {".": {}, "f:app": {}, "f:kubernetes.io/service-name": {}}},
                "f:endpoints": {}, "f:ports": {}, "f:addressType": {},
            },
        }],
    })
}

pub fn service(n: u32) -> Value {
    let ip = cluster_ip(n).to_string();
    json!({
        "metadata": metadata(&format!("svc-{n}"), n, 1, "kubectl"),
        "spec": {
            "clusterIP": ip, "clusterIPs": [ip], "internalTrafficPolicy": "Cluster", "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack", "selector": {"app": format!("svc-{n}")}, "sessionAffinity": "None",
            "type": "ClusterIP", "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
        },
        "status": {"loadBalancer": {}},
    })
}

pub fn slice(service: u32, addresses: &[Ipv4Addr], version: u64) -> Value {
    let endpoint = |(i, a): (usize, &Ipv4Addr)| {
        json!({
            "addresses": [a.to_string()],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": format!("node-{}", i + 2),
            "targetRef": {
                "kind": "Pod", "name": format!("svc-{service}-7d9c5b6f4-{i:05}"), "namespace": NAMESPACE,
                "uid": format!("7a2e3d00-0000-4000-8000-{service:08x}{i:04x}"),
            },
        })
    };
    json!({
        "metadata": metadata(&format!("svc-{service}-slice"), service, version, "kube-controller-manager"),
        "addressType": "IPv4",
        "endpoints": addresses.iter().enumerate().map(endpoint).collect::<Vec<_>>(),
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    })
}

pub fn node() -> Value {
    json!({
        "metadata": {"name": NODE, "uid": "8b3f4e00-0000-4000-8000-000000000001", "resourceVersion": "1"},
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    })
}

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;
use crate::model::convert;

/// What the model gets from an object decoded in full and stripped, which is to be what it gets from the slim one.
fn check<K, S>(json: &Value)
where
    K: DeserializeOwned + Strip + Into<Object>,
    S: DeserializeOwned + Into<Object>,
{
    let text = json.to_string();
    let mut full: K = serde_json::from_str(&text).unwrap();
    full.strip();
    let (full, slim): (Object, Object) = (full.into(), serde_json::from_str::<S>(&text).unwrap().into());
    assert_eq!(convert::object(&slim), convert::object(&full), "{text}");
    assert_eq!(slim.reference(), full.reference());
    let (slim, full) = (slim.metadata(), full.metadata());
    assert_eq!(slim.resource_version, full.resource_version);
    assert_eq!((&slim.uid, &slim.deletion_timestamp), (&full.uid, &full.deletion_timestamp));
    assert_eq!(slim.annotations, full.annotations);
}

fn metadata() -> Value {
    json!({
        "name": "web", "namespace": "shop", "uid": "6f1d", "resourceVersion": "17", "generation": 3,
        "creationTimestamp": "2026-01-01T00:00:00Z", "deletionTimestamp": "2026-01-02T00:00:00Z",
        "labels": {"app": "web", "kubernetes.io/service-name": "web"},
        "annotations": {
            "endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00Z", "example.com/note": "\u{1f980}\n",
        },
        "managedFields": [{"manager": "m", "operation": "Update", "fieldsV1": {"f:spec": {"f:ports": {}}}}],
        "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": "web", "uid": "6f1c"}],
        "finalizers": ["example.com/wait"],
    })
}

fn with(base: &Value, pointer: &str, value: Value) -> Value {
    let mut object = base.clone();
    *object.pointer_mut(pointer).unwrap() = value;
    object
}

#[test]
fn slices_are_what_they_are_when_decoded_in_full() {
    let slice = json!({
        "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "metadata": metadata(), "addressType": "IPv4",
        "endpoints": [
            {
                "addresses": ["10.1.0.1", "10.1.0.2"], "nodeName": "n1", "zone": "z1", "hostname": "h",
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "targetRef": {"kind": "Pod", "name": "web-1", "uid": "7a2e"},
                "hints": {"forZones": [{"name": "z1"}], "forNodes": [{"name": "n1"}]},
            },
            {"addresses": ["10.1.0.3"], "conditions": {"ready": false, "terminating": null}},
            {"addresses": []},
            {"addresses": ["not-an-address"], "conditions": null, "hints": null, "nodeName": null},
        ],
        "ports": [
            {"name": "http", "port": 8080, "protocol": "TCP", "appProtocol": "http"}, {"name": "", "port": null},
            {"port": 1}, {"name": "udp", "protocol": "UDP", "port": 70_000},
        ],
    });
    check::<discovery::EndpointSlice, SlimSlice>(&slice);
    let rejected = serde_json::from_value::<SlimSlice>(slice.clone()).unwrap().into();
    assert_eq!(convert::object(&rejected).unwrap().rejections.len(), 5, "every one of them is told");
    for list in ["/endpoints", "/ports", "/metadata/labels", "/metadata/annotations", "/addressType"] {
        check::<discovery::EndpointSlice, SlimSlice>(&with(&slice, list, Value::Null));
    }
    for (field, wrong) in [("/endpoints", json!("x")), ("/endpoints/0/addresses", json!(["10.1.0.1", 1]))] {
        let text = with(&slice, field, wrong).to_string();
        let is_full_refused = serde_json::from_str::<discovery::EndpointSlice>(&text).is_err();
        assert!(is_full_refused);
    }
    let wrong = with(&slice, "/endpoints", json!("x"));
    assert!(serde_json::from_value::<SlimSlice>(wrong).is_err());
    for label in ["service.kubernetes.io/headless", "service.kubernetes.io/service-proxy-name"] {
        let labels = json!({"kubernetes.io/service-name": "web", label: ""});
        check::<discovery::EndpointSlice, SlimSlice>(&with(&slice, "/metadata/labels", labels));
    }
}

#[test]
fn services_are_what_they_are_when_decoded_in_full() {
    let service = json!({
        "metadata": metadata(),
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00::1"],
            "externalIPs": ["192.0.2.1", "x"], "externalTrafficPolicy": "Local", "healthCheckNodePort": 30_001,
            "internalTrafficPolicy": "Local", "loadBalancerSourceRanges": ["192.0.2.0/24"], "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 100}}, "selector": {"app": "web"},
            "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "PreferDualStack",
            "ports": [
                {"name": "http", "port": 80, "protocol": "TCP", "targetPort": "web", "nodePort": 30_080},
                {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53}, {"name": "none"},
            ],
        },
        "status": {
            "loadBalancer": {"ingress": [{"ip": "198.51.100.1", "ipMode": "VIP"}, {"hostname": "h"}]},
            "conditions": [],
        },
    });
    check::<core::Service, Slim<core::Service>>(&service);
    for field in ["/spec", "/status", "/status/loadBalancer", "/spec/ports", "/spec/clusterIPs"] {
        check::<core::Service, Slim<core::Service>>(&with(&service, field, Value::Null));
    }
    for (field, value) in [("type", "ExternalName"), ("type", "x"), ("clusterIP", "None")] {
        let mut other = service.clone();
        other["spec"][field] = value.into();
        other["spec"]["clusterIPs"] = Value::Null;
        check::<core::Service, Slim<core::Service>>(&other);
    }
    let labels = json!({"service.kubernetes.io/service-proxy-name": "other"});
    check::<core::Service, Slim<core::Service>>(&with(&service, "/metadata/labels", labels));
}

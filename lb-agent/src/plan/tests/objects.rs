//! Random objects as the API has them: whatever may be left out is left out at times.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use proptest::{bool::weighted, collection::vec, option, prelude::*, sample::select};

use super::world::NODE;

/// Everything that there is to one Service, on this node.
#[derive(Clone, Debug)]
pub struct Objects {
    pub service: core::Service,
    pub slices: Vec<discovery::EndpointSlice>,
    pub node: Option<core::Node>,
}

pub const SERVICE: &str = "web";

/// Addresses of endpoints, by family. Few, so that slices have some in common.
const HOSTS: [[&str; 5]; 2] = [
    ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"],
    ["2001:db8:1::1", "2001:db8:1::2", "2001:db8:1::3", "2001:db8:1::4", "2001:db8:1::5"],
];

/// Where the pod of an address runs, and what the controller thinks of it: the same in all slices. What counts if copies
/// disagree about that is not defined.
type Pods = Vec<(Option<&'static str>, Option<discovery::EndpointHints>)>;

fn labels(pairs: impl IntoIterator<Item = (&'static str, String)>) -> Option<BTreeMap<String, String>> {
    let labels: BTreeMap<_, _> = pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
    (!labels.is_empty()).then_some(labels)
}

fn meta(name: &str, labels: Option<BTreeMap<String, String>>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: Some("default".into()),
        labels,
        ..ObjectMeta::default()
    }
}

/// A value of the API's enumerations, or nothing.
fn text(values: &'static [&'static str]) -> impl Strategy<Value = Option<String>> {
    option::weighted(0.8, select(values).prop_map(str::to_owned))
}

fn texts(values: &'static [&'static str], most: usize) -> impl Strategy<Value = Vec<String>> {
    vec(select(values).prop_map(str::to_owned), 0..=most)
}

fn hints() -> impl Strategy<Value = Option<discovery::EndpointHints>> {
    let zones = option::weighted(0.9, texts(&["zone-a", "zone-b", "zone-c"], 2));
    let nodes = option::weighted(0.9, texts(&[NODE, "node-b"], 2));
    let hints = (zones, nodes).prop_map(|(zones, nodes)| discovery::EndpointHints {
        for_zones: zones.map(|z| z.into_iter().map(|name| discovery::ForZone { name }).collect()),
        for_nodes: nodes.map(|n| n.into_iter().map(|name| discovery::ForNode { name }).collect()),
    });
    option::weighted(0.9, hints)
}

/// Either a world where hints are usually complete, or one where they are anything.
fn pods() -> impl Strategy<Value = Pods> {
    let node = || option::weighted(0.8, select(&[NODE, "node-b", "NODE-A"]));
    let full = (select(&["zone-a", "zone-b"]), select(&[NODE, "node-b"]), any::<bool>()).prop_map(
        |(zone, node, with_node)| {
            let node = discovery::ForNode { name: node.to_owned() };
            Some(discovery::EndpointHints {
                for_zones: Some(vec![discovery::ForZone { name: zone.to_owned() }]),
                for_nodes: with_node.then(|| vec![node]),
            })
        },
    );
    prop_oneof![vec((node(), full), HOSTS[0].len()), vec((node(), hints()), HOSTS[0].len())]
}

fn conditions() -> impl Strategy<Value = Option<discovery::EndpointConditions>> {
    let flag = || option::weighted(0.8, any::<bool>());
    let any = (flag(), flag(), flag()).prop_map(|(ready, serving, terminating)| {
        Some(discovery::EndpointConditions { ready, serving, terminating })
    });
    let some = |ready, serving, terminating| {
        Just(Some(discovery::EndpointConditions {
            ready: Some(ready),
            serving: Some(serving),
            terminating: Some(terminating),
        }))
    };
    prop_oneof![
        4 => any,
        1 => Just(None),
        2 => some(true, true, false),
        2 => some(false, true, true),
    ]
}

fn endpoint(family: usize, pods: Pods) -> impl Strategy<Value = discovery::Endpoint> {
    let strange = weighted(0.05).prop_map(move |other| if other { 1 - family } else { family });
    let hosts = (strange, 0..HOSTS[0].len(), option::weighted(0.2, 0..HOSTS[0].len()));
    (hosts, conditions()).prop_map(move |((family, host, second), conditions)| {
        let (node, hints) = pods[host].clone();
        let addresses = [Some(host), second].into_iter().flatten();
        discovery::Endpoint {
            addresses: addresses.map(|h| HOSTS[family][h].to_owned()).collect(),
            conditions,
            node_name: node.map(str::to_owned),
            hints,
            ..discovery::Endpoint::default()
        }
    })
}

/// A port of a slice: usually one of the Service's, with the number that its name has in these pods.
fn slice_port(ports: Vec<core::ServicePort>) -> impl Strategy<Value = discovery::EndpointPort> {
    let number = option::weighted(0.95, prop_oneof![1 => Just(0), 19 => 8080..8083]);
    let name = option::weighted(0.9, select(&["", "p", "q"]).prop_map(str::to_owned));
    let strange = (name, text(&["TCP", "UDP", "SCTP"]));
    let usual = select(ports).prop_map(|p| (Some(p.name.unwrap_or_default()), p.protocol));
    (prop_oneof![4 => usual.boxed(), 1 => strange.boxed()], number).prop_map(|((name, protocol), port)| {
        discovery::EndpointPort { name, protocol, port, ..discovery::EndpointPort::default() }
    })
}

fn slice(
    number: usize,
    pods: Pods,
    ports: Vec<core::ServicePort>,
) -> impl Strategy<Value = discovery::EndpointSlice> {
    let family = prop_oneof![6 => Just(0usize), 3 => Just(1)];
    let endpoints = family.prop_flat_map(move |f| (Just(f), vec(endpoint(f, pods.clone()), 0..5)));
    let service = option::weighted(0.95, prop_oneof![12 => Just(SERVICE), 1 => Just("other"), 1 => Just("")]);
    let ports = option::weighted(0.97, vec(slice_port(ports), 1..4));
    (endpoints, service, ports, weighted(0.05), weighted(0.05)).prop_map(
        move |((family, endpoints), service, ports, headless, names)| {
            let label = service.map(|s| ("kubernetes.io/service-name", s.to_owned()));
            let headless = headless.then(|| ("service.kubernetes.io/headless", String::new()));
            let address_type = match (names, family) {
                (true, _) => "FQDN",
                (false, 0) => "IPv4",
                (false, _) => "IPv6",
            };
            discovery::EndpointSlice {
                metadata: meta(&format!("s{number}"), labels(label.into_iter().chain(headless))),
                address_type: address_type.to_owned(),
                endpoints,
                ports,
            }
        },
    )
}

fn service_ports() -> impl Strategy<Value = Vec<core::ServicePort>> {
    let port = |name: Option<&'static str>, number: i32| {
        let node_port = option::weighted(0.8, prop_oneof![1 => Just(0), 4 => Just(30_000 + number)]);
        (text(&["TCP", "TCP", "UDP", "SCTP"]), node_port).prop_map(move |(protocol, node_port)| {
            core::ServicePort {
                name: name.map(str::to_owned),
                protocol,
                port: number,
                node_port,
                ..core::ServicePort::default()
            }
        })
    };
    prop_oneof![
        port(None, 80).prop_map(|p| vec![p]),
        (port(Some("p"), 80), port(Some("q"), 443)).prop_map(|(p, q)| vec![p, q]),
    ]
}

fn ingress() -> impl Strategy<Value = core::LoadBalancerIngress> {
    let ip = option::weighted(0.9, select(&["198.51.100.1", "198.51.100.2", "2001:db8:2::1"]));
    (ip, text(&["VIP", "Proxy"])).prop_map(|(ip, ip_mode)| core::LoadBalancerIngress {
        ip: ip.map(str::to_owned),
        hostname: ip.is_none().then(|| "lb.example.com".to_owned()),
        ip_mode,
        ..core::LoadBalancerIngress::default()
    })
}

fn service(ports: Vec<core::ServicePort>) -> impl Strategy<Value = core::Service> {
    let kind = prop_oneof![
        9 => text(&["ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"]),
        1 => Just(Some("ExternalName".to_owned())),
    ];
    let cluster_ips = prop_oneof![
        4 => Just(&["10.96.0.1", "2001:db8:96::1"][..]),
        2 => Just(&["10.96.0.1"][..]),
        2 => Just(&["2001:db8:96::1"][..]),
        1 => Just(&["None"][..]),
    ];
    let policy = || text(&["Cluster", "Local"]);
    let external = option::of(texts(&["203.0.113.1", "203.0.113.2", "8.8.8.8"], 2));
    let spec = (kind, cluster_ips, (policy(), policy()), external, Just(ports), text(&["None", "ClientIP"]));
    (spec, option::of(vec(ingress(), 0..3)), weighted(0.05)).prop_map(|(spec, ingress, foreign)| {
        let (type_, ips, (internal, external_policy), external_ips, ports, session_affinity) = spec;
        let exposed = matches!(type_.as_deref(), Some("NodePort" | "LoadBalancer"));
        let node_port =
            |p: core::ServicePort| core::ServicePort { node_port: p.node_port.filter(|_| exposed), ..p };
        let foreign = foreign.then(|| ("service.kubernetes.io/service-proxy-name", "other".to_owned()));
        core::Service {
            metadata: meta(SERVICE, labels(foreign)),
            spec: Some(core::ServiceSpec {
                type_,
                cluster_ip: ips.first().map(|ip| (*ip).to_owned()),
                cluster_ips: Some(ips.iter().map(|ip| (*ip).to_owned()).collect()),
                internal_traffic_policy: internal,
                external_traffic_policy: external_policy.filter(|_| exposed),
                external_ips,
                ports: Some(ports.into_iter().map(node_port).collect()),
                session_affinity,
                ..core::ServiceSpec::default()
            }),
            status: Some(core::ServiceStatus {
                load_balancer: Some(core::LoadBalancerStatus { ingress }),
                ..core::ServiceStatus::default()
            }),
        }
    })
}

fn node() -> impl Strategy<Value = Option<core::Node>> {
    let zone = option::weighted(0.9, prop_oneof![12 => Just("zone-a"), 4 => Just("zone-b"), 1 => Just("")]);
    let node = zone.prop_map(|zone| core::Node {
        metadata: ObjectMeta {
            namespace: None,
            ..meta(NODE, labels(zone.map(|z| ("topology.kubernetes.io/zone", z.to_owned()))))
        },
        ..core::Node::default()
    });
    option::weighted(0.95, node)
}

/// Any objects.
pub fn objects() -> impl Strategy<Value = Objects> {
    (pods(), service_ports()).prop_flat_map(|(pods, ports)| {
        let slice = |n| option::weighted(0.6, slice(n, pods.clone(), ports.clone()));
        let slices = (0..5usize).map(slice).collect::<Vec<_>>();
        (service(ports), slices, node()).prop_map(|(service, slices, node)| Objects {
            service,
            slices: slices.into_iter().flatten().collect(),
            node,
        })
    })
}

//! The objects are written as users write them.

use k8s_openapi::{
    api::{
        core::v1::{Node as KubeNode, Service as KubeService},
        discovery::v1::EndpointSlice as KubeSlice,
    },
    serde::de::DeserializeOwned,
};

use super::*;
use crate::model::{AddressType, Conditions, ExternalPolicy, InternalPolicy, ServiceType};

fn parse<T: DeserializeOwned>(yaml: &str) -> T {
    serde_saphyr::from_str(yaml).unwrap()
}

/// A Service with these lines in its spec.
fn spec(lines: &str) -> KubeService {
    let lines = lines.replace('\n', "\n  ");
    parse(&format!("kind: Service\nmetadata: {{name: web, namespace: shop}}\nspec:\n  {lines}\n"))
}

fn slice_of(rest: &str) -> KubeSlice {
    parse(&format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: web-x, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}\n{rest}"
    ))
}

fn fields<T>(converted: &Converted<T>) -> Vec<&str> {
    converted.rejections.iter().map(|r| r.field.as_str()).collect()
}

#[test]
fn a_service_with_everything() {
    let kube: KubeService = parse(
        "apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.1
  clusterIPs: [10.96.0.1, '2001:db8::1']
  externalIPs: [203.0.113.9]
  internalTrafficPolicy: Local
  externalTrafficPolicy: Local
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 600}}
  ports:
  - {name: dns, port: 53, protocol: UDP, nodePort: 30053}
  - {name: http, port: 80, targetPort: http}
status:
  loadBalancer:
    ingress:
    - {ip: 198.51.100.1}
    - {ip: 198.51.100.2, ipMode: VIP}
    - {ip: 198.51.100.3, ipMode: Proxy}
    - {hostname: lb.example}
",
    );
    let converted = service(&kube).unwrap();
    assert_eq!(converted.rejections, []);
    let s = converted.object;
    assert_eq!((&*s.key.namespace, &*s.key.name, s.kind), ("shop", "web", ServiceType::LoadBalancer));
    assert_eq!(s.cluster_ips.iter().map(IpAddr::to_string).collect::<Vec<_>>(), ["10.96.0.1", "2001:db8::1"]);
    assert_eq!((s.internal_policy, s.external_policy), (InternalPolicy::Local, ExternalPolicy::Local));
    assert_eq!(s.affinity_timeout_s, Some(600));
    let ports: Vec<_> = s.ports.iter().map(|p| (&*p.name, p.protocol, p.port, p.node_port)).collect();
    assert_eq!(ports, [("dns", Protocol::Udp, 53, 30053), ("http", Protocol::Tcp, 80, 0)]);
    assert!(s.is_programmed());
}

#[test]
fn e5_ingress_addresses_of_mode_proxy_and_of_other_types_get_no_frontend() {
    let mut kube = spec("type: LoadBalancer\nclusterIP: 10.96.0.1\nports: [{port: 80}]");
    kube.status = parse(
        "loadBalancer: {ingress: [{ip: 198.51.100.1}, {ip: 198.51.100.2, ipMode: VIP}, \
         {ip: 198.51.100.3, ipMode: Proxy}, {ip: 198.51.100.4, ipMode: Magic}, {ip: nonsense}]}",
    );
    let converted = service(&kube).unwrap();
    let ips: Vec<String> = converted.object.load_balancer_ips.iter().map(IpAddr::to_string).collect();
    assert_eq!(ips, ["198.51.100.1", "198.51.100.2"]);
    assert_eq!(
        fields(&converted),
        ["status.loadBalancer.ingress[3].ipMode", "status.loadBalancer.ingress[4].ip"]
    );
    kube.spec.as_mut().unwrap().type_ = Some("ClusterIP".to_owned());
    assert!(service(&kube).unwrap().object.load_balancer_ips.is_empty());
}

#[test]
fn i9_headless_external_name_and_foreign_services_are_not_programmed() {
    for lines in ["clusterIP: None\nports: [{port: 80}]", "type: ExternalName\nexternalName: example.org"] {
        let converted = service(&spec(lines)).unwrap();
        assert!(!converted.object.is_programmed(), "{lines}");
        assert_eq!(converted.rejections, []);
    }
    let mut foreign = spec("clusterIP: 10.96.0.1\nports: [{port: 80}]");
    foreign.metadata.labels = parse("{service.kubernetes.io/service-proxy-name: other}");
    assert!(!service(&foreign).unwrap().object.is_programmed());
}

#[test]
fn bad_parts_of_a_service_do_not_cost_the_rest() {
    let converted = service(&spec(
        "clusterIPs: [10.96.0.1, 10.96.0.2, bogus, 127.0.0.1]
externalIPs: [169.254.169.254, 203.0.113.1]
internalTrafficPolicy: Sometimes
externalTrafficPolicy: Never
sessionAffinity: ClientIP
sessionAffinityConfig: {clientIP: {timeoutSeconds: 0}}
ports:
- {name: a, port: 0}
- {name: b, port: 80, nodePort: 70000}
- {name: c, port: 81, protocol: ICMP}
- {name: b, port: 82}
- {name: d, port: 80}
- {name: 'e/f', port: 83}",
    ))
    .unwrap();
    assert_eq!(
        fields(&converted),
        [
            "spec.clusterIPs[1]",
            "spec.clusterIPs[2]",
            "spec.clusterIPs[3]",
            "spec.externalIPs[0]",
            "spec.internalTrafficPolicy",
            "spec.externalTrafficPolicy",
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            "spec.ports[0].port",
            "spec.ports[1].nodePort",
            "spec.ports[2].protocol",
            "spec.ports[3]",
            "spec.ports[4]",
            "spec.ports[5].name",
        ]
    );
    let s = converted.object;
    assert_eq!((s.cluster_ips.len(), s.external_ips.len(), s.ports.len()), (1, 1, 1));
    assert_eq!(s.affinity_timeout_s, Some(10_800));
    assert_eq!((&*s.ports[0].name, s.ports[0].port, s.ports[0].node_port), ("b", 80, 0));
    assert_eq!(
        converted.rejections[0].to_string(),
        "Service shop/web: spec.clusterIPs[1]: 10.96.0.2 is a second address of its family"
    );
}

#[test]
fn a_service_without_a_cluster_ip_or_ports_says_so() {
    assert_eq!(fields(&service(&spec("ports: []")).unwrap()), ["spec.clusterIP", "spec.ports"]);
}

#[test]
fn an_object_that_cannot_be_named_or_understood_is_refused() {
    let mut kube = spec("clusterIP: 10.96.0.1\nports: [{port: 80}]");
    kube.metadata.name = None;
    assert_eq!(service(&kube).unwrap_err().field, "metadata.name");
    kube.metadata.name = Some("a/b:c".to_owned());
    assert_eq!(service(&kube).unwrap_err().reason, Reason::BadName("a/b:c".to_owned()));
    let unknown = service(&spec("type: Teapot")).unwrap_err();
    assert_eq!(
        unknown.to_string(),
        "Service shop/web: spec.type: \"Teapot\" is none of the values that the API knows"
    );
    assert_eq!(slice(&slice_of("addressType: IPX\nendpoints: []")).unwrap_err().field, "addressType");
}

#[test]
fn a6_conditions_that_are_not_said_count_as_ready_serving_and_not_terminating() {
    let converted = slice(&slice_of(
        "addressType: IPv4
ports: [{name: '', port: 80}]
endpoints:
- addresses: [10.0.0.1]
- {addresses: [10.0.0.2], conditions: {}}
- {addresses: [10.0.0.3], conditions: {ready: false, serving: false, terminating: true}}",
    ))
    .unwrap();
    let conditions: Vec<Conditions> = converted.object.endpoints.iter().map(|e| e.conditions).collect();
    let alive = Conditions { ready: true, serving: true, terminating: false };
    let dead = Conditions { ready: false, serving: false, terminating: true };
    assert_eq!(conditions, [alive, alive, dead]);
}

#[test]
fn a8_first_address_only_and_ports_need_a_name_and_a_number() {
    let converted = slice(&slice_of(
        "addressType: IPv4
ports: [{name: '', port: 80}, {port: 81}, {name: b}, {name: c, port: 0}, {name: d, port: 53, protocol: UDP}]
endpoints:
- {addresses: [10.0.0.1, 10.0.0.2], nodeName: n, hints: {forZones: [{name: z}], forNodes: [{name: n}]}}
- {addresses: []}
- {addresses: ['2001:db8::1']}
- {addresses: [127.0.0.1]}
- {addresses: [10.0.0.3], hints: {forZones: []}}",
    ))
    .unwrap();
    let s = &converted.object;
    let addresses: Vec<String> = s.endpoints.iter().map(|e| e.addr.to_string()).collect();
    assert_eq!(addresses, ["10.0.0.1", "10.0.0.3"]);
    assert_eq!(s.endpoints[0].node.as_deref(), Some("n"));
    let hints = s.endpoints[0].hints.as_deref().unwrap();
    assert_eq!((&*hints.zones[0], &*hints.nodes[0]), ("z", "n"));
    assert_eq!(s.endpoints[1].hints, None);
    let ports: Vec<_> = s.ports.iter().map(|p| (&*p.name, p.protocol, p.port)).collect();
    assert_eq!(ports, [("", Protocol::Tcp, 80), ("d", Protocol::Udp, 53)]);
    assert_eq!(
        fields(&converted),
        [
            "ports[1].name",
            "ports[2].port",
            "ports[3].port",
            "endpoints[1].addresses[0]",
            "endpoints[2].addresses[0]",
            "endpoints[3].addresses[0]",
        ]
    );
}

#[test]
fn a8_slices_for_nobody_of_names_or_of_headless_services_are_empty_shells() {
    let full = "ports: [{name: '', port: 80}]\nendpoints: [{addresses: [10.0.0.1]}]";
    let fqdn = slice(&slice_of(&format!("addressType: FQDN\n{full}"))).unwrap();
    assert_eq!((fqdn.object.address_type, fqdn.object.endpoints.len()), (AddressType::Fqdn, 0));
    let mut kube = slice_of(&format!("addressType: IPv4\n{full}"));
    kube.metadata.labels = parse("{kubernetes.io/service-name: web, service.kubernetes.io/headless: ''}");
    assert_eq!(slice(&kube).unwrap().object.service, None);
    kube.metadata.labels = None;
    let nobodys = slice(&kube).unwrap();
    assert_eq!((nobodys.object.service, nobodys.object.endpoints.len()), (None, 0));
}

#[test]
fn a_node_has_its_zone_and_its_addresses() {
    let kube: KubeNode = parse(
        "metadata: {name: n1, labels: {topology.kubernetes.io/zone: z1}}
status:
  addresses:
  - {type: Hostname, address: n1}
  - {type: InternalIP, address: 192.0.2.1}
  - {type: InternalIP, address: nonsense}
  - {type: ExternalIP, address: 203.0.113.1}",
    );
    let converted = node(&kube).unwrap();
    assert_eq!(fields(&converted), ["status.addresses[2]"]);
    assert_eq!(
        converted.rejections[0].to_string(),
        "Node n1: status.addresses[2]: \"nonsense\" is not an IP address"
    );
    let n = converted.object;
    assert_eq!((&*n.name, n.zone.as_deref()), ("n1", Some("z1")));
    assert_eq!((n.internal_ips.len(), n.external_ips.len()), (1, 1));
}

#[test]
fn a_deleted_object_is_a_change_too() {
    let gone = |kind| deleted(&ObjectRef { kind, namespace: "shop".to_owned(), name: "web".to_owned() });
    assert_eq!(gone(Kind::Service), Change::DeleteService(ServiceKey::new("shop", "web")));
    assert_eq!(gone(Kind::EndpointSlice), Change::DeleteSlice(SliceKey::new("shop", "web")));
    assert_eq!(gone(Kind::Node), Change::DeleteNode("web".into()));
}

#[test]
fn e4_source_ranges_are_trimmed_and_invalid_ones_ignored() {
    let converted = service(&spec(
        "clusterIP: 10.96.0.1\nports: [{port: 80}]\n\
         loadBalancerSourceRanges: [' 10.1.2.3/16 ', '2001:db8::/32', '', nonsense, '10.1.0.0/33', '10.1.0.0/16', '::ffff:10.0.0.0/104']",
    ))
    .unwrap();
    let expected = ["10.1.0.0/16", "2001:db8::/32"].map(|r| r.parse::<ipnet::IpNet>().unwrap());
    assert_eq!(converted.object.source_ranges.as_deref(), Some(&expected[..]));
    let field = |i: usize| format!("spec.loadBalancerSourceRanges[{i}]");
    assert_eq!(fields(&converted), [field(3), field(4), field(6)]);
    let of = |ranges: &str| {
        let lines =
            format!("clusterIP: 10.96.0.1\nports: [{{port: 80}}]\nloadBalancerSourceRanges: {ranges}");
        service(&spec(&lines)).unwrap().object.source_ranges
    };
    assert_eq!(of("[]"), None);
    assert_eq!(of("['', ' ']"), None);
    assert_eq!(of("[nonsense]"), Some(vec![]), "nobody rather than everybody");
}

#[test]
fn i9_of_another_proxys_service_only_the_cluster_ips_are_read() {
    let kube: KubeService = parse(
        "kind: Service
metadata: {name: web, namespace: shop, labels: {service.kubernetes.io/service-proxy-name: other}}
spec: {clusterIPs: [10.96.0.1, nonsense], externalIPs: [nonsense], ports: [{port: 0}]}
",
    );
    let converted = service(&kube).unwrap();
    assert_eq!(converted.rejections, []);
    assert!(converted.object.is_foreign() && !converted.object.is_programmed());
    assert_eq!(converted.object.cluster_ips, ["10.96.0.1".parse::<IpAddr>().unwrap()]);
    assert!(converted.object.ports.is_empty());
}

#[test]
fn c7_service_cidrs_are_prefixes_without_a_namespace() {
    let kube: networking::ServiceCIDR = parse(
        "apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {name: kubernetes}
spec: {cidrs: [10.96.0.0/16, nonsense, '2001:db8:96::/112']}
",
    );
    let converted = service_cidr(&kube).unwrap();
    assert_eq!(fields(&converted), ["spec.cidrs[1]"]);
    assert_eq!(
        converted.rejections[0].to_string(),
        "ServiceCIDR kubernetes: spec.cidrs[1]: \"nonsense\" is not an address prefix (as 192.0.2.0/24 is)"
    );
    let cidrs: Vec<String> = converted.object.cidrs.iter().map(|c| c.to_string()).collect();
    assert_eq!(
        (&*converted.object.name, cidrs),
        ("kubernetes", vec!["10.96.0.0/16".to_owned(), "2001:db8:96::/112".to_owned()])
    );
}

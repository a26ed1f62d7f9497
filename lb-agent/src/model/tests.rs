use super::*;
use crate::plan::op::{Family, Protocol};

fn key(name: &str) -> ServiceKey {
    ServiceKey::new("default", name)
}

fn service(name: &str) -> Service {
    Service {
        key: key(name),
        kind: ServiceType::ClusterIp,
        headless: false,
        cluster_ips: vec!["10.96.0.1".parse().unwrap()],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: None,
        internal_policy: InternalPolicy::Cluster,
        external_policy: ExternalPolicy::Cluster,
        affinity_timeout_s: None,
        proxy_name: None,
        health_check: None,
        ports: vec![ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: 0 }],
    }
}

fn slice(name: &str, service: Option<&str>) -> EndpointSlice {
    EndpointSlice {
        key: SliceKey::new("default", name),
        service: service.map(Arc::from),
        address_type: AddressType::Ip(Family::V4),
        ports: Box::default(),
        endpoints: Box::default(),
    }
}

fn node(name: &str, zone: &str) -> Change {
    let zone = Some(zone.into());
    Change::Node(Node { name: name.into(), zone, internal_ips: Vec::new(), external_ips: Vec::new() })
}

fn slices(model: &Model, service: &str) -> Vec<String> {
    model.slices(&key(service)).iter().map(|s| s.key.name.to_string()).collect()
}

#[test]
fn a_change_makes_its_service_dirty_and_no_change_nothing() {
    let mut model = Model::new("n");
    assert_eq!(model.apply(Change::Service(service("a"))), Dirty::Services(vec![key("a")]));
    assert_eq!(model.apply(Change::Service(service("a"))), Dirty::Nothing);
    let changed = Service { affinity_timeout_s: Some(1), ..service("a") };
    assert_eq!(model.apply(Change::Service(changed)), Dirty::Services(vec![key("a")]));
    assert_eq!(model.apply(Change::DeleteService(key("a"))), Dirty::Services(vec![key("a")]));
    assert_eq!(model.apply(Change::DeleteService(key("a"))), Dirty::Nothing);
    assert_eq!(model.services().len(), 0);
}

#[test]
fn a_slice_whose_label_moves_makes_both_services_dirty() {
    let mut model = Model::new("n");
    assert_eq!(model.apply(Change::Slice(slice("s", Some("a")))), Dirty::Services(vec![key("a")]));
    assert_eq!(model.apply(Change::Slice(slice("s", Some("a")))), Dirty::Nothing);
    assert_eq!(model.apply(Change::Slice(slice("s", Some("b")))), Dirty::Services(vec![key("a"), key("b")]));
    assert_eq!((slices(&model, "a"), slices(&model, "b")), (vec![], vec!["s".to_owned()]));
    assert_eq!(model.apply(Change::Slice(slice("s", None))), Dirty::Services(vec![key("b")]));
    assert_eq!(model.apply(Change::Slice(slice("s", None))), Dirty::Nothing);
    assert!(model.slices.is_empty() && model.slice_service.is_empty());
}

#[test]
fn a_deleted_slice_is_found_without_its_label() {
    let mut model = Model::new("n");
    let _ = model.apply(Change::Slice(slice("s", Some("a"))));
    let _ = model.apply(Change::Slice(slice("t", Some("a"))));
    let gone = Change::DeleteSlice(SliceKey::new("default", "s"));
    assert_eq!(model.apply(gone.clone()), Dirty::Services(vec![key("a")]));
    assert_eq!(slices(&model, "a"), ["t"]);
    assert_eq!(model.apply(gone), Dirty::Nothing);
}

#[test]
fn only_this_node_matters() {
    let mut model = Model::new("n");
    assert_eq!(model.apply(node("other", "z")), Dirty::Nothing);
    assert_eq!(model.apply(node("n", "z")), Dirty::All);
    assert_eq!(model.apply(node("n", "z")), Dirty::Nothing);
    assert_eq!(model.apply(node("n", "y")), Dirty::All);
    assert_eq!(model.apply(Change::DeleteNode("other".into())), Dirty::Nothing);
    assert_eq!(model.node().and_then(|n| n.zone.as_deref()), Some("y"));
    assert_eq!(model.apply(Change::DeleteNode("n".into())), Dirty::All);
    assert_eq!(model.node(), None);
}

#[test]
fn service_cidrs_make_no_service_stale() {
    let mut model = Model::new("n");
    let object = ServiceCidr { name: "a".into(), cidrs: vec!["10.96.0.0/16".parse().unwrap()] };
    assert_eq!(model.apply(Change::ServiceCidr(object.clone())), Dirty::ServiceCidrs);
    assert_eq!(model.apply(Change::ServiceCidr(object.clone())), Dirty::Nothing);
    assert!(model.service_cidrs().eq(&object.cidrs));
    assert_eq!(model.apply(Change::DeleteServiceCidr("b".into())), Dirty::Nothing);
    assert_eq!(model.apply(Change::DeleteServiceCidr("a".into())), Dirty::ServiceCidrs);
    assert_eq!(model.service_cidrs().count(), 0);
}

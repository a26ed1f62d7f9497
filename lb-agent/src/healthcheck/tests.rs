//! What is wanted, from objects as users write them.

use k8s_openapi::api::{
    core::v1::{Node, Service as KubeService},
    discovery::v1::EndpointSlice as KubeSlice,
};
use serde_json::{Value, json};

use super::*;
use crate::{
    model::{convert, convert::Rejection},
    source::Object,
};

const NODE: &str = "node1";

fn object(json: Value) -> Object {
    match json["kind"].as_str() {
        Some("Service") => serde_json::from_value::<KubeService>(json).unwrap().into(),
        Some("EndpointSlice") => serde_json::from_value::<KubeSlice>(json).unwrap().into(),
        _ => serde_json::from_value::<Node>(json).unwrap().into(),
    }
}

fn apply(model: &mut Model, json: Value) -> Vec<Rejection> {
    let converted = convert::object(&object(json)).unwrap();
    let _ = model.apply(converted.object);
    converted.rejections
}

fn model(objects: impl IntoIterator<Item = Value>) -> Model {
    let mut model = Model::new(NODE);
    for object in objects {
        assert_eq!(apply(&mut model, object), []);
    }
    model
}

/// `web`: a LoadBalancer Service of both families, policy Local, health checks at 31000, two ports.
fn web() -> Value {
    json!({
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop", "uid": "a-uid"},
        "spec": {
            "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31000,
            "clusterIPs": ["10.96.0.1", "2001:db8::1"],
            "ports": [
                {"name": "http", "port": 80, "nodePort": 30080},
                {"name": "https", "port": 443, "nodePort": 30443},
            ],
        },
    })
}

fn web_with(field: &str, value: Value) -> Value {
    let mut service = web();
    service["spec"][field] = value;
    service
}

/// A slice of `web` with both ports; endpoints as (address, node, conditions).
fn slice(name: &str, family: &str, endpoints: &[(&str, &str, Value)]) -> Value {
    let endpoints: Vec<_> = endpoints
        .iter()
        .map(|(ip, node, conditions)| json!({"addresses": [ip], "nodeName": node, "conditions": conditions}))
        .collect();
    json!({
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": family,
        "ports": [{"name": "http", "port": 8080}, {"name": "https", "port": 8443}],
        "endpoints": endpoints,
    })
}

fn ready() -> Value {
    json!({"ready": true, "serving": true, "terminating": false})
}

fn terminating() -> Value {
    json!({"ready": false, "serving": true, "terminating": true})
}

fn key() -> ServiceKey {
    ServiceKey::new("shop", "web")
}

fn view(model: &Model) -> NodeView {
    NodeView::new(model, &NodePortAddresses::All, &[], &["192.0.2.1".parse().unwrap()])
}

fn wanted_of(model: &Model) -> Option<Wanted> {
    let key = key();
    let slices = model.slices(&key);
    wanted(model.service(&key)?, || slices.iter(), &view(model))
}

/// Local endpoints, IPv4 and IPv6.
fn counts(objects: impl IntoIterator<Item = Value>) -> (u32, u32) {
    let local = wanted_of(&model(objects)).expect("a server").local_endpoints;
    (local[&Family::V4], local[&Family::V6])
}

#[test]
fn h1_only_load_balancers_with_policy_local_have_a_server() {
    let has =
        |service: Value| wanted_of(&model([service])).map(|w| (w.port, w.uid.as_deref() == Some("a-uid")));
    assert_eq!(has(web()), Some((31000, true)));
    assert_eq!(has(web_with("externalTrafficPolicy", json!("Cluster"))), None);
    assert_eq!(has(web_with("externalTrafficPolicy", Value::Null)), None);
    assert_eq!(has(web_with("type", json!("NodePort"))), None);
    assert_eq!(has(web_with("type", json!("ClusterIP"))), None);
    // A manifest need not have one.
    assert_eq!(has(web_with("healthCheckNodePort", json!(0))), None);
    assert_eq!(has(web_with("healthCheckNodePort", Value::Null)), None);
    let mut foreign = web();
    foreign["metadata"]["labels"] = json!({"service.kubernetes.io/service-proxy-name": "other"});
    assert_eq!(has(foreign), None);
}

#[test]
fn h1_a_port_that_is_none_is_refused_and_costs_nothing_else() {
    let mut model = Model::new(NODE);
    for bad in [-1, 65_536, 400_000] {
        let rejections = apply(&mut model, web_with("healthCheckNodePort", json!(bad)));
        assert_eq!(rejections.len(), 1, "{rejections:?}");
        let text = rejections[0].to_string();
        assert_eq!(
            text,
            format!("Service shop/web: spec.healthCheckNodePort: {bad} is outside of 1..=65535")
        );
        assert_eq!(wanted_of(&model), None);
        assert_eq!(model.service(&key()).unwrap().ports.len(), 2);
    }
}

#[test]
fn h3_distinct_ready_addresses_of_this_node_count() {
    // Two ports of each pod are one.
    let two = [("10.1.0.1", NODE, ready()), ("10.1.0.2", NODE, ready())];
    assert_eq!(counts([web(), slice("a", "IPv4", &two)]), (2, 0));
    // Nil means ready; an address is not a place.
    let mixed = [("10.1.0.1", NODE, json!({})), ("10.1.0.2", "node2", ready())];
    assert_eq!(counts([web(), slice("a", "IPv4", &mixed)]), (1, 0));
    assert_eq!(counts([web()]), (0, 0));
}

#[test]
fn h3_draining_endpoints_do_not_count_although_they_still_serve() {
    let draining = [("10.1.0.1", NODE, terminating()), ("10.1.0.2", "node2", ready())];
    let objects = [web(), slice("a", "IPv4", &draining)];
    assert_eq!(counts(objects.clone()), (0, 0));
    // The data path does use it (A3).
    let model = model(objects);
    let port = &model.service(&key()).unwrap().ports[0];
    let sets = endpoints::sets(port, Family::V4, model.slices(&key()).iter(), &view(&model));
    assert_eq!(sets.local, [("10.1.0.1".parse().unwrap(), 8080)]);
    // publishNotReadyAddresses: the API server says "ready" and nothing else counts.
    let published = [("10.1.0.1", NODE, json!({"ready": true, "serving": false, "terminating": true}))];
    assert_eq!(counts([web(), slice("a", "IPv4", &published)]), (1, 0));
}

#[test]
fn h3_an_address_in_two_slices_counts_once_and_by_its_better_copy() {
    let (here, gone) = ([("10.1.0.1", NODE, ready())], [("10.1.0.1", NODE, terminating())]);
    for (first, second) in [(&here, &gone), (&gone, &here), (&here, &here)] {
        assert_eq!(counts([web(), slice("a", "IPv4", first), slice("b", "IPv4", second)]), (1, 0));
    }
}

#[test]
fn h3_each_family_counts_alone() {
    let v4 = slice("a", "IPv4", &[("10.1.0.1", NODE, ready()), ("10.1.0.2", NODE, ready())]);
    let v6 = slice("b", "IPv6", &[("2001:db8:1::1", NODE, ready())]);
    assert_eq!(counts([web(), v4.clone(), v6.clone()]), (2, 1));
    // A Service of one family has no server in the other.
    let single = model([web_with("clusterIPs", json!(["10.96.0.1"])), v4, v6]);
    assert_eq!(wanted_of(&single).unwrap().local_endpoints, BTreeMap::from([(Family::V4, 2)]));
}

#[test]
fn h3_hints_do_not_count() {
    let mut hinted = slice("a", "IPv4", &[("10.1.0.1", NODE, ready()), ("10.1.0.2", "node2", ready())]);
    for (i, zone) in ["b", "a"].into_iter().enumerate() {
        hinted["endpoints"][i]["hints"] = json!({"forZones": [{"name": zone}]});
    }
    let node = json!({
        "kind": "Node",
        "metadata": {"name": NODE, "labels": {"topology.kubernetes.io/zone": "a"}},
    });
    assert_eq!(counts([web(), hinted, node]), (1, 0));
}

#[test]
fn h4_servers_listen_where_node_ports_are_served() {
    let chosen: BTreeSet<IpAddr> =
        ["192.0.2.1", "192.0.2.2", "2001:db8::5"].iter().map(|a| a.parse().unwrap()).collect();
    let at = |setting: NodePortAddresses| -> Vec<String> {
        listen_addresses(&setting, &chosen).iter().map(IpAddr::to_string).collect()
    };
    let cidrs = |list: &[&str]| NodePortAddresses::Cidrs(list.iter().map(|c| c.parse().unwrap()).collect());
    assert_eq!(at(NodePortAddresses::All), ["0.0.0.0", "::"]);
    assert_eq!(at(NodePortAddresses::Primary), ["192.0.2.1", "192.0.2.2", "2001:db8::5"]);
    assert_eq!(at(cidrs(&["192.0.2.0/24", "2001:db8::/64"])), ["192.0.2.1", "192.0.2.2", "2001:db8::5"]);
    // F2.
    assert_eq!(at(cidrs(&["192.0.2.0/24"])), ["192.0.2.1", "192.0.2.2", "::"]);
    assert_eq!(at(cidrs(&["192.0.2.0/24", "0.0.0.0/0", "2001:db8::/64"])), ["0.0.0.0", "2001:db8::5"]);
    // No address of the node is in the list: nothing listens, as no NodePort is served.
    assert!(listen_addresses(&cidrs(&["198.51.100.0/24", "2001:db8:1::/64"]), &BTreeSet::new()).is_empty());
}

/// A tracker, what it follows, and who follows it.
struct World {
    model: Model,
    tracker: Tracker,
    seen: watch::Receiver<Desired>,
}

impl World {
    fn new(objects: impl IntoIterator<Item = Value>) -> Self {
        let tracker = Tracker::default();
        let seen = tracker.subscribe();
        let mut world = Self { model: model(objects), tracker, seen };
        world.turn([]);
        world.seen.mark_unchanged();
        world
    }

    /// One turn of the loop with these changes; true if the runner has to do something.
    fn turn(&mut self, changes: impl IntoIterator<Item = Value>) -> bool {
        for change in changes {
            let converted = convert::object(&object(change)).unwrap();
            if let crate::model::Dirty::Services(keys) = self.model.apply(converted.object) {
                self.tracker.mark(false, &keys.into_iter().collect());
            }
        }
        let addresses = BTreeSet::from([Ipv4Addr::UNSPECIFIED.into()]);
        self.tracker.publish(&self.model, &view(&self.model), addresses);
        let changed = self.seen.has_changed().unwrap();
        self.seen.mark_unchanged();
        changed
    }

    fn count(&self) -> Option<u32> {
        let desired = self.seen.borrow();
        Some(desired.servers.get(&key())?.local_endpoints[&Family::V4].load(Ordering::Relaxed))
    }
}

#[test]
fn h3_an_endpoint_that_comes_or_goes_wakes_nobody() {
    let mut world = World::new([web()]);
    assert_eq!(world.count(), Some(0));
    assert!(!world.turn([slice("a", "IPv4", &[("10.1.0.1", NODE, ready())])]));
    assert_eq!(world.count(), Some(1));
    assert!(!world.turn([slice("a", "IPv4", &[("10.1.0.1", NODE, terminating())])]));
    assert_eq!(world.count(), Some(0));
}

#[test]
fn h4_the_server_follows_the_service() {
    let mut world = World::new([web(), slice("a", "IPv4", &[("10.1.0.1", NODE, ready())])]);
    assert_eq!(world.count(), Some(1));
    assert!(world.turn([web_with("externalTrafficPolicy", json!("Cluster"))]));
    assert_eq!(world.count(), None);
    // The other way round, the endpoints that were there all along are counted.
    assert!(world.turn([web()]));
    assert_eq!(world.count(), Some(1));
    assert!(world.turn([web_with("healthCheckNodePort", json!(31001))]));
    assert_eq!(world.seen.borrow().servers[&key()].port, 31001);
    // What other fields say is of no interest.
    assert!(!world.turn([{
        let mut other = web_with("healthCheckNodePort", json!(31001));
        other["spec"]["internalTrafficPolicy"] = json!("Local");
        other
    }]));
    let _ = world.model.apply(convert::deleted(&object(web()).reference()));
    world.tracker.mark(false, &BTreeSet::from([key()]));
    assert!(world.turn([]));
    assert_eq!(world.count(), None);
}

#[test]
fn h4_a_turn_that_failed_is_made_up_for() {
    let mut world = World::new([]);
    // Marked by a turn whose plan was refused, hence not published.
    let _ = world.model.apply(convert::object(&object(web())).unwrap().object);
    world.tracker.mark(false, &BTreeSet::from([key()]));
    assert!(world.turn([slice("other", "IPv6", &[])]));
    assert_eq!(world.count(), Some(0));
    // Everything is looked at when the view of the node changes, what is gone, too.
    let _ = world.model.apply(convert::deleted(&object(web()).reference()));
    world.tracker.mark(true, &BTreeSet::new());
    assert!(world.turn([]));
    assert_eq!(world.count(), None);
}

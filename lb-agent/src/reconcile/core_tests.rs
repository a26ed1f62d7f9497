use std::io;

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use lb_common::{frontend::FrontendValue, maps::name};
use serde_json::json;

use super::*;
use crate::{
    plan::{
        ActualCidr, ActualService,
        op::{Family, Frontend, Protocol},
    },
    source::{Kind, Missing, Object},
};

/// Maps in memory, with the same meaning of every operation.
#[derive(Default)]
pub(in crate::reconcile) struct FakeKernel {
    pub state: ActualState,
    /// Every plan that was applied.
    pub plans: Vec<Vec<MapOp>>,
    /// The next so many plans are refused in part.
    pub refuse: usize,
    reads: std::cell::Cell<usize>,
    /// What elements of `SERVICE_CIDRS4/6` hold before they count.
    cidrs: BTreeMap<(Family, u32), IpNet>,
}

impl Kernel for FakeKernel {
    fn capacities(&self) -> Capacities {
        Capacities {
            frontends: 100_000,
            services: 10_000,
            slots: 100_000,
            backends: 10_000,
            members: 1000,
            source_ranges: 1000,
        }
    }

    fn read_actual(&self) -> Result<ActualState, MapError> {
        self.reads.set(self.reads.get() + 1);
        Ok(self.state.clone())
    }

    fn apply(&mut self, ops: &[MapOp]) -> Result<Applied, MapError> {
        self.plans.push(ops.to_vec());
        if self.refuse > 0 {
            self.refuse -= 1;
            let source = io::Error::from_raw_os_error(libc::E2BIG);
            let refused = Refused { map: name::FRONTENDS4, what: "written", entries: 1, source };
            return Ok(Applied { done: 0, refused: vec![refused] });
        }
        ops.iter().for_each(|op| self.apply_one(op));
        Ok(Applied { done: ops.len(), refused: Vec::new() })
    }
}

impl FakeKernel {
    fn apply_one(&mut self, op: &MapOp) {
        let s = &mut self.state;
        match op.clone() {
            MapOp::NameService { service, name } => s.services.entry(service).or_default().name = Some(name),
            MapOp::WriteBackend { id, backend } => match Family::of(backend.addr) {
                Family::V4 => drop(s.backends4.insert(id, backend)),
                Family::V6 => drop(s.backends6.insert(id, backend)),
            },
            MapOp::WriteSlots { base, backends } => {
                let base = base as usize;
                s.slots.resize(s.slots.len().max(base + backends.len()), 0);
                s.slots[base..base + backends.len()].copy_from_slice(&backends);
            }
            MapOp::PutMember { key, bits } => drop(s.members.insert(key, bits)),
            MapOp::WriteService { service, record } => s.services.entry(service).or_default().record = record,
            MapOp::PutFrontend { frontend, value } => drop(s.frontends.insert(frontend, value)),
            MapOp::DeleteFrontend { frontend } => drop(s.frontends.remove(&frontend)),
            MapOp::DeleteMember { key } => drop(s.members.remove(&key)),
            MapOp::PutAddress { addr, kind } => {
                s.addresses.insert(addr, FrontendValue { service: 0, flags: kind });
            }
            MapOp::DeleteAddress { addr } => drop(s.addresses.remove(&addr)),
            MapOp::PutRange { service, net } => drop(s.ranges.insert((service, net))),
            MapOp::DeleteRange { service, net } => drop(s.ranges.remove(&(service, net))),
            MapOp::WriteCidr { index, net } => {
                self.cidrs.insert((Family::of_net(&net), index), net);
            }
            MapOp::SwitchCidr { family, index, flags: 0 } => drop(s.cidrs.remove(&(family, index))),
            MapOp::SwitchCidr { family, index, flags } => {
                let net = self.cidrs.get(&(family, index)).copied();
                s.cidrs.insert((family, index), ActualCidr { net, flags });
            }
            MapOp::Grace => {}
            MapOp::ClearService { service } => drop(s.services.remove(&service)),
            MapOp::ClearBackend { family: Family::V4, id } => drop(s.backends4.remove(&id)),
            MapOp::ClearBackend { family: Family::V6, id } => drop(s.backends6.remove(&id)),
        }
    }
}

pub(in crate::reconcile) fn rules() -> NodeRules {
    NodeRules {
        name: "node1".into(),
        nodeport_addresses: NodePortAddresses::All,
        allow_external_ips: Vec::new(),
        localhost_nodeports: false,
        service_cidrs: Vec::new(),
    }
}

/// Service `s<i>` with the ClusterIP 10.96.x.y:80.
pub(in crate::reconcile) fn service(i: u16) -> Object {
    let ip = format!("10.96.{}.{}", i / 250, i % 250 + 1);
    let service: Service = serde_json::from_value(json!({
        "metadata": {"name": format!("s{i}"), "namespace": "default"},
        "spec": {"clusterIP": ip, "clusterIPs": [ip], "ports": [{"port": 80, "protocol": "TCP"}]},
    }))
    .unwrap();
    service.into()
}

/// Its slice, with endpoints 10.1.x.y:8080.
pub(in crate::reconcile) fn slice(i: u16, endpoints: &[u16]) -> Object {
    let endpoints: Vec<_> = endpoints
        .iter()
        .map(|e| json!({"addresses": [format!("10.1.{}.{}", e / 250, e % 250 + 1)], "nodeName": "node1"}))
        .collect();
    let slice: EndpointSlice = serde_json::from_value(json!({
        "metadata": {
            "name": format!("s{i}-x"), "namespace": "default",
            "labels": {"kubernetes.io/service-name": format!("s{i}")},
        },
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints,
    }))
    .unwrap();
    slice.into()
}

fn node_addresses() -> BTreeSet<IpAddr> {
    BTreeSet::from([[192, 168, 0, 1].into()])
}

pub(in crate::reconcile) fn core_with(services: u16) -> Core<FakeKernel> {
    let mut core = Core::new(FakeKernel::default(), rules());
    for i in 0..services {
        core.apply(&service(i));
        core.apply(&slice(i, &[2 * i, 2 * i + 1]));
    }
    core
}

#[test]
fn objects_become_map_entries() {
    let mut core = core_with(3);
    let outcome = core.sync(&node_addresses()).unwrap();
    assert!(outcome.ran);
    let state = &core.kernel.state;
    let frontend = Frontend { addr: [10, 96, 0, 2].into(), port: 80, protocol: Protocol::Tcp };
    let record = &state.services[&state.frontends[&frontend].service].record;
    assert_eq!((state.frontends.len(), state.backends4.len(), record.cluster.len()), (3, 6, 2));
    assert_eq!(outcome.operations["put_frontend"], 3);
}

#[test]
fn a_changed_endpoint_costs_the_same_whatever_else_there_is() {
    let operations = |services: u16| {
        let mut core = core_with(services);
        core.sync(&node_addresses()).unwrap();
        core.apply(&slice(1, &[2, 3, 900]));
        core.sync(&node_addresses()).unwrap();
        core.kernel.plans.last().unwrap().len()
    };
    assert_eq!(operations(3), operations(400));
    assert!(operations(3) < 10, "{}", operations(3));
}

#[test]
fn nothing_changed_is_nothing_done() {
    let mut core = core_with(3);
    core.sync(&node_addresses()).unwrap();
    core.apply(&slice(1, &[2, 3]));
    let outcome = core.sync(&node_addresses()).unwrap();
    assert!(!outcome.ran);
    assert_eq!((core.kernel.plans.len(), core.kernel.reads.get()), (1, 1));
}

#[test]
fn a_restart_takes_over_what_is_there() {
    let mut core = core_with(5);
    core.sync(&node_addresses()).unwrap();
    let state = core.kernel.state;
    let mut next = core_with(5);
    next.kernel.state = state.clone();
    next.sync(&node_addresses()).unwrap();
    assert!(next.kernel.plans.is_empty(), "{:?}", next.kernel.plans);
    assert_eq!(next.kernel.state, state);
}

#[test]
fn an_audit_repairs_what_somebody_else_broke() {
    let mut core = core_with(3);
    core.sync(&node_addresses()).unwrap();
    let good = core.kernel.state.clone();
    let frontend = *good.frontends.keys().next().unwrap();
    core.kernel.state.frontends.remove(&frontend);
    core.kernel
        .state
        .services
        .insert(77, ActualService { name: Some("who/knows:x/TCP/v4".into()), ..Default::default() });
    core.sync(&node_addresses()).unwrap();
    assert_ne!(core.kernel.state, good, "a turn without changes does not look");
    let outcome = core.audit(&node_addresses()).unwrap();
    assert!(outcome.operations.values().sum::<u64>() >= 2, "{:?}", outcome.operations);
    assert_eq!(core.kernel.state, good);
    let plans = core.kernel.plans.len();
    core.audit(&node_addresses()).unwrap();
    assert_eq!(core.kernel.plans.len(), plans);
    // Work goes on with what the audit read.
    core.apply(&slice(1, &[2]));
    core.sync(&node_addresses()).unwrap();
    assert_eq!(core.kernel.state.backends4.len(), 5);
}

#[test]
fn after_a_refused_write_the_maps_are_read_again() {
    let mut core = core_with(3);
    core.kernel.refuse = 1;
    let error = core.sync(&node_addresses()).unwrap_err();
    assert!(error.to_string().contains("--max-frontends"), "{error}");
    core.sync(&node_addresses()).unwrap();
    assert_eq!(core.kernel.reads.get(), 2);
    assert_eq!(core.kernel.state.frontends.len(), 3);
}

#[test]
fn what_is_left_out_is_counted_as_long_as_it_is() {
    let mut core = core_with(1);
    let Object::Service(mut web) = service(0) else { panic!("a Service") };
    web.spec.as_mut().unwrap().external_ips = Some(vec!["192.0.2.1".into(), "not an address".into()]);
    core.apply(&Object::Service(web));
    let outcome = core.sync(&node_addresses()).unwrap();
    assert_eq!(outcome.rejected, BTreeMap::from([("external_ip_not_allowed", 1), ("not_an_address", 1)]));
    core.apply(&service(0));
    assert_eq!(core.sync(&node_addresses()).unwrap().rejected, BTreeMap::new());
}

#[test]
fn new_addresses_of_the_node_are_new_frontends() {
    let mut core = core_with(1);
    let Object::Service(mut web) = service(0) else { panic!("a Service") };
    let spec = web.spec.as_mut().unwrap();
    spec.type_ = Some("NodePort".into());
    spec.ports.as_mut().unwrap()[0].node_port = Some(30080);
    core.apply(&Object::Service(web));
    core.sync(&node_addresses()).unwrap();
    assert_eq!(core.kernel.state.frontends.len(), 2);
    let more = BTreeSet::from([[192, 168, 0, 1].into(), [192, 168, 0, 2].into()]);
    core.sync(&more).unwrap();
    assert_eq!(core.kernel.state.frontends.len(), 3);
}

#[test]
fn deleted_objects_leave_nothing() {
    let mut core = core_with(2);
    core.sync(&node_addresses()).unwrap();
    for i in 0..2 {
        core.delete(&ObjectRef { kind: Kind::Service, namespace: "default".into(), name: format!("s{i}") });
    }
    core.sync(&node_addresses()).unwrap();
    let left = &core.kernel.state;
    assert!(left.frontends.is_empty() && left.services.is_empty() && left.backends4.is_empty(), "{left:?}");
}

#[test]
fn h4_health_checks_are_published_once_the_maps_hold_the_plan() {
    let mut core = core_with(2);
    let mut seen = core.health_checks();
    core.sync(&node_addresses()).unwrap();
    seen.mark_unchanged();
    let Object::Service(mut web) = service(0) else { panic!("a Service") };
    let spec = web.spec.as_mut().unwrap();
    (spec.type_, spec.external_traffic_policy) = (Some("LoadBalancer".into()), Some("Local".into()));
    spec.health_check_node_port = Some(31000);
    spec.external_ips = None;
    spec.ports.as_mut().unwrap()[0].node_port = Some(30080);
    core.apply(&Object::Service(web));
    core.kernel.refuse = 1;
    core.sync(&node_addresses()).unwrap_err();
    assert!(!seen.has_changed().unwrap() && seen.borrow().servers.is_empty());
    core.sync(&node_addresses()).unwrap();
    assert!(seen.has_changed().unwrap());
    let key = ServiceKey::new("default", "s0");
    let (port, count) = {
        let desired = seen.borrow_and_update();
        (desired.servers[&key].port, desired.servers[&key].local_endpoints[&Family::V4].clone())
    };
    let local = || count.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!((port, local()), (31000, 2));
    core.apply(&slice(0, &[0]));
    core.sync(&node_addresses()).unwrap();
    assert_eq!(local(), 1);
    assert!(!seen.has_changed().unwrap(), "nobody has to open or close anything");
    core.delete(&service(0).reference());
    core.sync(&node_addresses()).unwrap();
    assert!(seen.has_changed().unwrap() && seen.borrow().servers.is_empty());
}

fn missing(names: &[&str]) -> Missing {
    let services = names.iter().map(|n| ("default".to_owned(), (*n).to_owned())).collect();
    Missing { services, unknown: false }
}

#[test]
fn i7_objects_that_cannot_be_read_at_start_keep_what_an_earlier_run_programmed() {
    let mut core = core_with(3);
    core.sync(&node_addresses()).unwrap();
    let state = core.kernel.state;
    // s0 is no object, s1 one that makes no sense, s2 has not changed.
    let mut next = Core::new(FakeKernel::default(), rules());
    next.kernel.state = state.clone();
    next.missing(&missing(&["s0"]));
    let Object::Service(mut bad) = service(1) else { panic!("a Service") };
    bad.spec.as_mut().unwrap().type_ = Some("Nonsense".into());
    next.apply(&Object::Service(bad));
    next.apply(&service(2));
    next.apply(&slice(2, &[4, 5]));
    next.sync(&node_addresses()).unwrap();
    assert_eq!(next.kernel.state, state);
    next.audit(&node_addresses()).unwrap();
    assert_eq!(next.kernel.state, state);
    // One of them is gone after all, the other one makes sense again.
    next.missing(&missing(&[]));
    next.apply(&service(1));
    next.apply(&slice(1, &[2, 3]));
    assert!(next.is_dirty());
    next.sync(&node_addresses()).unwrap();
    assert_eq!((next.kernel.state.frontends.len(), next.kernel.state.backends4.len()), (2, 4));
}

#[test]
fn c7_service_cidr_objects_and_those_of_the_settings_are_programmed() {
    let mut rules = rules();
    rules.service_cidrs = vec!["10.96.0.0/16".parse().unwrap()];
    let mut core = Core::new(FakeKernel::default(), rules);
    core.sync(&node_addresses()).unwrap();
    let object: k8s_openapi::api::networking::v1::ServiceCIDR = serde_json::from_value(json!({
        "metadata": {"name": "more"}, "spec": {"cidrs": ["10.98.0.0/16"]},
    }))
    .unwrap();
    core.apply(&object.into());
    assert!(core.is_dirty());
    let outcome = core.sync(&node_addresses()).unwrap();
    assert!(outcome.ran && !core.is_dirty());
    let nets = |core: &Core<FakeKernel>| -> Vec<String> {
        core.kernel.state.cidrs.values().filter_map(|c| Some(c.net?.to_string())).collect()
    };
    assert_eq!(nets(&core), ["10.96.0.0/16", "10.98.0.0/16"]);
    core.delete(&ObjectRef { kind: Kind::ServiceCidr, namespace: String::new(), name: "more".into() });
    core.sync(&node_addresses()).unwrap();
    assert_eq!(nets(&core), ["10.96.0.0/16"]);
}

/// A run that was killed after its maps were right may not have come to its flows.
#[test]
fn i1_the_first_turn_names_udp_records_even_if_the_maps_are_right() {
    let Object::Service(mut dns) = service(0) else { panic!("a Service") };
    dns.spec.as_mut().unwrap().ports.as_mut().unwrap()[0].protocol = Some("UDP".into());
    let mut core = Core::new(FakeKernel::default(), rules());
    core.apply(&Object::Service(dns.clone()));
    core.sync(&node_addresses()).unwrap();
    let mut next = Core::new(FakeKernel::default(), rules());
    next.kernel.state = core.kernel.state;
    next.apply(&Object::Service(dns));
    let outcome = next.sync(&node_addresses()).unwrap();
    assert!(next.kernel.plans.is_empty(), "{:?}", next.kernel.plans);
    assert_eq!(outcome.retired.iter().map(|r| r.service).collect::<Vec<_>>(), [1]);
}

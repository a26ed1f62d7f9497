//! Objects in, set of backends out: for any Service, slices and Node as the API has them, each frontend and origin gets
//! what a reference says that knows the API's objects, the rules A, B, C and D, and nothing of models, plans or maps.
//! The final choice is that of the data path: `lb_common::select`, on the simulated kernel's records and slots.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use lb_common::select::{Choice, Origin, slot_index};
use proptest::prelude::*;

use super::{
    kernel::Decision,
    objects::{Objects, SERVICE, objects},
    reference::ORIGINS,
    world::*,
};
use crate::{
    model::{Change, SliceKey, convert},
    plan::op::{Family, Frontend, Protocol},
};

/// An endpoint at one of its ports.
#[derive(Clone, Debug)]
struct Pod {
    at: (IpAddr, u16),
    ready: bool,
    serving: bool,
    terminating: bool,
    here: bool,
    zones: Vec<String>,
    nodes: Vec<String>,
}

impl Pod {
    fn is_draining(&self) -> bool {
        !self.ready && self.serving && self.terminating
    }
}

fn is_v4(text: &str) -> bool {
    !text.contains(':')
}

/// Every endpoint of a Service port in one family, each once.
fn pods(port: &core::ServicePort, v4: bool, slices: &[discovery::EndpointSlice]) -> Vec<Pod> {
    let mut pods: Vec<Pod> = Vec::new();
    for slice in slices {
        let labels = slice.metadata.labels.clone().unwrap_or_default();
        // A8, I9.
        let ours = labels.get("kubernetes.io/service-name").is_some_and(|name| name == SERVICE);
        let headless = labels.contains_key("service.kubernetes.io/headless");
        if !ours || headless || slice.address_type != (if v4 { "IPv4" } else { "IPv6" }) {
            continue;
        }
        for slice_port in slice.ports.iter().flatten() {
            let same_name = slice_port.name == Some(port.name.clone().unwrap_or_default());
            let protocol = |p: &Option<String>| p.clone().unwrap_or("TCP".to_owned());
            let number = slice_port.port.unwrap_or(0);
            if !same_name || protocol(&slice_port.protocol) != protocol(&port.protocol) || number == 0 {
                continue;
            }
            for endpoint in &slice.endpoints {
                let Some(address) = endpoint.addresses.first().filter(|a| is_v4(a) == v4) else { continue };
                let pod = pod(endpoint, (ip(address), number as u16));
                // A9.
                match pods.iter_mut().find(|p| p.at == pod.at) {
                    None => pods.push(pod),
                    Some(other) => {
                        let alive = |p: &Pod| (!p.terminating, p.ready, p.serving);
                        if alive(&pod) > alive(other) {
                            *other = pod;
                        }
                    }
                }
            }
        }
    }
    pods
}

fn pod(endpoint: &discovery::Endpoint, at: (IpAddr, u16)) -> Pod {
    // A6.
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    let hints = endpoint.hints.clone().unwrap_or_default();
    Pod {
        at,
        ready: conditions.ready.unwrap_or(true),
        serving: conditions.serving.unwrap_or(true),
        terminating: conditions.terminating.unwrap_or(false),
        // A10.
        here: endpoint.node_name.as_deref() == Some(NODE),
        zones: hints.for_zones.unwrap_or_default().into_iter().map(|z| z.name).collect(),
        nodes: hints.for_nodes.unwrap_or_default().into_iter().map(|n| n.name).collect(),
    }
}

/// A1, A5 and B.
fn cluster_set(pods: &[Pod], zone: Option<&str>) -> Vec<Pod> {
    let ready: Vec<Pod> = pods.iter().filter(|p| p.ready).cloned().collect();
    if ready.is_empty() {
        return pods.iter().filter(|p| p.is_draining()).cloned().collect();
    }
    let for_node = |p: &Pod| p.nodes.iter().any(|n| n == NODE);
    if ready.iter().all(|p| !p.nodes.is_empty()) && ready.iter().any(for_node) {
        return ready.into_iter().filter(for_node).collect();
    }
    let for_zone = |p: &Pod| p.zones.iter().any(|z| Some(z.as_str()) == zone);
    if ready.iter().all(|p| !p.zones.is_empty()) && ready.iter().any(for_zone) {
        return ready.into_iter().filter(for_zone).collect();
    }
    ready
}

/// A2 and B5.
fn local_set(pods: &[Pod]) -> Vec<Pod> {
    let here = |wanted: fn(&Pod) -> bool| -> Vec<Pod> {
        pods.iter().filter(|p| p.here && wanted(p)).cloned().collect()
    };
    let ready = here(|p| p.ready);
    if ready.is_empty() { here(Pod::is_draining) } else { ready }
}

/// C1 to C4.
fn decision(pods: &[Pod], zone: Option<&str>, local: bool) -> Decision {
    let (cluster, here) = (cluster_set(pods, zone), local_set(pods));
    let set = |pods: Vec<Pod>| Decision::To(pods.into_iter().map(|p| p.at).collect::<BTreeSet<_>>());
    match (local, cluster.is_empty(), here.is_empty()) {
        (false, false, _) => set(cluster),
        (true, _, false) => set(here),
        (true, false, true) => Decision::Drop,
        (_, true, _) => Decision::Refuse,
    }
}

/// What new flows from inside and from outside get, for each frontend that there is.
fn expected(objects: &Objects) -> BTreeMap<Frontend, [Decision; 2]> {
    let mut expected = BTreeMap::new();
    let (Some(spec), Some(status)) = (&objects.service.spec, &objects.service.status) else {
        return expected;
    };
    let cluster_ips = spec.cluster_ips.clone().unwrap_or_default();
    let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
    // I9.
    let other = objects.service.metadata.labels.is_some();
    if other || kind == "ExternalName" || cluster_ips == ["None"] {
        return expected;
    }
    let zone = objects.node.as_ref().and_then(|n| n.metadata.labels.as_ref()?.values().next());
    let zone = zone.map(String::as_str).filter(|z| !z.is_empty());
    let inside_only = spec.internal_traffic_policy.as_deref() == Some("Local");
    let outside_only = spec.external_traffic_policy.as_deref() == Some("Local");
    for port in spec.ports.iter().flatten() {
        for cluster_ip in &cluster_ips {
            let v4 = is_v4(cluster_ip);
            let pods = pods(port, v4, &objects.slices);
            let mut add = |addr: &str, number: i32, local: [bool; 2]| {
                if is_v4(addr) == v4 {
                    let frontend = Frontend { addr: ip(addr), port: number as u16, protocol: protocol(port) };
                    expected.insert(frontend, local.map(|local| decision(&pods, zone, local)));
                }
            };
            add(cluster_ip, port.port, [inside_only; 2]);
            // D: pods and the node itself get all endpoints of every other kind (D4, D5).
            let external = [false, outside_only];
            for addr in spec.external_ips.iter().flatten().filter(|a| *a != "8.8.8.8") {
                add(addr, port.port, external);
            }
            let ingress = status.load_balancer.iter().flat_map(|l| l.ingress.iter().flatten());
            // E5.
            for entry in ingress.filter(|e| kind == "LoadBalancer" && e.ip_mode.as_deref() != Some("Proxy")) {
                if let Some(addr) = &entry.ip {
                    add(addr, port.port, external);
                }
            }
            for addr in ["192.0.2.1", "192.0.2.2", "2001:db8::1"] {
                if let Some(number) = port.node_port.filter(|n| *n != 0) {
                    add(addr, number, external);
                }
            }
        }
    }
    expected
}

fn protocol(port: &core::ServicePort) -> Protocol {
    match port.protocol.as_deref() {
        Some("UDP") => Protocol::Udp,
        Some("SCTP") => Protocol::Sctp,
        _ => Protocol::Tcp,
    }
}

/// The world takes these objects in, as the agent does, and forgets all others.
fn apply(world: &mut World, objects: &Objects) {
    let mut changes = vec![Change::Service(convert::service(&objects.service).expect("a Service").object)];
    let names = |n: usize| SliceKey::new("default", &format!("s{n}"));
    changes.extend((0..5).map(|n| Change::DeleteSlice(names(n))));
    let slices = objects.slices.iter().map(|s| convert::slice(s).expect("a slice").object);
    changes.extend(slices.map(Change::Slice));
    changes.push(match &objects.node {
        Some(node) => Change::Node(convert::node(node).expect("a Node").object),
        None => Change::DeleteNode(NODE.into()),
    });
    if objects.node.is_none() {
        world.node.zone = None;
    }
    world.change(changes);
    world.plan_all();
}

/// The backend that `lb_common::select` names for a flow with this hash.
fn chosen(world: &World, frontend: &Frontend, origin: Origin, hash: u32) -> Option<(IpAddr, u16)> {
    let kernel = &world.kernel;
    let value = kernel.frontends.get(frontend)?;
    let Choice::Slots(range) = kernel.services.get(&value.service)?.choose(value.flags, origin) else {
        return None;
    };
    let id = kernel.slots.get(slot_index(range, hash) as usize)?;
    let backends = match Family::of(frontend.addr) {
        Family::V4 => &kernel.backends4,
        Family::V6 => &kernel.backends6,
    };
    backends.get(id).map(|b| (b.addr, b.port))
}

/// Hashes that reach every slot of a set of up to this many.
const HASHES: u32 = 64;

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn any_objects_lead_where_the_rules_say(history in prop::collection::vec(objects(), 1..4)) {
        let mut world = World::new(ROOMY);
        for objects in &history {
            apply(&mut world, objects);
            let expected = expected(objects);
            let found: Vec<_> = world.kernel.frontends.keys().collect();
            prop_assert_eq!(&found, &expected.keys().collect::<Vec<_>>(), "frontends");
            for (frontend, decisions) in &expected {
                for (origin, decision) in ORIGINS.into_iter().zip(decisions) {
                    prop_assert_eq!(&world.kernel.decide(frontend, origin), decision, "{} {:?}", frontend, origin);
                    let picks = (0..HASHES).map(|i| i * (u32::MAX / HASHES));
                    let picked: BTreeSet<_> =
                        picks.filter_map(|hash| chosen(&world, frontend, origin, hash)).collect();
                    let set = match decision {
                        Decision::To(set) => set.clone(),
                        _ => BTreeSet::new(),
                    };
                    prop_assert_eq!(picked, set, "{} {:?}", frontend, origin);
                }
            }
        }
    }
}

/// The generator reaches what the rules are about: otherwise the law above would say little.
#[test]
fn the_objects_are_varied() {
    use proptest::{strategy::ValueTree as _, test_runner::TestRunner};
    let mut runner = TestRunner::deterministic();
    let mut seen: BTreeMap<&str, u32> = BTreeMap::new();
    for _ in 0..500 {
        let objects = objects().new_tree(&mut runner).expect("objects").current();
        for decisions in expected(&objects).values() {
            let [inside, outside] = decisions;
            for decision in decisions {
                let kind = match decision {
                    Decision::Pass => "pass",
                    Decision::Refuse => "refuse",
                    Decision::Drop => "drop",
                    Decision::To(set) if set.len() > 1 => "several",
                    Decision::To(_) => "one",
                };
                *seen.entry(kind).or_default() += 1;
            }
            *seen.entry("origins differ").or_default() += u32::from(inside != outside);
        }
        let ports = objects.service.spec.iter().flat_map(|s| s.ports.iter().flatten());
        for pods in ports.map(|port| pods(port, true, &objects.slices)) {
            let all: BTreeSet<_> = pods.iter().filter(|p| p.ready).map(|p| p.at).collect();
            let chosen: BTreeSet<_> = cluster_set(&pods, Some("zone-a")).iter().map(|p| p.at).collect();
            *seen.entry("hints filter").or_default() += u32::from(chosen.is_subset(&all) && chosen != all);
            *seen.entry("fall back").or_default() += u32::from(all.is_empty() && !chosen.is_empty());
            let numbers: BTreeSet<u16> = all.iter().map(|(_, port)| *port).collect();
            *seen.entry("ports differ").or_default() += u32::from(numbers.len() > 1);
        }
    }
    for kind in
        ["refuse", "drop", "several", "one", "origins differ", "hints filter", "fall back", "ports differ"]
    {
        assert!(seen.get(kind).is_some_and(|n| *n >= 20), "{kind}: {seen:?}");
    }
}

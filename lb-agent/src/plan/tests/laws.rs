//! What holds after any history: right for every frontend, nothing to do twice, nothing lost, nothing leaked. Every
//! plan along the way is also carried out operation by operation (see [`World::change`]).

use ipnet::IpNet;
use proptest::{
    collection::{btree_set, vec},
    option,
    prelude::*,
    sample::select,
};

use super::world::*;
use crate::{
    model::{
        AddressType, Change, Conditions, Endpoint, EndpointSlice, ExternalPolicy, Hints, InternalPolicy,
        Service, ServiceCidr, ServiceKey, ServicePort, ServiceType, SliceKey, SlicePort,
    },
    plan::{
        Capacities, Rejection,
        op::{Family, Protocol},
    },
};

const SERVICES: [&str; 5] = ["a", "b", "c", "d", "e"];
const SLICES: [&str; 7] = ["s1", "s2", "s3", "s4", "s5", "s6", "s7"];
const CIDRS: [&str; 2] = ["kubernetes", "more"];
const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

fn endpoint(family: Family) -> impl Strategy<Value = Endpoint> {
    let names = |list: &'static [&'static str]| vec(select(list), 0..2);
    let hints = option::of((names(&["zone-a", "zone-b"]), names(&[NODE, "node-b"])));
    let node = option::of(select(&[NODE, "node-b"]));
    (1u8..7, any::<[bool; 3]>(), node, hints).prop_map(
        move |(host, [ready, serving, terminating], node, hints)| {
            let addr = match family {
                Family::V4 => ip(&format!("10.0.0.{host}")),
                Family::V6 => ip(&format!("2001:db8:1::{host}")),
            };
            let shared = |names: Vec<&str>| names.into_iter().map(Into::into).collect();
            Endpoint {
                addr,
                conditions: Conditions { ready, serving, terminating },
                node: node.map(Into::into),
                hints: hints
                    .map(|(zones, nodes)| Box::new(Hints { zones: shared(zones), nodes: shared(nodes) })),
            }
        },
    )
}

fn endpoint_slice() -> impl Strategy<Value = EndpointSlice> {
    let slice_port = (select(&["", "p", "q"]), select(&PROTOCOLS), 8080u16..8083);
    let ports = vec(slice_port, 1..4);
    let service = option::weighted(0.9, select(&SERVICES));
    let family = prop_oneof![3 => Just(Family::V4), 1 => Just(Family::V6)];
    let endpoints = family.prop_flat_map(|family| (Just(family), vec(endpoint(family), 0..5)));
    (select(&SLICES), service, ports, endpoints).prop_map(|(name, service, ports, (family, endpoints))| {
        let port = |(name, protocol, port): (&str, _, _)| SlicePort { name: name.into(), protocol, port };
        EndpointSlice {
            key: SliceKey::new("default", name),
            service: service.map(Into::into),
            address_type: AddressType::Ip(family),
            ports: ports.into_iter().map(port).collect(),
            endpoints: endpoints.into(),
        }
    })
}

fn some_service() -> impl Strategy<Value = Service> {
    let kind = prop_oneof![
        6 => select(&[ServiceType::ClusterIp, ServiceType::NodePort, ServiceType::LoadBalancer][..]),
        1 => Just(ServiceType::ExternalName),
    ];
    let flags = (prop::bool::weighted(0.05), prop::bool::weighted(0.05), any::<[bool; 4]>());
    let addresses = (1u8..4, vec(1u8..20, 0..2), vec(1u8..3, 0..2));
    let affinity = option::of(1u32..3);
    let unnamed = select(&PROTOCOLS).prop_map(|p| vec![port("", p, 80, 30080)]);
    let named = (select(&PROTOCOLS), select(&PROTOCOLS), select(&[0u16, 30081]))
        .prop_map(|(p, q, node_port)| vec![port("p", p, 80, 30080), port("q", q, 443, node_port)]);
    let ports = prop_oneof![unnamed, named];
    let ranges = (affinity, source_ranges());
    (select(&SERVICES), kind, flags, addresses, ranges, ports).prop_map(
        |(
            name,
            kind,
            (headless, foreign, flags),
            (vip, external, load_balancer),
            (affinity_timeout_s, source_ranges),
            ports,
        )| {
            let [external_local, internal_local, dual, v6_only] = flags;
            let (four, six) = (format!("10.96.0.{vip}"), format!("2001:db8:96::{vip}"));
            let ips: &[&str] = match (dual, v6_only) {
                (true, _) => &[&four, &six],
                (false, true) => &[&six],
                (false, false) => &[&four],
            };
            let is_external = matches!(kind, ServiceType::NodePort | ServiceType::LoadBalancer);
            let node_port =
                |p: ServicePort| ServicePort { node_port: if is_external { p.node_port } else { 0 }, ..p };
            let addresses =
                |net: &str, hosts: Vec<u8>| hosts.iter().map(|h| ip(&format!("{net}.{h}"))).collect();
            Service {
                kind,
                headless,
                external_ips: addresses("203.0.113", external),
                load_balancer_ips: addresses("198.51.100", load_balancer),
                source_ranges,
                internal_policy: if internal_local { InternalPolicy::Local } else { InternalPolicy::Cluster },
                external_policy: if external_local { ExternalPolicy::Local } else { ExternalPolicy::Cluster },
                affinity_timeout_s,
                proxy_name: foreign.then(|| "other".into()),
                ports: ports.into_iter().map(node_port).collect(),
                ..service(name, ips)
            }
        },
    )
}

fn service_cidr() -> impl Strategy<Value = ServiceCidr> {
    let cidrs = select(&["10.96.0.0/16", "10.97.0.0/16", "10.96.0.0/12", "2001:db8:96::/112"]);
    (select(&CIDRS), vec(cidrs, 0..3)).prop_map(|(name, cidrs)| ServiceCidr {
        name: name.into(),
        cidrs: cidrs.iter().map(|c| c.parse().expect("a prefix")).collect(),
    })
}

/// None, or some of few, so that they meet each other and the node's own addresses.
fn source_ranges() -> impl Strategy<Value = Option<Vec<IpNet>>> {
    const RANGES: [&str; 6] =
        ["10.1.0.0/16", "10.2.0.0/16", "10.0.0.0/8", "192.0.2.0/24", "0.0.0.0/0", "2001:db8::/32"];
    option::of(btree_set(select(&RANGES), 0..4))
        .prop_map(|set| Some(set?.iter().map(|r| r.parse().expect("a prefix")).collect()))
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => some_service().prop_map(Change::Service),
        8 => endpoint_slice().prop_map(Change::Slice),
        1 => select(&SERVICES).prop_map(|n| Change::DeleteService(ServiceKey::new("default", n))),
        1 => select(&SLICES).prop_map(|n| Change::DeleteSlice(SliceKey::new("default", n))),
        1 => option::of(select(&["zone-a", "zone-b"])).prop_map(node),
        1 => service_cidr().prop_map(Change::ServiceCidr),
        1 => select(&CIDRS).prop_map(|n| Change::DeleteServiceCidr(n.into())),
    ]
}

#[derive(Clone, Debug)]
enum Step {
    /// What arrives between two plans.
    Change(Vec<Change>),
    /// Changes arrive while no agent runs.
    Restart(Vec<Change>),
}

fn history() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => vec(change(), 1..4).prop_map(Step::Change),
        1 => vec(change(), 0..3).prop_map(Step::Restart),
    ];
    vec(step, 1..25)
}

/// With NodePorts on loopback.
fn world(capacities: Capacities) -> World {
    let mut world = World::new(capacities);
    world.node.loopback_addresses = [ip("127.0.0.1"), ip("::1")].into();
    world
}

fn run(world: &mut World, step: Step) {
    match step {
        Step::Change(changes) => {
            world.change(changes);
        }
        Step::Restart(changes) => {
            world.restart();
            for change in changes {
                if let Change::Node(node) = &change {
                    world.node.zone = node.zone.clone();
                }
                let _ = world.model.apply(change);
            }
            // The first plan after a restart is one of everything, whoever asks.
            world.change([]);
        }
    }
}

/// Everything goes; then everything must be free.
fn assert_nothing_leaks(world: &mut World) {
    world.change(SERVICES.map(|name| Change::DeleteService(ServiceKey::new("default", name))));
    world.change(CIDRS.map(|name| Change::DeleteServiceCidr(name.into())));
    let planner = &world.planner;
    assert_eq!(planner.record_ids.used(), 0);
    assert_eq!((planner.backends4.used(), planner.backends6.used()), (0, 0));
    assert_eq!(planner.slots.free(), (planner.capacities.slots, 1));
    assert_eq!((planner.frontends.used(), planner.members_in_kernel), (0, 0));
    assert_eq!((planner.addresses.used(), planner.room.used(), planner.range_room.used()), (0, 0, 0));
    assert_eq!(planner.cidrs.used(), 0);
    assert!(planner.holdings.is_empty() && planner.inherited.is_empty());
    assert!(planner.records.is_empty() && planner.by_name.is_empty());
    assert!(planner.rejected.is_empty());
    let kernel = &world.kernel;
    assert!(kernel.frontends.is_empty() && kernel.services.is_empty() && kernel.names.is_empty());
    assert!(kernel.backends4.is_empty() && kernel.backends6.is_empty() && kernel.members.is_empty());
    assert!(kernel.addresses.is_empty() && kernel.ranges.is_empty() && kernel.active_cidrs().is_empty());
}

proptest! {
    #[test]
    fn any_history_ends_in_what_the_rules_say(history in history()) {
        let mut world = world(ROOMY);
        for step in history {
            run(&mut world, step);
            world.assert_right();
            prop_assert_eq!(world.plan_all().ops, [], "a second plan");
        }
        // Rejections do not depend on the way here.
        let mut fresh = World::new(ROOMY);
        std::mem::swap(&mut fresh.model, &mut world.model);
        std::mem::swap(&mut fresh.node, &mut world.node);
        fresh.plan_all();
        prop_assert_eq!(fresh.taken(), world.taken());
        std::mem::swap(&mut fresh.model, &mut world.model);
        world.restart();
        std::mem::swap(&mut fresh.node, &mut world.node);
        prop_assert_eq!(world.plan_all().ops, [], "a plan after a restart");
        assert_nothing_leaks(&mut world);
    }

    /// Equal input, equal output.
    #[test]
    fn plans_are_reproducible(history in history()) {
        let (mut a, mut b) = (world(ROOMY), world(ROOMY));
        for step in history {
            run(&mut a, step.clone());
            run(&mut b, step);
            prop_assert_eq!(&a.kernel, &b.kernel);
        }
    }

    /// Where there is too little room, those who have all they want get what the rules say, the others something whole
    /// (checked operation by operation), and nothing is lost.
    #[test]
    fn maps_that_are_too_small_harm_nobody_else(
        history in history(),
        frontends in 2u32..24,
        services in 2u32..8,
        slots in 1u32..30,
        backends in 2u32..10,
        members in 0u32..10,
        source_ranges in 0u32..5,
    ) {
        let capacities = Capacities { frontends, services, slots, backends, members, source_ranges };
        let mut world = world(capacities);
        for step in history {
            run(&mut world, step);
            while world.planner.retry && world.planner.starved().next().is_some() {
                world.change([]);
            }
            assert_satisfied_ones_are_right(&world);
        }
        assert_nothing_leaks(&mut world);
    }
}

fn assert_satisfied_ones_are_right(world: &World) {
    let rejections = world.taken();
    let waiting = |key: &ServiceKey| {
        rejections.iter().any(|r| matches!(r, Rejection::Full { service, .. } if service == key))
    };
    let answers = super::reference::answers(&world.model, &world.node);
    for (frontend, value) in &world.kernel.frontends {
        let record = &world.planner.records[&value.service];
        if waiting(&record.owner) {
            continue;
        }
        for (i, origin) in super::reference::ORIGINS.into_iter().enumerate() {
            let seen = world.kernel.decide(frontend, origin);
            // Whoever has it for lack of room for the first one to claim it, has it rightly.
            let first_waits = rejections.iter().any(|r| matches!(r, Rejection::Full { .. }));
            assert!(first_waits || answers[frontend][i] == seen, "{frontend}: {seen:?}");
        }
    }
    if rejections.iter().all(|r| !matches!(r, Rejection::Full { .. })) {
        world.assert_right();
    }
}

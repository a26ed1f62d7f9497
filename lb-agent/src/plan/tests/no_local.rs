//! Rule C8: what is counted, and that the count follows every change.

use super::world::*;
use crate::{
    model::{
        Change::{self, DeleteService, DeleteSlice},
        Endpoint, ExternalPolicy, InternalPolicy, Service, ServiceKey, ServiceType, SliceKey,
    },
    plan::{
        no_local::{ByPolicy, NoLocalEndpoints},
        op::{Family, Protocol},
    },
};

/// Internal and external, IPv4 then IPv6.
fn counts(world: &World) -> [u32; 4] {
    let NoLocalEndpoints { v4, v6 } = world.planner.no_local_endpoints();
    [v4.internal, v4.external, v6.internal, v6.external]
}

fn local(kind: ServiceType, internal: InternalPolicy, external: ExternalPolicy) -> Service {
    Service { kind, internal_policy: internal, external_policy: external, ..service("web", &["10.96.0.1"]) }
}

fn both() -> Service {
    local(ServiceType::NodePort, InternalPolicy::Local, ExternalPolicy::Local)
}

fn world(service: Service, endpoints: &[Endpoint]) -> World {
    World::with([Change::Service(service), Change::Slice(slice("web-1", "web", endpoints))])
}

#[test]
fn c8_counts_by_policy_what_has_endpoints_but_none_here() {
    use ServiceType::{ClusterIp, LoadBalancer, NodePort};
    let remote = [ready("10.0.0.1")];
    for (kind, internal, external, expected) in [
        (NodePort, InternalPolicy::Cluster, ExternalPolicy::Cluster, [0, 0]),
        (NodePort, InternalPolicy::Local, ExternalPolicy::Cluster, [1, 0]),
        (NodePort, InternalPolicy::Cluster, ExternalPolicy::Local, [0, 1]),
        (LoadBalancer, InternalPolicy::Local, ExternalPolicy::Local, [1, 1]),
        // Nothing from outside gets to it.
        (ClusterIp, InternalPolicy::Local, ExternalPolicy::Local, [1, 0]),
    ] {
        let world = world(local(kind, internal, external), &remote);
        assert_eq!(counts(&world)[..2], expected, "{kind:?} {internal:?} {external:?}");
    }
    let external_ip = Service {
        kind: ClusterIp,
        external_ips: vec![ip("203.0.113.1")],
        ..local(ClusterIp, InternalPolicy::Cluster, ExternalPolicy::Local)
    };
    assert_eq!(counts(&world(external_ip, &remote)), [0, 1, 0, 0]);
}

#[test]
fn c8_does_not_count_where_nobody_serves_anywhere_or_somebody_here() {
    for (endpoints, expected) in [
        // Rejected, not dropped (C4).
        (vec![], 0),
        (vec![unready("10.0.0.1")], 0),
        (vec![ready("10.0.0.1").here()], 0),
        (vec![ready("10.0.0.1"), terminating("10.0.0.2").here()], 0),
        (vec![terminating("10.0.0.1")], 1),
        (vec![ready("10.0.0.1"), unready("10.0.0.2").here()], 1),
        // Hints to other zones leave nobody out of the count.
        (vec![ready("10.0.0.1").hinted(&["zone-b"], &[])], 1),
    ] {
        assert_eq!(counts(&world(both(), &endpoints)), [expected, expected, 0, 0], "{endpoints:?}");
    }
}

#[test]
fn c8_counts_ports_and_families_by_themselves() {
    let dual = Service {
        cluster_ips: vec![ip("10.96.0.1"), ip("fd00::1")],
        ports: vec![port("", Protocol::Tcp, 80, 30080), port("other", Protocol::Tcp, 81, 30081)],
        ..both()
    };
    let mut world = world(dual, &[ready("10.0.0.1")]);
    // Port "other" has no endpoint, IPv6 neither.
    assert_eq!(counts(&world), [1, 1, 0, 0]);
    world.change([Change::Slice(slice("web-6", "web", &[ready("fd00::9")]))]);
    assert_eq!(counts(&world), [1, 1, 1, 1]);
}

/// Every change of a long history, against a count that walks over everything.
#[test]
fn c8_count_follows_every_change() {
    let mut world = World::new(ROOMY);
    let mut seed = 1_u32;
    let mut random = |n: u32| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 16) % n
    };
    let mut seen = std::collections::BTreeSet::new();
    for step in 0..400 {
        let name = format!("s{}", random(6));
        let change = match random(12) {
            0 => DeleteService(ServiceKey::new("default", &name)),
            1 => DeleteSlice(SliceKey::new("default", &format!("{name}-1"))),
            2..=6 => {
                let internal = [InternalPolicy::Cluster, InternalPolicy::Local][random(2) as usize];
                let external = [ExternalPolicy::Cluster, ExternalPolicy::Local][random(2) as usize];
                let kind = [ServiceType::ClusterIp, ServiceType::NodePort][random(2) as usize];
                let address = format!("10.96.0.{}", name.as_bytes()[1]);
                let base = service(&name, &[&address]);
                Change::Service(Service {
                    kind,
                    internal_policy: internal,
                    external_policy: external,
                    headless: random(8) == 0,
                    ..base
                })
            }
            _ => {
                let endpoints: Vec<_> = (0..random(4))
                    .map(|i| {
                        let make = [ready, terminating, unready][random(3) as usize];
                        let endpoint = make(&format!("10.0.{}.{i}", name.as_bytes()[1]));
                        if random(5) == 0 { endpoint.here() } else { endpoint }
                    })
                    .collect();
                Change::Slice(slice(&format!("{name}-1"), &name, &endpoints))
            }
        };
        world.change([change]);
        if random(20) == 0 {
            world.plan_all();
        }
        let expected = walked(&world);
        assert_eq!(world.planner.no_local_endpoints(), expected, "step {step}");
        seen.insert((expected.v4.internal, expected.v4.external));
    }
    assert!(seen.len() > 6, "the history does not try much: {seen:?}");
}

/// The rule word by word, for Services with one TCP port and IPv4 alone.
fn walked(world: &World) -> NoLocalEndpoints {
    let mut v4 = ByPolicy::default();
    for (key, service) in world.model.services().filter(|(_, s)| !s.headless) {
        assert!(service.cluster_ip(Family::V6).is_none());
        let usable = |e: &Endpoint| e.conditions.ready || (e.conditions.serving && e.conditions.terminating);
        let endpoints: Vec<_> =
            world.model.slices(key).into_iter().flat_map(|s| s.endpoints).filter(usable).collect();
        let is_here = endpoints.iter().any(|e| e.node.as_deref() == Some(NODE));
        if endpoints.is_empty() || is_here {
            continue;
        }
        v4.internal += u32::from(service.internal_policy == InternalPolicy::Local);
        let node_ports = service.kind == ServiceType::NodePort;
        v4.external += u32::from(service.external_policy == ExternalPolicy::Local && node_ports);
    }
    NoLocalEndpoints { v4, v6: ByPolicy::default() }
}

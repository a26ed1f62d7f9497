//! The rules of Services one by one, named as in kube-proxy's own tests. What flows get is asked of the simulated
//! kernel, so each test covers everything from the model to the maps.

use lb_common::frontend::flags;

use super::world::*;
use crate::{
    model::{
        Change::{self, DeleteService, DeleteSlice},
        Conditions, Endpoint, EndpointSlice, ExternalPolicy, InternalPolicy, Service, ServiceKey,
        ServiceType, SliceKey, SlicePort,
    },
    plan::{Rejection, op::Protocol},
};

const VIP: &str = "10.96.0.1:80";

/// One Service at [`VIP`] with these endpoints in one slice.
fn one(endpoints: &[Endpoint]) -> World {
    with(service("web", &["10.96.0.1"]), endpoints)
}

#[test]
fn a1_cluster_set_is_the_ready_ones() {
    let world = one(&[ready("10.0.0.1"), terminating("10.0.0.2"), unready("10.0.0.3")]);
    assert_eq!(world.both(VIP), "10.0.0.1:8080");
}

#[test]
fn a1_cluster_set_falls_back_to_serving_terminating_without_topology() {
    let hinted = |e: Endpoint, zone| e.hinted(&[zone], &[]);
    let world = one(&[
        hinted(terminating("10.0.0.1"), "zone-a"),
        hinted(terminating("10.0.0.2"), "zone-b"),
        unready("10.0.0.3"),
    ]);
    assert_eq!(world.both(VIP), "10.0.0.1:8080 10.0.0.2:8080");
}

#[test]
fn a2_local_set_falls_back_by_itself() {
    let world = with(external_local(), &[terminating("10.0.0.1").here(), ready("10.0.0.2")]);
    for frontend in EXTERNAL {
        assert_eq!(world.ask(frontend), ["10.0.0.2:8080", "10.0.0.1:8080"], "{frontend}");
    }
}

#[test]
fn a3_pods_use_remote_ready_ones_while_outside_traffic_drains_the_local_ones() {
    let world = with(external_local(), &[terminating("10.0.0.1").here(), ready("10.0.0.2")]);
    assert_eq!(world.both(VIP), "10.0.0.2:8080");
    assert_eq!(world.ask(EXTERNAL[2])[1], "10.0.0.1:8080");
}

#[test]
fn a4_local_terminating_gets_nothing_new_beside_a_local_ready_one() {
    let world = with(external_local(), &[terminating("10.0.0.1").here(), ready("10.0.0.2").here()]);
    assert_eq!(world.ask(EXTERNAL[0])[1], "10.0.0.2:8080");
}

#[test]
fn a5_terminating_and_not_serving_is_as_good_as_none() {
    let dead = Conditions { ready: false, serving: false, terminating: true };
    let world = with(external_local(), &[Endpoint { conditions: dead, ..ready("10.0.0.1").here() }]);
    assert_eq!(world.both(VIP), "refuse");
    for frontend in EXTERNAL {
        assert_eq!(world.both(frontend), "refuse", "{frontend}");
    }
}

#[test]
fn a7_ready_counts_whatever_terminating_says() {
    let published = Conditions { ready: true, serving: true, terminating: true };
    let world = one(&[Endpoint { conditions: published, ..ready("10.0.0.1") }, terminating("10.0.0.2")]);
    assert_eq!(world.both(VIP), "10.0.0.1:8080");
}

#[test]
fn a8_other_slices_do_not_count() {
    let mut world = one(&[ready("10.0.0.1")]);
    let nobodys = EndpointSlice { service: None, ..slice("nobody", "web", &[ready("10.0.0.2")]) };
    let v6 = slice("v6", "web", &[ready("2001:db8::2")]);
    let other_port = EndpointSlice {
        ports: [SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: 1 }].into(),
        ..slice("port", "web", &[ready("10.0.0.3")])
    };
    let other_protocol = EndpointSlice {
        ports: [SlicePort { name: "".into(), protocol: Protocol::Udp, port: 1 }].into(),
        ..slice("protocol", "web", &[ready("10.0.0.4")])
    };
    for slice in [nobodys, v6, other_port, other_protocol] {
        assert_eq!(world.change([Change::Slice(slice)]).ops, []);
    }
    assert_eq!(world.both(VIP), "10.0.0.1:8080");
}

#[test]
fn a9_the_living_copy_wins_in_either_order() {
    for (first, second) in [("a", "b"), ("b", "a")] {
        let world = World::with([
            Change::Service(external_local()),
            Change::Slice(slice(first, "web", &[ready("10.0.0.1").here()])),
            Change::Slice(slice(
                second,
                "web",
                &[terminating("10.0.0.1").here(), terminating("10.0.0.2").here()],
            )),
        ]);
        assert_eq!(world.both(VIP), "10.0.0.1:8080");
        assert_eq!(world.ask(EXTERNAL[0])[1], "10.0.0.1:8080");
        world.assert_right();
    }
}

/// kube-proxy 1.36 (#135593): also where the terminating one is published as ready, and the other is not.
#[test]
fn a9_a_copy_that_is_not_terminating_wins_over_one_that_is_published() {
    let published = Conditions { ready: true, serving: true, terminating: true };
    let mut world = one(&[Endpoint { conditions: published, ..ready("10.0.0.1") }, ready("10.0.0.2")]);
    assert_eq!(world.both(VIP), "10.0.0.1:8080 10.0.0.2:8080");
    world.change([Change::Slice(slice("t", "web", &[unready("10.0.0.1")]))]);
    assert_eq!(world.both(VIP), "10.0.0.2:8080");
    world.assert_right();
}

#[test]
fn a10_local_is_what_the_node_name_says() {
    let nowhere = Endpoint { node: None, ..ready("10.0.0.1") };
    let world = with(external_local(), &[nowhere, ready("10.0.0.2").here(), ready("10.0.0.3")]);
    assert_eq!(world.ask(EXTERNAL[0])[1], "10.0.0.2:8080");
    let is_local = |b: &crate::plan::op::Backend| b.local;
    let local: Vec<_> = world.kernel.backends4.values().filter(|b| is_local(b)).map(|b| b.addr).collect();
    assert_eq!(local, [ip("10.0.0.2")]);
}

#[test]
fn a11_a_named_target_port_may_differ_between_slices() {
    let other = EndpointSlice {
        ports: [SlicePort { name: "".into(), protocol: Protocol::Tcp, port: 9090 }].into(),
        ..slice("t", "web", &[ready("10.0.0.2")])
    };
    let mut world = one(&[ready("10.0.0.1")]);
    world.change([Change::Slice(other)]);
    assert_eq!(world.both(VIP), "10.0.0.1:8080 10.0.0.2:9090");
    world.assert_right();
}

#[test]
fn b1_same_node_needs_every_ready_endpoint_hinted_and_one_for_this_node() {
    let (here, there) = (["zone-a"], ["zone-b"]);
    let a = ready("10.0.0.1").hinted(&here, &[NODE]);
    let b = ready("10.0.0.2").hinted(&here, &["node-b"]);
    let c = ready("10.0.0.3").hinted(&there, &["node-c"]);
    assert_eq!(one(&[a.clone(), b.clone(), c.clone()]).both(VIP), "10.0.0.1:8080");
    // Not ready ones do not count, neither way.
    assert_eq!(one(&[a, b.clone(), c.clone(), unready("10.0.0.4")]).both(VIP), "10.0.0.1:8080");
    assert_eq!(one(&[b, c]).both(VIP), "10.0.0.2:8080", "no hint for this node: the zone decides");
}

#[test]
fn b2_same_zone_if_node_hints_do_not_apply() {
    let a = ready("10.0.0.1").hinted(&["zone-a"], &[NODE]);
    let b = ready("10.0.0.2").hinted(&["zone-a", "zone-c"], &[]);
    let c = ready("10.0.0.3").hinted(&["zone-b"], &["node-c"]);
    assert_eq!(one(&[a, b, c]).both(VIP), "10.0.0.1:8080 10.0.0.2:8080");
}

#[test]
fn b3_one_ready_endpoint_without_a_hint_turns_hints_off() {
    let a = ready("10.0.0.1").hinted(&["zone-a"], &[NODE]);
    let world = one(&[a.clone(), ready("10.0.0.2")]);
    assert_eq!(world.both(VIP), "10.0.0.1:8080 10.0.0.2:8080");
    let elsewhere = ready("10.0.0.2").hinted(&["zone-b"], &[]);
    assert_eq!(one(&[elsewhere]).both(VIP), "10.0.0.2:8080", "no endpoint for this zone");
}

#[test]
fn b4_the_nodes_zone_is_followed() {
    let mut world =
        one(&[ready("10.0.0.1").hinted(&["zone-a"], &[]), ready("10.0.0.2").hinted(&["zone-b"], &[])]);
    assert_eq!(world.both(VIP), "10.0.0.1:8080");
    world.change([node(Some("zone-b"))]);
    assert_eq!(world.both(VIP), "10.0.0.2:8080");
    world.change([node(None)]);
    assert_eq!(world.both(VIP), "10.0.0.1:8080 10.0.0.2:8080");
    world.assert_right();
}

#[test]
fn b5_hints_never_filter_the_local_set() {
    let local = Service { internal_policy: InternalPolicy::Local, ..external_local() };
    let world = with(
        local,
        &[ready("10.0.0.1").here().hinted(&["zone-b"], &[]), ready("10.0.0.2").hinted(&["zone-a"], &[])],
    );
    assert_eq!(world.both(VIP), "10.0.0.1:8080");
    assert_eq!(world.ask(EXTERNAL[0]), ["10.0.0.2:8080", "10.0.0.1:8080"]);
}

#[test]
fn b7_traffic_moves_from_the_node_to_the_zone_to_anywhere() {
    let (a, b, c) = (
        ready("10.0.0.1").hinted(&["zone-a"], &[NODE]),
        ready("10.0.0.2").hinted(&["zone-a"], &["node-b"]),
        ready("10.0.0.3").hinted(&["zone-b"], &["node-c"]),
    );
    let mut world = one(&[a, b.clone(), c.clone()]);
    for (endpoints, expected) in
        [(vec![b, c.clone()], "10.0.0.2:8080"), (vec![c], "10.0.0.3:8080"), (vec![], "refuse")]
    {
        world.change([Change::Slice(slice("s", "web", &endpoints))]);
        assert_eq!(world.both(VIP), expected);
    }
}

#[test]
fn c2_c3_c4_without_local_endpoints_local_policies_drop_and_without_any_refuse() {
    let both_local = Service { internal_policy: InternalPolicy::Local, ..external_local() };
    let mut world = with(both_local, &[ready("10.0.0.1")]);
    assert_eq!(world.both(VIP), "drop");
    assert_eq!(world.ask(EXTERNAL[0]), ["10.0.0.1:8080", "drop"]);
    world.change([DeleteSlice(SliceKey::new("default", "s"))]);
    assert_eq!(world.both(VIP), "refuse");
    assert_eq!(world.both(EXTERNAL[0]), "refuse");
}

#[test]
fn d4_internal_policy_is_for_cluster_ips_alone() {
    let service = Service {
        internal_policy: InternalPolicy::Local,
        external_policy: ExternalPolicy::Cluster,
        ..external_local()
    };
    let world = with(service, &[ready("10.0.0.1"), ready("10.0.0.2").here()]);
    assert_eq!(world.both(VIP), "10.0.0.2:8080");
    for frontend in EXTERNAL {
        assert_eq!(world.both(frontend), "10.0.0.1:8080 10.0.0.2:8080", "{frontend}");
    }
}

#[test]
fn e6_a_load_balancer_without_node_ports_has_its_ip_alone() {
    let service = Service { ports: vec![port("", Protocol::Tcp, 80, 0)], ..external_local() };
    let world = with(service, &[ready("10.0.0.1").here()]);
    assert_eq!(world.both("198.51.100.1:80"), "10.0.0.1:8080");
    assert_eq!(world.kernel.frontends.len(), 3);
}

#[test]
fn f6_one_node_port_number_serves_tcp_and_udp() {
    let ports = vec![port("t", Protocol::Tcp, 53, 30053), port("u", Protocol::Udp, 53, 30053)];
    let mut world = World::with([Change::Service(Service {
        kind: ServiceType::NodePort,
        ports,
        ..service("dns", &["10.96.0.10"])
    })]);
    let tcp = SlicePort { name: "t".into(), protocol: Protocol::Tcp, port: 5353 };
    let udp = SlicePort { name: "u".into(), protocol: Protocol::Udp, port: 5354 };
    let slice = EndpointSlice { ports: [tcp, udp].into(), ..slice("s", "dns", &[ready("10.0.0.1")]) };
    world.change([Change::Slice(slice)]);
    assert_eq!(world.both("192.0.2.1:30053"), "10.0.0.1:5353");
    assert_eq!(world.both("udp 192.0.2.1:30053"), "10.0.0.1:5354");
    world.assert_right();
}

#[test]
fn g5_affinity_is_in_flags_record_and_members_and_goes_again() {
    let mut world = with(external_local(), &[ready("10.0.0.1"), ready("10.0.0.2").here()]);
    world.change([Change::Service(Service { affinity_timeout_s: Some(60), ..external_local() })]);
    assert!(world.kernel.frontends.values().all(|v| v.flags & flags::AFFINITY != 0));
    assert_eq!(world.kernel.members.values().copied().collect::<Vec<_>>(), [1, 3]);
    let plan = world.change([Change::Service(Service { affinity_timeout_s: Some(61), ..external_local() })]);
    assert!(matches!(plan.ops[..], [crate::plan::MapOp::WriteService { .. }]), "{plan:?}");
    world.change([Change::Service(external_local())]);
    assert!(world.kernel.frontends.values().all(|v| v.flags & flags::AFFINITY == 0));
    assert!(world.kernel.members.is_empty());
    world.kernel.assert_consistent();
}

#[test]
fn i1_udp_flows_to_backends_that_do_not_serve_any_more_are_reported() {
    let udp = |endpoints: &[Endpoint]| EndpointSlice {
        ports: [SlicePort { name: "".into(), protocol: Protocol::Udp, port: 53 }].into(),
        ..slice("s", "dns", endpoints)
    };
    let mut dns = service("dns", &["10.96.0.10"]);
    dns.ports = vec![port("", Protocol::Udp, 53, 0)];
    let mut world = World::with([Change::Service(dns), Change::Slice(udp(&[ready("10.0.0.1")]))]);
    let serving = |plan: &crate::plan::Plan| -> Vec<Vec<String>> {
        plan.retired.iter().map(|r| r.serving.iter().map(|(ip, _)| ip.to_string()).collect()).collect()
    };
    // Terminating but serving ones keep their flows.
    let plan = world.change([Change::Slice(udp(&[terminating("10.0.0.1"), ready("10.0.0.2")]))]);
    assert_eq!(serving(&plan), [["10.0.0.1", "10.0.0.2"]]);
    // I2: N to 0 and back.
    let plan = world.change([Change::Slice(udp(&[]))]);
    assert_eq!(serving(&plan), [[""; 0]]);
    let plan = world.change([Change::Slice(udp(&[ready("10.0.0.2")]))]);
    assert_eq!(serving(&plan), [["10.0.0.2"]]);
    let plan = world.change([Change::DeleteService(ServiceKey::new("default", "dns"))]);
    assert_eq!(serving(&plan), [[""; 0]]);
}

#[test]
fn j2_backends_that_no_slice_names_are_reported_and_terminating_ones_are_not() {
    let mut world = with(service("web", &["10.96.0.1"]), &[ready("10.0.0.1"), ready("10.0.0.2")]);
    let report = |plan: &crate::plan::Plan| -> Vec<(String, bool)> {
        let name = |r: &crate::plan::Retired| r.serving.iter().map(|(ip, _)| format!("{ip} ")).collect();
        plan.retired.iter().map(|r| (name(r), r.lost)).collect()
    };
    let slice = |endpoints: &[Endpoint]| Change::Slice(slice("s", "web", endpoints));
    // Whatever its conditions: it is there, so its connections are its own business.
    let plan = world.change([slice(&[terminating("10.0.0.1"), ready("10.0.0.2")])]);
    assert_eq!(report(&plan), []);
    assert!(!plan.ops.is_empty());
    let plan = world.change([slice(&[unready("10.0.0.1"), ready("10.0.0.2")])]);
    assert_eq!(report(&plan), []);
    // It leaves no trace in the maps by then.
    let plan = world.change([slice(&[ready("10.0.0.2")])]);
    assert_eq!((report(&plan), plan.ops.len()), (vec![("10.0.0.2 ".into(), true)], 0));
    assert_eq!(plan.retired[0].frontends, [frontend("10.96.0.1:80")]);
    // One that comes back must not be taken for gone.
    let plan = world.change([slice(&[ready("10.0.0.1"), ready("10.0.0.2")])]);
    assert_eq!(report(&plan), [("10.0.0.1 10.0.0.2 ".into(), false)]);
    let plan = world.change([Change::DeleteService(ServiceKey::new("default", "web"))]);
    assert_eq!(report(&plan), [("".into(), true)]);
    assert_eq!(plan.retired[0].frontends, [frontend("10.96.0.1:80")]);
}

#[test]
fn i9_services_of_others_and_without_a_vip_program_nothing_and_come_back() {
    let plain = external_local();
    let mut world = with(plain.clone(), &[ready("10.0.0.1")]);
    let full = world.kernel.frontends.len();
    assert_eq!(full, 5);
    for not_ours in [
        Service { proxy_name: Some("other".into()), ..plain.clone() },
        Service { headless: true, ..plain.clone() },
        Service { kind: ServiceType::ExternalName, ..plain.clone() },
        Service { cluster_ips: Vec::new(), ..plain.clone() },
    ] {
        world.change([Change::Service(not_ours)]);
        assert_eq!(world.kernel.frontends.len() + world.kernel.services.len(), 0);
        assert_eq!(world.kernel.backends4.len(), 0);
        world.change([Change::Service(plain.clone())]);
        assert_eq!(world.kernel.frontends.len(), full);
        world.assert_right();
    }
}

#[test]
fn i10_a_vip_can_move_to_another_service_in_one_plan() {
    let mut world = one(&[ready("10.0.0.1")]);
    let plan = world.change([
        DeleteService(ServiceKey::new("default", "web")),
        Change::Service(service("next", &["10.96.0.1"])),
        Change::Slice(slice("n", "next", &[ready("10.0.0.9")])),
    ]);
    assert_eq!(world.both(VIP), "10.0.0.9:8080");
    assert!(!plan.ops.iter().any(|op| matches!(op, crate::plan::MapOp::DeleteFrontend { .. })));
    world.assert_right();
}

#[test]
fn i11_each_family_is_computed_alone() {
    let mut world = World::with([
        Change::Service(service("web", &["10.96.0.1", "2001:db8:96::1"])),
        Change::Slice(slice("four", "web", &[ready("10.0.0.1")])),
    ]);
    assert_eq!(world.both("10.96.0.1:80"), "10.0.0.1:8080");
    assert_eq!(world.both("[2001:db8:96::1]:80"), "refuse");
    world.change([Change::Slice(slice("six", "web", &[ready("2001:db8::5")]))]);
    assert_eq!(world.both("10.96.0.1:80"), "10.0.0.1:8080");
    assert_eq!(world.both("[2001:db8:96::1]:80"), "2001:db8::5:8080");
    let names: Vec<&String> = world.kernel.names.values().collect();
    assert_eq!(names, ["default/web/TCP/v4", "default/web/TCP/v6"]);
}

#[test]
fn j4_external_ips_outside_of_the_allow_list_are_refused() {
    let stolen = Service { external_ips: vec![ip("8.8.8.8"), ip("203.0.113.1")], ..external_local() };
    let world = with(stolen, &[ready("10.0.0.1").here()]);
    assert_eq!(world.both("8.8.8.8:80"), "pass");
    assert_eq!(world.both("203.0.113.1:80"), "10.0.0.1:8080");
    let service = ServiceKey::new("default", "web");
    assert_eq!(world.taken(), [Rejection::ExternalIpNotAllowed { service, ip: ip("8.8.8.8") }]);
}

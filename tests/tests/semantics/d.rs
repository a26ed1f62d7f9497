//! From where, to which frontend, under which policy.

use lb_tests::{
    place::Family,
    rule::{
        cluster,
        probe::{EXTERNAL, Seen, To, flows},
    },
    shared::Shared,
    traffic::{Call, Proto},
};

use crate::options;

static CLUSTER: Shared = Shared::new(|| cluster(options()));

#[test]
fn d3_a_pod_that_is_balanced_to_itself_is_always_masqueraded() {
    let rule = CLUSTER.rule("d3");
    for to in [To::ClusterIp, To::NodePort, To::LoadBalancer, To::ExternalIp] {
        rule.check([
            flows("pod-1a", to).get(&["pod-1a"]).seen(Seen::Frontend),
            flows("pod-1a", to).over(Proto::UdpUnconnected).get(&["pod-1a"]).seen(Seen::Frontend),
        ]);
        for family in Family::BOTH {
            let to = rule.frontend("pod-1a", to, family, Proto::Tcp);
            let transfer = rule.place("pod-1a").bulk(to, 3_000_000).unwrap();
            assert!(transfer.is_ok(), "bulk to {to}: {transfer:?}");
        }
    }
}

#[test]
fn d4_internal_policy_is_about_cluster_ips_alone() {
    let rule = CLUSTER.rule("d4");
    for from in ["pod-1b", "node1", "client"] {
        rule.check([flows(from, To::ClusterIp).get(&["pod-1a"])]);
        rule.check(EXTERNAL.map(|to| flows(from, to).get(&["pod-1a", "pod-2a", "pod-2b"])));
    }
}

#[test]
fn d5_external_policy_covers_external_ips_too() {
    let mut rule = CLUSTER.rule("d5");
    rule.check(EXTERNAL.map(|to| flows("client", to).get(&["pod-1a"]).seen(Seen::Kept)));
    for from in ["pod-1b", "node1"] {
        rule.check([flows(from, To::ExternalIp).get(&["pod-1a", "pod-2a", "pod-2b"])]);
    }
    rule.change(|f| {
        f.endpoints(&["pod-2a"]);
    });
    rule.check(EXTERNAL.map(|to| flows("client", to).are_dropped()));
    rule.check([flows("pod-1b", To::ExternalIp).get(&["pod-2a"])]);
}

#[test]
fn d6_clients_with_one_source_port_are_kept_apart_by_another() {
    let rule = CLUSTER.rule("d6");
    let client = &rule.cluster.client;
    let second = lb_tests::place::Pair::new("203.0.113.3", "2001:db8:203::3");
    client
        .netns
        .ip(&[
            format!("addr replace {}/24 dev eth0", second.v4),
            format!("addr replace {}/64 dev eth0 nodad", second.v6),
        ])
        .unwrap();
    let ways = EXTERNAL[..2].iter().flat_map(|to| Family::BOTH.map(|family| (*to, family)));
    for ((to, family), proto) in ways.flat_map(|way| [Proto::Tcp, Proto::Udp].map(|proto| (way, proto))) {
        let call = Call::new(proto, rule.frontend("client", to, family, proto));
        let open = |from| client.session(&call.clone().from(from)).unwrap();
        let mut one = open(client.addrs.socket(family, 45_678));
        let first = one.ask().unwrap().unwrap_or_else(|e| panic!("{to:?} {family:?} {proto:?}: {e:?}"));
        let mut two = open(second.socket(family, 45_678));
        let next = two.ask().unwrap().unwrap_or_else(|e| panic!("{to:?} {family:?} {proto:?}: {e:?}"));
        let node = rule.cluster.node(1).place.addrs.ip(family);
        assert_eq!([first.seen.ip(), next.seen.ip()], [node; 2], "masqueraded");
        assert_ne!(first.seen.port(), next.seen.port());
        // And each still has its own flow.
        assert_eq!(one.ask().unwrap(), Ok(first));
        assert_eq!(two.ask().unwrap(), Ok(next));
    }
}

#[test]
fn d7_a_pods_address_is_kept_through_a_cluster_ip() {
    let rule = CLUSTER.rule("d7");
    for from in ["pod-1b", "pod-2b"] {
        for proto in [Proto::Tcp, Proto::Udp, Proto::UdpUnconnected] {
            rule.check([flows(from, To::ClusterIp).over(proto).get(&["pod-1a", "pod-2a"]).seen(Seen::Kept)]);
        }
    }
}

//! NodePorts. Each test starts the agent of node1 with the addresses that it is about.

use lb_tests::{
    place::{Family, Pair},
    rule::{
        Rule, cluster,
        probe::{To, flows},
    },
    shared::{SOON, Shared},
    traffic::{Proto, Server},
    wait_for,
};
use serde_json::json;

use crate::options;

static CLUSTER: Shared = Shared::new(|| cluster(options()));

const SIDES: [&str; 3] = ["client", "pod-1b", "node1"];
const PODS: [&str; 2] = ["pod-1a", "pod-2a"];

/// Gives node1 a second address in each family.
fn second_address(rule: &Rule<'_>, host: u8) -> Pair {
    let addrs = Pair::new(&format!("172.18.0.{host}"), &format!("fd00:18::{host}"));
    rule.place("node1")
        .netns
        .ip(&[
            format!("addr replace {}/24 dev eth0", addrs.v4),
            format!("addr replace {}/64 dev eth0 nodad", addrs.v6),
        ])
        .unwrap();
    addrs
}

#[test]
fn f1_node_ports_are_on_all_addresses_or_on_the_primary_ones() {
    let mut rule = CLUSTER.rule("f1");
    let second = second_address(&rule, 111);
    rule.cluster.restart_agent(1, &[]).unwrap();
    for from in SIDES {
        rule.check([
            flows(from, To::NodePortOf(1)).get(&PODS),
            flows(from, To::NodePortOf(1)).at(second).get(&PODS),
        ]);
    }
    rule.cluster.restart_agent(1, &["--nodeport-addresses=primary"]).unwrap();
    for from in SIDES {
        rule.check([
            flows(from, To::NodePortOf(1)).get(&PODS),
            flows(from, To::NodePortOf(1)).at(second).are_refused(),
        ]);
    }
}

#[test]
fn f2_a_family_without_a_cidr_has_node_ports_on_all_addresses() {
    let mut rule = CLUSTER.rule("f2");
    let second = second_address(&rule, 111);
    for (listed, cidr) in [(Family::V4, "172.18.0.11/32"), (Family::V6, "fd00:18::11/128")] {
        rule.cluster.restart_agent(1, &[&format!("--nodeport-addresses={cidr}")]).unwrap();
        for from in SIDES {
            rule.check([flows(from, To::NodePortOf(1)).get(&PODS)]);
            for family in Family::BOTH {
                let line = flows(from, To::NodePortOf(1)).at(second).only(family);
                rule.check([if family == listed { line.are_refused() } else { line.get(&PODS) }]);
            }
        }
    }
}

#[test]
fn f3_addresses_that_are_not_listed_reach_the_hosts_own_socket() {
    let mut rule = CLUSTER.rule("f3");
    let second = second_address(&rule, 111);
    rule.cluster.restart_agent(1, &["--nodeport-addresses=172.18.0.11/32,fd00:18::11/128"]).unwrap();
    let number = rule.frontend("client", To::NodePort, Family::V4, Proto::Tcp).port();
    let sockets = Family::BOTH.map(|f| second.socket(f, number));
    let _host = Server::start(rule.place("node1"), "host", &sockets).unwrap();
    for from in SIDES {
        rule.check([
            flows(from, To::NodePortOf(1)).at(second).get(&["host"]),
            flows(from, To::NodePortOf(1)).get(&PODS),
        ]);
    }
}

#[test]
fn f6_one_number_serves_tcp_and_udp_and_changes_of_the_protocol_keep_it() {
    let mut rule = CLUSTER.rule("f6");
    let both = rule.spec()["ports"].clone();
    for from in SIDES {
        rule.check([flows(from, To::NodePortOf(1)).get(&PODS)]);
    }
    for (kept, other) in [(Proto::Tcp, Proto::Udp), (Proto::Udp, Proto::Tcp)] {
        let served = both[usize::from(kept == Proto::Udp)].clone();
        let number = served["nodePort"].clone();
        rule.spec()["ports"] = json!([served]);
        rule.apply();
        for from in SIDES {
            rule.check([flows(from, To::NodePortOf(1)).over(kept).get(&PODS)]);
        }
        // The other protocol at the same number.
        let all = rule.fixture.clone();
        rule.spec()["ports"] = both.clone();
        assert_eq!(rule.spec()["ports"][0]["nodePort"], number);
        rule.check(SIDES.map(|from| flows(from, To::NodePortOf(1)).over(other).are_refused()));
        rule.fixture = all;
    }
    rule.spec()["ports"] = both;
    rule.apply();
    rule.check([flows("client", To::NodePort).get(&PODS)]);
}

#[test]
fn f7_second_addresses_of_a_node_serve_node_ports_from_when_they_come_until_they_go() {
    let mut rule = CLUSTER.rule("f7");
    rule.cluster.restart_agent(1, &[]).unwrap();
    let second = second_address(&rule, 112);
    rule.check_soon(SIDES.map(|from| flows(from, To::NodePortOf(1)).at(second).get(&PODS)));
    let node = rule.place("node1").netns.clone();
    node.ip(&[format!("addr del {}/24 dev eth0", second.v4), format!("addr del {}/64 dev eth0", second.v6)])
        .unwrap();
    let agent = &rule.cluster.agents["node1"];
    for ip in Family::BOTH.map(|f| format!("\"{}\"", second.ip(f))) {
        wait_for(&format!("{ip} to be served no more"), SOON, || {
            agent.command("services", &["-o", "json"]).is_ok_and(|services| !services.contains(&ip))
        })
        .unwrap();
    }
    rule.check([
        flows("pod-1b", To::NodePortOf(1)).at(second).are_unserved(),
        flows("client", To::NodePort).get(&PODS),
    ]);
}

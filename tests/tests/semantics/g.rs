//! Session affinity.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    thread,
    time::{Duration, Instant},
};

use lb_tests::{
    cluster::Cluster,
    place::{Family, Pair},
    rule::{
        Rule, cluster,
        probe::{EXTERNAL, To},
    },
    shared::Shared,
    traffic::{Call, Proto},
};
use serde_json::{Value, json};

use crate::options;

/// The client outside has this many addresses: four backends are picked for them as by dice.
const CLIENTS: u8 = 16;

fn client(number: u8) -> Pair {
    Pair::new(&format!("203.0.113.{}", 20 + number), &format!("2001:db8:203::{}", 20 + number))
}

static CLUSTER: Shared = Shared::new(|| {
    let cluster = cluster(options())?;
    let addrs = (0..CLIENTS).map(client).flat_map(|a| {
        [format!("addr add {}/24 dev eth0", a.v4), format!("addr add {}/64 dev eth0 nodad", a.v6)]
    });
    cluster.client.netns.ip(&addrs.collect::<Vec<_>>())?;
    Ok(cluster)
});

/// Who answers a new connection to this frontend; `from` says which of the client's addresses.
fn server(rule: &Rule<'_>, place: &str, to: &Call, from: Option<IpAddr>) -> String {
    let call = match from {
        Some(ip) => to.clone().from((ip, 0).into()),
        None => to.clone(),
    };
    let outcome = rule.place(place).call(&call).unwrap();
    outcome.unwrap_or_else(|e| panic!("{place} {call:?}: {e:?}")).by
}

/// Who answers `count` new connections.
fn servers(rule: &Rule<'_>, place: &str, to: &Call, count: usize) -> BTreeSet<String> {
    let answers = rule.place(place).calls(to, count).unwrap();
    let counts = answers.all_answered().unwrap_or_else(|e| panic!("{place} {to:?}: {e:#}"));
    counts.into_keys().map(str::to_owned).collect()
}

fn call(rule: &Rule<'_>, place: &str, to: To, family: Family, proto: Proto) -> Call {
    Call::new(proto, rule.frontend(place, to, family, proto))
}

fn set_affinity(rule: &mut Rule<'_>, on: bool) {
    rule.spec()["sessionAffinity"] = json!(if on { "ClientIP" } else { "None" });
    rule.spec()["sessionAffinityConfig"] =
        if on { json!({ "clientIP": { "timeoutSeconds": 60 } }) } else { Value::Null };
    rule.apply();
}

#[test]
fn g1_all_frontends_of_a_port_share_one_memory_of_each_client() {
    let rule = CLUSTER.rule("g1");
    let kinds = [To::ClusterIp, To::NodePort, To::LoadBalancer, To::ExternalIp];
    for family in Family::BOTH {
        for place in ["client", "pod-1b", "node1"] {
            let mut found = BTreeSet::new();
            for to in kinds {
                found.extend(servers(&rule, place, &call(&rule, place, to, family, Proto::Tcp), 8));
            }
            assert_eq!(found.len(), 1, "{place} {family:?}: {found:?}");
        }
        // Each client has its own.
        let to = call(&rule, "client", To::LoadBalancer, family, Proto::Tcp);
        let each = || -> Vec<String> {
            (0..CLIENTS).map(|n| server(&rule, "client", &to, Some(client(n).ip(family)))).collect()
        };
        let first = each();
        assert!(first.iter().collect::<BTreeSet<_>>().len() > 1, "{first:?}");
        assert_eq!(each(), first);
    }
}

#[test]
fn g2_another_port_of_the_service_has_a_memory_of_its_own() {
    let rule = CLUSTER.rule("g2");
    for family in Family::BOTH {
        let one = call(&rule, "client", To::LoadBalancer, family, Proto::Tcp);
        let other = Call::tcp((one.to.ip(), 81).into());
        let each = |to: &Call| -> Vec<String> {
            (0..CLIENTS).map(|n| server(&rule, "client", to, Some(client(n).ip(family)))).collect()
        };
        let (first, second) = (each(&one), each(&other));
        assert_ne!(first, second, "{family:?}: as if they knew of each other");
        assert_eq!((each(&one), each(&other)), (first, second));
    }
}

/// What the maps say about the timeout of a Service.
fn timeouts(cluster: &Cluster, service: &str) -> BTreeSet<u64> {
    let rows = cluster.agents["node1"].command("services", &["-o", "json"]).unwrap();
    let rows: Value = serde_json::from_str(&rows).unwrap();
    let ours = rows.as_array().unwrap().iter();
    let ours = ours.filter(|r| r["name"].as_str().is_some_and(|n| n.contains(&format!("/{service}:"))));
    ours.map(|r| r["affinity_timeout_s"].as_u64().unwrap()).collect()
}

#[test]
fn g3_the_timeout_restarts_with_new_connections_and_not_with_packets() {
    let mut rule = CLUSTER.rule("g3");
    let timeout = Duration::from_secs(3);
    assert_eq!(timeouts(&rule.cluster, "g3"), [3].into());
    let to = call(&rule, "client", To::LoadBalancer, Family::V4, Proto::Tcp);
    let own = |n| IpAddr::from(client(n).v4);
    // All but one only send on the connections that they have.
    let mut silent: Vec<_> = (1..CLIENTS)
        .map(|n| {
            let mut session = rule.place("client").session(&to.clone().from((own(n), 0).into())).unwrap();
            let by = session.ask().unwrap().unwrap().by;
            (n, session, by)
        })
        .collect();
    let begun = Instant::now();
    let (mut last, mut longest) = (begun, Duration::ZERO);
    let first = server(&rule, "client", &to, Some(own(0)));
    // Twice the timeout, and a second for the clock of the programs.
    while begun.elapsed() < 2 * timeout + Duration::from_secs(1) {
        let now = server(&rule, "client", &to, Some(own(0)));
        longest = longest.max(last.elapsed());
        last = Instant::now();
        // A machine that stands still for the whole time says nothing about the rule.
        assert!(now == first || longest + Duration::from_secs(1) > timeout, "forgotten while in use");
        for (_, session, by) in &mut silent {
            assert_eq!(session.ask().unwrap().unwrap().by, *by);
        }
        thread::sleep(Duration::from_millis(100));
    }
    let moved = silent.iter().filter(|(n, _, by)| server(&rule, "client", &to, Some(own(*n))) != *by);
    assert!(moved.count() > 0, "packets of open connections kept the memory");
    rule.spec()["sessionAffinityConfig"] = Value::Null;
    rule.apply();
    assert_eq!(timeouts(&rule.cluster, "g3"), [10_800].into(), "the API's default");
}

#[test]
fn g4_a_backend_that_is_not_usable_is_replaced_and_the_new_one_remembered() {
    let mut rule = CLUSTER.rule("g4");
    for (family, proto) in Family::BOTH.into_iter().flat_map(|f| [(f, Proto::Tcp), (f, Proto::Udp)]) {
        // From outside the ClusterIP leads anywhere, the others to this node alone.
        let [anywhere, inside, outside] = [To::ClusterIp, To::NodePort, To::LoadBalancer]
            .map(|to| call(&rule, "client", to, family, proto));
        let remote = (0..CLIENTS)
            .map(|n| client(n).ip(family))
            .find(|ip| server(&rule, "client", &anywhere, Some(*ip)).starts_with("pod-2"));
        let own = remote.expect("one of 16 clients with a backend on node2");
        let local = server(&rule, "client", &outside, Some(own));
        assert!(local.starts_with("pod-1"), "policy Local: {local}");
        for to in [&inside, &anywhere, &outside] {
            assert_eq!(server(&rule, "client", to, Some(own)), local, "remembered");
        }
    }
    // The one that is remembered leaves, and comes back too late.
    let (mut own, mut last) = (Vec::new(), BTreeSet::new());
    for family in Family::BOTH {
        let to = call(&rule, "pod-1b", To::ClusterIp, family, Proto::Tcp);
        own.push((to.clone(), server(&rule, "pod-1b", &to, None)));
    }
    last.extend(own.iter().map(|(_, by)| by.clone()));
    let rest: Vec<&str> =
        ["pod-1a", "pod-1b", "pod-2a", "pod-2b"].into_iter().filter(|p| !last.contains(*p)).collect();
    rule.change(|f| {
        f.endpoints(&rest);
    });
    for (to, by) in &mut own {
        *by = server(&rule, "pod-1b", to, None);
        assert!(rest.contains(&by.as_str()), "{by} serves no more");
    }
    rule.change(|f| {
        f.endpoints(&["pod-1a", "pod-1b", "pod-2a", "pod-2b"]);
    });
    for (to, by) in &own {
        assert_eq!(servers(&rule, "pod-1b", to, 8), [by.clone()].into(), "remembered");
    }
}

#[test]
fn g5_switching_affinity_off_and_on_takes_effect_for_the_next_connection() {
    let mut rule = CLUSTER.rule("g5");
    for on in [true, false, true] {
        set_affinity(&mut rule, on);
        for (family, proto) in Family::BOTH.into_iter().flat_map(|f| [(f, Proto::Tcp), (f, Proto::Udp)]) {
            for (place, to) in
                [("client", To::LoadBalancer), ("pod-1b", To::ClusterIp), ("node1", To::NodePort)]
            {
                let found = servers(&rule, place, &call(&rule, place, to, family, proto), 24);
                assert_eq!(found.len() == 1, on, "{place} {to:?} {family:?} {proto:?}, {on}: {found:?}");
            }
        }
    }
}

#[test]
fn g6_open_connections_stay_where_they_are_whatever_affinity_does() {
    let mut rule = CLUSTER.rule("g6");
    set_affinity(&mut rule, false);
    let mut sessions = Vec::new();
    for place in ["client", "pod-1b", "node1"] {
        for to in EXTERNAL[..2].iter().chain([&To::ClusterIp]) {
            for (family, proto) in Family::BOTH.into_iter().flat_map(|f| [(f, Proto::Tcp), (f, Proto::Udp)]) {
                let mut session = rule.place(place).session(&call(&rule, place, *to, family, proto)).unwrap();
                let first = session.ask().unwrap().unwrap();
                sessions.push((format!("{place} {to:?} {family:?} {proto:?}"), session, first));
            }
        }
    }
    let backends: BTreeSet<_> = sessions.iter().map(|(_, _, first)| first.by.clone()).collect();
    assert!(backends.len() > 1, "nothing could move: {backends:?}");
    for on in [true, false, true] {
        set_affinity(&mut rule, on);
        for (what, session, first) in &mut sessions {
            // A new connection, which is remembered, in between.
            assert_eq!(session.ask().unwrap().as_ref(), Ok(&*first), "{what}, affinity {on}");
        }
        let to = call(&rule, "client", To::LoadBalancer, Family::V4, Proto::Tcp);
        server(&rule, "client", &to, None);
    }
    for (what, session, first) in &mut sessions {
        assert_eq!(session.ask().unwrap().as_ref(), Ok(&*first), "{what} in the end");
    }
}

#[test]
fn g7_udp_honours_affinity() {
    let rule = CLUSTER.rule("g7");
    for family in Family::BOTH {
        for (place, kinds) in [
            ("client", &[To::NodePort, To::LoadBalancer][..]),
            ("pod-1b", &[To::ClusterIp, To::NodePort, To::LoadBalancer]),
            ("node1", &[To::ClusterIp, To::LoadBalancer]),
        ] {
            let mut found = BTreeSet::new();
            for (to, proto) in kinds.iter().flat_map(|to| [(to, Proto::Udp), (to, Proto::UdpUnconnected)]) {
                found.extend(servers(&rule, place, &call(&rule, place, *to, family, proto), 8));
            }
            assert_eq!(found.len(), 1, "{place} {family:?}: {found:?}");
        }
    }
}

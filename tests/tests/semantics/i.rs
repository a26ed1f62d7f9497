//! Flows over changes, and the life of Services and of the agent. Those of UDP are in [`udp`].

mod udp;

use std::collections::BTreeMap;

use aya::maps::{HashMap, Map, MapData};
use lb_common::{LAYOUT_VERSION, maps::name};
use lb_tests::{
    place::Family,
    rule::{
        Rule, cluster,
        fixture::{Fixture, conditions, draining, ended, ready},
        probe::{To, flows},
    },
    shared::{SOON, Shared},
    traffic::{Call, Load, Proto, Server},
    wait_for,
};
use serde_json::{Value, json};

use crate::{
    api_server::ApiServer,
    options,
    stray::{out_of_window, resets_received},
};

static CLUSTER: Shared = Shared::new(|| cluster(options()));

/// A server on this port of these pods; called `POD:PORT`.
fn serve(rule: &Rule<'_>, pods: &[&str], port: u16) -> BTreeMap<String, Server> {
    let start = |pod: &&str| {
        let place = rule.place(pod);
        let addrs = Family::BOTH.map(|f| place.addrs.socket(f, port));
        ((*pod).to_owned(), Server::start(place, &format!("{pod}:{port}"), &addrs).unwrap())
    };
    pods.iter().map(start).collect()
}

#[test]
fn i4_tcp_connections_last_until_the_pod_ends_them() {
    let mut rule = CLUSTER.prepare("i4");
    let mut servers = serve(&rule, &["pod-1a", "pod-2a"], 9092);
    rule.change(|f| {
        f.endpoints(&["pod-1a"]);
    });
    let mut sessions = Vec::new();
    for (place, to) in [
        ("client", To::LoadBalancer),
        ("client", To::NodePortOf(2)),
        ("pod-1b", To::ClusterIp),
        ("node2", To::ClusterIp),
    ] {
        for family in Family::BOTH {
            let call = Call::tcp(rule.frontend(place, to, family, Proto::Tcp));
            let mut session = rule.place(place).session(&call).unwrap();
            let first = session.ask().unwrap().unwrap();
            assert_eq!(first.by, "pod-1a:9092");
            sessions.push((format!("{place} -> {to:?} {family:?}"), session, first));
        }
    }
    // It drains, then serves no more, while another one takes what is new.
    for last in [draining(), ended(), conditions(false, false, false)] {
        rule.change(|f| {
            f.endpoints(&["pod-1a", "pod-2a"]).condition("pod-1a", last.clone());
        });
        rule.check([flows("client", To::LoadBalancer).over(Proto::Tcp).get(&["pod-2a:9092"])]);
        for (what, session, first) in &mut sessions {
            assert_eq!(session.ask().unwrap().as_ref(), Ok(&*first), "{what} with {last}");
        }
    }
    servers.remove("pod-1a");
    for (what, session, _) in &mut sessions {
        let failure = session.ask().unwrap().unwrap_err();
        assert!(!failure.is_timeout(), "{what} is to hear of the end: {failure:?}");
    }
}

#[test]
fn i5_segments_out_of_the_window_do_not_bring_a_reset_to_the_server() {
    let rule = CLUSTER.rule("i5");
    let (client, server) = (rule.place("pod-1b"), rule.place("pod-2a"));
    for family in Family::BOTH {
        let call = Call::tcp(rule.frontend("pod-1b", To::ClusterIp, family, Proto::Tcp));
        let mut session = client.session(&call).unwrap();
        let first = session.ask().unwrap().unwrap();
        // One to a port that nobody listens on shows that they arrive, and that a reset is seen.
        let unused = std::net::SocketAddr::new(client.addrs.ip(family), 9);
        let before = resets_received(server).unwrap() + 1;
        out_of_window(server, server.addrs.socket(family, 8080), unused).unwrap();
        wait_for("a reset", SOON, || resets_received(server).is_ok_and(|n| n == before)).unwrap();
        for _ in 0..3 {
            out_of_window(server, server.addrs.socket(family, 8080), first.seen).unwrap();
        }
        // What the client answers to those has arrived when the answer to this has.
        assert_eq!(session.ask().unwrap().as_ref(), Ok(&first), "{family:?}");
        assert_eq!(resets_received(server).unwrap(), before, "{family:?}");
    }
}

#[test]
fn i6_nothing_changes_before_everything_is_known() {
    let mut rule = CLUSTER.rule("i6");
    let lines = || [("client", To::LoadBalancer), ("pod-1b", To::ClusterIp), ("node1", To::ClusterIp)];
    let served = || lines().map(|(from, to)| flows(from, to).get(&["pod-1a", "pod-2a"]));
    let mut open = rule
        .place("client")
        .session(&Call::tcp(rule.frontend("client", To::LoadBalancer, Family::V4, Proto::Tcp)))
        .unwrap();
    let first = open.ask().unwrap().unwrap();
    // The next agent asks an API server that has another Service, and keeps its EndpointSlices to itself.
    let objects = Fixture::load("i6-server").unwrap();
    let server = ApiServer::start(rule.place("node1"), &objects.documents).unwrap();
    rule.cluster.launch_agent(1, &["--source=kube", &format!("--master=http://{}", server.address)]).unwrap();
    wait_for("the agent to ask for EndpointSlices", SOON, || server.slices_wanted()).unwrap();
    wait_for("the agent to know all Services", SOON, || server.services_watched()).unwrap();
    let ready = |rule: &Rule<'_>| rule.cluster.agents["node1"].health("/readyz").is_ok_and(|(s, _)| s == 200);
    assert!(!ready(&rule), "EndpointSlices are missing");
    rule.check(served());
    assert_eq!(open.ask().unwrap(), Ok(first.clone()));
    rule.fixture.documents.extend(objects.documents.clone());
    rule.check([flows("pod-1b", To::ClusterIp).of("i6-new").are_unserved()]);
    server.release_slices();
    rule.cluster.agent(1).wait_ready().unwrap();
    rule.check([flows("pod-1b", To::ClusterIp).of("i6-new").get(&["pod-2a"])]);
    rule.check([flows("pod-1b", To::ClusterIp).are_unserved()]);
    assert_eq!(open.ask().unwrap(), Ok(first), "open connections go on");
    rule.cluster.restart_agent(1, &[]).unwrap();
    rule.check(served());
}

/// Deletes every entry of a map with keys of this size and values of 8 bytes.
fn empty<const KEY: usize>(rule: &Rule<'_>, map: &str) -> anyhow::Result<usize> {
    let path = rule.cluster.node(1).state_dir().join(format!("v{LAYOUT_VERSION}/maps/{map}"));
    let map = Map::HashMap(MapData::from_pin(path)?);
    let mut map: HashMap<MapData, [u8; KEY], [u8; 8]> = map.try_into()?;
    let keys = map.keys().collect::<Result<Vec<_>, _>>()?;
    keys.iter().try_for_each(|key| map.remove(key))?;
    Ok(keys.len())
}

#[test]
fn i7_entries_that_somebody_deleted_come_back() {
    let mut rule = CLUSTER.rule("i7");
    let ways = [("client", To::LoadBalancer), ("pod-1b", To::ClusterIp), ("node1", To::ClusterIp)];
    let served = || ways.map(|(from, to)| flows(from, to).get(&["pod-1a", "pod-2a"]));
    rule.check(served());
    for restart in [false, true] {
        assert!(empty::<8>(&rule, name::FRONTENDS4).unwrap() > 0);
        assert!(empty::<20>(&rule, name::FRONTENDS6).unwrap() > 0);
        rule.check([
            flows("pod-1b", To::ClusterIp).are_unserved(),
            flows("node1", To::ClusterIp).are_unserved(),
        ]);
        if restart {
            rule.cluster.agent(1).kill().unwrap();
            rule.cluster.start_agent(1).unwrap();
            // Ready means programmed.
            rule.check(served());
        } else {
            rule.cluster.agent(1).signal("USR1").unwrap();
            rule.check_soon(served());
        }
    }
}

/// New connections from outside and inside in the background.
fn loads(rule: &Rule<'_>) -> Vec<(String, Load)> {
    let mut loads = Vec::new();
    for (place, to, family, proto) in [
        ("client", To::LoadBalancer, Family::V4, Proto::Tcp),
        ("client", To::LoadBalancer, Family::V6, Proto::Udp),
        ("pod-2b", To::LoadBalancer, Family::V6, Proto::Tcp),
        ("node2", To::LoadBalancer, Family::V4, Proto::Udp),
    ] {
        let call = Call::new(proto, rule.frontend(place, to, family, proto));
        loads.push((format!("{place} {family:?} {proto:?}"), rule.place(place).load(&call).unwrap()));
    }
    loads
}

#[test]
fn i8_a_rolling_update_fails_no_connection() {
    let mut rule = CLUSTER.prepare("i8");
    for policy in ["Cluster", "Local"] {
        let mut servers = serve(&rule, &["pod-1a", "pod-2a"], 9093);
        rule.spec()["externalTrafficPolicy"] = json!(policy);
        rule.change(|f| {
            f.endpoints(&["pod-1a", "pod-2a"]);
        });
        let loads = loads(&rule);
        let mut pods = vec!["pod-1a", "pod-2a"];
        for (old, new) in [("pod-1a", "pod-1b"), ("pod-2a", "pod-2b")] {
            servers.extend(serve(&rule, &[new], 9093));
            pods.push(new);
            // The new one is ready, then the old one drains, serves no more, is gone from the slices, and ends.
            for condition in [ready(), draining(), ended()] {
                rule.change(|f| {
                    f.endpoints(&pods).condition(old, condition);
                });
            }
            pods.retain(|p| *p != old);
            rule.change(|f| {
                f.endpoints(&pods);
            });
            servers.remove(old);
        }
        rule.check([flows("pod-2b", To::LoadBalancer).get(&["pod-1b:9093", "pod-2b:9093"])]);
        for (what, load) in loads {
            let tally = load.stop().unwrap();
            assert_eq!(tally.failed, 0, "{policy}: {what}: {tally:?}");
            assert!(tally.total() > 20, "{policy}: {what}: hardly any traffic: {tally:?}");
        }
    }
}

#[test]
fn i9_headless_services_and_those_of_other_proxies_are_ignored_while_they_are() {
    let mut rule = CLUSTER.rule("i9");
    let ways = [("client", To::LoadBalancer), ("pod-1b", To::ClusterIp), ("node1", To::NodePort)];
    let served = || ways.map(|(from, to)| flows(from, to).get(&["pod-1a", "pod-2a"]));
    rule.check(served());
    let listed = rule.cluster.agents["node1"].command("services", &["-o", "json"]).unwrap();
    assert!(listed.contains("default/i9:") && !listed.contains("i9-headless"), "{listed}");
    for label in ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"] {
        rule.change(|f| f.object("Service", "i9")["metadata"]["labels"][label] = json!("other"));
        rule.check(ways.map(|(from, to)| flows(from, to).are_unserved()));
        rule.change(|f| {
            f.object("Service", "i9")["metadata"]["labels"].as_object_mut().map(|l| l.remove(label));
        });
        rule.check(served());
    }
    // A slice with the label of headless Services is none of its endpoints.
    let label = "service.kubernetes.io/headless";
    rule.change(|f| f.slices().for_each(|s| s["metadata"]["labels"][label] = json!("")));
    rule.check([
        flows("pod-1b", To::ClusterIp).are_refused(),
        flows("client", To::LoadBalancer).are_refused(),
    ]);
    rule.change(|f| {
        f.slices().for_each(|s| drop(s["metadata"]["labels"].as_object_mut().map(|l| l.remove(label))));
    });
    rule.check(served());
}

#[test]
fn i10_services_change_to_external_names_and_back_and_are_made_again() {
    let mut rule = CLUSTER.rule("i10");
    let ways = [("client", To::NodePort), ("pod-1b", To::ClusterIp), ("node1", To::ClusterIp)];
    let served = || ways.map(|(from, to)| flows(from, to).get(&["pod-1a", "pod-2a"]));
    let unserved = || ways.map(|(from, to)| flows(from, to).are_unserved());
    rule.check(served());
    let whole = rule.fixture.clone();
    let spec = json!({
        "type": "ExternalName", "externalName": "example.com", "sessionAffinity": "None",
        "ports": [{ "name": "tcp", "protocol": "TCP", "port": 80, "targetPort": 8080 }],
    });
    let without: Vec<Value> = whole.documents.iter().filter(|d| d["kind"] != "Service").cloned().collect();
    for gone in ["an ExternalName", "deleted"] {
        rule.change(|f| match gone {
            "deleted" => f.documents = without.clone(),
            _ => f.object("Service", "i10")["spec"] = spec.clone(),
        });
        // The addresses that it had.
        rule.fixture = whole.clone();
        rule.check(unserved());
        rule.change(|f| {
            f.object("Service", "i10")["metadata"]["uid"] = json!("0d9b7d6c-5b1e-4c54-9a3e-2f0a3c1b7e55")
        });
        rule.check(served());
    }
    // Another Service takes the addresses over in the same moment.
    rule.change(|f| {
        for document in &mut f.documents {
            let meta = &mut document["metadata"];
            let name = meta["name"].as_str().unwrap().replace("i10", "i10-next");
            meta["name"] = json!(name);
            if document["kind"] == "EndpointSlice" {
                document["metadata"]["labels"]["kubernetes.io/service-name"] = json!("i10-next");
            }
        }
    });
    rule.check(ways.map(|(from, to)| flows(from, to).of("i10-next").get(&["pod-1a", "pod-2a"])));
}

#[test]
fn i11_each_family_is_computed_alone() {
    let mut rule = CLUSTER.rule("i11");
    let ways = [
        ("client", To::LoadBalancer),
        ("client", To::NodePort),
        ("pod-1b", To::ClusterIp),
        ("node1", To::ClusterIp),
    ];
    let served = |family| ways.map(|(from, to)| flows(from, to).only(family).get(&["pod-1a", "pod-2a"]));
    for (dead, alive) in [(Family::V4, Family::V6), (Family::V6, Family::V4)] {
        let kind = if dead == Family::V4 { "IPv4" } else { "IPv6" };
        rule.change(|f| {
            let all = f.endpoints(&["pod-1a", "pod-2a"]);
            all.slices().filter(|s| s["addressType"] == kind).for_each(|s| s["endpoints"] = json!([]));
        });
        rule.check(served(alive));
        rule.check(ways.map(|(from, to)| flows(from, to).only(dead).are_refused()));
    }
    // A Service of one family has nothing in the other, although there are endpoints.
    let whole = rule.fixture.clone();
    rule.change(|f| {
        let spec = &mut f.endpoints(&["pod-1a", "pod-2a"]).object("Service", "i11")["spec"];
        for (field, value) in [
            ("clusterIP", json!("fd00:10:96::18:11")),
            ("clusterIPs", json!(["fd00:10:96::18:11"])),
            ("ipFamilies", json!(["IPv6"])),
            ("ipFamilyPolicy", json!("SingleStack")),
        ] {
            spec[field] = value;
        }
    });
    rule.check(served(Family::V6));
    rule.fixture = whole;
    rule.check(ways.map(|(from, to)| flows(from, to).only(Family::V4).are_unserved()));
}

//! Health, as load balancers, the kubelet and scripts ask for it: real requests to real agents.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use anyhow::Context as _;
use lb_tests::{
    cluster::{Cluster, Layout, Options},
    manifests::{Service, nodes},
    place::{Family, Place},
    shared::{SOON, Shared},
    traffic::Call,
    wait_for,
};
use serde_json::{Value, json};

static CLUSTER: Shared = Shared::new(|| start(Options::new(Layout::PointToPoint)));

/// NodePorts, and so health checks, only on the nodes' addresses towards the outside.
static LISTED: Shared = Shared::new(|| {
    start(Options::new(Layout::Bridge).flag("--nodeport-addresses=172.18.0.0/24,fd00:18::/64"))
});

fn start(options: Options) -> anyhow::Result<Cluster> {
    let mut cluster = Cluster::new(options)?;
    cluster.manifests.write("nodes", &nodes(cluster.nodes.iter().map(|n| &n.place)))?;
    cluster.start_agents()?;
    Ok(cluster)
}

/// A LoadBalancer Service with policy Local. `number` makes its health check port unique, too.
fn local(cluster: &Cluster, name: &str, number: u8, pods: &[&str]) -> Service {
    Service::on(cluster, name, number, pods)
        .with("externalTrafficPolicy", json!("Local"))
        .with("healthCheckNodePort", json!(port(number)))
}

fn port(number: u8) -> u16 {
    32_000 + u16::from(number)
}

/// Status, head and body.
type Answer = (u16, String, String);

/// What a GET of this path gets, asked by a process of `from`.
fn get(from: &Place, at: SocketAddr, path: &str) -> anyhow::Result<Answer> {
    let ask = || -> anyhow::Result<Answer> {
        let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let (head, body) = text.split_once("\r\n\r\n").context("not HTTP")?;
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).context("no status")?;
        Ok((status, head.to_owned(), body.to_owned()))
    };
    from.netns.run(ask)?
}

/// Waits for this answer: a status and a number of local endpoints, or `None` for nobody who listens.
fn wait_for_check(from: &Place, at: SocketAddr, expected: Option<(u16, u64)>) {
    let mut last = None;
    let waited = wait_for(&format!("{expected:?} from {at}"), SOON, || {
        last = get(from, at, "/").ok().and_then(|(status, _, body)| {
            let body: Value = serde_json::from_str(&body).ok()?;
            Some((status, body["localEndpoints"].as_u64()?))
        });
        last == expected
    });
    waited.unwrap_or_else(|e| panic!("{e:#}; last: {last:?}"));
}

/// Both families' addresses of a node at the health check port.
fn checks(cluster: &Cluster, node: u8, number: u8) -> [SocketAddr; 2] {
    Family::BOTH.map(|family| cluster.node(node).place.addrs.socket(family, port(number)))
}

#[test]
fn h1_h3_a_node_answers_for_its_own_endpoints_until_they_are_gone() {
    let cluster = CLUSTER.lock();
    let client = &cluster.client;
    let mut service = local(&cluster, "drain", 10, &["pod-1a", "pod-1b"]);
    cluster.serve(&service).unwrap();
    for (node, expected) in [(1, (200, 2)), (2, (503, 0))] {
        for at in checks(&cluster, node, 10) {
            wait_for_check(client, at, Some(expected));
        }
    }
    // Every path, and what else there is in an answer (H2).
    let (status, head, body) = get(client, checks(&cluster, 1, 10)[0], "/any/path").unwrap();
    assert_eq!(status, 200);
    assert!(head.contains("\r\nContent-Type: application/json\r\n"), "{head}");
    assert!(head.contains("\r\nX-Content-Type-Options: nosniff\r\n"), "{head}");
    assert!(head.contains("\r\nX-Load-Balancing-Endpoint-Weight: 2\r\n"), "{head}");
    let expected = json!({
        "service": {"namespace": "default", "name": "drain"},
        "localEndpoints": 2, "serviceProxyHealthy": true,
    });
    assert_eq!(serde_json::from_str::<Value>(&body).unwrap(), expected);

    // One goes; the other drains: no more health, yet it still serves what arrives (A2).
    service.endpoints.remove(1);
    (service.endpoints[0].ready, service.endpoints[0].terminating) = (false, true);
    cluster.manifests.write("drain", &service.documents()).unwrap();
    for at in checks(&cluster, 1, 10) {
        wait_for_check(client, at, Some((503, 0)));
    }
    let balancer = service.load_balancer.unwrap().socket(Family::V4, service.port);
    assert_eq!(client.call(&Call::tcp(balancer)).unwrap().unwrap().by, "pod-1a");
    // Then it is gone, and another pod comes up on the other node.
    service.endpoints = Service::on(&cluster, "drain", 10, &["pod-2a"]).endpoints;
    cluster.manifests.write("drain", &service.documents()).unwrap();
    for (node, expected) in [(1, (503, 0)), (2, (200, 1))] {
        for at in checks(&cluster, node, 10) {
            wait_for_check(client, at, Some(expected));
        }
    }
    cluster.manifests.remove("drain").unwrap();
    for at in [1, 2].into_iter().flat_map(|node| checks(&cluster, node, 10)) {
        wait_for_check(client, at, None);
    }
}

#[test]
fn h4_toggling_the_policy_closes_and_opens_the_port_and_keeps_service() {
    let cluster = CLUSTER.lock();
    let client = &cluster.client;
    let service = local(&cluster, "toggle", 11, &["pod-1a"]);
    cluster.serve(&service).unwrap();
    let balancer = Call::tcp(service.load_balancer.unwrap().socket(Family::V4, service.port));
    let mut load = client.load(&balancer).unwrap();
    for _ in 0..2 {
        for at in checks(&cluster, 1, 11) {
            wait_for_check(client, at, Some((200, 1)));
        }
        let everywhere = service.clone().with("externalTrafficPolicy", json!("Cluster"));
        cluster.manifests.write("toggle", &everywhere.documents()).unwrap();
        for at in checks(&cluster, 1, 11) {
            wait_for_check(client, at, None);
        }
        let tally = load.stop().unwrap();
        assert!(tally.failed == 0 && !tally.answered.is_empty(), "{tally:?}");
        load = client.load(&balancer).unwrap();
        cluster.manifests.write("toggle", &service.documents()).unwrap();
    }
    // A port that changes moves the server.
    let moved = service.clone().with("healthCheckNodePort", json!(port(12)));
    cluster.manifests.write("toggle", &moved.documents()).unwrap();
    wait_for_check(client, checks(&cluster, 1, 12)[0], Some((200, 1)));
    wait_for_check(client, checks(&cluster, 1, 11)[0], None);
    let tally = load.stop().unwrap();
    assert!(tally.failed == 0, "{tally:?}");
}

#[test]
fn h4_a_port_that_is_taken_is_said_and_had_once_it_is_free() {
    let cluster = CLUSTER.lock();
    let client = &cluster.client;
    // Sockets stay in the namespace that they were made in.
    let take = || TcpListener::bind(("0.0.0.0", port(13)));
    let taken = cluster.node(1).place.netns.run(take).unwrap().unwrap();
    cluster.serve(&local(&cluster, "taken", 13, &["pod-1a", "pod-2a"])).unwrap();
    // The other family and the other node have theirs.
    let [v4, v6] = checks(&cluster, 1, 13);
    wait_for_check(client, v6, Some((200, 1)));
    wait_for_check(client, checks(&cluster, 2, 13)[0], Some((200, 1)));
    let complaints = || {
        let logs = cluster.logs();
        logs.lines()
            .filter(|l| l.contains("cannot answer health checks") && l.contains("default/taken"))
            .count()
    };
    wait_for("the agent to complain", SOON, || complaints() == 1).unwrap();
    drop(taken);
    wait_for_check(client, v4, Some((200, 1)));
    assert_eq!(complaints(), 1, "once per failure");
}

#[test]
fn h4_servers_are_on_the_addresses_of_node_ports_as_those_come_and_go() {
    let cluster = LISTED.lock();
    let client = &cluster.client;
    let node = cluster.node(1);
    cluster.serve(&local(&cluster, "listed", 14, &["pod-1a"])).unwrap();
    for at in checks(&cluster, 1, 14) {
        wait_for_check(client, at, Some((200, 1)));
    }
    // The node's address towards its pods is not in the list.
    let gateway = node.gateway().socket(Family::V4, port(14));
    assert!(get(&node.place, gateway, "/").is_err());
    assert!(get(&node.place, SocketAddr::new([127, 0, 0, 1].into(), port(14)), "/").is_err());
    // A second address, while the agent runs.
    let second: IpAddr = [172, 18, 0, 111].into();
    node.place.netns.ip(&[format!("address add {second}/24 dev eth0")]).unwrap();
    wait_for_check(client, SocketAddr::new(second, port(14)), Some((200, 1)));
    node.place.netns.ip(&[format!("address del {second}/24 dev eth0")]).unwrap();
    wait_for_check(client, checks(&cluster, 1, 14)[0], Some((200, 1)));
    wait_for("the socket to be closed", SOON, || {
        node.place.netns.exec("ss -Hltn").is_ok_and(|open| !open.contains(&format!("{second}:")))
    })
    .unwrap();
}

#[test]
fn h5_h6_a_node_about_to_go_takes_no_traffic_and_keeps_its_agent() {
    let mut cluster = CLUSTER.lock();
    let normal = nodes(cluster.nodes.iter().map(|n| &n.place));
    let mut leaving = normal.clone();
    leaving[0]["spec"] =
        json!({"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]});
    for (documents, expected) in
        [(&leaving, 503), (&normal, 200), (&normal[1..].to_vec(), 503), (&normal, 200)]
    {
        cluster.manifests.write("nodes", documents).unwrap();
        let agent = cluster.agent(1);
        wait_for(&format!("/healthz to say {expected}"), SOON, || {
            agent.health("/healthz").is_ok_and(|(status, _)| status == expected)
        })
        .unwrap();
        let (_, body) = agent.health("/healthz").unwrap();
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((&body["nodeEligible"], &body["healthy"]), (&(expected == 200).into(), &true.into()));
        let (status, body) = agent.health("/livez").unwrap();
        assert_eq!(status, 200);
        assert!(!body.contains("nodeEligible"), "{body}");
        assert_eq!(cluster.agent(2).health("/healthz").unwrap().0, 200);
    }
}

#[test]
fn h7_scripts_find_mode_and_settings_at_the_metrics_address() {
    let cluster = CLUSTER.lock();
    let node = &cluster.node(1).place;
    let metrics = SocketAddr::new([127, 0, 0, 1].into(), 10249);
    assert_eq!(get(node, metrics, "/proxyMode").unwrap().2, "ebpf");
    let (status, _, body) = get(node, metrics, "/configz").unwrap();
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &body["kubeproxy.config.k8s.io"]["HostnameOverride"]), (200, &"node1".into()));
}

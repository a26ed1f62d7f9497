//! Rules J: what others do right, and what they do wrong.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use lb_agent::datapath::OBJECT;
use lb_common::{frontend::flags, maps::name, proto};
use lb_tests::{
    agent::Agent,
    cluster::{Cluster, Layout, Node, Options, POD_PORT},
    lab::{self, Action, Hook, Lab},
    manifests::{Endpoint, Service},
    packets::{external, nets, udp},
    place::{Family, Pair, Place},
    raw::{self, IcmpError, Raw, ping},
    shared::SOON,
    traffic::{Call, Proto, Server},
    wait_for,
};
use serde_json::{Value, json};

use crate::bed::{
    CLUSTER, NO_ANSWER_MS, Want, check, check_soon, cluster, external_ips, frontends, lines, service, sides,
};

/// For an ICMP error to arrive.
const SOON_MS: u64 = 2_000;

/// MTU of the small links.
const SMALL: u32 = 1_400;

/// An ICMP error that a place gets about its own datagram, if any comes.
fn error_about(icmp: &Raw, src: SocketAddr, dst: SocketAddr) -> Option<IcmpError> {
    icmp.receive(Duration::from_millis(SOON_MS), |from, bytes| {
        IcmpError::parse(from, bytes).filter(|e| (e.quoted.src, e.quoted.dst) == (src, dst))
    })
    .unwrap()
}

/// Has packets between two places of a node be small: the route to a pod takes 1400 bytes.
fn small_link_to(node: &Node, pod: &Place, mtu: &str) {
    let device = Node::pod_device(pod);
    let (v4, v6) = (pod.addrs.v4, pod.addrs.v6);
    node.place
        .netns
        .ip(&[
            format!("route replace {v4}/32 dev {device} {mtu}"),
            // An IPv6 route keeps its MTU when it is replaced without one.
            format!("route del {v6}/128 dev {device}"),
            format!("route add {v6}/128 dev {device} {mtu}"),
        ])
        .unwrap();
}

fn small_link_to_client(cluster: &Cluster, mtu: &str) {
    // The kernel's own IPv6 route has metric 256; one with another metric would be a second route.
    let link = "2001:db8:203::/64 dev out0 proto kernel metric 256";
    cluster
        .router
        .ip(&[
            format!("route replace 203.0.113.0/24 dev out0 proto kernel {mtu}"),
            format!("route del {link}"),
            format!("route add {link} {mtu}"),
        ])
        .unwrap();
}

/// The way from client to backend is small: whoever sent too much hears of it, about the packet as it was sent.
#[test]
fn j1_a_small_link_to_the_backend_is_told_to_the_client() {
    let cluster = CLUSTER.lock();
    for (number, pod, node) in [(90, "pod-1a", 1), (91, "pod-2a", 2)] {
        let service = service(&cluster, &format!("j1-{number}"), number, &[pod]);
        cluster.serve(&service).unwrap();
        small_link_to(cluster.node(node), cluster.pod(pod), &format!("mtu lock {SMALL}"));
        let mut wrong = Vec::new();
        for from in [&cluster.client, cluster.pod("pod-1b"), cluster.pod("pod-2b")] {
            let asked = cluster.node(if from.name == "pod-2b" { 2 } else { 1 });
            for (kind, to) in service.frontends(asked) {
                let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
                let what = format!("{} -> {kind} {to} ({pod})", from.name);
                let icmp = Raw::icmp(from, family).unwrap();
                let socket = raw::udp(from, family, 0).unwrap();
                raw::never_fragment(&socket, family).unwrap();
                // Fits the first link.
                socket.send_to(&[7; 1_440], to).unwrap();
                match error_about(&icmp, socket.local_addr().unwrap(), to) {
                    Some(e) if e.is_too_big() && e.mtu == SMALL => {}
                    other => wrong.push(format!("{what}: {other:?}")),
                }
                if let Err(e) = from.bulk(to, 1_000_000).unwrap() {
                    wrong.push(format!("{what}: bulk: {}", e.message));
                }
            }
        }
        small_link_to(cluster.node(node), cluster.pod(pod), "");
        assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
    }
}

/// The way back is small: the error quotes an answer of the Service's address, and it is the pod that must hear of it.
#[test]
fn j1_a_small_link_to_the_client_is_told_to_the_backend_that_owns_the_flow() {
    const ANSWERS: u16 = 9_100;
    let cluster = CLUSTER.lock();
    for (number, pod) in [(92, "pod-1a"), (93, "pod-2a")] {
        let mut service = service(&cluster, &format!("j1-{number}"), number, &[pod]);
        service.endpoints = vec![Endpoint { port: ANSWERS, ..Endpoint::pod(cluster.pod(pod)) }];
        cluster.manifests.write(&service.name, &service.documents()).unwrap();
        let mut wrong = Vec::new();
        for (kind, to) in service.frontends(cluster.node(1)) {
            let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
            let what = format!("{kind} {to} ({pod})");
            let backend = cluster.pod(pod);
            let server = raw::udp(backend, family, ANSWERS).unwrap();
            raw::never_fragment(&server, family).unwrap();
            let client = raw::udp(&cluster.client, family, 0).unwrap();
            let seen = heard(&client, &server, to);
            small_link_to_client(&cluster, &format!("mtu lock {SMALL}"));
            let icmp = Raw::icmp(backend, family).unwrap();
            server.send_to(&[7; 1_440], seen).unwrap();
            match error_about(&icmp, server.local_addr().unwrap(), seen) {
                Some(e) if e.is_too_big() && e.mtu == SMALL => {}
                other => wrong.push(format!("{what}: {other:?}")),
            }
            small_link_to_client(&cluster, "");
        }
        assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
    }
}

/// Sends datagrams to a frontend until the server hears one; the address that it saw.
fn heard(client: &UdpSocket, server: &UdpSocket, to: SocketAddr) -> SocketAddr {
    let mut seen = None;
    server.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    wait_for("a datagram to arrive", SOON, || {
        client.send_to(b"who", to).unwrap();
        seen = server.recv_from(&mut [0; 16]).ok().map(|(_, from)| from);
        seen.is_some()
    })
    .unwrap();
    seen.unwrap()
}

/// traceroute through a Service: every router on the way tells the client about the client's own packet.
#[test]
fn j1_time_exceeded_about_a_translated_packet_names_the_service() {
    let cluster = CLUSTER.lock();
    let service = service(&cluster, "j1-trace", 94, &["pod-2a"]);
    cluster.serve(&service).unwrap();
    let mut wrong = Vec::new();
    // Routers between: the client's own, node1, node2; the nodes alone for a pod of node1.
    for (from, hops) in [(&cluster.client, 3), (cluster.pod("pod-1b"), 2)] {
        for (kind, to) in service.frontends(cluster.node(1)) {
            let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
            let icmp = Raw::icmp(from, family).unwrap();
            for ttl in 1..=hops {
                let socket = raw::udp(from, family, 0).unwrap();
                set_ttl(&socket, family, ttl);
                socket.send_to(b"who", to).unwrap();
                match error_about(&icmp, socket.local_addr().unwrap(), to) {
                    Some(e) if e.is_time_exceeded() => {}
                    other => wrong.push(format!("{} -> {kind} {to}, TTL {ttl}: {other:?}", from.name)),
                }
            }
            // One more, and the pod answers.
            let socket = raw::udp(from, family, 0).unwrap();
            set_ttl(&socket, family, hops + 1);
            socket.set_read_timeout(Some(Duration::from_millis(SOON_MS))).unwrap();
            socket.send_to(b"who", to).unwrap();
            if let Err(e) = socket.recv(&mut [0; 64]) {
                wrong.push(format!("{} -> {kind} {to}, TTL {}: {e}", from.name, hops + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
}

fn set_ttl(socket: &UdpSocket, family: Family, ttl: u32) {
    let socket = socket2::SockRef::from(socket);
    match family {
        Family::V4 => socket.set_ttl_v4(ttl).unwrap(),
        Family::V6 => socket.set_unicast_hops_v6(ttl).unwrap(),
    }
}

/// Who answers a ping, of the addresses of a Service and of node1, as `kind address`.
fn answers_to_ping(cluster: &Cluster, service: &Service) -> Vec<String> {
    let node = ("node", SocketAddr::new(cluster.node(1).place.addrs.v4.into(), 0));
    let node6 = ("node", SocketAddr::new(cluster.node(1).place.addrs.v6.into(), 0));
    let all: Vec<_> = frontends(service, cluster.node(1))
        .into_iter()
        .filter(|(kind, _)| *kind != "NodePort")
        .chain([node, node6])
        .collect();
    let mut answered = Vec::new();
    for from in [&cluster.client, cluster.pod("pod-1b")] {
        let pings = thread::scope(|scope| {
            let each = |to: SocketAddr| {
                scope.spawn(move || ping(from, to.ip(), Duration::from_millis(NO_ANSWER_MS)))
            };
            let all: Vec<_> = all.iter().map(|(kind, to)| (kind, to, each(*to))).collect();
            let done = all.into_iter().map(|(kind, to, ping)| (kind, to, ping.join().unwrap().unwrap()));
            done.filter(|(.., answered)| *answered)
                .map(|(kind, to, _)| {
                    format!("{} {kind} {}", from.name, if to.is_ipv4() { "v4" } else { "v6" })
                })
                .collect::<Vec<_>>()
        });
        answered.extend(pings);
    }
    answered.sort();
    answered
}

fn pings(kinds: &[&str]) -> Vec<String> {
    let each = |from: &str| {
        let from = from.to_owned();
        kinds
            .iter()
            .flat_map(move |kind| ["v4", "v6"].map(|family| format!("{from} {kind} {family}")))
            .collect::<Vec<_>>()
    };
    let mut all: Vec<_> = ["client", "pod-1b"].into_iter().flat_map(each).collect();
    all.sort();
    all
}

#[test]
fn j3_a_ping_to_a_service_is_not_answered() {
    let cluster = CLUSTER.lock();
    let service = service(&cluster, "j3", 95, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    assert_eq!(answers_to_ping(&cluster, &service), pings(&["node"]));
}

#[test]
fn j3_a_ping_to_a_service_is_answered_if_asked_for() {
    let cluster = cluster(&["--answer-ping=on"]).unwrap();
    let service = service(&cluster, "j3-on", 96, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    assert_eq!(
        answers_to_ping(&cluster, &service),
        pings(&["ClusterIP", "LoadBalancer", "external IP", "node"])
    );
    assert!(crate::bed::counted(&cluster, 1, "echo_answered") > 0);
    // The Service gone, its addresses are nobody's.
    cluster.manifests.remove("j3-on").unwrap();
    wait_for("the addresses to be nobody's", SOON, || {
        answers_to_ping(&cluster, &service) == pings(&["node"])
    })
    .unwrap();
}

/// What a Service's external IPs lead to in a cluster with these flags.
fn external_traffic(flag: Option<&str>, name: &str, number: u8, served: bool) {
    let options = Options::new(Layout::PointToPoint);
    let mut cluster =
        Cluster::new(flag.into_iter().fold(options, |options, flag| options.flag(flag))).unwrap();
    cluster.start_agents().unwrap();
    let service = service(&cluster, name, number, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    let external: Vec<_> =
        Family::BOTH.map(|f| ("external IP", external_ips(number).socket(f, service.port))).into();
    if served {
        check_soon(&lines(&sides(&cluster), &external, |_, _| Some(Want::From(&["pod-1a", "pod-2a"]))));
        return;
    }
    for from in sides(&cluster) {
        for (_, to) in &external {
            let outcome = from.call(&Call::udp(*to).timeout_ms(NO_ANSWER_MS)).unwrap();
            assert!(outcome.is_err(), "{} -> {to}: {outcome:?}", from.name);
        }
    }
    // Said, and counted.
    let metrics = cluster.agents["node1"].metrics().unwrap();
    assert!(
        metrics.lines().any(|l| l.starts_with("lb_rejected_objects{") && l.contains("xternal")),
        "{metrics}"
    );
}

#[test]
fn j4_external_ips_are_refused_unless_allowed() {
    external_traffic(None, "j4", 97, false);
    external_traffic(Some("--allow-external-ips=198.51.100.0/24,2001:db8:51::/64"), "j4", 97, false);
    external_traffic(Some("--allow-external-ips=192.0.2.0/24,2001:db8:192::/64"), "j4", 97, true);
}

#[test]
fn j5_no_process_of_the_node_gets_a_node_port_as_its_own_port() {
    let mut cluster = Cluster::new(Options::new(Layout::PointToPoint)).unwrap();
    let node = cluster.node(1).place.clone();
    // A node whose ephemeral ports take in NodePorts and ours.
    node.netns.sysctl(&[("ipv4/ip_local_port_range", "9000 60999")]).unwrap();
    cluster.start_agents().unwrap();
    // By one call: of a list the kernel gives what fits, and no more after that.
    let reserved = || -> String {
        let read = || -> std::io::Result<String> {
            let mut buffer = [0; 4096];
            let length = fs::File::open("/proc/sys/net/ipv4/ip_local_reserved_ports")?.read(&mut buffer)?;
            Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
        };
        node.netns.run(read).unwrap().unwrap()
    };
    let covers = |port: u16| {
        reserved().trim().split(',').any(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            first.parse().is_ok_and(|f: u16| f <= port) && last.parse().is_ok_and(|l: u16| port <= l)
        })
    };
    let wanted = [10_240, 29_999, 30_000, 31_234, 32_767];
    wait_for("the ports to be reserved", SOON, || wanted.iter().all(|p| covers(*p)))
        .unwrap_or_else(|e| panic!("{e:#}: {}", reserved()));
    assert!(!covers(9_000) && !covers(33_000) && !covers(60_999), "no more than that: {}", reserved());
    // What the administrator has reserved stays.
    let own = format!("9100,{}", reserved().trim());
    node.netns.sysctl(&[("ipv4/ip_local_reserved_ports", &own)]).unwrap();
    cluster.agent(1).kill().unwrap();
    cluster.start_agent(1).unwrap();
    assert!(covers(9_100) && covers(30_000), "{}", reserved());
}

/// Many Services are there at the start. `/readyz` says 503 until the last of them answers.
#[test]
fn j7_ready_means_that_everything_is_programmed() {
    let mut cluster = Cluster::new(Options::new(Layout::PointToPoint)).unwrap();
    let mut all = Vec::new();
    for number in 0..400u32 {
        let mut service = Service::on(&cluster, &format!("j7-{number}"), 0, &["pod-1a", "pod-2a"]);
        let (high, low) = (number / 200 + 10, number % 200 + 1);
        service.cluster_ips = Pair::new(&format!("10.96.{high}.{low}"), &format!("fd00:10:96::{high}:{low}"));
        (service.node_port, service.load_balancer) = (None, None);
        cluster.manifests.write(&service.name, &service.documents()).unwrap();
        all.push(service);
    }
    for round in 0..2 {
        let log = std::env::temp_dir().join(format!("lb-j7-{}-{round}.log", std::process::id()));
        let agent = Agent::start(cluster.node(1), &log, &cluster.manifests, &[]).unwrap();
        let mut statuses = Vec::new();
        wait_for("the agent to be ready", Duration::from_secs(60), || {
            let status = agent.health("/readyz").map_or(0, |(status, _)| status);
            statuses.push(status);
            status == 200
        })
        .unwrap();
        // From this moment on every Service answers: the first call to each.
        let from = &cluster.node(1).place;
        for service in all.iter().step_by(23).chain(all.last()) {
            let outcome = from.call(&Call::tcp(service.cluster_ip(Family::V4)).timeout_ms(1_000)).unwrap();
            assert!(outcome.is_ok(), "{}: {outcome:?}", service.name);
        }
        assert!(statuses.iter().all(|s| matches!(s, 0 | 503 | 200)), "{statuses:?}");
        drop(agent);
        fs::remove_file(&log).ok();
    }
    cluster.agents.clear();
}

/// An agent that has not heard what there is says 503 for as long as that takes, although it lives.
#[test]
fn j7_an_agent_that_knows_nothing_yet_is_not_ready() {
    let cluster = Cluster::new(Options::new(Layout::PointToPoint)).unwrap();
    let node = cluster.node(1);
    let flags = ["--source=kube".to_owned(), "--master=https://127.0.0.1:9".to_owned()];
    let log = node.state_dir().with_extension("log");
    let agent = Agent::start(node, &log, &cluster.manifests, &flags).unwrap();
    let status = |path: &str| agent.health(path).map_or(0, |(status, _)| status);
    wait_for("the agent to live", Duration::from_secs(30), || status("/livez") == 200).unwrap();
    for _ in 0..10 {
        assert_eq!(status("/readyz"), 503);
        thread::sleep(Duration::from_millis(100));
    }
}

/// Value of a metric of a Service port on node1.
fn of_service(cluster: &Cluster, metric: &str, service: &str) -> f64 {
    let metrics = cluster.agents["node1"].metrics().unwrap();
    let start = format!("lb_service_{metric}_total{{service=\"{service}\"}} ");
    metrics.lines().filter_map(|l| l.strip_prefix(&start)).filter_map(|n| n.parse::<f64>().ok()).sum()
}

#[test]
fn j8_every_service_port_has_counters_of_its_own() {
    let cluster = CLUSTER.lock();
    let [one, other] =
        [101, 102].map(|number| service(&cluster, &format!("j8-{number}"), number, &["pod-2a"]));
    for s in [&one, &other] {
        cluster.serve(s).unwrap();
    }
    let records: Vec<String> = cluster.agents["node1"]
        .metrics()
        .unwrap()
        .lines()
        .filter_map(|l| l.strip_prefix("lb_service_connections_total{service=\"")?.split('"').next())
        .filter(|name| name.contains("j8-101") || name.contains("j8-102"))
        .map(str::to_owned)
        .collect();
    assert_eq!(records.len(), 8, "two Services, two protocols, two families: {records:?}");
    let values =
        |metric: &str| -> Vec<f64> { records.iter().map(|r| of_service(&cluster, metric, r)).collect() };
    let all = || ["connections", "packets", "bytes"].map(values);
    let before = all();
    // Seven UDP questions from a pod, one packet each way.
    for (kind, to) in one.frontends(cluster.node(1)).into_iter().filter(|(_, to)| to.is_ipv4()) {
        let answers = cluster.pod("pod-1b").calls(&Call::udp(to), 7).unwrap();
        answers.all_answered().unwrap_or_else(|e| panic!("{kind}: {e:#}"));
    }
    let after = all();
    // Three frontends, one record.
    let name = records
        .iter()
        .position(|r| r.contains("j8-101") && r.contains("udp") && r.contains("4"))
        .unwrap_or_else(|| panic!("no record of IPv4 and UDP: {records:?}"));
    for (metric, (before, after)) in before.iter().zip(&after).enumerate() {
        for record in 0..records.len() {
            let grown = after[record] - before[record];
            // Connections, packets (both ways); bytes are some.
            let right = match (record == name, metric) {
                (false, _) => grown == 0.0,
                (true, 0) => grown == 21.0,
                (true, 1) => grown == 42.0,
                (true, _) => grown > 42.0 * 28.0,
            };
            assert!(right, "{} {metric}: {grown}", records[record]);
        }
    }
}

/// Constant cost per packet: frontends are found by one exact lookup, not by a longest prefix.
#[test]
fn j9_frontends_backends_and_flows_are_in_no_trie() {
    const BPF_MAP_TYPE_HASH: u32 = 1;
    const BPF_MAP_TYPE_ARRAY: u32 = 2;
    const BPF_MAP_TYPE_LPM_TRIE: u32 = 11;
    let object = aya_obj::Object::parse(OBJECT).unwrap();
    let kind = |map: &str| object.maps.get(map).unwrap_or_else(|| panic!("no map {map}")).map_type();
    for map in [name::FRONTENDS4, name::FRONTENDS6, name::FLOWS4, name::FLOWS6] {
        assert_eq!(kind(map), BPF_MAP_TYPE_HASH, "{map}");
    }
    for map in [name::SERVICES, name::SLOTS, name::BACKENDS4, name::BACKENDS6] {
        assert_eq!(kind(map), BPF_MAP_TYPE_ARRAY, "{map}");
    }
    // The only tries: source ranges, which are ranges, and are asked only for Services that have some.
    let tries: Vec<_> = object
        .maps
        .iter()
        .filter(|(_, m)| m.map_type() == BPF_MAP_TYPE_LPM_TRIE)
        .map(|(n, _)| n.as_str())
        .collect();
    assert!(tries.iter().all(|n| n.starts_with("SOURCE_RANGES")), "{tries:?}");
}

/// Endpoint slices hold a hundred endpoints each, as the controller makes them.
fn slices(documents: &mut Vec<Value>, endpoints: usize) {
    let is_slice = |d: &&Value| d["kind"] == "EndpointSlice" && d["addressType"] == "IPv4";
    let template = documents.iter().find(is_slice).unwrap().clone();
    documents.retain(|d| d["kind"] != "EndpointSlice");
    for first in (0..endpoints).step_by(100) {
        let mut slice = template.clone();
        slice["metadata"]["name"] = format!("{}-{first}", slice["metadata"]["name"].as_str().unwrap()).into();
        let endpoint = |i: usize| {
            json!({
                "addresses": [format!("10.250.{}.{}", i / 250, i % 250 + 1)], "nodeName": "node1",
                "conditions": { "ready": true, "serving": true, "terminating": false },
            })
        };
        slice["endpoints"] = (first..(first + 100).min(endpoints)).map(endpoint).collect();
        documents.push(slice);
    }
}

#[test]
fn j9_one_service_may_have_five_thousand_endpoints() {
    const ENDPOINTS: usize = 5_000;
    const PORT: u16 = 8_500;
    let mut cluster = cluster(&[]).unwrap();
    let pod = cluster.pod("pod-1a").clone();
    // All of them real: addresses of one pod.
    cluster
        .node(1)
        .place
        .netns
        .ip(&[format!("route add 10.250.0.0/16 via {} dev veth1a", pod.addrs.v4)])
        .unwrap();
    pod.netns.ip(&["route add local 10.250.0.0/16 dev lo"]).unwrap();
    let any: SocketAddr = ([0, 0, 0, 0], PORT).into();
    let server = Server::start(&pod, "many", &[any]).unwrap();
    let mut service = Service::on(&cluster, "j9", 103, &["pod-1a"]);
    service.endpoints[0].port = PORT;
    let mut documents = service.documents();
    slices(&mut documents, ENDPOINTS);
    cluster.manifests.write("j9", &documents).unwrap();
    let listed = |cluster: &mut Cluster| -> usize {
        let shown = cluster.agent(1).command("backends", &["-o", "json"]).unwrap();
        let all: Vec<Value> = serde_json::from_str(&shown).unwrap();
        all.iter().filter(|b| b.to_string().contains("10.250.")).count()
    };
    wait_for("all endpoints to be programmed", Duration::from_secs(30), || listed(&mut cluster) >= ENDPOINTS)
        .unwrap();
    let to = service.cluster_ip(Family::V4);
    for from in [&cluster.client, cluster.pod("pod-1b"), &cluster.node(1).place] {
        let answers = from.calls(&Call::new(Proto::Tcp, to), 500).unwrap();
        let counts = answers.all_answered().unwrap_or_else(|e| panic!("{}: {e:#}", from.name));
        assert_eq!(counts.into_iter().collect::<Vec<_>>(), [("many", 500)]);
    }
    drop(server);
    // They go as they came.
    service.endpoints[0].port = POD_PORT;
    cluster.manifests.write("j9", &service.documents()).unwrap();
    wait_for("the endpoints to be gone", Duration::from_secs(30), || listed(&mut cluster) == 0).unwrap();
    check(&lines(&sides(&cluster), &[("ClusterIP", to)], |_, _| Some(Want::From(&["pod-1a"]))));
}

/// An id of 16 bits would take the first Service for the second.
#[test]
fn j9_service_ids_have_more_than_sixteen_bits() {
    let run = || -> anyhow::Result<()> {
        let mut lab = Lab::with(lab::Options { service_entries: 1 << 17, ..lab::Options::default() })?;
        let external = external(&mut lab)?;
        for n in nets() {
            let ports = [(1, 8_001), (65_536 + 1, 8_002), (131_071, 8_003)];
            for (id, port) in ports {
                let backend = lab.backend((n.pod, port), true)?;
                lab.set_service(id, &[backend], &[])?;
                lab.frontend((n.vip, port - 8_000), proto::UDP, id, flags::KIND_CLUSTER_IP)?;
            }
            for (_, port) in ports {
                let request = udp((n.client, 1_000), (n.vip, port - 8_000));
                let (action, out) = lab.run(Hook::Ingress, external, &request.bytes())?;
                assert_eq!(action, Action::Pass);
                assert_eq!(out, request.between((n.client, 1_000), (n.pod, port)).bytes(), "{port}");
            }
        }
        Ok(())
    };
    // The lab takes its thread along to another namespace.
    thread::spawn(run).join().unwrap().unwrap();
}

/// Status of a GET from outside.
fn status(from: &Place, at: SocketAddr) -> Option<u16> {
    let ask = || -> Option<u16> {
        let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(1)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
        write!(stream, "GET / HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        text.split(' ').nth(1)?.parse().ok()
    };
    from.netns.run(ask).unwrap()
}

/// Who announces an address for a Service with eTP Local asks the nodes for health: those without ready endpoints say no.
#[test]
fn j6_nodes_without_ready_endpoints_say_so_to_those_who_announce() {
    const CHECK: u16 = 32_104;
    let cluster = CLUSTER.lock();
    let mut service = service(&cluster, "j6", 104, &["pod-1a"])
        .with("externalTrafficPolicy", json!("Local"))
        .with("healthCheckNodePort", json!(CHECK));
    let expect = |service: &Service, wanted: [u16; 2]| {
        cluster.manifests.write("j6", &service.documents()).unwrap();
        let mut last = Vec::new();
        let waited = wait_for("the nodes to say so", SOON, || {
            let nodes = cluster.nodes.iter();
            let asked = nodes
                .flat_map(|n| Family::BOTH.map(|f| status(&cluster.client, n.place.addrs.socket(f, CHECK))));
            last = asked.collect();
            last.iter().zip(wanted.iter().flat_map(|w| [w, w])).all(|(is, wanted)| *is == Some(*wanted))
        });
        waited.unwrap_or_else(|e| panic!("{e:#}: {last:?}, not {wanted:?}"));
    };
    expect(&service, [200, 503]);
    // The one that drains serves, and is not announced.
    (service.endpoints[0].ready, service.endpoints[0].terminating) = (false, true);
    expect(&service, [503, 503]);
    let to: Vec<_> = frontends(&service, cluster.node(1))
        .into_iter()
        .filter(|(kind, _)| *kind == "LoadBalancer")
        .collect();
    check(&lines(&[&cluster.client], &to, |_, _| Some(Want::From(&["pod-1a"]))));
    service.endpoints = vec![Endpoint::pod(cluster.pod("pod-2a"))];
    expect(&service, [503, 200]);
}

//! UDP: senders that keep their port, as in Kubernetes' e2e conntrack.go.

use std::thread;

use lb_tests::{place::Family, traffic::Server};
use serde_json::json;

use super::*;

/// Sockets on every side, on every kind of address, in both families, with and without connect.
fn clients(cluster: &Cluster, service: &Service) -> Vec<Client> {
    let sides = [&cluster.client, cluster.pod("pod-1b"), &cluster.node(1).place];
    let mut clients = Vec::new();
    for from in sides {
        for (kind, to) in service.frontends(cluster.node(1)) {
            for proto in [Proto::Udp, Proto::UdpUnconnected] {
                let port = 20_000 + clients.len() as u16;
                clients.push(Client::open(from, kind, proto, to, port));
            }
        }
    }
    clients
}

/// Asks all of them at once.
fn each(clients: &mut [Client], ask: impl Fn(&mut Client) + Sync) {
    let ask = &ask;
    thread::scope(|scope| {
        let asking: Vec<_> = clients.iter_mut().map(|c| scope.spawn(move || ask(c))).collect();
        for a in asking {
            a.join().unwrap_or_else(|e| std::panic::resume_unwind(e));
        }
    });
}

fn move_to(clients: &mut [Client], pod: &str) {
    each(clients, |c| {
        c.wait_for(pod);
        c.stays_on(pod);
    });
}

#[test]
fn i1_senders_move_when_their_backend_is_replaced() {
    let cluster = CLUSTER.lock();
    let mut service = Service::on(&cluster, "replaced", 70, &["pod-1a"]);
    cluster.serve(&service).unwrap();
    let mut clients = clients(&cluster, &service);
    // IPv4 through an IPv6 socket.
    let mapped = SocketAddr::new(service.cluster_ips.v4.to_ipv6_mapped().into(), service.port);
    clients.push(Client::open(&cluster.node(1).place, "ClusterIP", Proto::Udp, mapped, 20_999));
    move_to(&mut clients, "pod-1a");
    // The old ones live on: they would answer.
    for pod in ["pod-2a", "pod-2b", "pod-1a"] {
        lead_to(&cluster, &mut service, &[pod]);
        move_to(&mut clients, pod);
    }
    for c in &clients {
        // Only sockets that a hook connected have to be made anew: unconnected ones choose with each datagram.
        assert_eq!(c.reopened, if c.is_hooked() { 3 } else { 0 }, "{}", c.what);
    }
}

#[test]
fn i1_a_terminating_backend_keeps_its_senders_until_it_stops_serving() {
    let cluster = CLUSTER.lock();
    // Both on the other node: with one of this node's own, the Local set would change in the end.
    let mut service = Service::on(&cluster, "drained", 71, &["pod-2a"]);
    cluster.serve(&service).unwrap();
    let mut clients = clients(&cluster, &service);
    // Unconnected sockets behind the hooks have no flow: each datagram goes to a ready one.
    clients.retain(|c| c.place.name != "node1" || c.call.proto == Proto::Udp);
    move_to(&mut clients, "pod-2a");
    service.endpoints.push(Endpoint::pod(cluster.pod("pod-2b")));
    (service.endpoints[0].ready, service.endpoints[0].terminating) = (false, true);
    program(&cluster, &service);
    let new = Call::udp(service.cluster_ip(Family::V4));
    for from in [&cluster.client, &cluster.node(1).place] {
        let is_new = |o: &Outcome| o.as_ref().is_ok_and(|a| a.by == "pod-2b");
        cluster.wait_for_calls("new senders to go elsewhere", from, &new, is_new).unwrap();
    }
    each(&mut clients, |c| c.stays_on("pod-2a"));
    // Nothing changes for new flows any more, so the maps stay as they are.
    service.endpoints.remove(0);
    program(&cluster, &service);
    move_to(&mut clients, "pod-2b");
}

#[test]
fn i2_senders_survive_a_time_without_backends() {
    let cluster = CLUSTER.lock();
    let mut service = Service::on(&cluster, "cycled", 72, &["pod-1a"]);
    cluster.serve(&service).unwrap();
    let mut clients = clients(&cluster, &service);
    move_to(&mut clients, "pod-1a");
    for pod in ["pod-2a", "pod-1a"] {
        lead_to(&cluster, &mut service, &[]);
        each(&mut clients, |c| {
            // They go on sending all the time: that kept kube-proxy's entries alive (kubernetes #139628).
            wait_for(&format!("nobody to answer {}", c.what), SOON, || c.ask().is_err()).unwrap();
            for _ in 0..3 {
                assert!(c.ask().is_err(), "{}", c.what);
            }
        });
        lead_to(&cluster, &mut service, &[pod]);
        move_to(&mut clients, pod);
    }
}

#[test]
fn i2_senders_reach_a_backend_that_becomes_ready_later() {
    let cluster = CLUSTER.lock();
    let mut service = Service::on(&cluster, "late", 73, &["pod-2a"]);
    cluster.serve(&service).unwrap();
    (service.endpoints[0].ready, service.endpoints[0].serving) = (false, false);
    program(&cluster, &service);
    let probe = Call::udp(service.cluster_ip(Family::V4)).timeout_ms(NO_ANSWER_MS);
    for number in [1, 2] {
        let from = &cluster.node(number).place;
        cluster.wait_for_calls("nobody to be ready", from, &probe, |o| o.is_err()).unwrap();
    }
    let mut clients = clients(&cluster, &service);
    each(&mut clients, |c| {
        for _ in 0..3 {
            assert!(c.ask().is_err(), "{}", c.what);
        }
    });
    (service.endpoints[0].ready, service.endpoints[0].serving) = (true, true);
    program(&cluster, &service);
    move_to(&mut clients, "pod-2a");
}

#[test]
fn i2_senders_survive_cycling_with_policy_local() {
    let cluster = CLUSTER.lock();
    let mut service =
        Service::on(&cluster, "local", 74, &["pod-1a"]).with("internalTrafficPolicy", json!("Local"));
    // Ready on the other node too: the Cluster set is never empty.
    lead_to(&cluster, &mut service, &["pod-1a", "pod-2a"]);
    let to = service.cluster_ip(Family::V4);
    let sides = [cluster.pod("pod-1b"), &cluster.node(1).place];
    let mut clients: Vec<Client> = sides
        .iter()
        .flat_map(|from| [(from, Proto::Udp, 21_000), (from, Proto::UdpUnconnected, 21_001)])
        .map(|(from, proto, port)| {
            let call = Call::new(proto, to).timeout_ms(NO_ANSWER_MS);
            cluster.wait_for_calls("the Service", from, &call, Result::is_ok).unwrap();
            Client::open(from, "ClusterIP", proto, to, port)
        })
        .collect();
    move_to(&mut clients, "pod-1a");
    lead_to(&cluster, &mut service, &["pod-2a"]);
    each(&mut clients, |c| {
        wait_for(&format!("nobody to answer {}", c.what), SOON, || c.ask().is_err()).unwrap();
    });
    lead_to(&cluster, &mut service, &["pod-1a", "pod-2a"]);
    move_to(&mut clients, "pod-1a");
}

#[test]
fn i3_senders_follow_a_change_of_the_target_port() {
    let cluster = CLUSTER.lock();
    let mut service = Service::on(&cluster, "ported", 75, &["pod-1a"]);
    cluster.serve(&service).unwrap();
    let pod = cluster.pod("pod-1a");
    let other = Family::BOTH.map(|f| pod.addrs.socket(f, 8181));
    let _server = Server::start(pod, "other-port", &other).unwrap();
    let mut clients = clients(&cluster, &service);
    move_to(&mut clients, "pod-1a");
    service.endpoints[0].port = 8181;
    program(&cluster, &service);
    move_to(&mut clients, "other-port");
}

#[test]
fn i2_senders_leave_a_backend_that_died() {
    let cluster = cluster(&[]).unwrap();
    let mut service = Service::on(&cluster, "died", 76, &["pod-1a"]);
    cluster.serve(&service).unwrap();
    let mut clients = clients(&cluster, &service);
    move_to(&mut clients, "pod-1a");
    take_away(&cluster, "pod-1a");
    // First the node is lost, then its endpoints are noticed to be: senders go on meanwhile.
    each(&mut clients, |c| assert!(c.ask().is_err(), "{}", c.what));
    lead_to(&cluster, &mut service, &["pod-2a"]);
    move_to(&mut clients, "pod-2a");
}

#[test]
fn i1_senders_move_although_the_agent_was_away_when_their_backend_went() {
    let mut cluster = cluster(&[]).unwrap();
    let mut service = Service::on(&cluster, "unseen", 80, &["pod-1a"]);
    cluster.serve(&service).unwrap();
    let mut clients = clients(&cluster, &service);
    move_to(&mut clients, "pod-1a");
    cluster.agent(1).kill().unwrap();
    lead_to(&cluster, &mut service, &["pod-2a"]);
    each(&mut clients, |c| c.stays_on("pod-1a"));
    cluster.start_agent(1).unwrap();
    move_to(&mut clients, "pod-2a");
}

#[test]
fn i1_a_process_that_waits_for_an_answer_hears_that_there_will_be_none() {
    let cluster = cluster(&[]).unwrap();
    let mut service = Service::on(&cluster, "waiting", 77, &["pod-2a"]);
    cluster.serve(&service).unwrap();
    let host = &cluster.node(1).place;
    let call = Call::udp(service.cluster_ip(Family::V4)).timeout_ms(30_000);
    let mut session = host.session(&call).unwrap();
    assert_eq!(session.ask().unwrap().unwrap().by, "pod-2a");
    take_away(&cluster, "pod-2a");
    let sent = || {
        let counters = host.netns.exec("cat /proc/net/snmp").unwrap();
        // The line of names comes first; the fourth number is OutDatagrams.
        let udp = counters.lines().filter(|l| l.starts_with("Udp:")).nth(1).unwrap_or_default();
        udp.split_whitespace().nth(4).and_then(|n| n.parse::<u64>().ok()).unwrap()
    };
    let before = sent();
    let outcome = thread::scope(|scope| {
        let waiting = scope.spawn(|| session.ask().unwrap());
        wait_for("the question to be sent", SOON, || sent() > before).unwrap();
        lead_to(&cluster, &mut service, &["pod-1b"]);
        waiting.join().unwrap()
    });
    assert_eq!(outcome.unwrap_err().kind, "ConnectionAborted");
    assert_eq!(host.call(&call).unwrap().unwrap().by, "pod-1b");
}

#[test]
fn i1_what_belongs_to_others_is_left_alone() {
    let cluster = CLUSTER.lock();
    let mut service = Service::on(&cluster, "leaving", 78, &["pod-1a"]);
    let sharing = Service::on(&cluster, "sharing", 79, &["pod-1a"]);
    cluster.serve(&service).unwrap();
    cluster.serve(&sharing).unwrap();
    let (host, pod) = (&cluster.node(1).place, cluster.pod("pod-1b"));
    // Connection tracking, as others' rules bring it about.
    let rules =
        ["add table inet others", "add chain inet others c { type filter hook forward priority 0 ; }"];
    for rule in rules.into_iter().chain(["add rule inet others c ct state established accept"]) {
        host.netns.exec(&format!("nft {rule}")).unwrap();
    }
    let direct = cluster.pod("pod-1a").addrs.socket(Family::V4, 8080);
    let mut mover = Client::open(host, "ClusterIP", Proto::Udp, service.cluster_ip(Family::V4), 22_000);
    let mut stayers = [
        // Straight to the backend.
        Client::open(host, "pod", Proto::Udp, direct, 22_001),
        Client::open(pod, "pod", Proto::Udp, direct, 22_002),
        // Through another Service.
        Client::open(host, "ClusterIP", Proto::Udp, sharing.cluster_ip(Family::V4), 22_003),
        Client::open(pod, "ClusterIP", Proto::Udp, sharing.cluster_ip(Family::V4), 22_004),
    ];
    mover.wait_for("pod-1a");
    each(&mut stayers, |c| c.wait_for("pod-1a"));
    let tracked = || {
        let table = host.netns.exec("cat /proc/net/nf_conntrack").unwrap();
        table.lines().filter(|l| l.contains("sport=22002 dport=8080")).count()
    };
    let flows_to_sharing =
        || flows(cluster.node(1), |frontend, _, _| frontend == sharing.cluster_ip(Family::V4));
    assert_eq!((tracked(), flows_to_sharing()), (1, 1));
    lead_to(&cluster, &mut service, &["pod-2a"]);
    mover.wait_for("pod-2a");
    assert_eq!(mover.reopened, 1);
    assert_eq!((tracked(), flows_to_sharing()), (1, 1));
    each(&mut stayers, |c| c.stays_on("pod-1a"));
    assert!(stayers.iter().all(|c| c.reopened == 0));
    host.netns.exec("nft delete table inet others").unwrap();
}

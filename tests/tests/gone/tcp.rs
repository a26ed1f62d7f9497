//! TCP.

use std::{thread, time::Instant};

use lb_tests::place::Family;

use super::*;

/// Connections from every side to every address of the Service, in both families, each of which has had an answer.
fn connect(cluster: &Cluster, service: &Service) -> Vec<(String, Session)> {
    let mut sessions = Vec::new();
    for from in [&cluster.client, cluster.pod("pod-1b"), &cluster.node(1).place] {
        for (kind, to) in service.frontends(cluster.node(1)) {
            let mut session = from.session(&Call::tcp(to).timeout_ms(1000)).unwrap();
            let what = format!("{} -> {kind} {to}", from.name);
            session.ask().unwrap().unwrap_or_else(|e| panic!("{what}: {e:?}"));
            sessions.push((what, session));
        }
    }
    sessions
}

/// Asks until the connection ends, and tells how.
fn end_of(what: &str, session: &mut Session) -> String {
    let mut last = None;
    wait_for(&format!("the end of {what}"), NOTICED, || {
        let failure = session.ask().unwrap().err();
        let ended = failure.as_ref().is_some_and(|f| !f.is_timeout());
        last = failure;
        ended
    })
    .unwrap_or_else(|e| panic!("{e:#}; last: {last:?}"));
    last.map(|f| f.kind).unwrap_or_default()
}

/// Asks them all until their connections end, as they should for clients of a dead backend.
fn expect_resets(sessions: &mut [(String, Session)]) {
    let ends: Vec<_> = thread::scope(|scope| {
        let asking: Vec<_> = sessions
            .iter_mut()
            .map(|(what, session)| scope.spawn(move || (what.clone(), end_of(what, session))))
            .collect();
        asking.into_iter().map(|a| a.join().unwrap()).collect()
    });
    for (what, end) in ends {
        // Sockets of the node speak to the backend directly: the agent ends them, not a packet.
        let expected = if what.starts_with("node") { "ConnectionAborted" } else { "ConnectionReset" };
        assert_eq!(end, expected, "{what}");
    }
}

#[test]
fn j2_clients_of_backends_that_are_gone_for_good_get_a_reset() {
    let cluster = cluster(&[]).unwrap();
    // One backend beside the clients, one whose packets are in transit.
    let mut here = Service::on(&cluster, "here", 60, &["pod-1a"]);
    let mut there = Service::on(&cluster, "there", 61, &["pod-2a"]);
    for service in [&here, &there] {
        cluster.serve(service).unwrap();
    }
    let mut sessions = connect(&cluster, &here);
    sessions.extend(connect(&cluster, &there));
    take_away(&cluster, "pod-1a");
    take_away(&cluster, "pod-2a");
    lead_to(&cluster, &mut here, &["pod-1b"]);
    // Of this one nothing at all is left.
    there.endpoints.clear();
    cluster.manifests.remove("there").unwrap();
    expect_resets(&mut sessions);
    let again = cluster.client.call(&Call::tcp(here.cluster_ip(Family::V4))).unwrap();
    assert_eq!(again.unwrap().by, "pod-1b");
}

#[test]
fn j2_the_mark_is_on_the_entries_of_those_clients_alone() {
    let cluster = cluster(&[]).unwrap();
    let mut service = Service::on(&cluster, "marks", 62, &["pod-1a"]);
    let other = Service::on(&cluster, "others", 63, &["pod-1b"]);
    cluster.serve(&service).unwrap();
    cluster.serve(&other).unwrap();
    let to = service.cluster_ip(Family::V4);
    let ask = |to| {
        let mut session = cluster.client.session(&Call::tcp(to).timeout_ms(1000)).unwrap();
        session.ask().unwrap().unwrap();
        session
    };
    let (mut asking, mut silent, mut others) = (ask(to), ask(to), ask(other.cluster_ip(Family::V4)));
    take_away(&cluster, "pod-1a");
    lead_to(&cluster, &mut service, &["pod-2a"]);
    wait_for("the mark", NOTICED, || {
        let _ = asking.ask().unwrap();
        others.ask().unwrap().unwrap();
        marked(cluster.node(1), &service) > 0
    })
    .unwrap();
    assert_eq!(marked(cluster.node(1), &service), 1, "one of the clients has said nothing");
    assert_eq!(marked(cluster.node(1), &other), 0);
    wait_for("the other mark", NOTICED, || {
        let _ = silent.ask().unwrap();
        marked(cluster.node(1), &service) == 2
    })
    .unwrap();
}

#[test]
fn j2_backends_that_went_while_the_agent_was_away_are_found_too() {
    let mut cluster = cluster(&[]).unwrap();
    let mut service = Service::on(&cluster, "unseen", 67, &["pod-1a"]);
    cluster.serve(&service).unwrap();
    let mut sessions = connect(&cluster, &service);
    cluster.agent(1).kill().unwrap();
    take_away(&cluster, "pod-1a");
    lead_to(&cluster, &mut service, &["pod-1b"]);
    cluster.start_agent(1).unwrap();
    expect_resets(&mut sessions);
}

#[test]
fn j2_off_leaves_clients_to_their_own_timeouts() {
    let cluster = cluster(&["--reset-gone-backends=off"]).unwrap();
    let mut service = Service::on(&cluster, "off", 64, &["pod-1a"]);
    cluster.serve(&service).unwrap();
    let mut sessions = connect(&cluster, &service);
    take_away(&cluster, "pod-1a");
    lead_to(&cluster, &mut service, &["pod-1b"]);
    // Longer than it takes where it is on: that test ends in a few seconds.
    let end = Instant::now() + Duration::from_secs(8);
    while Instant::now() < end {
        thread::scope(|scope| {
            for (what, session) in &mut sessions {
                scope.spawn(move || {
                    let failure = session.ask().unwrap().unwrap_err();
                    assert_ne!(failure.kind, "ConnectionReset", "{what}");
                    assert_ne!(failure.kind, "ConnectionAborted", "{what}");
                });
            }
        });
    }
    assert_eq!(marked(cluster.node(1), &service), 0);
}

/// Asks each of them, now and then, for longer than it takes to find out that a backend is gone.
fn go_on(cluster: &Cluster, service: &Service, sessions: &mut [(String, Session)], pod: &str) {
    let end = Instant::now() + Duration::from_secs(6);
    let mut pauses = [30, 300, 1700].into_iter().cycle();
    while Instant::now() < end {
        for (what, session) in &mut *sessions {
            let outcome = session.ask().unwrap();
            assert_eq!(outcome.as_ref().map(|a| a.by.as_str()), Ok(pod), "{what}");
        }
        // Quiet times too: the first packet after one is unanswered for a moment.
        thread::sleep(Duration::from_millis(pauses.next().unwrap_or_default()));
    }
    assert_eq!(marked(cluster.node(1), service), 0);
}

#[test]
fn i4_a_pod_that_only_stops_being_an_endpoint_keeps_its_connections() {
    let cluster = CLUSTER.lock();
    let mut service = Service::on(&cluster, "leaves", 65, &["pod-1a"]);
    cluster.serve(&service).unwrap();
    let mut sessions = connect(&cluster, &service);
    lead_to(&cluster, &mut service, &["pod-2b"]);
    cluster
        .wait_for_calls("the new backend", &cluster.client, &Call::tcp(service.cluster_ip(Family::V4)), |o| {
            o.as_ref().is_ok_and(|a| a.by == "pod-2b")
        })
        .unwrap();
    go_on(&cluster, &service, &mut sessions, "pod-1a");
    // Not even the end of the Service ends them.
    cluster.manifests.remove("leaves").unwrap();
    go_on(&cluster, &service, &mut sessions, "pod-1a");
}

#[test]
fn i4_connections_to_a_terminating_backend_go_on() {
    let cluster = CLUSTER.lock();
    let mut service = Service::on(&cluster, "terminates", 66, &["pod-1a", "pod-2b"]);
    service.endpoints.truncate(1);
    cluster.serve(&service).unwrap();
    let mut sessions = connect(&cluster, &service);
    service.endpoints.push(Endpoint::pod(cluster.pod("pod-2b")));
    let leaving = &mut service.endpoints[0];
    (leaving.ready, leaving.terminating) = (false, true);
    program(&cluster, &service);
    cluster
        .wait_for_calls("the new backend", &cluster.client, &Call::tcp(service.cluster_ip(Family::V4)), |o| {
            o.as_ref().is_ok_and(|a| a.by == "pod-2b")
        })
        .unwrap();
    go_on(&cluster, &service, &mut sessions, "pod-1a");
}

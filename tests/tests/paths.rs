//! Packets on hard paths: many bytes, small links, hosts with firewalls.

use lb_tests::{
    cluster::{Cluster, Layout, Options, POD_PORT},
    manifests::{Service, nodes},
    place::Family,
    shared::{SOON, Shared},
    traffic::Call,
    wait_for,
};

static CLUSTER: Shared = Shared::new(|| {
    let mut cluster = Cluster::new(Options::new(Layout::Bridge))?;
    cluster.manifests.write("nodes", &nodes(cluster.nodes.iter().map(|n| &n.place)))?;
    cluster.start_agents()?;
    Ok(cluster)
});

#[test]
fn fifty_megabytes_pass_unchanged_in_both_directions() {
    let cluster = CLUSTER.lock();
    for (number, pod) in [(30, "pod-1a"), (31, "pod-2a")] {
        let service = Service::on(&cluster, &format!("bulk-{number}"), number, &[pod]);
        cluster.serve(&service).unwrap();
        for from in [&cluster.client, cluster.pod("pod-1b"), &cluster.node(1).place] {
            for (kind, to) in service.frontends(cluster.node(1)) {
                let transfer = from.bulk(to, 50_000_000).unwrap();
                assert!(transfer.is_ok(), "{} -> {kind} {to} ({pod}): {transfer:?}", from.name);
            }
        }
    }
}

/// The last link to the client takes 1400 bytes. The router tells so, by an ICMP error about a packet that came from the
/// Service's address and was sent by a pod: it is the pod that must hear of it.
#[test]
fn a_small_link_to_the_client_is_discovered() {
    let cluster = CLUSTER.lock();
    // With the kernel's own metrics: another one would make a second route, which nothing takes.
    let links = ["203.0.113.0/24 metric 0", "2001:db8:203::/64 metric 256"];
    let set = |mtu: &str| {
        cluster
            .router
            .ip(&links.map(|link| format!("route replace {link} dev out0 proto kernel {mtu}")))
            .unwrap();
    };
    set("mtu lock 1400");
    let mut failed = Vec::new();
    for (number, pod) in [(33, "pod-1a"), (34, "pod-2a")] {
        let service = Service::on(&cluster, &format!("mtu-{number}"), number, &[pod]);
        cluster.serve(&service).unwrap();
        for (kind, to) in service.frontends(cluster.node(1)) {
            if let Err(e) = cluster.client.bulk(to, 3_000_000).unwrap() {
                failed.push(format!("{kind} {to} ({pod}): {}", e.message));
            }
        }
    }
    set("");
    assert!(failed.is_empty(), "{failed:#?}");
}

/// Two pods on one bridge, one of which reaches the other through a Service: the node routes such packets back out of the
/// device that they came by, and tells the sender that there is a shorter way (ICMP redirect). Translated like other
/// ICMP errors, that would say "the Service's address is at this pod", and lead all its packets there. Linux NAT drops
/// redirects about what it translated for the same reason (nf_nat_icmp_reply_translation).
#[test]
fn a_redirect_does_not_tie_a_service_to_one_pod() {
    // A cluster of its own: the kernel sends a host few redirects, ever more seldom.
    let mut cluster = Cluster::new(Options::new(Layout::Bridge)).unwrap();
    cluster.start_agents().unwrap();
    let service = Service::on(&cluster, "redirect", 36, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    let (from, neighbour) = (cluster.pod("pod-1b"), cluster.pod("pod-1a"));
    let call = |family| Call::udp(service.cluster_ip(family)).timeout_ms(300);
    let route = |family| {
        let route = from.netns.exec(&format!("ip route get {}", service.cluster_ips.ip(family))).unwrap();
        let redirected = route.contains("redirected");
        (route, redirected)
    };
    // A redirect only counts if the new gateway is a known neighbour, and for the sockets that are open then.
    from.call(&Call::udp(neighbour.addrs.socket(Family::V4, POD_PORT))).unwrap().unwrap();
    let node = &cluster.node(1).place.netns;
    wait_for("the node to send redirects", SOON, || {
        from.calls(&call(Family::V4), 10).unwrap();
        let counter = node.exec("nstat -asz IcmpOutRedirects").unwrap();
        // Two, or one that took effect: the node then sees no more such packets.
        counter.split_whitespace().any(|word| word.parse::<u64>().is_ok_and(|n| n >= 2))
            || route(Family::V4).1
    })
    .unwrap();
    for family in Family::BOTH {
        let answers = from.calls(&call(family), 40).unwrap();
        let (route, redirected) = route(family);
        assert!(!redirected, "{family:?}: {route}");
        assert_eq!(answers.all_answered().unwrap().len(), 2, "{family:?}");
    }
}

/// Docker sets this policy. Services are served all the same, or the agent says why not.
#[test]
fn a_forward_policy_of_drop_is_survived_or_reported() {
    let mut cluster = CLUSTER.lock();
    let service = Service::on(&cluster, "firewall", 35, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    let node = cluster.node(1).place.netns.clone();
    for family in ["ip", "ip6"] {
        node.exec(&format!("nft add table {family} filter")).unwrap();
        node.exec(&format!(
            "nft add chain {family} filter FORWARD {{ type filter hook forward priority 0 ; policy drop ; }}"
        ))
        .unwrap();
    }
    // The agent looks at start.
    cluster.agent(1).kill().unwrap();
    let restarted = cluster.start_agent(1);
    let mut unanswered = 0;
    for (_, to) in service.frontends(cluster.node(1)) {
        for from in [&cluster.client, cluster.pod("pod-1b")] {
            unanswered += from.calls(&Call::tcp(to).timeout_ms(500), 6).unwrap().failures().len();
        }
    }
    for family in ["ip", "ip6"] {
        node.exec(&format!("nft delete table {family} filter")).unwrap();
    }
    restarted.unwrap();
    let log = cluster.agent(1).log();
    let said = log.lines().find(|l| l.contains("FORWARD"));
    assert!(unanswered == 0 || said.is_some(), "{unanswered} calls failed, and the agent does not say why");
    println!("{unanswered} calls failed; the agent: {said:?}");
}

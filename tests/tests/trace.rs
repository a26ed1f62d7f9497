//! `--trace-flows`: log lines from inside the kernel programs.

use lb_tests::{
    SOON,
    cluster::{Cluster, Layout, Options},
    manifests::Service,
    place::Family,
    traffic::Call,
    wait_for,
};

#[test]
fn new_flows_and_refusals_are_logged_with_their_addresses() {
    let mut cluster = Cluster::new(Options::new(Layout::PointToPoint).flag("--trace-flows=on")).unwrap();
    cluster.start_agents().unwrap();
    let (service, nobody) =
        (Service::on(&cluster, "trace", 8, &["pod-2a"]), Service::on(&cluster, "nobody", 9, &[]));
    cluster.serve(&service).unwrap();
    cluster.manifests.write("nobody", &nobody.documents()).unwrap();
    for family in Family::BOTH {
        let (from, to) = (cluster.pod("pod-1a"), service.cluster_ip(family));
        from.call(&Call::tcp(to)).unwrap().unwrap();
        let (client, backend) = (from.addrs.ip(family), cluster.pod("pod-2a").addrs.ip(family));
        let refused = nobody.cluster_ip(family);
        let log = cluster.agents["node1"].log();
        assert!(!log.contains(&format!("{refused}")), "nothing was sent there yet");
        wait_for("a refusal", SOON, || {
            cluster.pod("pod-1a").call(&Call::tcp(refused).timeout_ms(300)).unwrap().is_err()
                && cluster.agents["node1"].log().contains(&format!(
                    "to {} port {}",
                    refused.ip(),
                    refused.port()
                ))
        })
        .unwrap();
        for line in [
            format!("new flow, protocol 6: {client} port "),
            format!("to {} port {}", to.ip(), to.port()),
            format!("goes to {backend} port 8080 as {client} port "),
        ] {
            wait_for(&line, SOON, || cluster.agents["node1"].log().contains(&line)).unwrap();
        }
    }
    cluster.finish().unwrap();
}

//! The demo: a small cluster, one agent per node on the manifests in examples/, real connections from everywhere to
//! every kind of Service address, and what became of them.

use std::{collections::BTreeSet, net::IpAddr, path::Path, process::ExitCode, time::Instant};

use anyhow::Context as _;
use lb_tests::{
    cluster::{Cluster, Layout, Options},
    expect::mistakes,
    place::{Family, Pair, Place},
    traffic::{Answers, Call, Proto},
};

/// Connections per line of the table: enough that a pod which is never chosen is a mistake and not bad luck
/// (4 pods: once in ten million lines).
const CALLS: usize = 60;

/// The addresses in examples/service.yaml.
const PORT: u16 = 80;
const NODE_PORT: u16 = 30080;
const CLUSTER_IPS: (&str, &str) = ("10.96.0.80", "fd00:10:96::80");
const LOAD_BALANCER: (&str, &str) = ("192.0.2.80", "2001:db8:192::80");

fn main() -> ExitCode {
    match demo() {
        Ok(0) => {
            println!("\nEverything as it should be. All taken down again.");
            ExitCode::SUCCESS
        }
        Ok(wrong) => {
            eprintln!("\n{wrong} lines are wrong (marked with !).");
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("demo: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Builds the cluster, makes all connections, takes the cluster down. Gives the number of wrong lines.
fn demo() -> anyhow::Result<usize> {
    let start = Instant::now();
    let mut cluster = Cluster::new(Options::new(Layout::PointToPoint))?;
    cluster.manifests.copy_from(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../examples")))?;
    cluster.start_agents()?;
    println!(
        "client ── router ─┬─ node1 ── pod-1a, pod-1b       {} namespaces, one agent per node,\n                  \
         └─ node2 ── pod-2a, pod-2b       ready after {:.1} s",
        cluster.places().count() + 1,
        start.elapsed().as_secs_f64()
    );
    let node1 = cluster.node(1).place.addrs;
    let frontends = [
        ("ClusterIP", Pair::new(CLUSTER_IPS.0, CLUSTER_IPS.1), PORT),
        ("NodePort on node1", node1, NODE_PORT),
        ("LoadBalancer", Pair::new(LOAD_BALANCER.0, LOAD_BALANCER.1), PORT),
    ];
    let mut wrong = 0;
    for (kind, addrs, port) in frontends {
        wrong += frontend(&cluster, kind, addrs, port)?;
    }
    if wrong > 0 {
        eprintln!("{}", cluster.logs());
    }
    cluster.finish().context("taking the cluster down")?;
    Ok(wrong)
}

/// One block of the table: connections to one kind of address.
fn frontend(cluster: &Cluster, kind: &str, addrs: Pair, port: u16) -> anyhow::Result<usize> {
    let pods: Vec<&Place> = cluster.nodes.iter().flat_map(|n| &n.pods).collect();
    println!("\n{kind}: {} and {}", addrs.socket(Family::V4, port), addrs.socket(Family::V6, port));
    println!("  from    protocol  pod-1a pod-1b pod-2a pod-2b  source address that the pods saw");
    let mut wrong = 0;
    for from in [cluster.pod("pod-1a"), &cluster.node(1).place, &cluster.client] {
        for proto in [Proto::Tcp, Proto::Udp] {
            for family in Family::BOTH {
                let to = addrs.socket(family, port);
                let answers = from.calls(&Call::new(proto, to), CALLS)?;
                let mistakes = mistakes(cluster, &pods, cluster.node(1), from, to, &answers);
                let mark = if mistakes.is_empty() { ' ' } else { '!' };
                println!("{mark} {}", line(from, proto, family, &pods, &answers));
                mistakes.iter().for_each(|m| println!("    {m}"));
                wrong += usize::from(!mistakes.is_empty());
            }
        }
    }
    Ok(wrong)
}

fn line(from: &Place, proto: Proto, family: Family, pods: &[&Place], answers: &Answers) -> String {
    let counts = answers.counts();
    let protocol = format!(
        "{} {}",
        if proto == Proto::Tcp { "TCP" } else { "UDP" },
        if family == Family::V4 { "IPv4" } else { "IPv6" }
    );
    let columns: String =
        pods.iter().map(|p| format!(" {:>6}", counts.get(p.name.as_str()).unwrap_or(&0))).collect();
    format!("{:<7} {protocol:<9}{columns}  {}", from.name, sources(pods, answers))
}

/// The source addresses, each with the pods that saw it where not all saw the same.
fn sources(pods: &[&Place], answers: &Answers) -> String {
    let seen: BTreeSet<IpAddr> = answers.0.iter().flatten().map(|a| a.seen.ip()).collect();
    if let [only] = seen.iter().collect::<Vec<_>>()[..] {
        return only.to_string();
    }
    let by_source = seen.iter().map(|source| {
        let saw = pods.iter().filter(|p| answers.sources(&p.name).contains(source));
        let names: Vec<_> = saw.map(|p| p.name.trim_start_matches("pod-")).collect();
        format!("{source} ({})", names.join(" "))
    });
    by_source.collect::<Vec<_>>().join(", ")
}

//! kube-proxy's nftables mode (pkg/proxy/nftables/proxier.go, v1.36): verdict maps lead from a Service's address to its
//! chain, a random number from there to the endpoint's chain, which translates.

use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
};

use super::{Cluster, MASQUERADE_MARK, Service, destination, hash};
use crate::place::Family;

pub const TABLE: &str = "kube-proxy";

/// Services in one transaction. A transaction costs nf_tables time by the square of what it adds (every anonymous map is
/// looked for among the others): one with 1,000 Services of 10 takes a second, one with 10,000 minutes. kube-proxy does
/// it in one all the same; what stands in the kernel in the end is the same.
const SERVICES_AT_ONCE: usize = 400;

/// Elements in one command.
const ELEMENTS_AT_ONCE: usize = 1_000;

pub const fn family(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

/// Transactions: tables, then chains of Services, which nothing leads to yet (so that the kernel has no paths to check),
/// then what leads to them.
pub fn batches(cluster: &Cluster, services: &[Service]) -> Vec<String> {
    let mut batches = vec![base(cluster)];
    for some in services.chunks(SERVICES_AT_ONCE) {
        let mut text = format!("table {} {TABLE} {{\n", family(cluster.family));
        for service in some {
            chains(&mut text, cluster, service);
        }
        text.push_str("}\n");
        batches.push(text);
    }
    batches.push(dispatch(cluster, services));
    batches
}

/// Everything that does not depend on Services.
fn base(cluster: &Cluster) -> String {
    let ip = family(cluster.family);
    let (addr, range) = match cluster.family {
        Family::V4 => ("ipv4_addr", &cluster.service_range),
        Family::V6 => ("ipv6_addr", &cluster.service_range),
    };
    let unallocated = range.as_ref().map_or_else(String::new, |range| {
        format!("ip_ daddr {{ {range} }} drop comment \"Drop traffic to unallocated ClusterIPs\"\n")
    });
    let text = format!(
        "table ip_ {TABLE} {{
            comment \"rules for kube-proxy\"
            set cluster-ips {{ type {addr}; comment \"Active ClusterIPs\"; }}
            set nodeport-ips {{ type {addr}; comment \"IPs that accept NodePort traffic\"; }}
            map no-endpoint-services {{ type {addr} . inet_proto . inet_service : verdict; }}
            map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; }}
            map firewall-ips {{ type {addr} . inet_proto . inet_service : verdict; }}
            map service-ips {{ type {addr} . inet_proto . inet_service : verdict; }}
            map service-nodeports {{ type inet_proto . inet_service : verdict; }}
            chain reject-chain {{ reject; }}
            chain mark-for-masquerade {{ mark set mark or {MASQUERADE_MARK}; }}
            chain masquerading {{
                mark and {MASQUERADE_MARK} == 0 return
                mark set mark xor {MASQUERADE_MARK}
                masquerade fully-random
            }}
            chain cluster-ips-check {{
                ip_ daddr @cluster-ips reject comment \"Reject traffic to invalid ports of ClusterIPs\"
                {unallocated}
            }}
            chain service-endpoints-check {{ ip_ daddr . meta l4proto . th dport vmap @no-endpoint-services; }}
            chain nodeport-endpoints-check {{
                ip_ daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
            }}
            chain firewall-check {{ ip_ daddr . meta l4proto . th dport vmap @firewall-ips; }}
            chain services {{
                ip_ daddr . meta l4proto . th dport vmap @service-ips
                ip_ daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
            }}
            chain filter-prerouting {{
                type filter hook prerouting priority -110;
                ct state new jump firewall-check
            }}
            chain filter-input {{
                type filter hook input priority -110;
                ct state new jump nodeport-endpoints-check
                ct state new jump service-endpoints-check
            }}
            chain filter-forward {{
                type filter hook forward priority -110;
                ct state new jump service-endpoints-check
                ct state new jump cluster-ips-check
            }}
            chain filter-output {{
                type filter hook output priority -110;
                ct state new jump service-endpoints-check
                ct state new jump firewall-check
            }}
            chain filter-output-post-dnat {{
                type filter hook output priority -90;
                ct state new jump cluster-ips-check
            }}
            chain nat-prerouting {{ type nat hook prerouting priority -100; jump services; }}
            chain nat-output {{ type nat hook output priority -100; jump services; }}
            chain nat-postrouting {{ type nat hook postrouting priority 100; jump masquerading; }}
        }}\n"
    );
    text.replace("ip_", ip)
}

/// What all chains of a Service have in their names.
fn name_base(service: &Service) -> String {
    let name = service.port_name();
    let hash = hash(&format!("{name}{}", service.proto.name()), 8);
    format!("{hash}-{}/{}/http", service.name, service.proto.name())
}

fn endpoint_chain(service: &Service, endpoint: &SocketAddr) -> String {
    let name = format!("{}{}{endpoint}", service.port_name(), service.proto.name());
    // Colons are not for chain names.
    let address = match endpoint.ip() {
        IpAddr::V4(a) => a.to_string(),
        IpAddr::V6(a) => a.to_string().replace(':', "."),
    };
    format!(
        "endpoint-{}-{}/{}/http__{address}/{}",
        hash(&name, 8),
        service.name,
        service.proto.name(),
        endpoint.port()
    )
}

/// Chains of a Service and its endpoints.
fn chains(out: &mut String, cluster: &Cluster, service: &Service) {
    let (ip, base) = (family(cluster.family), name_base(service));
    let proto = service.proto.name();
    let endpoints: Vec<_> = service.endpoints.iter().map(|e| (e, endpoint_chain(service, e))).collect();
    for (endpoint, chain) in &endpoints {
        let _ = writeln!(
            out,
            "chain {chain} {{\n{ip} saddr {} jump mark-for-masquerade\nmeta l4proto {proto} dnat to {}\n}}",
            endpoint.ip(),
            destination(endpoint)
        );
    }
    let _ = writeln!(out, "chain service-{base} {{");
    if let Some(pods) = &cluster.pods {
        let _ = writeln!(
            out,
            "{ip} daddr {} {proto} dport {} {ip} saddr != {pods} jump mark-for-masquerade",
            service.cluster_ip, service.port
        );
    }
    let targets: Vec<_> =
        endpoints.iter().enumerate().map(|(n, (_, chain))| format!("{n} : goto {chain}")).collect();
    if !targets.is_empty() {
        let _ = writeln!(out, "numgen random mod {} vmap {{ {} }}", targets.len(), targets.join(", "));
    }
    let _ = writeln!(out, "}}");
    if service.is_external() {
        let _ = writeln!(out, "chain external-{base} {{\njump mark-for-masquerade\ngoto service-{base}\n}}");
    }
}

/// Elements of maps and sets.
fn dispatch(cluster: &Cluster, services: &[Service]) -> String {
    let mut out = String::new();
    let mut add = |set: &str, elements: Vec<String>| {
        for some in elements.chunks(ELEMENTS_AT_ONCE) {
            let (ip, some) = (family(cluster.family), some.join(", "));
            let _ = writeln!(out, "add element {ip} {TABLE} {set} {{ {some} }}");
        }
    };
    add("nodeport-ips", cluster.node_ips.iter().map(ToString::to_string).collect());
    add("cluster-ips", services.iter().map(|s| s.cluster_ip.to_string()).collect());
    let (with, without): (Vec<_>, Vec<_>) = services.iter().partition(|s| !s.endpoints.is_empty());
    let addresses = |s: &Service| {
        let key = |ip: IpAddr| format!("{ip} . {} . {}", s.proto.name(), s.port);
        let external = s.load_balancer.map(|ip| (key(ip), "external"));
        [(key(s.cluster_ip), "service")].into_iter().chain(external).collect::<Vec<_>>()
    };
    let to_chain = |s: &&Service| {
        let base = name_base(s);
        addresses(s).into_iter().map(|(key, kind)| format!("{key} : goto {kind}-{base}")).collect::<Vec<_>>()
    };
    let port = |s: &Service| s.node_port.map(|port| format!("{} . {port}", s.proto.name()));
    add("service-ips", with.iter().flat_map(to_chain).collect());
    add(
        "service-nodeports",
        with.iter().filter_map(|s| Some(format!("{} : goto external-{}", port(s)?, name_base(s)))).collect(),
    );
    let reject = |(key, _): (String, _)| format!("{key} : goto reject-chain");
    add("no-endpoint-services", without.iter().flat_map(|s| addresses(s).into_iter().map(reject)).collect());
    add(
        "no-endpoint-nodeports",
        without.iter().filter_map(|s| Some(format!("{} : goto reject-chain", port(s)?))).collect(),
    );
    out
}

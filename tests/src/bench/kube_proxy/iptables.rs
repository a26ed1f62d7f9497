//! kube-proxy's iptables mode (pkg/proxy/iptables/proxier.go, v1.36): one rule after the other until a Service's address
//! matches, then one probability after the other until an endpoint is chosen. Without comments, as kube-proxy writes it
//! for clusters of more than 1,000 endpoints.

use std::{fmt::Write as _, net::SocketAddr};

use super::{Cluster, MASQUERADE_MARK as MARK, Service, destination, hash};
use crate::place::Family;

/// What iptables-restore reads.
pub fn text(cluster: &Cluster, services: &[Service]) -> String {
    let mut out = filter(cluster, services);
    out.push_str(&nat(cluster, services));
    out
}

fn chain(kind: &str, service: &Service) -> String {
    format!("KUBE-{kind}-{}", hash(&format!("{}{}", service.port_name(), service.proto.name()), 16))
}

fn endpoint_chain(service: &Service, endpoint: &SocketAddr) -> String {
    let name = format!("{}{}{endpoint}", service.port_name(), service.proto.name());
    format!("KUBE-SEP-{}", hash(&name, 16))
}

const fn host_bits(family: Family) -> u8 {
    match family {
        Family::V4 => 32,
        Family::V6 => 128,
    }
}

/// `-p udp -m udp --dport 80`
fn to_port(service: &Service, port: u16) -> String {
    let proto = service.proto.name();
    format!("-p {proto} -m {proto} --dport {port}")
}

/// Where packets of new flows to Services without endpoints end, and where forwarded ones of others pass.
fn filter(cluster: &Cluster, services: &[Service]) -> String {
    let loopback = match cluster.family {
        // Only IPv4 has addresses of loopback that something could come in for (route_localnet).
        Family::V4 => {
            "-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP\n"
        }
        Family::V6 => "",
    };
    let mut out = format!(
        "*filter
:INPUT ACCEPT
:FORWARD ACCEPT
:OUTPUT ACCEPT
:KUBE-NODEPORTS -
:KUBE-SERVICES -
:KUBE-EXTERNAL-SERVICES -
:KUBE-FIREWALL -
:KUBE-FORWARD -
:KUBE-PROXY-FIREWALL -
-A INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A INPUT -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A FORWARD -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
{loopback}"
    );
    let bits = host_bits(cluster.family);
    for s in services.iter().filter(|s| s.endpoints.is_empty()) {
        let _ = writeln!(out, "-A KUBE-SERVICES -d {}/{bits} {} -j REJECT", s.cluster_ip, to_port(s, s.port));
        if let Some(ip) = s.load_balancer {
            let _ =
                writeln!(out, "-A KUBE-EXTERNAL-SERVICES -d {ip}/{bits} {} -j REJECT", to_port(s, s.port));
        }
        if let Some(port) = s.node_port {
            let _ = writeln!(
                out,
                "-A KUBE-EXTERNAL-SERVICES -m addrtype --dst-type LOCAL {} -j REJECT",
                to_port(s, port)
            );
        }
    }
    let _ = write!(
        out,
        "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark {MARK}/{MARK} -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
"
    );
    out
}

fn nat(cluster: &Cluster, services: &[Service]) -> String {
    let with: Vec<_> = services.iter().filter(|s| !s.endpoints.is_empty()).collect();
    let (mut chains, mut rules) = (String::new(), String::new());
    let bits = host_bits(cluster.family);
    for s in &with {
        service(&mut chains, &mut rules, cluster, s);
    }
    // After the Services' own chains, in the order of the Services.
    for s in &with {
        let (to, svc) = (to_port(s, s.port), chain("SVC", s));
        let _ = writeln!(rules, "-A KUBE-SERVICES -d {}/{bits} {to} -j {svc}", s.cluster_ip);
        if let Some(ip) = s.load_balancer {
            let _ = writeln!(rules, "-A KUBE-SERVICES -d {ip}/{bits} {to} -j {}", chain("EXT", s));
        }
        if let Some(port) = s.node_port {
            let _ = writeln!(rules, "-A KUBE-NODEPORTS {} -j {}", to_port(s, port), chain("EXT", s));
        }
    }
    format!(
        "*nat
:PREROUTING ACCEPT
:INPUT ACCEPT
:OUTPUT ACCEPT
:POSTROUTING ACCEPT
:KUBE-NODEPORTS -
:KUBE-SERVICES -
:KUBE-MARK-MASQ -
:KUBE-POSTROUTING -
{chains}-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark {MARK}
-A KUBE-POSTROUTING -m mark ! --mark {MARK}/{MARK} -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark {MARK}
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
{rules}-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
"
    )
}

/// Chains of a Service that has endpoints.
fn service(chains: &mut String, rules: &mut String, cluster: &Cluster, s: &Service) {
    let (svc, bits) = (chain("SVC", s), host_bits(cluster.family));
    let proto = s.proto.name();
    let _ = writeln!(chains, ":{svc} -");
    if s.is_external() {
        let ext = chain("EXT", s);
        let _ = writeln!(chains, ":{ext} -");
        let _ = writeln!(rules, "-A {ext} -j KUBE-MARK-MASQ\n-A {ext} -j {svc}");
    }
    if let Some(pods) = &cluster.pods {
        let to = to_port(s, s.port);
        let _ = writeln!(rules, "-A {svc} ! -s {pods} -d {}/{bits} {to} -j KUBE-MARK-MASQ", s.cluster_ip);
    }
    for (n, endpoint) in s.endpoints.iter().enumerate() {
        let sep = endpoint_chain(s, endpoint);
        let _ = writeln!(chains, ":{sep} -");
        match s.endpoints.len() - n {
            1 => {
                let _ = writeln!(rules, "-A {svc} -j {sep}");
            }
            left => {
                let part = 1.0 / left as f64;
                let _ =
                    writeln!(rules, "-A {svc} -m statistic --mode random --probability {part:.10} -j {sep}");
            }
        }
        let _ = writeln!(
            rules,
            "-A {sep} -s {}/{bits} -j KUBE-MARK-MASQ\n-A {sep} -p {proto} -m {proto} -j DNAT --to-destination {}",
            endpoint.ip(),
            destination(endpoint)
        );
    }
}

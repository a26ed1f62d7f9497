//! The kernel's own ways to serve Services: rules as kube-proxy v1.36 lays them out, written for given Services and put
//! into the calling thread's network namespace.
//!
//! [`nftables`] and [`iptables`] are pure: Services in, text out. What differs from kube-proxy is the way in only: it
//! sends one transaction, here nftables' rules come in several (see [`nftables::batches`]), and names end in another hash.

pub mod iptables;
pub mod nftables;

use std::{
    fmt::Write as _,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use super::control::objects;
use crate::place::Family;

/// The mark of packets whose source is to be translated; kube-proxy's default (bit 14).
const MASQUERADE_MARK: &str = "0x4000";

/// Which of kube-proxy's modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Nftables,
    /// Fed to iptables over nf_tables, the one that Debian installs.
    Iptables,
}

impl Mode {
    pub const ALL: [Self; 2] = [Self::Nftables, Self::Iptables];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proto {
    Tcp,
    Udp,
}

impl Proto {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// One port of a Service, with its ready endpoints: Cluster policies, no affinity, no source ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name, with a slash.
    pub name: String,
    pub cluster_ip: IpAddr,
    pub port: u16,
    pub proto: Proto,
    pub node_port: Option<u16>,
    pub load_balancer: Option<IpAddr>,
    pub endpoints: Vec<SocketAddr>,
}

impl Service {
    /// As in kube-proxy's comments and chain names: `ns/svc:http`.
    fn port_name(&self) -> String {
        format!("{}:http", self.name)
    }

    const fn is_external(&self) -> bool {
        self.node_port.is_some() || self.load_balancer.is_some()
    }
}

/// What the rules say of the cluster and the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    pub family: Family,
    /// `--cluster-cidr`: clients from elsewhere are masqueraded on their way from a ClusterIP to a pod. None: no client
    /// is, and kube-proxy writes no rule for it.
    pub pods: Option<String>,
    /// The range of ClusterIPs, of which the addresses without a Service are dropped (nftables).
    pub service_range: Option<String>,
    /// Where NodePorts are served (nftables; iptables asks the kernel whether an address is local).
    pub node_ips: Vec<IpAddr>,
}

impl Cluster {
    /// The cluster of the control plane's benchmark ([`objects`]); in IPv6 the same numbers below fd00:10::.
    pub fn bench(family: Family, node_ip: IpAddr) -> Self {
        let (pods, range) = match family {
            Family::V4 => ("10.128.0.0/9", "10.96.0.0/12"),
            Family::V6 => ("fd00:10:128::/48", "fd00:10:96::/108"),
        };
        Self { family, pods: Some(pods.into()), service_range: Some(range.into()), node_ips: vec![node_ip] }
    }
}

/// The same number below a prefix of the other family.
fn v6(prefix: u16, below: Ipv4Addr, base: Ipv4Addr) -> IpAddr {
    let base6 = u128::from(Ipv6Addr::new(0xfd00, 0x10, prefix, 0, 0, 0, 0, 0));
    Ipv6Addr::from(base6 + u128::from(u32::from(below) - u32::from(base))).into()
}

/// The ClusterIP of a Service of [`services`].
pub fn cluster_ip(family: Family, service: u32) -> IpAddr {
    let ip = objects::cluster_ip(service);
    match family {
        Family::V4 => ip.into(),
        Family::V6 => v6(0x96, ip, Ipv4Addr::new(10, 96, 0, 0)),
    }
}

/// The address of an endpoint of [`services`].
pub fn endpoint(family: Family, service: u32, index: u32, each: u32) -> IpAddr {
    let ip = objects::endpoint(service, index, each);
    match family {
        Family::V4 => ip.into(),
        Family::V6 => v6(0x128, ip, Ipv4Addr::new(10, 128, 0, 0)),
    }
}

/// The port of every Service of [`services`], and the one of its pods.
pub const PORTS: (u16, u16) = (80, 8080);

/// `count` ClusterIP Services of `each` endpoints, with the addresses and ports that [`objects`] has.
pub fn services(family: Family, proto: Proto, count: u32, each: u32) -> Vec<Service> {
    let service = |s| Service {
        name: format!("bench/svc-{s}"),
        cluster_ip: cluster_ip(family, s),
        port: PORTS.0,
        proto,
        node_port: None,
        load_balancer: None,
        endpoints: (0..each).map(|i| SocketAddr::new(endpoint(family, s, i, each), PORTS.1)).collect(),
    };
    (0..count).map(service).collect()
}

/// Letters and digits that stand for a text, as in chain names (kube-proxy: the beginning of a SHA-256 in base 32; here
/// FNV-1a, which needs no library and is as long).
fn hash(text: &str, letters: usize) -> String {
    const BASE32: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let fnv = |hash: u128, byte: u8| {
        (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    };
    let mut hash = text.bytes().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, fnv);
    let mut out = String::with_capacity(letters);
    for _ in 0..letters {
        // The upper bits: in the lower ones, texts that differ in their last letters do not differ enough.
        out.push(char::from(BASE32[(hash >> 123) as usize]));
        hash = hash.rotate_left(5);
    }
    out
}

/// `address:port` as both tools read it.
fn destination(endpoint: &SocketAddr) -> String {
    endpoint.to_string()
}

/// Rules as text, ready to be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    pub mode: Mode,
    pub family: Family,
    /// To be loaded one after the other.
    pub batches: Vec<String>,
}

/// Writes rules.
pub fn rules(mode: Mode, cluster: &Cluster, services: &[Service]) -> Rules {
    let batches = match mode {
        Mode::Nftables => nftables::batches(cluster, services),
        Mode::Iptables => vec![iptables::text(cluster, services)],
    };
    Rules { mode, family: cluster.family, batches }
}

/// Puts rules into the network namespace of the calling thread, where none of this module's are.
pub fn load(rules: &Rules) -> Result<()> {
    let restore = match rules.family {
        Family::V4 => "iptables-nft-restore",
        Family::V6 => "ip6tables-nft-restore",
    };
    for text in &rules.batches {
        match rules.mode {
            Mode::Nftables => feed("nft", &["-f", "-"], text)?,
            Mode::Iptables => feed(restore, &[], text)?,
        }
    }
    Ok(())
}

/// Takes the rules out of the namespace of the calling thread; flows that the kernel tracks stay.
pub fn clear(rules: &Rules) -> Result<()> {
    let family = nftables::family(rules.family);
    let tables: &[&str] = match rules.mode {
        Mode::Nftables => &[nftables::TABLE],
        // What iptables over nf_tables calls a table is one.
        Mode::Iptables => &["nat", "filter"],
    };
    let mut text = String::new();
    for table in tables {
        // Added first, so that it is no error if there is none.
        let _ = writeln!(text, "add table {family} {table}\ndelete table {family} {table}");
    }
    feed("nft", &["-f", "-"], &text)
}

/// Runs a program on a text; what it complains about becomes the error.
fn feed(program: &str, args: &[&str], text: &str) -> Result<()> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    let written = child.stdin.take().context("no stdin")?.write_all(text.as_bytes());
    let out = child.wait_with_output()?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        let first: Vec<_> = said.lines().take(10).collect();
        bail!("{program} failed ({}): {}", out.status, first.join("\n"));
    }
    written.with_context(|| format!("cannot write to {program}"))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_of_a_hundred_thousand_endpoints_differ() {
        let names: HashSet<_> = (0..100_000).map(|n| hash(&format!("bench/svc-{n}:http udp"), 16)).collect();
        assert_eq!(names.len(), 100_000);
    }

    #[test]
    fn services_are_those_of_the_control_planes_benchmark() {
        let all = services(Family::V4, Proto::Tcp, 3, 10);
        assert_eq!(all[2].cluster_ip.to_string(), "10.96.0.3");
        assert_eq!(all[2].endpoints[9].to_string(), "10.128.0.29:8080");
        let all = services(Family::V6, Proto::Udp, 300, 10);
        assert_eq!(all[299].cluster_ip.to_string(), "fd00:10:96::12c");
        assert_eq!(all[299].endpoints[9].to_string(), "[fd00:10:128::bb7]:8080");
    }
}

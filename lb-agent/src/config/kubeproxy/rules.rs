//! What kube-proxy refuses (pkg/proxy/apis/config/validation/validation.go, v1.36), with the paths of v1alpha1. As there, a
//! section of another mode than the chosen one is not looked at.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

use super::{
    Invalid,
    decode::{Document, go_duration},
};

/// `mode`, after its default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Iptables,
    Ipvs,
    Nftables,
}

impl Mode {
    /// Call [`check`] first: what it refuses counts as the default.
    pub fn of(document: &Document) -> Self {
        match document.text("mode") {
            "ipvs" => Self::Ipvs,
            "nftables" => Self::Nftables,
            _ => Self::Iptables,
        }
    }

    /// The section that the mode reads `syncPeriod` and the like from.
    pub const fn section(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
            Self::Nftables => "nftables",
        }
    }
}

/// The first rule that is broken.
pub fn check(document: &Document) -> Result<(), Invalid> {
    one_of(document, "mode", &["iptables", "ipvs", "nftables"])?;
    let mode = Mode::of(document);
    ranges(document, mode)?;
    sync_periods(document, mode)?;
    conntrack(document)?;
    addresses(document)?;
    nodeport_addresses(document.texts("nodePortAddresses"))?;
    if mode == Mode::Ipvs {
        ipvs(document)?;
    }
    local_detection(document)?;
    one_of(document, "logging.format", &["text", "json"])?;
    hidden_metrics(document.text("showHiddenMetricsForVersion"))
}

fn one_of(document: &Document, path: &str, allowed: &[&str]) -> Result<(), Invalid> {
    let value = document.text(path);
    if value.is_empty() || allowed.contains(&value) {
        return Ok(());
    }
    Err(Invalid::text(path, value, format!("must be {} or blank", allowed.join(", "))))
}

fn ranges(document: &Document, mode: Mode) -> Result<(), Invalid> {
    let masquerade_bit = |section: &str| {
        let path = format!("{section}.masqueradeBit");
        int(document, &path, 0, 31, "must be within the range [0, 31]")
    };
    masquerade_bit("iptables")?;
    if mode == Mode::Nftables {
        masquerade_bit("nftables")?;
    }
    int(document, "oomScoreAdj", -1000, 1000, "must be within the range [-1000, 1000]")?;
    int(document, "clientConnection.burst", 0, i64::MAX, "must not be negative")
}

fn int(document: &Document, path: &str, min: i64, max: i64, reason: &str) -> Result<(), Invalid> {
    match document.int(path) {
        Some(value) if value < min || value > max => Err(Invalid::new(path, &value.into(), reason)),
        _ => Ok(()),
    }
}

fn sync_periods(document: &Document, mode: Mode) -> Result<(), Invalid> {
    let section = mode.section();
    let (sync, min) = (format!("{section}.syncPeriod"), format!("{section}.minSyncPeriod"));
    let config_period = Period::of(document, "configSyncPeriod", "15m");
    let sync_period = Period::of(document, &sync, "30s");
    let min_period = Period::of(document, &min, if mode == Mode::Ipvs { "0s" } else { "1s" });
    if config_period.ns <= 0 {
        return Err(Invalid::text("configSyncPeriod", config_period.text, "must be greater than 0"));
    }
    if sync_period.ns <= 0 {
        return Err(Invalid::text(sync, sync_period.text, "must be greater than 0"));
    }
    if min_period.ns < 0 {
        return Err(Invalid::text(min, min_period.text, "must not be negative"));
    }
    if min_period.ns > sync_period.ns {
        let reason = format!("must be greater than or equal to {min}");
        return Err(Invalid::text(sync, sync_period.text, reason));
    }
    Ok(())
}

/// A duration, and how it is written.
struct Period<'a> {
    ns: i128,
    text: &'a str,
}

impl<'a> Period<'a> {
    /// A duration of 0 means kube-proxy's default.
    fn of(document: &'a Document, path: &str, default: &'a str) -> Self {
        match document.duration(path) {
            Some((ns, text)) if ns != 0 => Self { ns, text },
            _ => Self { ns: go_duration(default).unwrap_or_default(), text: default },
        }
    }
}

fn conntrack(document: &Document) -> Result<(), Invalid> {
    for path in ["conntrack.maxPerCore", "conntrack.min"] {
        int(document, path, 0, i64::MAX, "must not be negative")?;
    }
    let timeouts = [
        "conntrack.tcpEstablishedTimeout",
        "conntrack.tcpCloseWaitTimeout",
        "conntrack.udpTimeout",
        "conntrack.udpStreamTimeout",
    ];
    not_negative(document, timeouts)
}

fn ipvs(document: &Document) -> Result<(), Invalid> {
    not_negative(document, ["ipvs.tcpTimeout", "ipvs.tcpFinTimeout", "ipvs.udpTimeout"])?;
    for (i, text) in document.texts("ipvs.excludeCIDRs").iter().enumerate() {
        if cidr(text).is_none() {
            return Err(Invalid::text(format!("ipvs.excludeCIDRs[{i}]"), text, "must be a valid CIDR"));
        }
    }
    Ok(())
}

fn not_negative<const N: usize>(document: &Document, paths: [&str; N]) -> Result<(), Invalid> {
    for path in paths {
        if let Some((_, text)) = document.duration(path).filter(|(ns, _)| *ns < 0) {
            return Err(Invalid::text(path, text, "must not be negative"));
        }
    }
    Ok(())
}

fn addresses(document: &Document) -> Result<(), Invalid> {
    let bind = document.text("bindAddress");
    if !bind.is_empty() && ip(bind).is_none() {
        return Err(Invalid::text(
            "bindAddress",
            bind,
            "not a valid textual representation of an IP address",
        ));
    }
    for path in ["healthzBindAddress", "metricsBindAddress"] {
        let text = document.text(path);
        // An address alone gets the default port.
        if !text.is_empty() && ip(text).is_none() {
            host_port(path, text)?;
        }
    }
    Ok(())
}

fn host_port(path: &str, text: &str) -> Result<(), Invalid> {
    let Some((host, port)) = split_host_port(text) else {
        return Err(Invalid::text(path, text, "must be IP:port"));
    };
    if ip(host).is_none() {
        return Err(Invalid::text(path, host, "must be a valid IP"));
    }
    if !port.parse::<u16>().is_ok_and(|port| port != 0) {
        return Err(Invalid::text(path, port, "must be a valid port"));
    }
    Ok(())
}

/// As Go's `net.SplitHostPort`: an IPv6 address has to be in brackets.
pub fn split_host_port(text: &str) -> Option<(&str, &str)> {
    let (host, port) = text.rsplit_once(':')?;
    match host.strip_prefix('[') {
        Some(inner) => inner.strip_suffix(']').map(|host| (host, port)),
        None if host.contains([':', '[', ']']) => None,
        None => Some((host, port)),
    }
}

fn nodeport_addresses(list: &[String]) -> Result<(), Invalid> {
    for (i, text) in list.iter().enumerate() {
        let reason = match text.as_str() {
            "primary" if list.len() == 1 => return Ok(()),
            "primary" => "can't use both 'primary' and CIDRs",
            text if cidr(text).is_some() => continue,
            _ => "must be a valid CIDR",
        };
        return Err(Invalid::text(format!("nodePortAddresses[{i}]"), text, reason));
    }
    Ok(())
}

fn local_detection(document: &Document) -> Result<(), Invalid> {
    let modes = ["ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"];
    one_of(document, "detectLocalMode", &modes)?;
    let required = |path: &str| match document.text(path) {
        "" => Err(Invalid::text(path, "", "must not be empty")),
        _ => Ok(()),
    };
    match document.text("detectLocalMode") {
        "BridgeInterface" => required("detectLocal.bridgeInterface"),
        "InterfaceNamePrefix" => required("detectLocal.interfaceNamePrefix"),
        "ClusterCIDR" => cluster_cidr(document.text("clusterCIDR")),
        _ => Ok(()),
    }
}

fn cluster_cidr(text: &str) -> Result<(), Invalid> {
    if text.is_empty() {
        return Ok(());
    }
    let mut nets = Vec::new();
    for part in text.split(',') {
        nets.push(cidr(part).ok_or_else(|| Invalid::text("clusterCIDR", part, "must be a valid CIDR"))?);
    }
    let is_v4 = |net: &IpNet| matches!(net, IpNet::V4(_));
    match nets.as_slice() {
        [_] => Ok(()),
        [a, b] if is_v4(a) != is_v4(b) => Ok(()),
        _ => Err(Invalid::text("clusterCIDR", text, "must be a single CIDR or a dual-stack pair of CIDRs")),
    }
}

fn hidden_metrics(version: &str) -> Result<(), Invalid> {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    match version.split_once('.') {
        None if version.is_empty() => Ok(()),
        Some((major, minor)) if is_number(major) && is_number(minor) => Ok(()),
        _ => Err(Invalid::text("showHiddenMetricsForVersion", version, "must be MAJOR.MINOR or blank")),
    }
}

/// An address as Kubernetes reads it: numbers of IPv4 may have leading zeros, and are decimal all the same
/// (`ParseIPSloppy`, kept for objects and files from before Go 1.17).
pub fn ip(text: &str) -> Option<IpAddr> {
    if text.contains(':') {
        return text.parse().ok();
    }
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next().filter(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()))?;
        *octet = part.parse().ok()?;
    }
    parts.next().is_none().then(|| Ipv4Addr::from(octets).into())
}

/// An address and the length of a prefix.
pub fn cidr(text: &str) -> Option<IpNet> {
    let (addr, length) = text.split_once('/')?;
    let length = Some(length).filter(|l| l.bytes().all(|b| b.is_ascii_digit()))?;
    IpNet::new(ip(addr)?, length.parse().ok()?).ok()
}

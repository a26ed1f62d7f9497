//! What the node's own settings must allow: checked at the start, with every change of devices and every 30 seconds. Set where
//! that is harmless, reported with the remedy where it is not. Nothing here stops the agent.
//!
//! * **Forwarding.** Traffic to pods on this node goes through the stack, and a FIB lookup for traffic in transit refuses
//!   devices without forwarding. Every Kubernetes node needs it, and CNI plugins switch it on just so: we do, too. A single
//!   device where it is off although the node forwards was somebody's decision, and is reported. IPv6 only if the node has an
//!   IPv6 address; there the switch makes the node ignore router advertisements (Documentation/networking/ip-sysctl,
//!   `accept_ra`), so devices that follow them are told to go on first.
//! * **Reverse-path filter.** Strict mode is no obstacle as such: packets keep the client's address until after the check or
//!   are redirected before it, answers leave as the peers' routes expect. Only with several external devices does it drop
//!   clients that come in by one and are reached by another: reported.
//! * **FORWARD policy DROP** (docker hosts), in nf_tables or in legacy iptables: packets to pods pass only if a rule accepts
//!   them. Rules are not interpreted, and rules that drop under an accepting policy are not found. Reported.
//! * **Local ports.** A local process must not get a port that a translated flow uses, nor a NodePort, whose answers would be
//!   taken for requests to the Service: where `ip_local_port_range` overlaps ours or Kubernetes' range of NodePorts, the
//!   overlap is added to `ip_local_reserved_ports`. The node's own choice of another range of NodePorts is not known here.

mod iptables;
mod netfilter;
mod sysctl;

use std::{collections::BTreeMap, convert::Infallible, fmt, io, sync::Arc, time::Duration};

use lb_common::nat::PortRange;
use tokio::{sync::watch, time::timeout};
use tracing::{info, warn};

use crate::{
    datapath::{Attached, Datapath, Role},
    maps::wait_in_place,
};
use netfilter::{Chain, Family};

const INTERVAL: Duration = Duration::from_secs(30);

/// Something about the node that stands, or stood, in the way of Services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub kind: Kind,
    /// The setting or chain, with its value.
    pub what: String,
    pub why: &'static str,
    /// A command, or what to do. Empty if `fixed`.
    pub remedy: String,
    /// It has been set right.
    pub fixed: bool,
}

/// Kinds of findings, as metrics name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Forwarding,
    ReversePathFilter,
    ForwardPolicy,
    PortRange,
    /// Something cannot be checked.
    Unknown,
}

impl Kind {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Forwarding => "forwarding",
            Self::ReversePathFilter => "rp_filter",
            Self::ForwardPolicy => "forward_policy",
            Self::PortRange => "port_range",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)?;
        if self.fixed { f.write_str("; set right") } else { write!(f, "; remedy: {}", self.remedy) }
    }
}

/// What the checks depend on.
#[derive(Clone, Debug)]
pub struct Subject<'a> {
    pub devices: &'a [Attached],
    /// The node has an IPv6 address that others can reach.
    pub ipv6: bool,
    pub snat_ports: PortRange,
}

type Check = fn(&Subject<'_>, &mut Vec<Finding>) -> io::Result<()>;

/// Checks everything and sets right what may be. In the network namespace of this thread.
pub fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let checks: [Check; 5] = [forwarding_v4, forwarding_v6, reverse_path_filter, local_ports, forward_policy];
    for check in checks {
        if let Err(error) = check(subject, &mut findings) {
            findings.push(Finding {
                kind: Kind::Unknown,
                what: error.to_string(),
                why: "a setting of the node cannot be checked",
                remedy: "give the agent the node's /proc/sys and CAP_NET_ADMIN".to_owned(),
                fixed: false,
            });
        }
    }
    findings
}

/// Checks for ever and tells what there is; each new finding is logged once.
pub async fn watch(
    datapath: Arc<Datapath>,
    snat_ports: PortRange,
    addresses: watch::Receiver<std::collections::BTreeSet<std::net::IpAddr>>,
    findings: watch::Sender<Vec<Finding>>,
) -> Infallible {
    let mut changes = datapath.changes();
    let mut known = BTreeMap::new();
    loop {
        changes.mark_unchanged();
        let devices = datapath.attached();
        let ipv6 = addresses.borrow().iter().any(std::net::IpAddr::is_ipv6);
        // Some rule sets are long.
        let found = wait_in_place(|| check(&Subject { devices: &devices, ipv6, snat_ports }));
        report(&mut known, &found);
        findings.send_if_modified(|old| {
            let new = *old != found;
            *old = found;
            new
        });
        // Elapsed, or something has changed: both are reasons to look. `datapath` keeps the sender.
        let _ = timeout(INTERVAL, changes.changed()).await;
    }
}

fn report(known: &mut BTreeMap<String, Finding>, found: &[Finding]) {
    for finding in found {
        let new = known.get(&finding.what) != Some(finding);
        match (new, finding.fixed) {
            (true, true) => {
                info!(what = finding.what, why = finding.why, "a setting of the node was changed")
            }
            (true, false) => {
                warn!(what = finding.what, remedy = finding.remedy, "{}", finding.why);
            }
            (false, _) => {}
        }
    }
    for gone in known.values().filter(|old| !old.fixed && !found.iter().any(|new| new.what == old.what)) {
        info!(what = gone.what, "is in order now");
    }
    *known = found.iter().map(|f| (f.what.clone(), f.clone())).collect();
}

/// Writes a setting; the finding says how that went.
fn set(kind: Kind, why: &'static str, path: &str, old: &str, new: &str) -> Finding {
    let what = format!("{} is {old}", sysctl::name(path));
    match sysctl::write(path, new) {
        Ok(()) => Finding { kind, what, why, remedy: String::new(), fixed: true },
        Err(error) => {
            let remedy = format!("{} (the agent cannot: {error})", sysctl::command(path, new));
            Finding { kind, what, why, remedy, fixed: false }
        }
    }
}

const NO_FORWARDING: &str = "packets of Services do not get from one device to another";

fn forwarding_v4(subject: &Subject<'_>, findings: &mut Vec<Finding>) -> io::Result<()> {
    let all = sysctl::read("net/ipv4/ip_forward")?;
    let mut off = Vec::new();
    for device in subject.devices {
        let path = format!("net/ipv4/conf/{}/forwarding", device.device);
        // A device that has just gone has no settings.
        if sysctl::read_optional(&path)?.as_deref() == Some("0") {
            off.push(path);
        }
    }
    if all == "0" && !off.is_empty() {
        findings.push(set(Kind::Forwarding, NO_FORWARDING, "net/ipv4/ip_forward", &all, "1"));
    } else {
        findings.extend(off.iter().map(|path| Finding {
            kind: Kind::Forwarding,
            what: format!("{} is 0", sysctl::name(path)),
            why: NO_FORWARDING,
            remedy: sysctl::command(path, "1"),
            fixed: false,
        }));
    }
    Ok(())
}

fn forwarding_v6(subject: &Subject<'_>, findings: &mut Vec<Finding>) -> io::Result<()> {
    const ALL: &str = "net/ipv6/conf/all/forwarding";
    if !subject.ipv6 {
        return Ok(());
    }
    let Some(all) = sysctl::read_optional(ALL)? else { return Ok(()) };
    if all != "0" {
        return Ok(());
    }
    for device in sysctl::list("net/ipv6/conf")? {
        let path = format!("net/ipv6/conf/{device}/accept_ra");
        // 1: follow router advertisements unless forwarding. The two names are not devices.
        let follows = !matches!(device.as_str(), "all" | "default" | "lo")
            && sysctl::read_optional(&path)?.as_deref() == Some("1");
        if follows {
            const WHY: &str = "a node that forwards ignores router advertisements, unless told otherwise";
            let finding = set(Kind::Forwarding, WHY, &path, "1", "2");
            let failed = !finding.fixed;
            findings.push(finding);
            if failed {
                // Forwarding without it may cost the node its default route.
                return Ok(());
            }
        }
    }
    findings.push(set(Kind::Forwarding, NO_FORWARDING, ALL, &all, "1"));
    Ok(())
}

fn reverse_path_filter(subject: &Subject<'_>, findings: &mut Vec<Finding>) -> io::Result<()> {
    let external: Vec<_> = subject.devices.iter().filter(|d| d.role == Role::External).collect();
    if external.len() < 2 {
        return Ok(());
    }
    let all = sysctl::read("net/ipv4/conf/all/rp_filter")?;
    for device in external {
        let path = format!("net/ipv4/conf/{}/rp_filter", device.device);
        let Some(own) = sysctl::read_optional(&path)? else { continue };
        // The greater of the two counts; 2 is loose.
        if all.as_str().max(own.as_str()) == "1" {
            findings.push(Finding {
                kind: Kind::ReversePathFilter,
                what: format!("{} is 1 (strict)", sysctl::name(&path)),
                why: "clients that come in by this device but are reached by another are dropped",
                remedy: sysctl::command(&path, "2"),
                fixed: false,
            });
        }
    }
    Ok(())
}

/// Where Kubernetes takes NodePorts from (`--service-node-port-range` of the API server, by default).
const NODE_PORTS: PortRange = PortRange { first: 30_000, last: 32_767 };

fn local_ports(subject: &Subject<'_>, findings: &mut Vec<Finding>) -> io::Result<()> {
    const RESERVED: &str = "net/ipv4/ip_local_reserved_ports";
    const WHY: &str = "local connections could get ports that translated flows or NodePorts use";
    let range = sysctl::read("net/ipv4/ip_local_port_range")?;
    let mut ends = range.split_whitespace().map_while(|n| n.parse::<u16>().ok());
    let (Some(first), Some(last)) = (ends.next(), ends.next()) else { return Ok(()) };
    let old = sysctl::read_ports(RESERVED)?;
    let mut new = old.clone();
    for ours in [subject.snat_ports, NODE_PORTS] {
        let (first, last) = (first.max(ours.first), last.min(ours.last));
        if first <= last && !sysctl::covers(&new, first, last) {
            let separator = if new.is_empty() { "" } else { "," };
            new = format!("{new}{separator}{first}-{last}");
        }
    }
    if new != old {
        let what = format!("net.ipv4.ip_local_port_range is {}", range.replace('\t', "-"));
        findings.push(Finding { what, ..set(Kind::PortRange, WHY, RESERVED, &old, &new) });
    }
    Ok(())
}

fn forward_policy(subject: &Subject<'_>, findings: &mut Vec<Finding>) -> io::Result<()> {
    let mut chains = netfilter::dropping_forward_chains()?;
    chains.extend(iptables::dropping_forward_chains()?);
    for chain in chains {
        if chain.family == Family::Ip6 && !subject.ipv6 {
            continue;
        }
        findings.push(Finding {
            kind: Kind::ForwardPolicy,
            what: format!("{chain} has policy DROP"),
            why: "packets between clients and pods pass only if a rule in it accepts them",
            remedy: accept_pods(&chain),
            fixed: false,
        });
    }
    Ok(())
}

/// How to let Services through a chain, for its owner's tool.
fn accept_pods(chain: &Chain) -> String {
    let Chain { family, table, name, legacy } = chain;
    if *legacy || (table == "filter" && name == "FORWARD" && *family != Family::Inet) {
        let tool = match (family, legacy) {
            (Family::Ip6, true) => "ip6tables-legacy",
            (Family::Ip6, false) => "ip6tables",
            (_, true) => "iptables-legacy",
            (_, false) => "iptables",
        };
        format!(
            "{tool} -I FORWARD -s POD_CIDR -j ACCEPT; {tool} -I FORWARD -d POD_CIDR -j ACCEPT \
             (or {tool} -P FORWARD ACCEPT)"
        )
    } else {
        let ip = if *family == Family::Ip6 { "ip6" } else { "ip" };
        format!(
            "nft insert rule {family} {table} {name} {ip} saddr POD_CIDR accept; \
             nft insert rule {family} {table} {name} {ip} daddr POD_CIDR accept"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remedies_name_the_tool_that_owns_the_chain() {
        let chain = |family, table: &str, name: &str, legacy| Chain {
            family,
            table: table.into(),
            name: name.into(),
            legacy,
        };
        let shown = accept_pods(&chain(Family::Ip, "filter", "FORWARD", false));
        assert!(shown.starts_with("iptables -I FORWARD -s POD_CIDR -j ACCEPT;"), "{shown}");
        let shown = accept_pods(&chain(Family::Ip6, "filter", "FORWARD", true));
        assert!(shown.starts_with("ip6tables-legacy -I FORWARD"), "{shown}");
        let shown = accept_pods(&chain(Family::Inet, "firewall", "fwd", false));
        assert!(shown.starts_with("nft insert rule inet firewall fwd ip saddr POD_CIDR accept;"), "{shown}");
    }

    #[test]
    fn a_finding_reads_as_one_line() {
        let finding = Finding {
            kind: Kind::Forwarding,
            what: "net.ipv4.ip_forward is 0".into(),
            why: NO_FORWARDING,
            remedy: "sysctl -w net.ipv4.ip_forward=1".into(),
            fixed: false,
        };
        assert_eq!(
            finding.to_string(),
            "net.ipv4.ip_forward is 0: packets of Services do not get from one device to another; \
             remedy: sysctl -w net.ipv4.ip_forward=1"
        );
    }
}

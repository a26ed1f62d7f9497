//! What the agent finds about a node's settings, in network namespaces of their own. Needs root.

#[path = "datapath/node.rs"]
#[allow(dead_code, reason = "shared with datapath.rs, which uses all of it")]
mod node;

use std::{fs, io::Read as _};

use anyhow::{Context as _, Result, ensure};
use lb_agent::{
    datapath::{Attached, Role, Tc, Xdp},
    host::{Finding, Kind, Subject, check},
};
use lb_common::nat::PortRange;
use node::{Elsewhere, on_a_node, run};

fn sysctl(path: &str) -> Result<String> {
    let path = format!("/proc/sys/{path}");
    // By one call with a large buffer: of a list the kernel gives what fits, and no more after that.
    let mut buffer = [0; 4096];
    let length = fs::File::open(&path).and_then(|mut f| f.read(&mut buffer)).context(path)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).trim().to_owned())
}

fn set(path: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/{path}");
    fs::write(&path, value).context(path)
}

fn device(name: &str, role: Role) -> Attached {
    Attached { ifindex: 0, device: name.into(), role, tc: Tc::Tcx, xdp: Xdp::None, xdp_refused: None }
}

/// Findings of a node with these devices. Ports 10000 to 20000 are ours.
fn findings(devices: &[Attached], ipv6: bool) -> Vec<Finding> {
    check(&Subject { devices, ipv6, snat_ports: PortRange { first: 10_000, last: 20_000 } })
}

/// A namespace whose settings are all in order.
fn orderly() -> Result<()> {
    set("net/ipv4/ip_forward", "1")?;
    set("net/ipv6/conf/all/forwarding", "1")?;
    set("net/ipv4/ip_local_port_range", "32768 60999")
}

#[test]
fn an_orderly_node_has_no_findings() {
    on_a_node(|_| {
        orderly()?;
        let elsewhere = Elsewhere::new()?;
        elsewhere.veth("up0")?;
        assert_eq!(findings(&[device("up0", Role::External)], true), []);
        // A device that has just gone.
        assert_eq!(findings(&[device("gone0", Role::External), device("up0", Role::Pod)], true), []);
        Ok(())
    });
}

#[test]
fn forwarding_is_switched_on_and_router_advertisements_stay_in_effect() {
    on_a_node(|_| {
        orderly()?;
        set("net/ipv4/ip_forward", "0")?;
        set("net/ipv6/conf/all/forwarding", "0")?;
        let elsewhere = Elsewhere::new()?;
        elsewhere.veth("up0")?;
        elsewhere.veth("up1")?;
        set("net/ipv6/conf/up0/accept_ra", "1")?;
        set("net/ipv6/conf/up1/accept_ra", "0")?;
        let devices = [device("up0", Role::External)];
        let found = findings(&devices, true);
        ensure!(found.iter().all(|f| f.fixed && f.kind == Kind::Forwarding), "{found:?}");
        assert_eq!(sysctl("net/ipv4/conf/up0/forwarding")?, "1");
        assert_eq!(sysctl("net/ipv6/conf/up0/forwarding")?, "1");
        assert_eq!(sysctl("net/ipv6/conf/up0/accept_ra")?, "2");
        assert_eq!(sysctl("net/ipv6/conf/up1/accept_ra")?, "0");
        assert_eq!(findings(&devices, true), []);
        Ok(())
    });
}

#[test]
fn ipv6_is_left_alone_on_a_node_without_it() {
    on_a_node(|_| {
        orderly()?;
        set("net/ipv6/conf/all/forwarding", "0")?;
        assert_eq!(findings(&[], false), []);
        assert_eq!(sysctl("net/ipv6/conf/all/forwarding")?, "0");
        Ok(())
    });
}

#[test]
fn a_device_that_must_not_forward_is_reported_and_left_as_it_is() {
    on_a_node(|_| {
        orderly()?;
        let elsewhere = Elsewhere::new()?;
        elsewhere.veth("up0")?;
        set("net/ipv4/conf/up0/forwarding", "0")?;
        let found = findings(&[device("up0", Role::External)], false);
        let [finding] = found.as_slice() else { anyhow::bail!("{found:?}") };
        assert_eq!((finding.kind, finding.fixed), (Kind::Forwarding, false));
        assert_eq!(finding.remedy, "sysctl -w net.ipv4.conf.up0.forwarding=1");
        assert_eq!(sysctl("net/ipv4/conf/up0/forwarding")?, "0");
        Ok(())
    });
}

#[test]
fn strict_reverse_path_filters_matter_with_two_external_devices() {
    on_a_node(|_| {
        orderly()?;
        let elsewhere = Elsewhere::new()?;
        for name in ["up0", "up1"] {
            elsewhere.veth(name)?;
            set(&format!("net/ipv4/conf/{name}/rp_filter"), "1")?;
        }
        set("net/ipv4/conf/all/rp_filter", "0")?;
        assert_eq!(findings(&[device("up0", Role::External), device("up1", Role::Pod)], false), []);
        let both = [device("up0", Role::External), device("up1", Role::External)];
        let found = findings(&both, false);
        assert_eq!(found.len(), 2, "{found:?}");
        ensure!(found.iter().all(|f| f.kind == Kind::ReversePathFilter && !f.fixed));
        // Loose for all wins.
        set("net/ipv4/conf/all/rp_filter", "2")?;
        assert_eq!(findings(&both, false), []);
        Ok(())
    });
}

#[test]
fn overlapping_local_ports_are_reserved_beside_what_is() {
    on_a_node(|_| {
        orderly()?;
        set("net/ipv4/ip_local_reserved_ports", "8080,9000-9010")?;
        set("net/ipv4/ip_local_port_range", "15000 60999")?;
        let found = findings(&[], false);
        let [finding] = found.as_slice() else { anyhow::bail!("{found:?}") };
        assert_eq!((finding.kind, finding.fixed), (Kind::PortRange, true));
        assert_eq!(sysctl("net/ipv4/ip_local_reserved_ports")?, "8080,9000-9010,15000-20000,30000-32767");
        assert_eq!(findings(&[], false), []);
        Ok(())
    });
}

#[test]
fn long_lists_of_reserved_ports_stay_whole() {
    on_a_node(|_| {
        orderly()?;
        // Longer than the 32 bytes that a read of unknown size begins with.
        let own = "101,103,105,107,109,111,113,115,117,119,121,123,125,127,129";
        set("net/ipv4/ip_local_reserved_ports", own)?;
        set("net/ipv4/ip_local_port_range", "15000 29000")?;
        assert_eq!(findings(&[], false).len(), 1);
        assert_eq!(sysctl("net/ipv4/ip_local_reserved_ports")?, format!("{own},15000-20000"));
        assert_eq!(findings(&[], false), []);
        Ok(())
    });
}

#[test]
fn settings_that_cannot_be_written_come_with_the_command() {
    on_a_node(|_| {
        orderly()?;
        set("net/ipv4/ip_local_port_range", "15000 60999")?;
        set("net/ipv4/ip_local_reserved_ports", "")?;
        run("mount --bind /proc/sys /proc/sys")?;
        run("mount -o remount,ro,bind /proc/sys")?;
        let found = findings(&[], false);
        let [finding] = found.as_slice() else { anyhow::bail!("{found:?}") };
        ensure!(!finding.fixed);
        ensure!(
            finding.remedy.starts_with("sysctl -w net.ipv4.ip_local_reserved_ports=15000-20000,30000-32767 "),
            "{finding}"
        );
        Ok(())
    });
}

#[test]
fn a_forward_chain_that_drops_is_named_with_its_owners_command() {
    on_a_node(|_| {
        orderly()?;
        run("nft add table inet lbd")?;
        // Not a policy that drops, not the forward hook.
        run("nft add chain inet lbd pass { type filter hook forward priority 0 ; policy accept ; }")?;
        run("nft add chain inet lbd in { type filter hook input priority 0 ; policy drop ; }")?;
        run("nft add chain inet lbd plain")?;
        assert_eq!(findings(&[], true), []);
        run("nft add chain inet lbd through { type filter hook forward priority 0 ; policy drop ; }")?;
        let found = findings(&[], true);
        let [finding] = found.as_slice() else { anyhow::bail!("{found:?}") };
        assert_eq!(finding.what, "nf_tables chain through in table inet lbd has policy DROP");
        ensure!(finding.remedy.starts_with("nft insert rule inet lbd through ip saddr"), "{finding}");
        // The remedy is one that nft takes.
        let command = finding.remedy.split(';').next().unwrap_or_default().replace("POD_CIDR", "10.0.0.0/8");
        run(&command)?;
        run("nft delete table inet lbd")?;
        assert_eq!(findings(&[], true), []);
        Ok(())
    });
}

#[test]
fn forward_policies_of_iptables_are_found_in_both_kinds() {
    on_a_node(|_| {
        orderly()?;
        for (tool, legacy) in [
            ("iptables-nft", false),
            ("ip6tables-nft", false),
            ("iptables-legacy", true),
            ("ip6tables-legacy", true),
        ] {
            run(&format!("{tool} -P FORWARD ACCEPT"))?;
            run(&format!("{tool} -A FORWARD -s 0/0 -j ACCEPT")
                .replace("0/0", if tool.starts_with("ip6") { "::/0" } else { "0.0.0.0/0" }))?;
            assert_eq!(findings(&[], true), [], "{tool}");
            run(&format!("{tool} -P FORWARD DROP"))?;
            let found = findings(&[], true);
            let [finding] = found.as_slice() else { anyhow::bail!("{tool}: {found:?}") };
            assert_eq!(finding.kind, Kind::ForwardPolicy);
            assert_eq!(
                finding.what.starts_with("legacy iptables chain FORWARD in table ip"),
                legacy,
                "{finding}"
            );
            let command = finding.remedy.split(';').next().unwrap_or_default();
            let cidr = if tool.starts_with("ip6") { "fd00::/8" } else { "10.0.0.0/8" };
            run(&command.replace("POD_CIDR", cidr))?;
            run(&format!("{tool} -P FORWARD ACCEPT"))?;
        }
        Ok(())
    });
}

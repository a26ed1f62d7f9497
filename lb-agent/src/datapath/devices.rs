//! Which devices get programs, and as what. Pure: facts in, role out.
//!
//! The rules in order; the first that fits decides.
//!
//! 1. Only Ethernet devices (ARPHRD_ETHER) and never loopback: the programs parse Ethernet frames. WireGuard, ipip, tun and
//!    other devices without a link header are left out.
//! 2. `--external-device` globs, then `--pod-device` globs. A role that has globs is not detected any more.
//! 3. Ports of a bond or team: nothing, their master sees the packets.
//! 4. A device with a default route (IPv4 or IPv6, main table): external, whatever it is: a bond, a bridge with the node's
//!    address, the veth that is the uplink of a kind node.
//! 5. veth and netkit. With the peer in this namespace: nothing (plumbing). A port of a bridge (bridge CNI): pod.
//!    With an address of a subnet (a prefix shorter than /32 or /128): a link to a network, external. The rest is a pod's; its
//!    own address, if it has one, is the gateway as a host route, as the ptp plugin and kindnet give it.
//! 6. Ports of a bridge otherwise: nothing, the bridge or the pod's port sees the packets.
//! 7. Devices on a bus (PCI, virtio, ...): external.
//! 8. Overlays (vxlan, geneve, gretap), VLANs, macvlan, ipvlan, bonds and teams with a global address: external. What other
//!    nodes send arrives through them.
//! 9. All others: nothing. Bridges such as cni0 and docker0 among them (the ports do the work), dummies, taps.
//!
//! Pods on macvlan, ipvlan or SR-IOV have no device on the node's side: their own requests reach Services only by the socket
//! hooks (`--socket-lb all`).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use lb_common::{
    V4, V6,
    addr::v6,
    device::{Device, flags},
};

use crate::settings::{Settings, XdpSetting};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Packets that come in by it come from outside the node.
    External,
    /// A pod's end of the wire, or a bridge port of one.
    Pod,
}

/// An address of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    pub ip: IpAddr,
    pub prefix: u8,
    /// Scope global or site: reachable from elsewhere.
    pub global: bool,
    /// IPv4: secondary in its subnet; IPv6: temporary (RFC 8981).
    pub secondary: bool,
    pub deprecated: bool,
    /// Duplicate address detection has not passed (RFC 4862): not an address yet.
    pub tentative: bool,
}

/// What the kernel tells about a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkFacts {
    pub ifindex: u32,
    pub name: String,
    /// IFLA_INFO_KIND; empty for hardware.
    pub kind: String,
    pub ethernet: bool,
    pub loopback: bool,
    pub up: bool,
    /// On a bus (IFLA_PARENT_DEV_NAME, kernel 5.14).
    pub on_bus: bool,
    /// Its other end is in another namespace (IFLA_LINK_NETNSID).
    pub peer_elsewhere: bool,
    pub master: Option<u32>,
    /// The device that a VLAN or an overlay sits on (IFLA_LINK).
    pub lower: Option<u32>,
    /// A VLAN device sits on this one.
    pub carries_vlans: bool,
    pub mac: [u8; 6],
    /// Id of the XDP program on it.
    pub xdp_program: Option<u32>,
    pub addresses: Vec<Address>,
}

/// What a device's role depends on beside itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// Devices with a default route.
    pub default_route: BTreeSet<u32>,
    /// Kinds of all devices, to know what a master is.
    pub kinds: BTreeMap<u32, String>,
}

/// What the settings say about devices.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    pub external: Vec<glob::Pattern>,
    pub pod: Vec<glob::Pattern>,
}

impl Rules {
    pub fn of(settings: &Settings) -> Self {
        Self { external: settings.external_devices.clone(), pod: settings.pod_devices.clone() }
    }
}

/// The role of a device, if it has one; see the module's rules.
pub fn classify(link: &LinkFacts, rules: &Rules, context: &Context) -> Option<Role> {
    if !link.ethernet || link.loopback {
        return None;
    }
    let named = |globs: &[glob::Pattern]| globs.iter().any(|g| g.matches(&link.name));
    if named(&rules.external) {
        return Some(Role::External);
    }
    if named(&rules.pod) {
        return Some(Role::Pod);
    }
    detect(link, context).filter(|role| match role {
        Role::External => rules.external.is_empty(),
        Role::Pod => rules.pod.is_empty(),
    })
}

fn detect(link: &LinkFacts, context: &Context) -> Option<Role> {
    let master = link.master.and_then(|m| context.kinds.get(&m)).map_or("", String::as_str);
    if matches!(master, "bond" | "team") {
        return None;
    }
    if context.default_route.contains(&link.ifindex) {
        return Some(Role::External);
    }
    if matches!(link.kind.as_str(), "veth" | "netkit") {
        return detect_veth(link, master);
    }
    if matches!(master, "bridge" | "openvswitch") {
        return None;
    }
    if link.on_bus {
        return Some(Role::External);
    }
    let carries_a_network = matches!(
        link.kind.as_str(),
        "vxlan" | "geneve" | "gretap" | "ip6gretap" | "vlan" | "macvlan" | "ipvlan" | "bond" | "team"
    );
    (carries_a_network && link.addresses.iter().any(|a| a.global)).then_some(Role::External)
}

fn detect_veth(link: &LinkFacts, master: &str) -> Option<Role> {
    if !link.peer_elsewhere {
        return None;
    }
    let of_subnet = |a: &Address| a.global && a.prefix < if a.ip.is_ipv4() { 32 } else { 128 };
    if master != "bridge" && link.addresses.iter().any(of_subnet) {
        return Some(Role::External);
    }
    Some(Role::Pod)
}

/// The device's entry in `DEVICES`.
pub fn entry(link: &LinkFacts, role: Role) -> Device {
    let external = if role == Role::External { flags::EXTERNAL } else { 0 };
    let xdp_target = if link.xdp_program.is_some() { flags::XDP_TARGET } else { 0 };
    let mut device = Device { flags: external | xdp_target, mac: link.mac, ..Default::default() };
    let preferred = |v4: bool| {
        link.addresses
            .iter()
            .filter(|a| a.ip.is_ipv4() == v4 && a.global && !a.tentative)
            .min_by_key(|a| (a.deprecated, a.secondary))
            .map(|a| a.ip)
    };
    if let Some(IpAddr::V4(ip)) = preferred(true) {
        device.snat4 = ip.into();
    }
    if let Some(IpAddr::V6(ip)) = preferred(false) {
        device.snat6 = v6(ip);
    }
    device
}

/// What devices without an address of their own leave under: the addresses of the devices with a default route, or else of
/// any external one.
pub fn node_entry<'a>(external: impl IntoIterator<Item = &'a LinkFacts>, context: &Context) -> Device {
    let mut by_preference: Vec<_> = external.into_iter().filter(|link| link.up).collect();
    by_preference.sort_by_key(|link| (!context.default_route.contains(&link.ifindex), link.ifindex));
    let entries: Vec<_> = by_preference.into_iter().map(|link| entry(link, Role::External)).collect();
    Device {
        snat4: entries.iter().map(|e| e.snat4).find(|a| *a != V4::default()).unwrap_or_default(),
        snat6: entries.iter().map(|e| e.snat6).find(|a| *a != V6::default()).unwrap_or_default(),
        ..Default::default()
    }
}

/// Addresses under which the node can be reached: of global scope, on devices that are up.
pub fn local_addresses<'a>(links: impl IntoIterator<Item = &'a LinkFacts>) -> BTreeSet<IpAddr> {
    links
        .into_iter()
        .filter(|link| link.up)
        .flat_map(|link| &link.addresses)
        .filter(|a| a.global && !a.tentative && !a.ip.is_loopback())
        .map(|a| a.ip)
        .collect()
}

/// True if frames come from a wire, with checksums that are there: XDP may rewrite them. A veth's never are. Not where a
/// VLAN device sits on top: hardware takes the tags away before XDP sees the frames, and they would be sent on without.
pub const fn frames_from_a_wire(link: &LinkFacts) -> bool {
    link.on_bus && link.kind.is_empty() && !link.carries_vlans
}

/// The XDP mode that a device should have.
pub fn wanted_xdp(link: &LinkFacts, role: Role, setting: XdpSetting) -> super::Xdp {
    match (role, setting) {
        (Role::Pod, _) | (_, XdpSetting::Off) => super::Xdp::None,
        (Role::External, XdpSetting::Auto) if !frames_from_a_wire(link) => super::Xdp::None,
        // Its ports run the program, and packets would seem to come in by them.
        (Role::External, XdpSetting::Native) if matches!(link.kind.as_str(), "bond" | "team") => {
            super::Xdp::None
        }
        (Role::External, XdpSetting::Auto | XdpSetting::Native) => super::Xdp::Native,
        (Role::External, XdpSetting::Generic) => super::Xdp::Generic,
    }
}

#[cfg(test)]
#[path = "devices_tests.rs"]
mod tests;

//! The devices of this network namespace, from the kernel.
//!
//! Events are only a reason to look: each time the whole list is read. So a lost event (ENOBUFS) costs nothing, and what is
//! acted on is always a state that the kernel was in. Reading it takes about as many microseconds as there are devices,
//! without statistics; routes are read only when a default route changes.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::AsRawFd,
};

use futures::TryStreamExt as _;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
        link::{LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp},
        route::{RouteAttribute, RouteHeader, RouteMessage, RouteType},
    },
    sys::{Socket, SocketAddr},
};
use tokio::io::unix::AsyncFd;

use super::{
    Error,
    devices::{Address, Context, LinkFacts},
    neighbours::{Neighbours, RTM_DELNEIGH, RTM_NEWNEIGH},
    netlink::{self, DATAGRAM},
};

// enum rtnetlink_groups, include/uapi/linux/rtnetlink.h.
const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_NEIGH: u32 = 3;
const RTNLGRP_IPV4_IFADDR: u32 = 5;
const RTNLGRP_IPV4_ROUTE: u32 = 7;
const RTNLGRP_IPV6_IFADDR: u32 = 9;
const RTNLGRP_IPV6_ROUTE: u32 = 11;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
/// Room for a burst of events while we are busy; overflow is harmless but makes us look again.
const RECEIVE_BUFFER: usize = 1 << 20;

/// What has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    pub devices: bool,
    pub default_route: bool,
    /// Where packets leave may have changed: a device, any route, the address of a neighbour.
    pub next_hops: bool,
}

impl Change {
    pub const ALL: Self = Self { devices: true, default_route: true, next_hops: true };
}

/// Tells when to look again.
#[derive(Debug)]
pub struct Events {
    socket: AsyncFd<EventSocket>,
    neighbours: Neighbours,
}

#[derive(Debug)]
struct EventSocket(Socket);

impl AsRawFd for EventSocket {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

impl Events {
    /// Listens in the network namespace of this thread. Open it before the first look.
    pub fn open() -> Result<Self, Error> {
        let open = || {
            let mut socket = Socket::new(libc::NETLINK_ROUTE as isize)?;
            socket.set_non_blocking(true)?;
            socket.set_rx_buf_sz(RECEIVE_BUFFER)?;
            socket.bind(&SocketAddr::new(0, 0))?;
            for group in [
                RTNLGRP_LINK,
                RTNLGRP_NEIGH,
                RTNLGRP_IPV4_IFADDR,
                RTNLGRP_IPV4_ROUTE,
                RTNLGRP_IPV6_IFADDR,
                RTNLGRP_IPV6_ROUTE,
            ] {
                socket.add_membership(group)?;
            }
            // SAFETY: the socket owns its descriptor and always names the same one.
            let registered = unsafe { AsyncFd::register(EventSocket(socket)) };
            Ok::<_, io::Error>(Self { socket: registered?, neighbours: Neighbours::default() })
        };
        open().map_err(|source| Error::Netlink { what: "listening for device events", source })
    }

    /// Waits for something that matters here.
    pub async fn changed(&mut self) -> Result<Change, Error> {
        loop {
            let mut ready = self.socket.readable().await.map_err(failed)?;
            let change = drain(&self.socket.get_ref().0, &mut self.neighbours).map_err(failed)?;
            ready.clear_ready();
            if change != Change::default() {
                return Ok(change);
            }
        }
    }
}

fn failed(source: io::Error) -> Error {
    Error::Netlink { what: "reading device events", source }
}

/// Reads all that has come.
fn drain(socket: &Socket, neighbours: &mut Neighbours) -> io::Result<Change> {
    let mut change = Change::default();
    let mut datagram = Vec::with_capacity(DATAGRAM);
    loop {
        datagram.clear();
        match socket.recv_from(&mut datagram, libc::MSG_DONTWAIT) {
            Ok(_) => netlink::messages(&datagram).for_each(|message| note(&mut change, neighbours, &message)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(change),
            // Events were lost: anything may have changed.
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => change = Change::ALL,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

fn note(change: &mut Change, neighbours: &mut Neighbours, message: &netlink::Message<'_>) {
    match message.kind {
        RTM_NEWNEIGH | RTM_DELNEIGH => change.next_hops |= neighbours.note(message),
        // rtm_dst_len, second byte of struct rtmsg: a default route.
        RTM_NEWROUTE | RTM_DELROUTE if message.payload.get(1) == Some(&0) => *change = Change::ALL,
        RTM_NEWROUTE | RTM_DELROUTE => change.next_hops = true,
        _ => (change.devices, change.next_hops) = (true, true),
    }
}

/// All devices with their addresses.
pub async fn links(handle: &Handle) -> Result<BTreeMap<u32, LinkFacts>, Error> {
    let mut links = BTreeMap::new();
    let mask = vec![LinkExtentMask::SkipStats];
    let mut list = Box::pin(handle.link().get().set_filter_mask(AddressFamily::Unspec, mask).execute());
    while let Some(message) = list.try_next().await? {
        links.insert(message.header.index, facts(&message));
    }
    let mut list = Box::pin(handle.address().get().execute());
    while let Some(message) = list.try_next().await? {
        if let (Some(link), Some(address)) = (links.get_mut(&message.header.index), address(&message)) {
            link.addresses.push(address);
        }
    }
    let below_vlans: Vec<u32> = links.values().filter(|l| l.kind == "vlan").filter_map(|l| l.lower).collect();
    for lower in below_vlans {
        if let Some(link) = links.get_mut(&lower) {
            link.carries_vlans = true;
        }
    }
    Ok(links)
}

/// The context of these devices, but for routes.
pub fn kinds(links: &BTreeMap<u32, LinkFacts>) -> Context {
    let kinds = links.iter().map(|(ifindex, link)| (*ifindex, link.kind.clone())).collect();
    Context { kinds, ..Default::default() }
}

/// Devices with a default route in the main table.
pub async fn default_routes(handle: &Handle) -> Result<BTreeSet<u32>, Error> {
    let v4 = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<std::net::Ipv6Addr>::new().build();
    let mut devices = BTreeSet::new();
    for family in [v4, v6] {
        let mut list = Box::pin(handle.route().get(family).execute());
        while let Some(route) = list.try_next().await? {
            devices.extend(default_route_devices(&route));
        }
    }
    Ok(devices)
}

fn default_route_devices(route: &RouteMessage) -> Vec<u32> {
    if route.header.destination_prefix_length != 0
        || route.header.table != RouteHeader::RT_TABLE_MAIN
        || route.header.kind != RouteType::Unicast
    {
        return Vec::new();
    }
    let mut devices = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(ifindex) => devices.push(*ifindex),
            RouteAttribute::MultiPath(hops) => devices.extend(hops.iter().map(|hop| hop.interface_index)),
            _ => {}
        }
    }
    devices
}

fn facts(message: &LinkMessage) -> LinkFacts {
    let flags = message.header.flags;
    let mut link = LinkFacts {
        ifindex: message.header.index,
        ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        loopback: flags.contains(LinkFlags::Loopback),
        up: flags.contains(LinkFlags::Up),
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Controller(master) => link.master = Some(*master),
            LinkAttribute::LinkNetNsId(_) => link.peer_elsewhere = true,
            LinkAttribute::Link(lower) => link.lower = Some(*lower),
            LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().unwrap_or_default(),
            LinkAttribute::ParentDevName(_) => link.on_bus = true,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        link.kind = kind.to_string();
                    }
                }
            }
            LinkAttribute::Xdp(parts) => {
                link.xdp_program = parts.iter().find_map(|part| match part {
                    LinkXdp::ProgId(id) => Some(*id),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    link
}

fn address(message: &AddressMessage) -> Option<Address> {
    // The header has only the low 8 bits; the attribute has all.
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    let (mut local, mut any) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            // On point-to-point links IFA_ADDRESS is the other end.
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => any = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let failed = AddressFlags::Tentative | AddressFlags::Dadfailed;
    Some(Address {
        ip: local.or(any)?,
        prefix: message.header.prefix_len,
        global: matches!(message.header.scope, AddressScope::Universe | AddressScope::Site),
        secondary: flags.contains(AddressFlags::Secondary),
        deprecated: flags.contains(AddressFlags::Deprecated),
        tentative: flags.intersects(failed) && !flags.contains(AddressFlags::Optimistic),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A netlink message with an rtmsg of the given destination length.
    fn event(kind: u16, dst_len: u8) -> Vec<u8> {
        let mut bytes = vec![28, 0, 0, 0];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&[0; 10]);
        bytes.extend_from_slice(&[2, dst_len, 0, 0, 254, 0, 0, 0, 0, 0, 0, 0]);
        bytes
    }

    #[test]
    fn only_default_routes_matter_among_routes() {
        let change_of = |bytes: &[u8]| {
            let mut change = Change::default();
            netlink::messages(bytes).for_each(|m| note(&mut change, &mut Neighbours::default(), &m));
            change
        };
        let next_hops = Change { next_hops: true, ..Change::default() };
        assert_eq!(change_of(&event(RTM_NEWROUTE, 24)), next_hops);
        assert_eq!(change_of(&event(RTM_DELROUTE, 0)), Change::ALL);
        // RTM_NEWLINK
        assert_eq!(change_of(&event(16, 0)), Change { devices: true, ..next_hops });
    }
}

//! A chain of devices: a generator's, two of the node under test, a sink's.
//!
//! ```text
//!   outside            node under test            outside
//!   g0 ─── veth ─── d0                d1 ─── veth ─── b0
//!   clients          192.0.2.1   198.51.100.1     backends
//! ```
//!
//! A chain may have several lanes, for several CPUs: d2 and d3 between g1 and b1, and so on. Clients are behind the lane's
//! first device, backends behind its second, each next hop with a permanent neighbour entry. What the node does with the
//! packets is whatever is put into [`Chain::node`]: an XDP program, an agent, rules.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{BorrowedFd, OwnedFd},
};

use anyhow::Result;

use super::space::Space;
use crate::bench::sys;

/// Clients of all lanes are in these ranges.
pub const CLIENTS4: &str = "198.18.0.0/15";
pub const CLIENTS6: &str = "2001:db8:c::/48";
/// Backends.
pub const BACKENDS4: &str = "10.128.0.0/9";
pub const BACKENDS6: &str = "fd00:128::/32";

/// Where frames leave the outside and come back to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Client,
    Server,
}

/// A pair of devices: one outside and the node's, which is its peer.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    pub outside: u32,
    pub outside_mac: [u8; 6],
    pub node: u32,
    pub node_mac: [u8; 6],
}

#[derive(Clone, Copy, Debug)]
pub struct Lane {
    pub client: Pair,
    pub server: Pair,
}

impl Lane {
    pub const fn pair(&self, end: End) -> &Pair {
        match end {
            End::Client => &self.client,
            End::Server => &self.server,
        }
    }
}

pub struct Chain {
    pub node: Space,
    pub outside: Space,
    pub lanes: Vec<Lane>,
}

const fn mac(lane: u8, device: u8) -> [u8; 6] {
    [2, 0, 0, 0, lane, device]
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

/// The node's addresses on the devices of a lane.
pub const fn node_address4(lane: u8, end: End) -> Ipv4Addr {
    match end {
        End::Client => Ipv4Addr::new(192, 0, 2, 1 + 64 * lane),
        End::Server => Ipv4Addr::new(198, 51, 100, 1 + 64 * lane),
    }
}

pub fn node_address6(lane: u8, end: End) -> Ipv6Addr {
    let net = if end == End::Client { 1 } else { 2 };
    Ipv6Addr::new(0x2001, 0xdb8, net, lane.into(), 0, 0, 0, 1)
}

/// The next hop on the same link: the 62nd host of an IPv4 /26, ::fe of an IPv6 /64.
pub fn next_hops(lane: u8, end: End) -> [IpAddr; 2] {
    let v4 = u32::from(node_address4(lane, end)) + 61;
    let v6 = u128::from(node_address6(lane, end)) + 0xfd;
    [IpAddr::V4(v4.into()), IpAddr::V6(v6.into())]
}

impl Chain {
    pub fn new(lanes: u8) -> Result<Self> {
        let (node, outside) = (Space::new()?, Space::new()?);
        // No frames but those that are measured: no address of their own, no detection of duplicates.
        outside.sysctl(&[("ipv6/conf/default/disable_ipv6", "1")])?;
        node.sysctl(&[
            ("ipv6/conf/default/accept_dad", "0"),
            ("ipv6/conf/default/addr_gen_mode", "1"),
            ("ipv6/conf/default/router_solicitations", "0"),
            ("ipv6/conf/all/forwarding", "1"),
            ("ipv4/ip_forward", "1"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
        ])?;
        let mut chain = Self { node, outside, lanes: Vec::new() };
        for lane in 0..lanes {
            let client = chain.pair(lane, End::Client)?;
            let server = chain.pair(lane, End::Server)?;
            chain.lanes.push(Lane { client, server });
        }
        chain.route(0)?;
        Ok(chain)
    }

    fn pair(&self, lane: u8, end: End) -> Result<Pair> {
        let (outside, node, first) = match end {
            End::Client => (format!("g{lane}"), format!("d{}", 2 * lane), 0xa0),
            End::Server => (format!("b{lane}"), format!("d{}", 2 * lane + 1), 0xb0),
        };
        let (outside_mac, node_mac) = (mac(lane, first), mac(lane, first + 1));
        self.node.ip(&[
            format!(
                "link add {node} address {} type veth peer name {outside} address {} netns {}",
                text(node_mac),
                text(outside_mac),
                self.outside.path()
            ),
            format!("addr add {}/26 dev {node}", node_address4(lane, end)),
            format!("addr add {}/64 dev {node} nodad", node_address6(lane, end)),
            format!("link set {node} up"),
        ])?;
        self.outside.ip(&[format!("link set {outside} up")])?;
        let [v4, v6] = next_hops(lane, end);
        let neighbour =
            |hop| format!("neigh replace {hop} lladdr {} dev {node} nud permanent", text(outside_mac));
        self.node.ip(&[neighbour(v4), neighbour(v6)])?;
        Ok(Pair {
            outside: self.outside.ifindex(&outside)?,
            outside_mac,
            node: self.node.ifindex(&node)?,
            node_mac,
        })
    }

    /// Clients and backends are behind this lane.
    pub fn route(&self, lane: u8) -> Result<()> {
        self.route_to(lane, End::Client, CLIENTS4, CLIENTS6)?;
        self.route_to(lane, End::Server, BACKENDS4, BACKENDS6)
    }

    /// These addresses are behind one end of a lane.
    pub fn route_to(&self, lane: u8, end: End, net4: &str, net6: &str) -> Result<()> {
        let device = 2 * lane + if end == End::Client { 0 } else { 1 };
        let [v4, v6] = next_hops(lane, end);
        self.node.ip(&[
            format!("route replace {net4} via {v4} dev d{device}"),
            format!("route replace {net6} via {v6} dev d{device}"),
        ])
    }

    /// Takes back [`Self::route_to`].
    pub fn unroute(&self, net4: &str, net6: &str) -> Result<()> {
        self.node.ip(&[format!("route del {net4}"), format!("route del {net6}")])
    }

    /// Attaches an XDP program to a device of the node, until the link is dropped.
    pub fn attach(&self, ifindex: u32, program: BorrowedFd) -> Result<OwnedFd> {
        self.node.run(|| sys::attach_xdp(program, ifindex))
    }
}

//! What single-packet tests share: addresses, devices, frames of the usual kinds.

use std::net::IpAddr;

use anyhow::Result;
use lb_common::proto;

use crate::{
    frame::{Frame, L4},
    lab::{Dev, Lab, ip},
};

pub const SYN: u8 = 2;
pub const SYN_ACK: u8 = 18;
pub const ACK: u8 = 16;
pub const FIN_ACK: u8 = 17;
pub const RST: u8 = 4;

/// Addresses of one family.
#[derive(Clone, Copy, Debug)]
pub struct Net {
    pub client: IpAddr,
    pub other_client: IpAddr,
    pub vip: IpAddr,
    pub pod: IpAddr,
    pub remote_pod: IpAddr,
    pub node: IpAddr,
    pub router: IpAddr,
}

pub fn nets() -> [Net; 2] {
    let a = |s: &str| s.parse().unwrap();
    [
        Net {
            client: a("198.51.100.7"),
            other_client: a("198.51.100.8"),
            vip: a("10.96.0.10"),
            pod: a("10.244.1.5"),
            remote_pod: a("10.244.2.9"),
            node: a("192.0.2.1"),
            router: a("192.0.2.254"),
        },
        Net {
            client: a("2001:db8:c::7"),
            other_client: a("2001:db8:c::8"),
            vip: a("fd00:96::a"),
            pod: a("fd00:244:1::5"),
            remote_pod: a("fd00:244:2::9"),
            node: a("2001:db8::1"),
            router: a("2001:db8::fe"),
        },
    ]
}

/// The MAC address of the next hop behind the external device.
pub const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xee];

/// An external device with routes to everything outside through a router whose MAC address is known.
pub fn external(lab: &mut Lab) -> Result<Dev> {
    let dev = lab.external("ext0", &["192.0.2.1/24", "2001:db8::1/64"])?;
    for (router, routes) in [
        ("192.0.2.254", ["198.51.100.0/24", "10.244.2.0/24"]),
        ("2001:db8::fe", ["2001:db8:c::/64", "fd00:244:2::/64"]),
    ] {
        ip(&format!("neigh replace {router} lladdr 02:00:00:00:00:ee dev ext0 nud permanent"))?;
        for route in routes {
            ip(&format!("route add {route} via {router} dev ext0"))?;
        }
    }
    for path in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{path}"), "1")?;
    }
    Ok(dev)
}

pub fn tcp(flags: u8, src: (IpAddr, u16), dst: (IpAddr, u16)) -> Frame {
    Frame::new(L4::Tcp(flags), src, dst)
}

pub fn udp(src: (IpAddr, u16), dst: (IpAddr, u16)) -> Frame {
    Frame::new(L4::Udp, src, dst)
}

/// A Service with one backend behind one frontend, for TCP and UDP; returns its record.
pub fn one_backend(lab: &mut Lab, n: Net, backend: (IpAddr, u16), local: bool) -> Result<u32> {
    let id = lab.backend(backend, local)?;
    let service = lab.service(&[id], if local { &[1] } else { &[] })?;
    for p in [proto::TCP, proto::UDP] {
        lab.frontend((n.vip, 80), p, service, 0)?;
    }
    Ok(service)
}

#[track_caller]
pub fn assert_frame(what: &str, got: &[u8], want: &[u8]) {
    assert!(got == want, "{what}:\n got {}\nwant {}", hex(got), hex(want));
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
}

//! Frames of many flows, in both families: what differs between flows is the low word of an address, and the port.

use std::net::IpAddr;

use super::{
    insn::{Field, Size},
    measure::Feed,
};
use crate::{
    frame::{Frame, L4},
    lab::Dev,
};

/// Ports of a client's flows: 16384 from here.
const FIRST_PORT: u32 = 1024;
const PORTS: u32 = 1 << 14;
const PORT_BITS: u8 = 14;
/// Clients in one range.
pub const CLIENTS: u32 = 1 << 10;

/// Flows that are told apart before a run meets the first one again.
pub const NEW: u32 = 1 << 24;

/// Addresses of a family: first clients, Service addresses and backends.
#[derive(Clone, Copy, Debug)]
pub struct Net {
    pub client: IpAddr,
    /// For flows that are new with every packet.
    pub new_client: IpAddr,
    pub vip: IpAddr,
    pub local: IpAddr,
    pub remote: IpAddr,
    pub is_v6: bool,
}

pub fn nets() -> [Net; 2] {
    let a = |s: &str| s.parse().expect("a constant");
    [
        Net {
            client: a("198.18.0.0"),
            new_client: a("198.19.0.0"),
            vip: a("10.96.0.0"),
            local: a("10.244.1.1"),
            remote: a("10.244.2.9"),
            is_v6: false,
        },
        Net {
            client: a("2001:db8:c::"),
            new_client: a("2001:db8:c::1:0:0"),
            vip: a("fd00:96::"),
            local: a("fd00:244:1::1"),
            remote: a("fd00:244:2::9"),
            is_v6: true,
        },
    ]
}

/// The address `n` after `first`, which differs from it in the low word only.
pub fn nth(first: IpAddr, n: u32) -> IpAddr {
    match first {
        IpAddr::V4(a) => IpAddr::V4((u32::from(a) + n).into()),
        IpAddr::V6(a) => IpAddr::V6((u128::from(a) + u128::from(n)).into()),
    }
}

fn low_word(addr: IpAddr) -> u32 {
    match addr {
        IpAddr::V4(a) => a.into(),
        IpAddr::V6(a) => u128::from(a) as u32,
    }
}

/// Offsets in the frame of the low words of source and destination, and of the ports.
struct Offsets {
    src: i16,
    dst: i16,
    sport: i16,
    dport: i16,
}

const fn offsets(is_v6: bool) -> Offsets {
    if is_v6 {
        Offsets { src: 34, dst: 50, sport: 54, dport: 56 }
    } else {
        Offsets { src: 26, dst: 30, sport: 34, dport: 36 }
    }
}

impl Net {
    /// The shortest frame: 60 bytes, as the wire pads them, or what IPv6 and TCP take.
    pub fn frame(&self, l4: &L4, src: (IpAddr, u16), dst: (IpAddr, u16)) -> Frame {
        Frame::new(l4.clone(), src, dst).with(|f| f.payload = vec![0; 6])
    }

    /// From `flows` clients to one of `services` Service addresses each.
    pub fn requests(&self, l4: &L4, clients: IpAddr, flows: u32, services: u32, dev: Dev) -> Feed {
        let at = offsets(self.is_v6);
        let mut fields = client(flows, clients, at.src, at.sport);
        if services > 1 {
            let mask = i32::MAX as u32;
            let base = low_word(self.vip);
            fields.push(Field { offset: at.dst, size: Size::Word, base, shift: 0, mask, modulo: services });
        }
        let frame = self.frame(l4, (clients, FIRST_PORT as u16), (self.vip, 80)).bytes();
        Feed { frame, fields, flows, ifindex: dev.ifindex }
    }

    /// The answers of one backend to as many clients.
    pub fn replies(&self, l4: &L4, backend: (IpAddr, u16), flows: u32, dev: Dev) -> Feed {
        let at = offsets(self.is_v6);
        let fields = client(flows, self.client, at.dst, at.dport);
        let frame = self.frame(l4, backend, (self.client, FIRST_PORT as u16)).bytes();
        Feed { frame, fields, flows, ifindex: dev.ifindex }
    }

    /// Source and destination of a frame.
    pub fn ends(&self, frame: &[u8]) -> Option<(IpAddr, IpAddr)> {
        if self.is_v6 {
            let at = |i: usize| Some(IpAddr::from(<[u8; 16]>::try_from(frame.get(i..i + 16)?).ok()?));
            Some((at(22)?, at(38)?))
        } else {
            let at = |i: usize| Some(IpAddr::from(<[u8; 4]>::try_from(frame.get(i..i + 4)?).ok()?));
            Some((at(26)?, at(30)?))
        }
    }

    /// Source port of a frame.
    pub fn source_port(&self, frame: &[u8]) -> Option<u16> {
        let at = offsets(self.is_v6).sport as usize;
        Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?))
    }

    pub const fn name(&self) -> &'static str {
        if self.is_v6 { "IPv6" } else { "IPv4" }
    }
}

fn client(flows: u32, first: IpAddr, addr: i16, port: i16) -> Vec<Field> {
    if flows == 1 {
        return Vec::new();
    }
    let clients = Field {
        offset: addr,
        size: Size::Word,
        base: low_word(first),
        shift: PORT_BITS,
        mask: CLIENTS - 1,
        modulo: CLIENTS,
    };
    let ports =
        Field { offset: port, size: Size::Half, base: FIRST_PORT, shift: 0, mask: PORTS - 1, modulo: PORTS };
    vec![clients, ports]
}

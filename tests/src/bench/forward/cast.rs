//! Who sends what to whom: addresses of clients, Services and backends, and the streams of packets between them.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    sync::Arc,
};

use super::{
    chain::{Chain, End, node_address4, node_address6},
    sink::{Expect, Follows, Same},
    stream::{Shape, Stream, UNRECORDED, Value},
};
use crate::bench::insn::Size;

/// Ports of a client's flows: 16384 from here.
const FIRST_PORT: u16 = 1024;
const PORTS: u32 = 1 << 14;
const PORT_BITS: u8 = 14;
/// Clients in one range.
const CLIENTS: u32 = 1 << 10;
pub const SERVICE_PORT: u16 = 80;
pub const BACKEND_PORT: u16 = 8080;
/// Addresses that belong to the backends of one Service, as a power of two; what comes after the endpoints is for newcomers.
pub const ENDPOINT_BITS: u8 = 4;
const TTL: u8 = 63;

const V4_SERVICES: u32 = u32::from_be_bytes([10, 96, 0, 1]);
const V6_SERVICES: u32 = 1;
const V4_BACKENDS: u32 = u32::from_be_bytes([10, 128, 0, 0]);

pub fn service_address(service: u32, is_v6: bool) -> IpAddr {
    if is_v6 {
        let [a, b] = halves(V6_SERVICES + service);
        Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, a, b).into()
    } else {
        Ipv4Addr::from(V4_SERVICES + service).into()
    }
}

pub fn backend_address(service: u32, index: u32, is_v6: bool) -> IpAddr {
    let n = (service << ENDPOINT_BITS) + index;
    if is_v6 {
        let [a, b] = halves(n);
        Ipv6Addr::new(0xfd00, 0x128, 0, 0, 0, 0, a, b).into()
    } else {
        Ipv4Addr::from(V4_BACKENDS + n).into()
    }
}

const fn halves(word: u32) -> [u16; 2] {
    [(word >> 16) as u16, word as u16]
}

fn client_address(n: u32, is_v6: bool) -> IpAddr {
    if is_v6 {
        let [a, b] = halves(n);
        Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, a, b).into()
    } else {
        Ipv4Addr::from(u32::from_be_bytes([198, 18, 0, 0]) + n).into()
    }
}

fn low_word(addr: IpAddr) -> u32 {
    match addr {
        IpAddr::V4(a) => a.into(),
        IpAddr::V6(a) => u128::from(a) as u32,
    }
}

/// `base + (flow >> shift & mask) % modulo`; modulo 0: none.
#[derive(Clone, Copy, Debug)]
struct Part {
    base: u32,
    shift: u8,
    mask: u32,
    modulo: u32,
}

impl Part {
    const fn constant(base: u32) -> Self {
        Self { base, shift: 0, mask: 0, modulo: 0 }
    }

    const fn written(self) -> Value {
        Value::Flow { base: self.base, shift: self.shift, mask: self.mask, modulo: self.modulo }
    }

    const fn checked(self, offset: i16, size: Size) -> Follows {
        let Self { base, shift, mask, modulo } = self;
        Follows { offset, size, base, drop: 0, shift, mask, modulo }
    }
}

/// Flows between clients and Services.
#[derive(Clone, Copy, Debug)]
pub struct Flows {
    pub shape: Shape,
    /// A power of two.
    pub count: u32,
    /// Flows go to these Services in turns.
    pub first_service: u32,
    pub services: u32,
    /// The first client, counted from the start of the range: each has 16384 flows.
    pub first_client: u32,
    /// Their packets are told apart at the sink, and each flow is to stay where it is.
    pub recorded: bool,
}

/// A TCP segment in the middle of a connection.
pub const ACK: u8 = 16;
pub const SYN: u8 = 2;

impl Flows {
    /// Flows of the first client on.
    pub const fn new(shape: Shape, count: u32, services: u32) -> Self {
        Self { shape, count, first_service: 0, services, first_client: 0, recorded: true }
    }

    /// Flows of a lane's own clients to its own Services, of which each lane has so many.
    pub const fn of_lane(shape: Shape, count: u32, services: u32, lane: u32) -> Self {
        let first_client = 2 * CLIENTS * (lane + 1);
        Self { shape, count, first_service: lane * services, services, first_client, recorded: true }
    }

    /// Every packet another flow, of other clients: comes round after 16 million.
    pub const fn flood(shape: Shape, services: u32) -> Self {
        let count = PORTS * CLIENTS;
        Self { shape, count, first_service: 0, services, first_client: CLIENTS, recorded: false }
    }

    /// The fields that follow from a flow, from the client's side: its address and port, the Service's address.
    fn client(&self) -> (Part, Part) {
        let base = low_word(client_address(self.first_client, self.shape.is_v6));
        let addr = Part { base, shift: PORT_BITS, mask: CLIENTS - 1, modulo: 0 };
        let port = Part { base: FIRST_PORT.into(), shift: 0, mask: PORTS - 1, modulo: 0 };
        (addr, port)
    }

    fn service(&self) -> Part {
        let base = low_word(service_address(self.first_service, self.shape.is_v6));
        Part { base, shift: 0, mask: self.count - 1, modulo: self.services }
    }

    /// From the clients to the Services.
    pub fn requests(&self, chain: &Chain, lane: usize, flags: u8) -> Stream {
        let (shape, pair) = (self.shape, chain.lanes[lane].client);
        let (addr, port) = self.client();
        Stream::new(
            shape,
            flags,
            (pair.outside_mac, pair.node_mac),
            (client_address(self.first_client, shape.is_v6), FIRST_PORT),
            (service_address(self.first_service, shape.is_v6), SERVICE_PORT),
        )
        .flows(self.count, if self.recorded { 0 } else { UNRECORDED })
        .field(shape.src(), Size::Word, addr.written())
        .field(shape.sport(), Size::Half, port.written())
        .field(shape.dst(), Size::Word, self.service().written())
    }

    /// The answers of the backends that the table has for each flow, to the node.
    pub fn replies(&self, chain: &Chain, lane: usize, flags: u8, table: &Arc<OwnedFd>) -> Stream {
        let (shape, pair) = (self.shape, chain.lanes[lane].server);
        Stream::new(
            shape,
            flags,
            (pair.outside_mac, pair.node_mac),
            (backend_address(0, 0, shape.is_v6), BACKEND_PORT),
            (node_address(lane, End::Server, shape.is_v6), 0),
        )
        .flows(self.count, 0)
        .table(table)
        .field(shape.src(), Size::Word, Value::Table { word: 0 })
        .field(shape.dport(), Size::Half, Value::Table { word: 1 })
    }

    /// From the Services to the clients, as if the addresses of requests were those of the backends.
    pub fn turned_round(&self, chain: &Chain, lane: usize, flags: u8) -> Stream {
        let (shape, pair) = (self.shape, chain.lanes[lane].server);
        let (addr, port) = self.client();
        Stream::new(
            shape,
            flags,
            (pair.outside_mac, pair.node_mac),
            (service_address(self.first_service, shape.is_v6), SERVICE_PORT),
            (client_address(self.first_client, shape.is_v6), FIRST_PORT),
        )
        .flows(self.count, if self.recorded { 0 } else { UNRECORDED })
        .field(shape.src(), Size::Word, self.service().written())
        .field(shape.dst(), Size::Word, addr.written())
        .field(shape.dport(), Size::Half, port.written())
    }

    /// A request as it was sent.
    pub fn untouched(&self) -> Expect {
        let shape = self.shape;
        let (addr, port) = self.client();
        Expect {
            shape,
            same: vec![Same { offset: shape.dport(), value: SERVICE_PORT }, ttl(shape, TTL)],
            follows: vec![
                addr.checked(shape.src(), Size::Word),
                port.checked(shape.sport(), Size::Half),
                self.service().checked(shape.dst(), Size::Word),
            ],
            record: None,
        }
    }

    /// A request at a backend of its Service, from this node's address on the way there (and its port), one hop further.
    pub fn translated(&self, lane: usize, table: Option<&Arc<OwnedFd>>) -> Expect {
        let shape = self.shape;
        let first = low_word(backend_address(self.first_service, 0, shape.is_v6));
        let backend = Part { base: first, shift: 0, mask: self.count - 1, modulo: self.services };
        let node = low_word(node_address(lane, End::Server, shape.is_v6));
        Expect {
            shape,
            same: vec![Same { offset: shape.dport(), value: BACKEND_PORT }, ttl(shape, TTL - 1)],
            follows: vec![
                Follows { drop: ENDPOINT_BITS, ..backend.checked(shape.dst(), Size::Word) },
                Part::constant(node).checked(shape.src(), Size::Word),
            ],
            record: table.map(|t| (t.clone(), self.count)),
        }
    }

    /// A request at a backend of its Service, from the client itself: as rules forward it that keep the source.
    pub fn forwarded(&self, table: Option<&Arc<OwnedFd>>) -> Expect {
        let (addr, port) = self.client();
        let translated = self.translated(0, table);
        let backend = translated.follows[0];
        let (src, sport) = (self.shape.src(), self.shape.sport());
        let follows = vec![backend, addr.checked(src, Size::Word), port.checked(sport, Size::Half)];
        Expect { follows, ..translated }
    }

    /// An answer as it was sent.
    pub fn untouched_reply(&self, lane: usize) -> Expect {
        let shape = self.shape;
        let node = low_word(node_address(lane, End::Server, shape.is_v6));
        let node = Part::constant(node);
        Expect {
            shape,
            same: vec![Same { offset: shape.sport(), value: BACKEND_PORT }, ttl(shape, TTL)],
            follows: vec![node.checked(shape.dst(), Size::Word)],
            record: None,
        }
    }

    /// An answer from the Service to the client.
    pub fn answered(&self) -> Expect {
        let shape = self.shape;
        let (addr, port) = self.client();
        Expect {
            shape,
            same: vec![Same { offset: shape.sport(), value: SERVICE_PORT }, ttl(shape, TTL - 1)],
            follows: vec![
                addr.checked(shape.dst(), Size::Word),
                port.checked(shape.dport(), Size::Half),
                self.service().checked(shape.src(), Size::Word),
            ],
            record: None,
        }
    }
}

fn node_address(lane: usize, end: End, is_v6: bool) -> IpAddr {
    let lane = lane as u8;
    if is_v6 { node_address6(lane, end).into() } else { node_address4(lane, end).into() }
}

/// The hop limit and what is beside it: the protocol, or the next header.
const fn ttl(shape: Shape, hops: u8) -> Same {
    if shape.is_v6 {
        Same { offset: 20, value: (shape.protocol() as u16) << 8 | hops as u16 }
    } else {
        Same { offset: 22, value: (hops as u16) << 8 | shape.protocol() as u16 }
    }
}

/// Flows of one client, which differ in its port, to one address.
pub fn from_one_client(
    shape: Shape,
    flows: u32,
    macs: ([u8; 6], [u8; 6]),
    from: IpAddr,
    to: SocketAddr,
) -> Stream {
    let port = Part { base: FIRST_PORT.into(), shift: 0, mask: PORTS - 1, modulo: 0 };
    Stream::new(shape, ACK, macs, (from, FIRST_PORT), (to.ip(), to.port())).flows(flows, 0).field(
        shape.sport(),
        Size::Half,
        port.written(),
    )
}

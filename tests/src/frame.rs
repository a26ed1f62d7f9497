//! Frames for single-packet tests, built by etherparse with full checksums: what comes out of a program is compared byte
//! for byte with a frame that was built the same way, never with the program's own arithmetic.

use std::net::IpAddr;

use etherparse::{
    IcmpEchoHeader, Icmpv4Type, Icmpv6Type, IpFragOffset, IpHeaders, IpNumber, Ipv4Header, Ipv4Options,
    Ipv6Extensions, Ipv6FlowLabel, Ipv6FragmentHeader, Ipv6Header, Ipv6RawExtHeader, PacketBuilder,
    TcpHeader, UdpHeader, icmpv4, icmpv6,
};

pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xc];
pub const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xa];

/// Layer 4 of a [`Frame`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum L4 {
    /// TCP with these flags (RFC 9293 order: FIN 1, SYN 2, RST 4, PSH 8, ACK 16).
    Tcp(u8),
    Udp,
    /// UDP over IPv4 without a checksum.
    UdpNoChecksum,
    Echo,
    EchoReply,
    /// SCTP whose first chunk has this type (RFC 9260 section 3.2).
    Sctp(u8),
}

/// IPv6 extension headers in front of the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extension {
    None,
    /// Hop-by-hop options and destination options.
    Options,
    /// A routing header with this many segments left.
    Routing(u8),
    /// An authentication header.
    Authentication,
}

/// Part of a datagram: offset in bytes and whether more follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    pub id: u16,
    pub offset: u16,
    pub more: bool,
}

/// A packet on Ethernet.
#[derive(Clone, Debug)]
pub struct Frame {
    pub src_mac: [u8; 6],
    pub dst_mac: [u8; 6],
    pub vlan: Option<u16>,
    pub src: IpAddr,
    pub dst: IpAddr,
    pub sport: u16,
    pub dport: u16,
    pub l4: L4,
    pub ttl: u8,
    /// IPv4: this many bytes of no-operation options (a multiple of 4).
    pub options: usize,
    pub extension: Extension,
    pub fragment: Option<Fragment>,
    pub payload: Vec<u8>,
}

impl Frame {
    pub fn new(l4: L4, src: (IpAddr, u16), dst: (IpAddr, u16)) -> Self {
        Self {
            src_mac: CLIENT_MAC,
            dst_mac: NODE_MAC,
            vlan: None,
            src: src.0,
            dst: dst.0,
            sport: src.1,
            dport: dst.1,
            l4,
            ttl: 63,
            options: 0,
            extension: Extension::None,
            fragment: None,
            payload: b"payload of odd length".to_vec(),
        }
    }

    /// The same packet between other ends.
    pub fn between(&self, src: (IpAddr, u16), dst: (IpAddr, u16)) -> Self {
        Self { src: src.0, sport: src.1, dst: dst.0, dport: dst.1, ..self.clone() }
    }

    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// Flipped MAC addresses: sent back where it came from.
    pub fn returned(mut self) -> Self {
        std::mem::swap(&mut self.src_mac, &mut self.dst_mac);
        self
    }

    fn transport(&self) -> (IpNumber, Vec<u8>) {
        let mut bytes = Vec::new();
        match (&self.l4, self.src, self.dst) {
            (L4::Tcp(flags), src, dst) => {
                let mut tcp = TcpHeader::new(self.sport, self.dport, 1_000, 64_000);
                tcp.fin = flags & 1 != 0;
                tcp.syn = flags & 2 != 0;
                tcp.rst = flags & 4 != 0;
                tcp.psh = flags & 8 != 0;
                tcp.ack = flags & 16 != 0;
                tcp.checksum = match (src, dst) {
                    (IpAddr::V4(s), IpAddr::V4(d)) => {
                        tcp.calc_checksum_ipv4_raw(s.octets(), d.octets(), &self.payload)
                    }
                    (IpAddr::V6(s), IpAddr::V6(d)) => {
                        tcp.calc_checksum_ipv6_raw(s.octets(), d.octets(), &self.payload)
                    }
                    _ => panic!("both ends have one family"),
                }
                .unwrap();
                tcp.write(&mut bytes).unwrap();
                bytes.extend_from_slice(&self.payload);
                (IpNumber::TCP, bytes)
            }
            (L4::Udp | L4::UdpNoChecksum, src, dst) => {
                let mut udp =
                    UdpHeader::without_ipv4_checksum(self.sport, self.dport, self.payload.len()).unwrap();
                if self.l4 == L4::Udp {
                    udp.checksum = match (src, dst) {
                        (IpAddr::V4(s), IpAddr::V4(d)) => {
                            udp.calc_checksum_ipv4_raw(s.octets(), d.octets(), &self.payload)
                        }
                        (IpAddr::V6(s), IpAddr::V6(d)) => {
                            udp.calc_checksum_ipv6_raw(s.octets(), d.octets(), &self.payload)
                        }
                        _ => panic!("both ends have one family"),
                    }
                    .unwrap();
                }
                udp.write(&mut bytes).unwrap();
                bytes.extend_from_slice(&self.payload);
                (IpNumber::UDP, bytes)
            }
            (L4::Sctp(chunk), ..) => (IpNumber::SCTP, self.sctp(*chunk)),
            (L4::Echo | L4::EchoReply, IpAddr::V4(_), _) => {
                let header = IcmpEchoHeader { id: 1, seq: 1 };
                let echo = match self.l4 {
                    L4::EchoReply => Icmpv4Type::EchoReply(header),
                    _ => Icmpv4Type::EchoRequest(header),
                };
                etherparse::Icmpv4Header::with_checksum(echo, &self.payload).write(&mut bytes).unwrap();
                bytes.extend_from_slice(&self.payload);
                (IpNumber::ICMP, bytes)
            }
            (L4::Echo | L4::EchoReply, IpAddr::V6(s), IpAddr::V6(d)) => {
                let header = IcmpEchoHeader { id: 1, seq: 1 };
                let echo = match self.l4 {
                    L4::EchoReply => Icmpv6Type::EchoReply(header),
                    _ => Icmpv6Type::EchoRequest(header),
                };
                etherparse::Icmpv6Header::with_checksum(echo, s.octets(), d.octets(), &self.payload)
                    .unwrap()
                    .write(&mut bytes)
                    .unwrap();
                bytes.extend_from_slice(&self.payload);
                (IpNumber::IPV6_ICMP, bytes)
            }
            _ => panic!("both ends have one family"),
        }
    }

    /// RFC 9260 section 3: a header and one chunk, padded to four bytes.
    fn sctp(&self, chunk: u8) -> Vec<u8> {
        let mut bytes = [self.sport.to_be_bytes(), self.dport.to_be_bytes()].concat();
        bytes.extend_from_slice(&0x1234_5678_u32.to_be_bytes());
        bytes.extend_from_slice(&[0; 4]);
        let chunk_bytes = u16::try_from(4 + self.payload.len()).unwrap();
        bytes.extend_from_slice(&[chunk, 0]);
        bytes.extend_from_slice(&chunk_bytes.to_be_bytes());
        bytes.extend_from_slice(&self.payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        // Section 6.8 and appendix A: over everything with the field at 0, stored with the low byte first.
        let check = crc32c(&bytes);
        bytes[8..12].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    /// The packet from the IP header on.
    pub fn ip_bytes(&self) -> Vec<u8> {
        let (number, transport) = self.transport();
        let transport = match self.fragment {
            Some(f) if f.offset > 0 => transport[f.offset as usize..].to_vec(),
            Some(f) if f.more => transport[..16].to_vec(),
            _ => transport,
        };
        let mut bytes = Vec::new();
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let payload_len = u16::try_from(transport.len()).unwrap();
                let mut ip =
                    Ipv4Header::new(payload_len, self.ttl, number, src.octets(), dst.octets()).unwrap();
                ip.options = Ipv4Options::try_from(&vec![1u8; self.options][..]).unwrap();
                ip.set_payload_len(transport.len()).unwrap();
                if let Some(f) = self.fragment {
                    ip.identification = f.id;
                    ip.dont_fragment = false;
                    ip.more_fragments = f.more;
                    ip.fragment_offset = IpFragOffset::try_new(f.offset / 8).unwrap();
                }
                ip.header_checksum = ip.calc_header_checksum();
                ip.write(&mut bytes).unwrap();
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let (next, headers) = self.extensions(number);
                let ip = Ipv6Header {
                    traffic_class: 0,
                    flow_label: Ipv6FlowLabel::ZERO,
                    payload_length: u16::try_from(headers.len() + transport.len()).unwrap(),
                    next_header: next,
                    hop_limit: self.ttl,
                    source: src.octets(),
                    destination: dst.octets(),
                };
                ip.write(&mut bytes).unwrap();
                bytes.extend_from_slice(&headers);
            }
            _ => panic!("both ends have one family"),
        }
        bytes.extend_from_slice(&transport);
        bytes
    }

    fn extensions(&self, number: IpNumber) -> (IpNumber, Vec<u8>) {
        let mut bytes = Vec::new();
        if let Some(f) = self.fragment {
            let header = Ipv6FragmentHeader::new(
                number,
                IpFragOffset::try_new(f.offset / 8).unwrap(),
                f.more,
                f.id.into(),
            );
            header.write(&mut bytes).unwrap();
            return (IpNumber::IPV6_FRAGMENTATION_HEADER, bytes);
        }
        // Six bytes of padding (PadN, RFC 8200 section 4.2).
        let pad = [1u8, 4, 0, 0, 0, 0];
        match self.extension {
            Extension::None => (number, bytes),
            Extension::Options => {
                Ipv6RawExtHeader::new_raw(IpNumber::IPV6_DESTINATION_OPTIONS, &pad)
                    .unwrap()
                    .write(&mut bytes)
                    .unwrap();
                Ipv6RawExtHeader::new_raw(number, &pad).unwrap().write(&mut bytes).unwrap();
                (IpNumber::IPV6_HEADER_HOP_BY_HOP, bytes)
            }
            Extension::Routing(left) => {
                bytes.extend_from_slice(&[number.0, 2, 4, left, 0, 0, 0, 0]);
                bytes.extend_from_slice(&[0x20; 16]);
                (IpNumber::IPV6_ROUTE_HEADER, bytes)
            }
            Extension::Authentication => {
                bytes.extend_from_slice(&[number.0, 4, 0, 0]);
                bytes.extend_from_slice(&[7; 20]);
                (IpNumber::AUTHENTICATION_HEADER, bytes)
            }
        }
    }

    /// The whole frame.
    pub fn bytes(&self) -> Vec<u8> {
        ethernet(self.src_mac, self.dst_mac, self.vlan, self.src.is_ipv6(), &self.ip_bytes())
    }
}

/// CRC32c, bit by bit (RFC 3720 appendix B.4 has the polynomial and test vectors).
pub fn crc32c(data: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 != 0 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

fn ethernet(src: [u8; 6], dst: [u8; 6], vlan: Option<u16>, is_v6: bool, ip: &[u8]) -> Vec<u8> {
    let mut bytes = [dst, src].concat();
    if let Some(id) = vlan {
        bytes.extend_from_slice(&[0x81, 0x00]);
        bytes.extend_from_slice(&id.to_be_bytes());
    }
    bytes.extend_from_slice(if is_v6 { &[0x86, 0xdd] } else { &[0x08, 0x00] });
    bytes.extend_from_slice(ip);
    bytes
}

/// Kinds of ICMP errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IcmpError {
    PortUnreachable,
    TooBig(u16),
    TimeExceeded,
}

/// An ICMP error from `src` to `dst` that quotes `quoted` (from its IP header on), with full checksums.
pub fn icmp_error(
    macs: ([u8; 6], [u8; 6]),
    src: IpAddr,
    dst: IpAddr,
    ttl: u8,
    error: IcmpError,
    quoted: &[u8],
) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(macs.0, macs.1);
    let mut bytes = Vec::new();
    match (src, dst) {
        (IpAddr::V4(s), IpAddr::V4(d)) => {
            let kind =
                match error {
                    IcmpError::PortUnreachable => {
                        Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Port)
                    }
                    IcmpError::TooBig(mtu) => Icmpv4Type::DestinationUnreachable(
                        icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: mtu },
                    ),
                    IcmpError::TimeExceeded => {
                        Icmpv4Type::TimeExceeded(icmpv4::TimeExceededCode::TtlExceededInTransit)
                    }
                };
            builder.ipv4(s.octets(), d.octets(), ttl).icmpv4(kind).write(&mut bytes, quoted).unwrap();
        }
        (IpAddr::V6(s), IpAddr::V6(d)) => {
            let kind = match error {
                IcmpError::PortUnreachable => {
                    Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port)
                }
                IcmpError::TooBig(mtu) => Icmpv6Type::PacketTooBig { mtu: mtu.into() },
                IcmpError::TimeExceeded => {
                    Icmpv6Type::TimeExceeded(icmpv6::TimeExceededCode::HopLimitExceeded)
                }
            };
            let ip = IpHeaders::Ipv6(
                Ipv6Header {
                    hop_limit: ttl,
                    source: s.octets(),
                    destination: d.octets(),
                    ..Ipv6Header::default()
                },
                Ipv6Extensions::default(),
            );
            builder.ip(ip).icmpv6(kind).write(&mut bytes, quoted).unwrap();
        }
        _ => panic!("both ends have one family"),
    }
    bytes
}

//! Raw sockets of places: packets that no ordinary socket sends, and answers that no ordinary socket shows.
//!
//! They are this process's own sockets, made inside a namespace. Socket hooks go by the cgroup of a process, so they never
//! see these: for pods and the client, whose packets are translated on the way.

use std::{
    io,
    mem::MaybeUninit,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{AsRawFd, RawFd},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::{
    netns::Netns,
    place::{Family, Place},
};

/// A raw IP socket.
pub struct Raw {
    socket: Socket,
    family: Family,
}

impl Raw {
    /// Sends and receives payloads of this protocol.
    pub fn open(place: &Place, family: Family, protocol: u8) -> anyhow::Result<Self> {
        let (domain, protocol) = (domain(family), Protocol::from(i32::from(protocol)));
        let socket = place
            .netns
            .run(|| Socket::new(domain, Type::RAW, Some(protocol)))?
            .with_context(|| format!("no raw socket in {}", place.name))?;
        Ok(Self { socket, family })
    }

    /// Sends and receives ICMP of the family.
    pub fn icmp(place: &Place, family: Family) -> anyhow::Result<Self> {
        Self::open(place, family, icmp_protocol(family))
    }

    /// Sends whole packets, IP header included.
    pub fn packets(place: &Place, family: Family) -> anyhow::Result<Self> {
        /// `IPPROTO_RAW`: sends only.
        const RAW: u8 = 255;
        let raw = Self::open(place, family, RAW)?;
        let option = match family {
            Family::V4 => (libc::IPPROTO_IP, libc::IP_HDRINCL),
            Family::V6 => (libc::IPPROTO_IPV6, libc::IPV6_HDRINCL),
        };
        set(&raw.socket, option, 1).with_context(|| format!("IP_HDRINCL in {}", place.name))?;
        Ok(raw)
    }

    pub fn send(&self, to: IpAddr, bytes: &[u8]) -> io::Result<()> {
        self.socket.send_to(bytes, &SockAddr::from(SocketAddr::new(to, 0))).map(|_| ())
    }

    /// The first thing that `pick` takes out of what arrives: sender and payload.
    pub fn receive<T>(
        &self,
        limit: Duration,
        mut pick: impl FnMut(IpAddr, &[u8]) -> Option<T>,
    ) -> io::Result<Option<T>> {
        let deadline = Instant::now() + limit;
        let mut buffer = [MaybeUninit::<u8>::uninit(); 65_536];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.socket.set_read_timeout(Some(left))?;
            let (length, from) = match self.socket.recv_from(&mut buffer) {
                Ok(received) => received,
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Ok(None);
                }
                Err(e) => return Err(e),
            };
            // SAFETY: the kernel has written so many bytes.
            let bytes = unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), length) };
            let Some(from) = from.as_socket() else { continue };
            // IPv4 comes with its header, IPv6 without.
            let payload = match self.family {
                Family::V4 => bytes.get(usize::from(bytes[0] & 0xf) * 4..).unwrap_or_default(),
                Family::V6 => bytes,
            };
            if let Some(found) = pick(from.ip(), payload) {
                return Ok(Some(found));
            }
        }
    }
}

impl AsRawFd for Raw {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// Has a socket send whatever its device takes, in one piece and with DF, also if the host has learned of a smaller link.
pub fn never_fragment(socket: &impl AsRawFd, family: Family) -> io::Result<()> {
    let option = match family {
        Family::V4 => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
        Family::V6 => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    };
    // IP_PMTUDISC_PROBE and IPV6_PMTUDISC_PROBE.
    set(socket, option, 3)
}

/// Sets a socket option, given by level and number.
fn set(
    socket: &impl AsRawFd,
    (level, option): (libc::c_int, libc::c_int),
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: an open socket, and the address and size of an int that lives through the call.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn domain(family: Family) -> Domain {
    match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    }
}

const fn icmp_protocol(family: Family) -> u8 {
    match family {
        Family::V4 => libc::IPPROTO_ICMP as u8,
        Family::V6 => libc::IPPROTO_ICMPV6 as u8,
    }
}

/// A UDP socket of a place, bound to its own address.
pub fn udp(place: &Place, family: Family, port: u16) -> anyhow::Result<UdpSocket> {
    let addr = place.addrs.socket(family, port);
    let socket = place.netns.run(|| UdpSocket::bind(addr))?;
    socket.with_context(|| format!("cannot bind {addr} in {}", place.name))
}

/// What an ICMP error says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IcmpError {
    /// Who says so.
    pub from: IpAddr,
    pub kind: u8,
    pub code: u8,
    /// The next link's MTU, in errors about that.
    pub mtu: u32,
    /// The packet that it is about.
    pub quoted: Quoted,
}

/// The start of a quoted packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quoted {
    pub protocol: u8,
    pub src: SocketAddr,
    pub dst: SocketAddr,
}

impl IcmpError {
    /// Port unreachable: type 3 code 3 (RFC 792), type 1 code 4 (RFC 4443).
    pub fn is_port_unreachable(&self) -> bool {
        (self.kind, self.code) == if self.from.is_ipv4() { (3, 3) } else { (1, 4) }
    }

    /// Time (hop limit) exceeded in transit: type 11 code 0, type 3 code 0.
    pub fn is_time_exceeded(&self) -> bool {
        (self.kind, self.code) == if self.from.is_ipv4() { (11, 0) } else { (3, 0) }
    }

    /// Fragmentation needed: type 3 code 4; packet too big: type 2 code 0.
    pub fn is_too_big(&self) -> bool {
        (self.kind, self.code) == if self.from.is_ipv4() { (3, 4) } else { (2, 0) }
    }

    /// Reads a payload of ICMP. `None` for anything but a well-formed error with a valid checksum about TCP, UDP or SCTP.
    pub fn parse(from: IpAddr, bytes: &[u8]) -> Option<Self> {
        let (kind, code) = (*bytes.first()?, *bytes.get(1)?);
        // The kernel shows raw sockets IPv4's before it has looked at the checksum, IPv6's after that.
        let (errors, valid): (&[u8], _) =
            if from.is_ipv4() { (&[3, 4, 11, 12], sum(bytes) == 0xffff) } else { (&[1, 2, 3, 4], true) };
        if !errors.contains(&kind) || !valid {
            return None;
        }
        let mtu = match from {
            IpAddr::V4(_) => u32::from(u16::from_be_bytes(bytes.get(6..8)?.try_into().ok()?)),
            IpAddr::V6(_) => u32::from_be_bytes(bytes.get(4..8)?.try_into().ok()?),
        };
        let quoted = Quoted::parse(from.is_ipv4(), bytes.get(8..)?)?;
        Some(Self { from, kind, code, mtu, quoted })
    }
}

impl Quoted {
    fn parse(is_v4: bool, packet: &[u8]) -> Option<Self> {
        let (protocol, src, dst, transport): (u8, IpAddr, IpAddr, _) = if is_v4 {
            let addr = |at: usize| -> Option<IpAddr> {
                Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?).into())
            };
            let length = usize::from(packet.first()? & 0xf) * 4;
            if sum(packet.get(..length)?) != 0xffff {
                return None;
            }
            (*packet.get(9)?, addr(12)?, addr(16)?, packet.get(length..)?)
        } else {
            let addr = |at: usize| -> Option<IpAddr> {
                Some(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?).into())
            };
            (*packet.get(6)?, addr(8)?, addr(24)?, packet.get(40..)?)
        };
        let port = |at: usize| Some(u16::from_be_bytes(transport.get(at..at + 2)?.try_into().ok()?));
        Some(Self { protocol, src: SocketAddr::new(src, port(0)?), dst: SocketAddr::new(dst, port(2)?) })
    }
}

/// The one's complement sum of RFC 1071; 0xffff over anything that holds its own checksum.
pub fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Sends one echo request; whether an answer with the same content came back from that address.
pub fn ping(from: &Place, to: IpAddr, limit: Duration) -> anyhow::Result<bool> {
    const CONTENT: &[u8] = b"echo, of an odd length.";
    let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
    let raw = Raw::icmp(from, family)?;
    let (request, reply) = match family {
        Family::V4 => (8, 0),
        Family::V6 => (128, 129),
    };
    let id = std::process::id() as u16;
    let mut bytes = [&[request, 0, 0, 0][..], &id.to_be_bytes(), &[0, 7], CONTENT].concat();
    if family == Family::V4 {
        // For IPv6 the kernel does this.
        let checksum = !sum(&bytes);
        bytes[2..4].copy_from_slice(&checksum.to_be_bytes());
    }
    raw.send(to, &bytes)?;
    let answered = raw.receive(limit, |sender, payload| {
        let ours = sender == to && payload.first() == Some(&reply) && payload.get(4..) == bytes.get(4..);
        (ours && (sender.is_ipv6() || sum(payload) == 0xffff)).then_some(())
    })?;
    Ok(answered.is_some())
}

/// The hardware address of a device.
pub fn mac(netns: &Netns, device: &str) -> anyhow::Result<[u8; 6]> {
    let shown = netns.exec(&format!("ip -o link show dev {device}"))?;
    let mut words = shown.split_whitespace().skip_while(|word| *word != "link/ether");
    let text = words.nth(1).with_context(|| format!("{device} has no address: {shown}"))?;
    let bytes: Vec<u8> =
        text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
    bytes.try_into().map_err(|_| anyhow::anyhow!("{text} is no hardware address"))
}

/// Sends a whole frame by a device.
pub fn send_frame(netns: &Netns, device: &str, frame: &[u8]) -> anyhow::Result<()> {
    let name = std::ffi::CString::new(device)?;
    netns.run(|| {
        let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
        // SAFETY: a valid C string; all zeros are a valid address, which is then filled in.
        let (index, mut addr) =
            unsafe { (libc::if_nametoindex(name.as_ptr()), std::mem::zeroed::<libc::sockaddr_ll>()) };
        addr.sll_family = libc::AF_PACKET as u16;
        addr.sll_ifindex = i32::try_from(index)?;
        // SAFETY: an open socket, a slice with its length, and an address with its size.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const addr).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        ensure!(sent == frame.len() as isize, "{device}: {}", io::Error::last_os_error());
        Ok(())
    })?
}

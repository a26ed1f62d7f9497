//! A node with the classifiers on its devices, packets in every state of their checksum, and what arithmetic on them takes.

use std::{
    net::IpAddr,
    os::fd::{AsFd as _, OwnedFd},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, Result};
use lb_tests::{
    bench::sys,
    frame::{Frame, L4},
    lab::{Dev, Hook, Lab, OneCpu, Options, TICKS, ifindex, ip},
    packets::{ACK, Net, assert_frame, external, one_backend, tcp, udp},
    vnet::{Header, Port},
};

/// In ticks: longer than any test.
const LONG: u32 = 1 << 28;
const SOON: Duration = Duration::from_secs(5);
pub const BACKEND_PORT: u16 = 8080;

/// Where translated packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By the stack to a pod of this node.
    Stack,
    /// Back out of the device, under the node's address.
    Routed,
}

/// A node with the programs on a device, and both ends of the way through it.
pub struct Bed {
    pub lab: Lab,
    pub ext: Dev,
    pub n: Net,
    pub way: Way,
    wire: Port,
    /// The pod's end of its device.
    pod: Port,
    _links: Vec<OwnedFd>,
    _cpu: OneCpu,
}

impl Bed {
    pub fn new(n: Net, way: Way) -> Result<Self> {
        let cpu = OneCpu::here();
        let mut lab = Lab::with(Options { flow_cache: 1024, jiffies_per_s: LONG, ..Options::default() })?;
        let ext = external(&mut lab)?;
        ip("link add pod0 type veth peer name pod0p")?;
        for dev in ["ext0", "ext0p", "pod0", "pod0p"] {
            ip(&format!("link set {dev} mtu 9000 up"))?;
        }
        let bits = if n.pod.is_ipv6() { 128 } else { 32 };
        ip(&format!("route add {}/{bits} dev pod0", n.pod))?;
        ip(&format!("neigh replace {} lladdr 02:00:00:00:00:99 dev pod0 nud permanent", n.pod))?;
        let backend = if way == Way::Stack { n.pod } else { n.remote_pod };
        one_backend(&mut lab, n, (backend, BACKEND_PORT), way == Way::Stack)?;
        let program = lab.program_fd(Hook::Ingress)?;
        let links = vec![sys::attach_tcx(program.as_fd(), ext.ifindex)?];
        let (wire, pod) = (Port::open(ifindex("ext0p")?)?, Port::open(ifindex("pod0p")?)?);
        Ok(Self { lab, ext, n, way, wire, pod, _links: links, _cpu: cpu })
    }

    /// From a client to the Service.
    pub fn request(&self, l4: &L4) -> Frame {
        let ends = ((self.n.client, 40_000), (self.n.vip, 80));
        if *l4 == L4::Udp { udp(ends.0, ends.1) } else { tcp(ACK, ends.0, ends.1) }
    }

    /// What arrives behind the node after `frame` was sent.
    pub fn deliver(&self, header: Header, frame: &[u8]) -> Result<(Header, Vec<u8>)> {
        self.wire.send(header, frame)?;
        let (port, to) =
            if self.way == Way::Stack { (&self.pod, self.n.pod) } else { (&self.wire, self.n.remote_pod) };
        let came = port.receive(SOON, |f| destination(f) == Some(to))?;
        came.with_context(|| format!("nothing arrived: {:?}", self.lab.counters()))
    }

    /// Opens the flow of `frame` and has it noted; gives the source that its packets get.
    pub fn open(&mut self, frame: &Frame) -> Result<(IpAddr, u16)> {
        self.deliver(Header::default(), &frame.bytes())?;
        sleep(TICKS);
        let (_, came) = self.deliver(Header::default(), &frame.bytes())?;
        let at = l4_at(self.n);
        let port = u16::from_be_bytes([came[at], came[at + 1]]);
        Ok((if self.way == Way::Stack { frame.src } else { self.n.node }, port))
    }

    /// The same packet behind the node.
    pub fn translated(&self, frame: &Frame, src: (IpAddr, u16)) -> Frame {
        let backend = if self.way == Way::Stack { self.n.pod } else { self.n.remote_pod };
        frame.between(src, (backend, BACKEND_PORT)).with(|f| f.ttl -= 1)
    }
}

fn destination(frame: &[u8]) -> Option<IpAddr> {
    match frame.get(12..14)? {
        [0x08, 0x00] => Some(<[u8; 4]>::try_from(frame.get(30..34)?).ok()?.into()),
        [0x86, 0xdd] => Some(<[u8; 16]>::try_from(frame.get(38..54)?).ok()?.into()),
        _ => None,
    }
}

pub const fn l4_at(n: Net) -> usize {
    if n.vip.is_ipv6() { 54 } else { 34 }
}

/// Distance of the checksum from the start of the header.
pub fn check_at(l4: &L4) -> usize {
    if matches!(l4, L4::Tcp(_)) { 16 } else { 6 }
}

/// RFC 1071 section 4.1, on bytes as they are on the wire; not complemented.
pub fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], *w.get(1).unwrap_or(&0)])));
    let mut sum: u32 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Sum of the pseudo-header (RFC 9293 section 3.1, RFC 8200 section 8.1) for so many bytes.
pub fn pseudo(frame: &Frame, bytes: u32) -> u16 {
    let octets = |addr: IpAddr| match addr {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    };
    let proto: u32 = if matches!(frame.l4, L4::Tcp(_)) { 6 } else { 17 };
    sum(&[octets(frame.src), octets(frame.dst), proto.to_be_bytes().into(), bytes.to_be_bytes().into()]
        .concat())
}

pub fn l4_bytes(n: Net, frame: &Frame) -> u32 {
    (frame.bytes().len() - l4_at(n)) as u32
}

pub fn put(frame: &mut [u8], at: usize, value: u16) {
    frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// As a stack leaves it to its device: the field holds the pseudo-header's sum.
pub fn unfinished(n: Net, frame: &Frame, pseudo: u16) -> (Header, Vec<u8>) {
    let (start, offset) = (l4_at(n), check_at(&frame.l4));
    let mut bytes = frame.bytes();
    put(&mut bytes, start + offset, pseudo);
    let header = Header {
        flags: Header::NEEDS_CSUM,
        csum_start: start as u16,
        csum_offset: offset as u16,
        ..Header::default()
    };
    (header, bytes)
}

/// What a device makes of it: the sum from `csum_start` on, field included.
pub fn finish(header: Header, mut frame: Vec<u8>, l4: &L4) -> Vec<u8> {
    let start = header.csum_start as usize;
    let check = match !sum(&frame[start..]) {
        // RFC 768: 0 means that there is none.
        0 if *l4 == L4::Udp => 0xffff,
        check => check,
    };
    put(&mut frame, start + header.csum_offset as usize, check);
    frame
}

/// From the IP header on, which is what translation is about.
#[track_caller]
pub fn assert_packet(what: &str, got: &[u8], want: &Frame) {
    assert_frame(what, &got[14..], &want.ip_bytes());
}

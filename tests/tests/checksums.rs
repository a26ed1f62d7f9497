//! The classifiers' short way on packets whose checksum is finished, left to a device, summed by one, or not there: frames go
//! in by packet sockets that say so ([`lb_tests::vnet`]), through devices with the real programs, and out by others. Needs root.

use std::{
    net::IpAddr,
    os::fd::{AsFd as _, OwnedFd},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{
    bench::{
        insn::{Insn, Size},
        sys::{self, MapType, ProgType},
    },
    frame::{Frame, L4, NODE_MAC},
    lab::{Dev, Hook, Lab, OneCpu, Options, ifindex, ip},
    packets::{ACK, Net, assert_frame, external, nets, one_backend, tcp, udp},
    vnet::{Header, Port},
};

/// Some ticks of the kernel: a flow is cached from the tick after its first packet on.
const TICKS: Duration = Duration::from_millis(40);
/// In ticks: longer than any test.
const LONG: u32 = 1 << 28;
const SOON: Duration = Duration::from_secs(5);
const BACKEND_PORT: u16 = 8080;

/// Where translated packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// By the stack to a pod of this node.
    Stack,
    /// Back out of the device, under the node's address.
    Routed,
}

/// A node with the programs on a device, and both ends of the way through it.
struct Bed {
    lab: Lab,
    ext: Dev,
    n: Net,
    way: Way,
    wire: Port,
    /// The pod's end of its device.
    pod: Port,
    _links: Vec<OwnedFd>,
    _cpu: OneCpu,
}

impl Bed {
    fn new(n: Net, way: Way) -> Result<Self> {
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
    fn request(&self, l4: &L4) -> Frame {
        let ends = ((self.n.client, 40_000), (self.n.vip, 80));
        if *l4 == L4::Udp { udp(ends.0, ends.1) } else { tcp(ACK, ends.0, ends.1) }
    }

    /// What arrives behind the node after `frame` was sent.
    fn deliver(&self, header: Header, frame: &[u8]) -> Result<(Header, Vec<u8>)> {
        self.wire.send(header, frame)?;
        let (port, to) =
            if self.way == Way::Stack { (&self.pod, self.n.pod) } else { (&self.wire, self.n.remote_pod) };
        let came = port.receive(SOON, |f| destination(f) == Some(to))?;
        came.with_context(|| format!("nothing arrived: {:?}", self.lab.counters()))
    }

    /// Opens the flow of `frame` and has it noted; gives the source that its packets get.
    fn open(&mut self, frame: &Frame) -> Result<(IpAddr, u16)> {
        self.deliver(Header::default(), &frame.bytes())?;
        sleep(TICKS);
        let (_, came) = self.deliver(Header::default(), &frame.bytes())?;
        let at = l4_at(self.n);
        let port = u16::from_be_bytes([came[at], came[at + 1]]);
        Ok((if self.way == Way::Stack { frame.src } else { self.n.node }, port))
    }

    /// The same packet behind the node.
    fn translated(&self, frame: &Frame, src: (IpAddr, u16)) -> Frame {
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

const fn l4_at(n: Net) -> usize {
    if n.vip.is_ipv6() { 54 } else { 34 }
}

/// Distance of the checksum from the start of the header.
fn check_at(l4: &L4) -> usize {
    if matches!(l4, L4::Tcp(_)) { 16 } else { 6 }
}

/// RFC 1071 section 4.1, on bytes as they are on the wire; not complemented.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], *w.get(1).unwrap_or(&0)])));
    let mut sum: u32 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Sum of the pseudo-header (RFC 9293 section 3.1, RFC 8200 section 8.1) for so many bytes.
fn pseudo(frame: &Frame, bytes: u32) -> u16 {
    let octets = |addr: IpAddr| match addr {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    };
    let proto: u32 = if matches!(frame.l4, L4::Tcp(_)) { 6 } else { 17 };
    sum(&[octets(frame.src), octets(frame.dst), proto.to_be_bytes().into(), bytes.to_be_bytes().into()]
        .concat())
}

fn l4_bytes(n: Net, frame: &Frame) -> u32 {
    (frame.bytes().len() - l4_at(n)) as u32
}

fn put(frame: &mut [u8], at: usize, value: u16) {
    frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// As a stack leaves it to its device: the field holds the pseudo-header's sum.
fn unfinished(n: Net, frame: &Frame, pseudo: u16) -> (Header, Vec<u8>) {
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
fn finish(header: Header, mut frame: Vec<u8>, l4: &L4) -> Vec<u8> {
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
fn assert_packet(what: &str, got: &[u8], want: &Frame) {
    assert_frame(what, &got[14..], &want.ip_bytes());
}

/// Runs `check` for both families, ways and protocols, with a flow that the tables have forgotten: who does not take the short
/// way opens another.
fn with_noted_flows(check: impl Fn(&Bed, &Frame, (IpAddr, u16)) -> Result<()>) -> Result<()> {
    for n in nets() {
        for way in [Way::Stack, Way::Routed] {
            let mut bed = Bed::new(n, way)?;
            for l4 in [L4::Udp, L4::Tcp(ACK)] {
                let request = bed.request(&l4);
                let src = bed.open(&request)?;
                bed.lab.forget_flows()?;
                check(&bed, &request, src).with_context(|| format!("{n:?}, {way:?}, {l4:?}"))?;
                assert_eq!(bed.lab.flow_entries(), 0, "{way:?}, {l4:?}: not by the cache");
            }
        }
    }
    Ok(())
}

#[test]
fn finished_checksums_are_finished_and_unfinished_ones_stay_so() -> Result<()> {
    with_noted_flows(|bed, request, src| {
        for payload in [vec![], b"odd".to_vec(), vec![0xff; 64], vec![7; 1400]] {
            let request = request.clone().with(|f| f.payload = payload);
            let expected = bed.translated(&request, src);
            let (header, came) = bed.deliver(Header::default(), &request.bytes())?;
            ensure!(!header.is_unfinished(), "{header:?}");
            assert_packet("finished", &came, &expected);

            let (header, bytes) = unfinished(bed.n, &request, pseudo(&request, l4_bytes(bed.n, &request)));
            let (after, came) = bed.deliver(header, &bytes)?;
            assert_eq!(
                (after.flags, after.csum_start, after.csum_offset),
                (1, header.csum_start, header.csum_offset)
            );
            assert_packet("unfinished", &finish(after, came, &request.l4), &expected);
        }
        Ok(())
    })
}

/// One finished checksum of 65,535 is the sum of the pseudo-header.
#[test]
fn a_finished_checksum_may_look_unfinished() -> Result<()> {
    with_noted_flows(|bed, request, src| {
        let with = |word: u16| {
            request.clone().with(|f| f.payload = [&[1, 2, 3, 4][..], &word.to_be_bytes()].concat())
        };
        let check = |frame: &Frame| {
            let at = l4_at(bed.n) + check_at(&frame.l4);
            let bytes = frame.bytes();
            u16::from_be_bytes([bytes[at], bytes[at + 1]])
        };
        let wanted = pseudo(request, l4_bytes(bed.n, &with(0)));
        // A word more is as much less in the checksum, in one's complement.
        let word = sum(&[check(&with(0)).to_be_bytes(), (!wanted).to_be_bytes()].concat());
        let request = with(word);
        assert_eq!(check(&request), wanted);
        let (header, came) = bed.deliver(Header::default(), &request.bytes())?;
        ensure!(!header.is_unfinished(), "{header:?}");
        assert_packet("looks unfinished", &came, &bed.translated(&request, src));
        Ok(())
    })
}

#[test]
fn datagrams_without_a_checksum_keep_none() -> Result<()> {
    with_noted_flows(|bed, request, src| {
        if request.l4 == L4::Udp {
            let request = request.clone().with(|f| f.l4 = L4::UdpNoChecksum);
            let (_, came) = bed.deliver(Header::default(), &request.bytes())?;
            assert_packet("without", &came, &bed.translated(&request, src));
        }
        Ok(())
    })
}

/// The pseudo-header has UDP's own length, behind which there may be more (RFC 9868).
#[test]
fn unfinished_datagrams_may_be_shorter_than_their_packet() -> Result<()> {
    /// The frame with `payload` and two bytes behind the datagram.
    fn longer(n: Net, frame: &Frame) -> (Vec<u8>, Vec<u8>) {
        let at = l4_at(n);
        let mut bytes = frame.clone().with(|f| f.payload.extend([0, 0])).bytes();
        bytes[at..at + 8].copy_from_slice(&frame.bytes()[at..at + 8]);
        (bytes[..14].to_vec(), bytes)
    }
    with_noted_flows(|bed, request, src| {
        if request.l4 == L4::Udp {
            let request = request.clone().with(|f| f.payload = vec![5; 30]);
            let (header, short) = unfinished(bed.n, &request, pseudo(&request, l4_bytes(bed.n, &request)));
            let (_, mut bytes) = longer(bed.n, &request);
            let at = l4_at(bed.n);
            bytes[at..at + 8].copy_from_slice(&short[at..at + 8]);
            let (after, came) = bed.deliver(header, &bytes)?;
            let (_, expected) = longer(bed.n, &bed.translated(&request, src));
            assert_frame("surplus", &finish(after, came, &request.l4)[14..], &expected[14..]);
        }
        Ok(())
    })
}

/// The pseudo-header's length of what will be cut into segments is that of the whole, or none: each segment gets its own.
#[test]
fn what_will_be_cut_into_segments_keeps_its_form() -> Result<()> {
    with_noted_flows(|bed, request, src| {
        if request.l4 == L4::Udp {
            return Ok(());
        }
        let request = request.clone().with(|f| f.payload = vec![9; 3000]);
        let bytes = l4_bytes(bed.n, &request);
        let expected = bed.translated(&request, src);
        for told in [bytes, 0] {
            let (header, frame) = unfinished(bed.n, &request, pseudo(&request, told));
            let header = Header {
                gso_type: if bed.n.vip.is_ipv6() { Header::GSO_TCPV6 } else { Header::GSO_TCPV4 },
                header_bytes: l4_at(bed.n) as u16 + 20,
                gso_size: 1000,
                ..header
            };
            let (after, mut came) = bed.deliver(header, &frame)?;
            assert_eq!((after.gso_type, after.gso_size), (header.gso_type, header.gso_size));
            let at = l4_at(bed.n) + 16;
            let field = u16::from_be_bytes([came[at], came[at + 1]]);
            assert_eq!(field % 0xffff, pseudo(&expected, told) % 0xffff, "{told} bytes");
            put(&mut came, at, pseudo(&expected, bytes));
            assert_packet("segments", &finish(after, came, &request.l4), &expected);
        }
        Ok(())
    })
}

/// The headers need not lie in one piece with the frame's start: then the tables are asked, with the same result.
#[test]
fn headers_in_pieces_are_translated_too() -> Result<()> {
    for n in nets() {
        for way in [Way::Stack, Way::Routed] {
            let mut bed = Bed::new(n, way)?;
            for l4 in [L4::Udp, L4::Tcp(ACK)] {
                let request = bed.request(&l4);
                let src = bed.open(&request)?;
                let flows = bed.lab.flow_entries();
                // Longer than a page, so that the kernel makes pieces.
                let request = request.with(|f| f.payload = vec![3; 6000]);
                for piece in [14, 20, l4_at(n) as u16, l4_at(n) as u16 + 6] {
                    let header = Header { header_bytes: piece, ..Header::default() };
                    let (_, came) = bed.deliver(header, &request.bytes())?;
                    assert_packet(&format!("{way:?}, {piece} bytes"), &came, &bed.translated(&request, src));
                }
                assert_eq!(bed.lab.flow_entries(), flows);
            }
        }
    }
    Ok(())
}

/// A sum over the whole packet, which the kernel makes when it checks a tunnel's outer checksum, follows every change.
#[test]
fn a_sum_over_the_packet_follows() -> Result<()> {
    for n in nets() {
        for way in [Way::Stack, Way::Routed] {
            let mut bed = Bed::new(n, way)?;
            let (sums, _links) = tunnel(&mut bed)?;
            for l4 in [L4::Udp, L4::UdpNoChecksum, L4::Tcp(ACK)] {
                // A flow of its own for each.
                let sport = if l4 == L4::UdpNoChecksum { 40_001 } else { 40_000 };
                let request = tcp(ACK, (n.client, sport), (n.vip, 80)).with(|f| f.l4 = l4.clone());
                // By the tables twice, then by the cache.
                let send = |bed: &Bed| -> Result<(Vec<u8>, u64)> {
                    sys::set_value(&sums, &u64::MAX.to_ne_bytes())?;
                    let came = bed.deliver(Header::default(), &encapsulated(&request).bytes())?.1;
                    Ok((came, sys::lookup(&sums, 0u32)?))
                };
                for round in ["opens", "is noted", "is cached"] {
                    let (came, summed) = send(&bed)?;
                    sleep(TICKS);
                    let what = format!("{n:?}, {way:?}, {l4:?}: {round}");
                    // The low 32 bits are a sum of 16-bit words in the order of this machine.
                    let summed = u32::try_from(summed).with_context(|| format!("{what}: no such sum"))?;
                    let summed = sum(&summed.to_ne_bytes());
                    let mut packet = came[14..].to_vec();
                    if way == Way::Stack {
                        undo_hop(&mut packet);
                    }
                    // The kernel adds the Ethernet header when it redirects (bpf_push_mac_rcsum): ours, or before a neighbour's
                    // address is found the one that it came with.
                    let header = match (way, round) {
                        (Way::Stack, _) => &[][..],
                        (Way::Routed, "is cached") => &came[..14],
                        (Way::Routed, _) => &request.bytes()[..14],
                    };
                    assert_eq!(summed % 0xffff, sum(&[header, &packet].concat()) % 0xffff, "{what}");
                }
            }
        }
    }
    Ok(())
}

/// The packet before the stack has sent it on.
fn undo_hop(packet: &mut [u8]) {
    match packet[0] >> 4 {
        4 => {
            packet[8] += 1;
            packet[10..12].fill(0);
            let check = !sum(&packet[..20]);
            put(packet, 10, check);
        }
        _ => packet[7] += 1,
    }
}

/// Puts the programs on a VXLAN device, and behind them one that writes the sum down, where the packet has one: the first
/// value of an array.
fn tunnel(bed: &mut Bed) -> Result<(OwnedFd, Vec<OwnedFd>)> {
    const CSUM_UPDATE: i32 = 40;
    const NEXT: i32 = -1;
    let jump_if_negative = |dst, offset| Insn::new(0xc5, dst, 0, offset, 0);
    ip("link add vx0 type vxlan id 5 local 192.0.2.1 dev ext0 dstport 4789")?;
    let mac = NODE_MAC.map(|b| format!("{b:02x}")).join(":");
    ip(&format!("link set vx0 address {mac} mtu 1500 up"))?;
    let dev = Dev { ifindex: ifindex("vx0")? };
    let device = bed.lab.device(bed.ext)?;
    bed.lab.set_device(dev, device)?;
    let sums = sys::map(MapType::Array, 8, 1)?;
    let mut code = vec![Insn::mov(2, 0), Insn::call(CSUM_UPDATE), jump_if_negative(0, 3)];
    code.extend(Insn::map_value(1, sums.as_fd()));
    code.extend([Insn::store(Size::Double, 1, 0, 0), Insn::mov(0, NEXT), Insn::exit()]);
    let writer = sys::load(ProgType::SchedCls, &code)?;
    let program = bed.lab.program_fd(Hook::Ingress)?;
    let mut links = vec![sys::attach_tcx(program.as_fd(), dev.ifindex)?];
    links.push(match bed.way {
        Way::Stack => sys::attach_tcx(writer.as_fd(), dev.ifindex)?,
        Way::Routed => sys::attach_tcx_egress(writer.as_fd(), bed.ext.ifindex)?,
    });
    Ok((sums, links))
}

/// In a VXLAN packet with a UDP checksum (RFC 7348 section 5).
fn encapsulated(inner: &Frame) -> Frame {
    let (from, to): (IpAddr, IpAddr) = ([192, 0, 2, 254].into(), [192, 0, 2, 1].into());
    udp((from, 50_000), (to, 4789))
        .with(|f| f.payload = [&[8, 0, 0, 0, 0, 0, 5, 0][..], &inner.bytes()].concat())
}

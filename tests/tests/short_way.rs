//! The classifiers' short way, through devices. Packets have a checksum that is finished, left to a device, summed by one, or
//! not there: packet sockets say so ([`lb_tests::vnet`]). Needs root.

#[path = "short_way/bed.rs"]
mod bed;

use std::{
    net::IpAddr,
    os::fd::{AsFd as _, OwnedFd},
    thread::sleep,
};

use anyhow::{Context as _, Result, ensure};
use bed::{
    BACKEND_PORT, Bed, Way, assert_packet, check_at, finish, l4_at, l4_bytes, pseudo, put, sum, unfinished,
};
use lb_common::proto;
use lb_tests::{
    bench::{
        insn::{Insn, Size},
        sys::{self, MapType, ProgType},
    },
    frame::{Frame, L4, NODE_MAC},
    lab::{Action, Dev, Hook, TICKS, ifindex, ip},
    packets::{ACK, Net, assert_frame, nets, tcp, udp},
    vnet::Header,
};

/// Runs `check` for both families and ways.
fn on_each_bed(check: impl Fn(&mut Bed) -> Result<()>) -> Result<()> {
    for n in nets() {
        for way in [Way::Stack, Way::Routed] {
            check(&mut Bed::new(n, way)?).with_context(|| format!("{n:?}, {way:?}"))?;
        }
    }
    Ok(())
}

/// Runs `check` for both families, ways and protocols, with a flow that the tables have forgotten: who does not take the short
/// way opens another.
fn with_noted_flows(check: impl Fn(&Bed, &Frame, (IpAddr, u16)) -> Result<()>) -> Result<()> {
    on_each_bed(|bed| {
        for l4 in [L4::Udp, L4::Tcp(ACK)] {
            let request = bed.request(&l4);
            let src = bed.open(&request)?;
            bed.lab.forget_flows()?;
            check(bed, &request, src).with_context(|| format!("{l4:?}"))?;
            assert_eq!(bed.lab.flow_entries(), 0, "{:?}, {l4:?}: not by the cache", bed.way);
        }
        Ok(())
    })
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
    on_each_bed(|bed| {
        let (n, way) = (bed.n, bed.way);
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
        Ok(())
    })
}

/// A sum over the whole packet, which the kernel makes when it checks a tunnel's outer checksum, follows every change.
#[test]
fn a_sum_over_the_packet_follows() -> Result<()> {
    on_each_bed(|bed| {
        let (n, way) = (bed.n, bed.way);
        let (sums, _links) = tunnel(bed)?;
        for l4 in [L4::Udp, L4::UdpNoChecksum, L4::Tcp(ACK)] {
            // A flow of its own for each.
            let sport = if l4 == L4::UdpNoChecksum { 40_001 } else { 40_000 };
            let request = tcp(ACK, (n.client, sport), (n.vip, 80)).with(|f| f.l4 = l4.clone());
            // By the tables twice, then by the cache.
            let send = || -> Result<(Vec<u8>, u64)> {
                sys::set_value(&sums, &u64::MAX.to_ne_bytes())?;
                let came = bed.deliver(Header::default(), &encapsulated(&request).bytes())?.1;
                Ok((came, sys::lookup(&sums, 0u32)?))
            };
            for round in ["opens", "is noted", "is cached"] {
                let (came, summed) = send()?;
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
        Ok(())
    })
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

/// A packet that was translated where it came in, and redirected, passes the hook where it leaves. Here that one has a flow
/// whose answers look just like it: another pod's, of a Service with this node's port behind it.
#[test]
fn what_was_redirected_is_left_alone_where_it_leaves() -> Result<()> {
    for n in nets() {
        let mut bed = Bed::new(n, Way::Routed)?;
        let egress = sys::attach_tcx_egress(bed.lab.program_fd(Hook::Egress)?.as_fd(), bed.ext.ifindex)?;
        for (l4, protocol) in [(L4::Udp, proto::UDP), (L4::Tcp(ACK), proto::TCP)] {
            let request = bed.request(&l4);
            let src = bed.open(&request)?;
            let own = bed.lab.backend(src, true)?;
            let service = bed.lab.service(&[own], &[own])?;
            bed.lab.silent_frontend((n.vip, 82), protocol, service, 0)?;
            let other = request.between((n.remote_pod, BACKEND_PORT), (n.vip, 82));
            assert_eq!(bed.lab.run(Hook::Ingress, bed.lab.pod, &other.bytes())?.0, Action::Pass);
            let sent = bed.translated(&request, src);
            let answer = bed.lab.run(Hook::Egress, bed.ext, &sent.bytes())?.1;
            assert_packet("an answer", &answer, &sent.between((n.vip, 82), (n.remote_pod, BACKEND_PORT)));

            let (_, came) = bed.deliver(Header::default(), &request.bytes())?;
            assert_packet("redirected", &came, &sent);
        }
        drop(egress);
    }
    Ok(())
}

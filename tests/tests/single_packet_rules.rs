//! Rules about new packets and odd ones, each on single packets: what is refused, answered, held back or reset.

use anyhow::Result;
use lb_common::{cidr, conntrack, device, frontend::flags, proto};
use lb_tests::{
    frame::{Fragment, Frame, IcmpError, L4, crc32c, icmp_error},
    lab::{Action, Hook, Lab, Options, TICKS},
    packets::{ACK, Net, RST, SYN, SYN_ACK, assert_frame, external, nets, one_backend, tcp, udp},
};

const ACTIVE: u32 = cidr::flags::ACTIVE;
const DROP: u32 = cidr::flags::ACTIVE | cidr::flags::DROP_UNASSIGNED;
/// The prefix around the ClusterIPs of [`nets`].
fn cidr_of(n: &Net) -> (std::net::IpAddr, u32) {
    if n.vip.is_ipv6() { ("fd00:96::".parse().unwrap(), 112) } else { ("10.96.0.0".parse().unwrap(), 16) }
}

/// What the sender of `frame` gets from `from` when nobody listens.
fn unreachable(frame: &Frame, from: std::net::IpAddr, quoted_l4_bytes: usize) -> Vec<u8> {
    let ip_header = if frame.src.is_ipv6() { 40 } else { 20 };
    let quoted = &frame.ip_bytes()[..ip_header + quoted_l4_bytes];
    let macs = (frame.dst_mac, frame.src_mac);
    let mut bytes = icmp_error(macs, from, frame.src, 64, IcmpError::PortUnreachable, quoted);
    if !frame.src.is_ipv6() {
        // Precedence, and no fragments: RFC 1812 section 4.3.2.5. etherparse sets neither.
        bytes[15] = 0xc0;
        bytes[24..26].fill(0);
        let sum =
            bytes[14..34].chunks(2).fold(0u32, |sum, w| sum + u32::from(u16::from_be_bytes([w[0], w[1]])));
        let folded = (sum & 0xffff) + (sum >> 16);
        bytes[24..26].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    }
    bytes
}

#[test]
fn c7_unlisted_ports_are_rejected_and_unassigned_addresses_dropped() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    for n in nets() {
        one_backend(&mut lab, n, (n.pod, 8080), true)?;
        lab.address(n.vip, flags::KIND_CLUSTER_IP)?;
        let foreign = if n.vip.is_ipv6() { "fd00:96::f" } else { "10.96.0.15" }.parse()?;
        let free = if n.vip.is_ipv6() { "fd00:96::e" } else { "10.96.0.14" }.parse()?;
        lab.address(foreign, flags::KIND_FOREIGN)?;
        let wrong_port = udp((n.pod, 1000), (n.vip, 81));
        let before = lab.run(Hook::Ingress, lab.pod, &wrong_port.bytes())?;
        assert_eq!(before, (Action::Pass, wrong_port.bytes()), "no range is known");

        let (net, bits) = cidr_of(&n);
        lab.service_cidr(3, net, bits, DROP)?;
        for dev in [lab.pod, ext] {
            let (action, out) = lab.run(Hook::Ingress, dev, &wrong_port.bytes())?;
            assert_eq!(action, Action::Redirect);
            assert_eq!(out.len(), unreachable(&wrong_port, n.vip, 8).len());
            let syn = tcp(SYN, (n.pod, 1000), (n.vip, 81)).bytes();
            assert_eq!(lab.run(Hook::Ingress, dev, &syn)?.0, Action::Redirect);
            let echo = Frame::new(L4::Echo, (n.pod, 0), (n.vip, 0));
            let (action, out) = lab.run(Hook::Ingress, dev, &echo.bytes())?;
            assert_eq!(action, Action::Redirect);
            assert_frame("the answer to an echo request", &out, &unreachable(&echo, n.vip, 8));
            for end in [RST, 17] {
                let end = tcp(end, (n.pod, 1000), (n.vip, 81)).bytes();
                assert_eq!(lab.run(Hook::Ingress, dev, &end)?.0, Action::Drop, "an end is not answered");
            }
            for frame in [
                udp((n.pod, 1000), (free, 81)),
                tcp(SYN, (n.pod, 1000), (free, 81)),
                Frame::new(L4::Echo, (n.pod, 0), (free, 0)),
            ] {
                assert_eq!(lab.run(Hook::Ingress, dev, &frame.bytes())?.0, Action::Drop, "{frame:?}");
                let elsewhere = frame.with(|f| f.dst_mac = [2, 0, 0, 0, 0, 0x77]).bytes();
                let xdp = lab.run(Hook::Xdp, dev, &elsewhere)?;
                assert_eq!(xdp, (Action::Pass, elsewhere), "XDP leaves it to tc");
            }
            for frame in [udp((n.pod, 1000), (foreign, 81)), udp((n.pod, 1000), (n.client, 81))] {
                let frame = frame.bytes();
                assert_eq!(lab.run(Hook::Ingress, dev, &frame)?, (Action::Pass, frame));
            }
        }
        lab.service_cidr(3, net, bits, ACTIVE)?;
        let to_free = udp((n.pod, 1000), (free, 81)).bytes();
        assert_eq!(
            lab.run(Hook::Ingress, lab.pod, &to_free)?,
            (Action::Pass, to_free),
            "not known as ClusterIPs"
        );
        lab.service_cidr(3, net, bits, 0)?;
    }
    assert_eq!(
        lab.counters()?,
        [("drop_no_flow", 8), ("reject_unlisted_port", 12), ("drop_unassigned_address", 12)]
    );
    assert_eq!(lab.flow_entries(), 0);
    Ok(())
}

#[test]
fn c5_packets_of_established_flows_are_never_refused() -> Result<()> {
    let mut lab = Lab::new()?;
    for n in nets() {
        let service = one_backend(&mut lab, n, (n.pod, 8080), true)?;
        lab.address(n.vip, flags::KIND_CLUSTER_IP)?;
        let (net, bits) = cidr_of(&n);
        lab.service_cidr(0, net, bits, DROP)?;
        let client = (n.pod, 1000);
        lab.run(Hook::Ingress, lab.pod, &tcp(SYN, client, (n.vip, 80)).bytes())?;
        lab.set_service(service, &[], &[])?;
        let ack = tcp(ACK, client, (n.vip, 80));
        assert_eq!(lab.run(Hook::Ingress, lab.pod, &ack.bytes())?.0, Action::Redirect, "hairpin goes on");
        let new = tcp(SYN, (n.pod, 1001), (n.vip, 80)).bytes();
        let (action, out) = lab.run(Hook::Ingress, lab.pod, &new)?;
        assert_eq!(action, Action::Redirect);
        assert_eq!(out[if n.vip.is_ipv6() { 20 } else { 23 }], if n.vip.is_ipv6() { 58 } else { 1 }, "ICMP");
    }
    Ok(())
}

#[test]
fn e1_source_ranges_gate_their_own_frontend_alone() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    for n in nets() {
        let id = lab.backend((n.pod, 8080), true)?;
        let (service, other) = (lab.service(&[id], &[id])?, lab.service(&[id], &[id])?);
        let gated = (n.vip, 80);
        lab.frontend(gated, proto::UDP, service, flags::KIND_LOAD_BALANCER | flags::SOURCE_RANGES)?;
        lab.frontend((n.node, 30080), proto::UDP, service, flags::KIND_NODE_PORT)?;
        // Ranges of another Service mean nothing here.
        lab.source_range(other, n.client, 24)?;
        let from_client = udp((n.client, 1000), gated);
        let run = |lab: &Lab, frame: &Frame| lab.run(Hook::Ingress, ext, &frame.bytes());
        assert_eq!(run(&lab, &from_client)?.0, Action::Drop);
        assert_eq!(lab.run(Hook::Xdp, ext, &from_client.bytes())?.0, Action::Pass, "tc drops it, and counts");
        assert_eq!(run(&lab, &udp((n.client, 1000), (n.node, 30080)))?.0, Action::Pass);

        let bits = if n.vip.is_ipv6() { 64 } else { 24 };
        lab.source_range(service, n.client, bits)?;
        let (action, out) = run(&lab, &from_client.between((n.client, 1001), gated))?;
        assert_eq!(action, Action::Pass);
        assert_frame("admitted", &out, &udp((n.client, 1001), (n.pod, 8080)).bytes());
        // E2: pods are gated like everybody.
        let from_pod = udp((n.remote_pod, 1000), gated).bytes();
        assert_eq!(lab.run(Hook::Ingress, lab.pod, &from_pod)?.0, Action::Drop);
        lab.source_range(service, n.remote_pod, if n.vip.is_ipv6() { 128 } else { 32 })?;
        assert_eq!(lab.run(Hook::Ingress, lab.pod, &from_pod)?.0, Action::Pass);
    }
    // XDP leaves refusals to tc, which counts them.
    assert_eq!(lab.counters()?, [("flow_created", 6), ("xdp_left_to_tc", 2), ("drop_source_range", 4)]);
    Ok(())
}

#[test]
fn f4_a_nodeport_on_loopback_is_not_for_packets() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    for n in nets() {
        let id = lab.backend((n.pod, 8080), true)?;
        let service = lab.service(&[id], &[id])?;
        let loopback = if n.vip.is_ipv6() { "::1" } else { "127.0.0.1" }.parse()?;
        lab.frontend((loopback, 30080), proto::TCP, service, flags::KIND_NODE_PORT | flags::LOOPBACK)?;
        for dev in [lab.pod, ext] {
            let frame = tcp(SYN, (n.client, 1000), (loopback, 30080)).bytes();
            assert_eq!(lab.run(Hook::Ingress, dev, &frame)?, (Action::Pass, frame.clone()));
            assert_eq!(lab.run(Hook::Xdp, dev, &frame)?, (Action::Pass, frame));
        }
    }
    assert_eq!(lab.flow_entries(), 0);
    Ok(())
}

#[test]
fn j3_echo_requests_are_answered_only_if_asked_for() -> Result<()> {
    for answer_ping in [false, true] {
        let mut lab = Lab::with(Options { answer_ping, ..Options::default() })?;
        let ext = external(&mut lab)?;
        for n in nets() {
            for (addr, kind, answers) in [
                (n.vip, flags::KIND_CLUSTER_IP, true),
                (n.remote_pod, flags::KIND_LOAD_BALANCER, true),
                (n.other_client, flags::KIND_EXTERNAL_IP, true),
                (n.node, flags::KIND_NODE_PORT, false),
                (n.router, flags::KIND_FOREIGN, false),
            ] {
                lab.address(addr, kind)?;
                let echo = Frame::new(L4::Echo, (n.client, 0), (addr, 0));
                let (action, out) = lab.run(Hook::Ingress, ext, &echo.bytes())?;
                if answer_ping && answers {
                    assert_eq!(action, Action::Redirect, "{addr}");
                    let reply = Frame::new(L4::EchoReply, (addr, 0), (n.client, 0)).returned();
                    assert_frame("reply", &out, &reply.with(|f| f.ttl = 64).bytes());
                } else {
                    assert_eq!((action, out), (Action::Pass, echo.bytes()), "{addr}");
                }
                let elsewhere = echo.with(|f| f.dst_mac = [2, 0, 0, 0, 0, 0x77]);
                assert_eq!(lab.run(Hook::Xdp, ext, &elsewhere.bytes())?.0, Action::Pass);
            }
        }
        let answered = if answer_ping { vec![("echo_answered", 6)] } else { vec![] };
        assert_eq!(lab.counters()?, answered);
    }
    Ok(())
}

#[test]
fn sctp_is_translated_with_its_checksum() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    // RFC 3720 appendix B.4, so that both sides of the comparison stand on something.
    assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    let [init, init_ack, data, abort]: [u8; 4] = [1, 2, 0, 6];
    for n in nets() {
        let local = lab.backend((n.pod, 8080), true)?;
        let remote = lab.backend((n.remote_pod, 8080), false)?;
        let (here, away) = (lab.service(&[local], &[local])?, lab.service(&[remote], &[])?);
        lab.frontend((n.vip, 80), proto::SCTP, here, flags::KIND_CLUSTER_IP)?;
        lab.frontend((n.vip, 81), proto::SCTP, away, flags::KIND_CLUSTER_IP)?;
        for (chunk, bytes) in [(init, 20), (data, 1), (data, 1400), (data, 333)] {
            let sent = Frame::new(L4::Sctp(chunk), (n.client, 5000), (n.vip, 80))
                .with(|f| f.payload = (0..bytes).map(|i| i as u8).collect());
            let (action, out) = lab.run(Hook::Ingress, ext, &sent.bytes())?;
            assert_eq!(action, Action::Pass);
            assert_frame("request", &out, &sent.between((n.client, 5000), (n.pod, 8080)).bytes());
            assert_eq!(lab.run(Hook::Xdp, ext, &sent.bytes())?, (Action::Pass, sent.bytes()), "tc's work");
        }
        let answer = Frame::new(L4::Sctp(init_ack), (n.pod, 8080), (n.client, 5000));
        let (_, out) = lab.run(Hook::Egress, ext, &answer.bytes())?;
        assert_frame("answer", &out, &answer.between((n.vip, 80), (n.client, 5000)).bytes());

        // In transit the source port changes too.
        let sent = Frame::new(L4::Sctp(init), (n.client, 5001), (n.vip, 81));
        let (action, out) = lab.run(Hook::Ingress, ext, &sent.bytes())?;
        assert_eq!(action, Action::Redirect);
        let l4 = if n.vip.is_ipv6() { 54 } else { 34 };
        let port = u16::from_be_bytes([out[l4], out[l4 + 1]]);
        let want = sent.between((n.node, port), (n.remote_pod, 8080)).with(|f| f.ttl = 62);
        assert_frame("transit", &out, &want.bytes());

        // An ABORT of an association that nobody knows opens none.
        let stray = Frame::new(L4::Sctp(abort), (n.client, 6000), (n.vip, 80)).bytes();
        assert_eq!(lab.run(Hook::Ingress, ext, &stray)?.0, Action::Drop);
    }
    assert_eq!(lab.counters()?, [("flow_created", 4), ("drop_no_flow", 2)]);
    Ok(())
}

#[test]
fn j2_clients_of_a_gone_backend_get_a_reset() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    for n in nets() {
        for (vip, local) in [((n.vip, 80), true), ((n.vip, 81), false)] {
            let id = lab.backend((if local { n.pod } else { n.remote_pod }, 8080), local)?;
            let service = lab.service(&[id], &[])?;
            lab.frontend(vip, proto::TCP, service, 0)?;
            let client = (n.client, 40_000);
            lab.run(Hook::Ingress, ext, &tcp(SYN, client, vip).bytes())?;
            // A later tick: the flow is noted in the cache.
            std::thread::sleep(TICKS);
            let data = tcp(ACK, client, vip);
            assert_ne!(lab.run(Hook::Ingress, ext, &data.bytes())?.0, Action::Drop);
            lab.flag_flows(conntrack::flags::GONE)?;
            assert_eq!(lab.run(Hook::Xdp, ext, &data.bytes())?, (Action::Pass, data.bytes()), "left to tc");
            let (action, out) = lab.run(Hook::Ingress, ext, &data.bytes())?;
            assert_eq!(action, Action::Redirect);
            assert_reset(&out, &data);
            // No reset answers a reset.
            let reset = tcp(RST | ACK, client, vip).bytes();
            assert_ne!(lab.run(Hook::Ingress, ext, &reset)?.1, out);
            // The port is free for a new connection at once.
            let new = tcp(SYN, client, vip);
            let (action, out) = lab.run(Hook::Ingress, ext, &new.bytes())?;
            assert_eq!(action, if local { Action::Pass } else { Action::Redirect });
            assert_eq!(out.len(), new.bytes().len(), "translated, not answered");
        }
    }
    let counters = lab.counters()?;
    assert!(counters.contains(&("reset_gone_backend", 4)), "{counters:?}");
    Ok(())
}

/// RFC 9293 section 3.10.7.1: from the address asked, with the sequence number that the client expects, and a checksum that
/// holds. The packet's own window and urgent pointer do not matter.
fn assert_reset(out: &[u8], to: &Frame) {
    let packet = etherparse::PacketHeaders::from_ethernet_slice(out).unwrap();
    let (src, dst) = match packet.net.unwrap() {
        etherparse::NetHeaders::Ipv4(ip, _) => {
            assert_eq!(ip.calc_header_checksum(), ip.header_checksum);
            assert_eq!((ip.time_to_live, usize::from(ip.total_len)), (64, out.len() - 14));
            (std::net::IpAddr::from(ip.source), std::net::IpAddr::from(ip.destination))
        }
        etherparse::NetHeaders::Ipv6(ip, _) => {
            assert_eq!((ip.hop_limit, usize::from(ip.payload_length)), (64, out.len() - 54));
            (std::net::IpAddr::from(ip.source), std::net::IpAddr::from(ip.destination))
        }
        other => panic!("{other:?}"),
    };
    assert_eq!((src, dst), (to.dst, to.src));
    let Some(etherparse::TransportHeader::Tcp(tcp)) = packet.transport else { panic!("no TCP") };
    assert_eq!((tcp.source_port, tcp.destination_port), (to.dport, to.sport));
    assert!(tcp.rst && !tcp.ack && !tcp.syn && !tcp.fin);
    // Frames of these tests acknowledge 0.
    assert_eq!(tcp.sequence_number, 0);
    let check = match (src, dst) {
        (std::net::IpAddr::V4(s), std::net::IpAddr::V4(d)) => {
            tcp.calc_checksum_ipv4_raw(s.octets(), d.octets(), &[]).unwrap()
        }
        (std::net::IpAddr::V6(s), std::net::IpAddr::V6(d)) => {
            tcp.calc_checksum_ipv6_raw(s.octets(), d.octets(), &[]).unwrap()
        }
        _ => unreachable!("one family"),
    };
    assert_eq!(check, tcp.checksum);
    assert_eq!(&out[..12], [to.src_mac, to.dst_mac].concat(), "back to whoever sent it");
}

#[test]
fn d2_masquerade_all_gives_every_client_of_a_cluster_ip_the_nodes_address() -> Result<()> {
    let mut lab = Lab::with(Options { masquerade_all: true, ..Options::default() })?;
    let ext = external(&mut lab)?;
    let node = lab.device(ext)?;
    lab.set_device(lab_any(), lb_common::device::Device { flags: 0, mac: [0; 6], ..node })?;
    for n in nets() {
        let id = lab.backend((n.remote_pod, 8080), false)?;
        let service = lab.service(&[id], &[])?;
        lab.frontend((n.vip, 80), proto::TCP, service, flags::KIND_CLUSTER_IP)?;
        lab.frontend((n.vip, 81), proto::TCP, service, flags::KIND_LOAD_BALANCER)?;
        let sent = tcp(SYN, (n.pod, 40_000), (n.vip, 80));
        let (action, out) = lab.run(Hook::Ingress, lab.pod, &sent.bytes())?;
        assert_eq!(action, Action::Redirect);
        let l4 = if n.vip.is_ipv6() { 54 } else { 34 };
        let port = u16::from_be_bytes([out[l4], out[l4 + 1]]);
        let want = sent.between((n.node, port), (n.remote_pod, 8080)).with(|f| f.ttl = 62);
        assert_frame("masqueraded", &out, &want.bytes());
        let other = tcp(SYN, (n.pod, 40_000), (n.vip, 81));
        let (action, out) = lab.run(Hook::Ingress, lab.pod, &other.bytes())?;
        assert_eq!(action, Action::Pass);
        assert_frame(
            "other kinds keep it",
            &out,
            &other.between((n.pod, 40_000), (n.remote_pod, 8080)).bytes(),
        );
    }
    Ok(())
}

const fn lab_any() -> lb_tests::lab::Dev {
    lb_tests::lab::Dev { ifindex: device::ANY }
}

#[test]
fn a_fragment_that_comes_before_the_first_one_waits_for_it() -> Result<()> {
    let mut lab = Lab::new()?;
    for n in nets() {
        one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
        lab.address(n.vip, flags::KIND_CLUSTER_IP)?;
        let part = |dst, id, offset, more| {
            udp((n.pod, 40_000), dst).with(|f| f.fragment = Some(Fragment { id, offset, more }))
        };
        let early = part((n.vip, 80), 7, 16, false);
        assert_eq!(lab.run(Hook::Ingress, lab.pod, &early.bytes())?.0, Action::Drop, "held");
        // Not for an address of a Service: not ours to hold.
        let other = part((n.client, 80), 7, 16, false).bytes();
        assert_eq!(lab.run(Hook::Ingress, lab.pod, &other)?, (Action::Pass, other.clone()));
        // The first one lets it go, and goes on itself, whole.
        let first = part((n.vip, 80), 7, 0, true);
        let (action, out) = lab.run(Hook::Ingress, lab.pod, &first.bytes())?;
        assert_eq!(action, Action::Pass);
        // Its checksum is that of the datagram, of which it is a part.
        assert_frame("first", &out, &part((n.remote_pod, 8080), 7, 0, true).bytes());
        // From now on later ones go straight.
        let (action, out) = lab.run(Hook::Ingress, lab.pod, &early.bytes())?;
        assert_eq!(action, Action::Pass);
        assert_frame("later", &out, &part((n.remote_pod, 8080), 7, 16, false).bytes());
    }
    assert_eq!(
        lab.counters()?,
        [("flow_created", 2), ("pass_fragment_unknown", 2), ("fragment_held", 2), ("fragment_released", 2)]
    );
    Ok(())
}

#[test]
fn a_syn_on_the_tuple_of_answers_is_no_packet_of_their_flow() -> Result<()> {
    let mut lab = Lab::with(Options { snat_ports: (15_000, 15_000), ..Options::default() })?;
    let ext = external(&mut lab)?;
    for n in nets() {
        one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
        // A frontend among our own source ports.
        let service = lab.service(&[1], &[])?;
        lab.frontend((n.node, 15_000), proto::TCP, service, 0)?;
        let sent = tcp(SYN, (n.client, 40_000), (n.vip, 80));
        assert_eq!(lab.run(Hook::Ingress, ext, &sent.bytes())?.0, Action::Redirect);
        let strange = tcp(SYN, (n.remote_pod, 8080), (n.node, 15_000));
        assert_eq!(lab.run(Hook::Ingress, ext, &strange.bytes())?.0, Action::Drop);
        let answer = tcp(SYN_ACK, (n.remote_pod, 8080), (n.node, 15_000));
        let (action, out) = lab.run(Hook::Ingress, ext, &answer.bytes())?;
        assert_eq!(action, Action::Redirect);
        let want = answer.between((n.vip, 80), (n.client, 40_000)).with(|f| f.ttl = 62);
        assert_eq!(out[12..], want.bytes()[12..], "the real answer finds its way");
    }
    Ok(())
}

#[test]
fn d2_masquerade_all_leaves_what_is_for_the_node_itself() -> Result<()> {
    let mut lab = Lab::with(Options { masquerade_all: true, ..Options::default() })?;
    let ext = external(&mut lab)?;
    let node = lab.device(ext)?;
    lab.set_device(lab_any(), lb_common::device::Device { flags: 0, mac: [0; 6], ..node })?;
    for n in nets() {
        // A pod with hostNetwork, such as the API server behind default/kubernetes.
        let id = lab.backend((n.node, 6443), true)?;
        let service = lab.service(&[id], &[id])?;
        lab.frontend((n.vip, 443), proto::TCP, service, flags::KIND_CLUSTER_IP)?;
        let sent = tcp(SYN, (n.pod, 40_000), (n.vip, 443));
        let (action, out) = lab.run(Hook::Ingress, lab.pod, &sent.bytes())?;
        assert_eq!(action, Action::Pass, "{:?}", lab.counters()?);
        assert_frame("to the node", &out, &sent.between((n.pod, 40_000), (n.node, 6443)).bytes());
    }
    Ok(())
}

#[test]
fn sctp_checksums_that_are_left_to_the_device_stay_zero() -> Result<()> {
    let mut lab = Lab::new()?;
    for n in nets() {
        let id = lab.backend((n.remote_pod, 8080), false)?;
        let service = lab.service(&[id], &[])?;
        lab.frontend((n.vip, 80), proto::SCTP, service, flags::KIND_CLUSTER_IP)?;
        let l4 = if n.vip.is_ipv6() { 54 } else { 34 };
        let unfinished = |frame: &Frame| {
            let mut bytes = frame.bytes();
            bytes[l4 + 8..l4 + 12].fill(0);
            bytes
        };
        let sent = Frame::new(L4::Sctp(1), (n.pod, 5000), (n.vip, 80));
        let (action, out) = lab.run(Hook::Ingress, lab.pod, &unfinished(&sent))?;
        assert_eq!(action, Action::Pass);
        assert_frame("request", &out, &unfinished(&sent.between((n.pod, 5000), (n.remote_pod, 8080))));
    }
    Ok(())
}

#[test]
fn fragments_wait_for_first_ones_of_any_length() -> Result<()> {
    let mut lab = Lab::new()?;
    for n in nets() {
        one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
        lab.address(n.vip, flags::KIND_CLUSTER_IP)?;
        let part = |offset, more| {
            udp((n.pod, 40_000), (n.vip, 80)).with(|f| f.fragment = Some(Fragment { id: 7, offset, more }))
        };
        assert_eq!(lab.run(Hook::Ingress, lab.pod, &part(16, false).bytes())?.0, Action::Drop, "held");
        let mut first = part(0, true).bytes();
        first.resize(2000, 0);
        let (action, out) = lab.run(Hook::Ingress, lab.pod, &first)?;
        assert_eq!((action, out.len()), (Action::Pass, first.len()));
    }
    let counters = lab.counters()?;
    assert!(counters.contains(&("fragment_released", 2)), "{counters:?}");
    Ok(())
}

#[test]
fn fragments_of_answers_are_known_whatever_device_they_come_by() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    let other = lab.external("ext1", &["203.0.113.1/24", "2001:db8:1::1/64"])?;
    for n in nets() {
        one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
        lab.address(n.vip, flags::KIND_CLUSTER_IP)?;
        let sent = udp((n.client, 40_000), (n.vip, 80));
        let (action, out) = lab.run(Hook::Ingress, ext, &sent.bytes())?;
        assert_eq!(action, Action::Redirect);
        let l4 = if n.vip.is_ipv6() { 54 } else { 34 };
        let port = u16::from_be_bytes([out[l4], out[l4 + 1]]);
        let part = |offset, more| {
            udp((n.remote_pod, 8080), (n.node, port))
                .with(|f| f.fragment = Some(Fragment { id: 9, offset, more }))
        };
        for frame in [part(0, true), part(16, false)] {
            assert_eq!(lab.run(Hook::Ingress, other, &frame.bytes())?.0, Action::Redirect, "{frame:?}");
        }
    }
    Ok(())
}

#[test]
fn c1_sctp_clients_are_told_with_their_initiate_tag() -> Result<()> {
    let mut lab = Lab::new()?;
    for n in nets() {
        let service = lab.service(&[], &[])?;
        lab.frontend((n.vip, 80), proto::SCTP, service, flags::KIND_CLUSTER_IP)?;
        let sent = Frame::new(L4::Sctp(1), (n.pod, 5000), (n.vip, 80)).with(|f| f.payload = vec![1; 20]);
        let (action, out) = lab.run(Hook::Ingress, lab.pod, &sent.bytes())?;
        assert_eq!(action, Action::Redirect);
        assert!(
            out.len()
                >= sent.ip_bytes().len().min(if n.vip.is_ipv6() { 40 } else { 20 } + 20)
                    + 14
                    + if n.vip.is_ipv6() { 48 } else { 28 },
            "RFC 9260 section 10: ICMP6 needs the initiate tag; got {}",
            out.len()
        );
    }
    Ok(())
}

#[test]
fn transit_lends_no_address_to_devices_whose_answers_nobody_sees() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    let node = lab.device(ext)?;
    lab.set_device(lab_any(), lb_common::device::Device { flags: 0, mac: [0; 6], ..node })?;
    // Stands for WireGuard or ipip: a device without programs.
    lb_tests::lab::ip("link add wg0 type veth peer name wg0p")?;
    for dev in ["wg0", "wg0p"] {
        lb_tests::lab::ip(&format!("link set {dev} up"))?;
    }
    for (n, net) in nets().into_iter().zip(["10.244.3.0/24", "fd00:244:3::/64"]) {
        lb_tests::lab::ip(&format!("route add {net} dev wg0"))?;
        let remote = if n.vip.is_ipv6() { "fd00:244:3::9" } else { "10.244.3.9" }.parse()?;
        one_backend(&mut lab, n, (remote, 8080), false)?;
        let sent = tcp(SYN, (n.client, 40_000), (n.vip, 80));
        assert_eq!(lab.run(Hook::Ingress, ext, &sent.bytes())?.0, Action::Drop);
    }
    assert_eq!(lab.counters()?, [("drop_no_snat_address", 2)]);
    Ok(())
}

//! Every path of a packet through the programs: bytes in, verdict and bytes out, byte for byte.

use std::net::IpAddr;

use anyhow::Result;
use lb_common::{affinity::member, device::Device, frontend::flags, proto};
use lb_tests::{
    frame::{CLIENT_MAC, Extension, Fragment, Frame, IcmpError, L4, NODE_MAC, icmp_error},
    lab::{Action, Hook, Lab, Options, ip},
    packets::{
        ACK, FIN_ACK, ROUTER_MAC, RST, SYN, SYN_ACK, assert_frame, external, nets, one_backend, tcp, udp,
    },
};

#[test]
fn other_traffic_passes_untouched() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    for n in nets() {
        one_backend(&mut lab, n, (n.pod, 8080), true)?;
        for frame in [
            tcp(SYN, (n.pod, 1000), (n.client, 80)),
            tcp(ACK, (n.client, 1000), (n.node, 80)),
            tcp(SYN, (n.client, 1000), (n.vip, 81)),
            udp((n.client, 1000), (n.pod, 80)),
            Frame::new(L4::Echo, (n.client, 0), (n.vip, 0)),
        ] {
            let frame = frame.bytes();
            for (hook, dev) in
                [(Hook::Ingress, lab.pod), (Hook::Egress, ext), (Hook::Ingress, ext), (Hook::Xdp, ext)]
            {
                assert_eq!(lab.run(hook, dev, &frame)?, (Action::Pass, frame.clone()), "{hook:?}");
            }
        }
    }
    assert_eq!(lab.counters()?, []);
    assert_eq!(lab.flow_entries(), 0);
    Ok(())
}

/// A handshake, data and the end of a connection from a pod, through both directions.
#[test]
fn pod_to_cluster_ip_and_back() -> Result<()> {
    let mut lab = Lab::new()?;
    for n in nets() {
        let service = one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
        let (client, vip, backend) = ((n.pod, 40_000), (n.vip, 80), (n.remote_pod, 8080));
        for (flags, reply_flags) in [(SYN, SYN_ACK), (ACK, ACK), (FIN_ACK, FIN_ACK)] {
            let sent = tcp(flags, client, vip);
            let (action, out) = lab.run(Hook::Ingress, lab.pod, &sent.bytes())?;
            assert_eq!(action, Action::Pass);
            assert_frame("request", &out, &sent.between(client, backend).bytes());

            let answer = tcp(reply_flags, backend, client);
            let (action, out) = lab.run(Hook::Ingress, lab.pod, &answer.bytes())?;
            assert_eq!(action, Action::Pass, "answers are not translated on their way in");
            assert_frame("answer at ingress", &out, &answer.bytes());
            let (action, out) = lab.run(Hook::Egress, lab.pod, &answer.bytes())?;
            assert_eq!(action, Action::Pass);
            assert_frame("answer", &out, &answer.between(vip, client).bytes());
        }
        let stats = lab.stats(service)?;
        assert_eq!((stats.packets, stats.connections, stats.xdp_packets), (6, 1, 0));
        let header = if n.vip.is_ipv6() { 40 } else { 20 };
        assert_eq!(stats.bytes, 6 * (header + 20 + 21));
    }
    assert_eq!(lab.flow_entries(), 4);
    assert_eq!(lab.counters()?, [("flow_created", 2)]);
    Ok(())
}

#[test]
fn udp_with_and_without_checksum() -> Result<()> {
    let mut lab = Lab::new()?;
    for n in nets() {
        one_backend(&mut lab, n, (n.remote_pod, 53), false)?;
        let (client, vip, backend) = ((n.pod, 40_000), (n.vip, 80), (n.remote_pod, 53));
        let kinds: &[L4] = if n.vip.is_ipv6() { &[L4::Udp] } else { &[L4::Udp, L4::UdpNoChecksum] };
        for l4 in kinds {
            let sent = Frame::new(l4.clone(), client, vip);
            let (_, out) = lab.run(Hook::Ingress, lab.pod, &sent.bytes())?;
            assert_frame("request", &out, &sent.between(client, backend).bytes());
            let answer = Frame::new(l4.clone(), backend, client);
            let (_, out) = lab.run(Hook::Egress, lab.pod, &answer.bytes())?;
            assert_frame("answer", &out, &answer.between(vip, client).bytes());
        }
    }
    Ok(())
}

/// 500 payloads, so that checksums of every kind (carries, 0x0000 and 0xffff) come up.
#[test]
fn checksums_hold_for_many_payloads() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    for n in nets() {
        one_backend(&mut lab, n, (n.pod, 53), true)?;
        for i in 0..500u32 {
            let payload = (i.wrapping_mul(0x9e37_79b9)).to_be_bytes();
            let client = (n.client, 20_000 + i as u16);
            for hook in [Hook::Ingress, Hook::Xdp] {
                for l4 in [L4::Udp, L4::Tcp(ACK)] {
                    let sent = Frame::new(l4, client, (n.vip, 80)).with(|f| f.payload = payload.to_vec());
                    let (_, out) = lab.run(hook, ext, &sent.bytes())?;
                    assert_frame("request", &out, &sent.between(client, (n.pod, 53)).bytes());
                }
            }
        }
    }
    Ok(())
}

#[test]
fn an_established_flow_keeps_its_backend() -> Result<()> {
    let mut lab = Lab::new()?;
    for n in nets() {
        let service = one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
        let (client, vip) = ((n.pod, 40_000), (n.vip, 80));
        lab.run(Hook::Ingress, lab.pod, &tcp(SYN, client, vip).bytes())?;
        lab.run(Hook::Egress, lab.pod, &tcp(SYN_ACK, (n.remote_pod, 8080), client).bytes())?;
        let other = lab.backend((n.client, 9090), false)?;
        for set in [&[other][..], &[]] {
            lab.set_service(service, set, &[])?;
            let sent = tcp(ACK, client, vip);
            let (action, out) = lab.run(Hook::Ingress, lab.pod, &sent.bytes())?;
            assert_eq!(action, Action::Pass);
            assert_frame("established", &out, &sent.between(client, (n.remote_pod, 8080)).bytes());
        }
    }
    Ok(())
}

/// A SYN on the tuple of a connection: a retransmission stays, after the end it is a new connection.
#[test]
fn syn_on_an_old_tuple() -> Result<()> {
    for end in
        [Some((FIN_ACK, Hook::Ingress)), Some((RST, Hook::Egress)), Some((FIN_ACK, Hook::Egress)), None]
    {
        let mut lab = Lab::new()?;
        for n in nets() {
            let service = one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
            let (client, vip, old) = ((n.pod, 40_000), (n.vip, 80), (n.remote_pod, 8080));
            lab.run(Hook::Ingress, lab.pod, &tcp(SYN, client, vip).bytes())?;
            if let Some((flags, hook)) = end {
                let frame =
                    if hook == Hook::Ingress { tcp(flags, client, vip) } else { tcp(flags, old, client) };
                lab.run(hook, lab.pod, &frame.bytes())?;
            }
            let new = lab.backend((n.client, 9090), false)?;
            lab.set_service(service, &[new], &[])?;
            let sent = tcp(SYN, client, vip);
            let (_, out) = lab.run(Hook::Ingress, lab.pod, &sent.bytes())?;
            let want = if end.is_some() { (n.client, 9090) } else { old };
            assert_frame(&format!("after {end:?}"), &out, &sent.between(client, want).bytes());
        }
        assert_eq!(lab.flow_entries(), 4, "an old flow goes with both its entries");
    }
    Ok(())
}

#[test]
fn client_address_is_kept_for_a_local_backend() -> Result<()> {
    for hook in [Hook::Ingress, Hook::Xdp] {
        let mut lab = Lab::new()?;
        let ext = external(&mut lab)?;
        for n in nets() {
            let service = one_backend(&mut lab, n, (n.pod, 8080), true)?;
            let (client, vip, backend) = ((n.client, 40_000), (n.vip, 80), (n.pod, 8080));
            let sent = tcp(SYN, client, vip);
            let (action, out) = lab.run(hook, ext, &sent.bytes())?;
            assert_eq!(action, Action::Pass);
            assert_frame("request", &out, &sent.between(client, backend).bytes());
            let answer = tcp(SYN_ACK, backend, client);
            let (_, out) = lab.run(Hook::Egress, ext, &answer.bytes())?;
            assert_frame("answer", &out, &answer.between(vip, client).bytes());
            assert_eq!(lab.stats(service)?.xdp_packets, u64::from(hook == Hook::Xdp));
        }
    }
    Ok(())
}

/// The source port that a translated frame has.
fn source_port(frame: &[u8], is_v6: bool) -> u16 {
    let l4 = if is_v6 { 54 } else { 34 };
    u16::from_be_bytes([frame[l4], frame[l4 + 1]])
}

#[test]
fn transit_goes_out_under_the_nodes_address_and_comes_back() -> Result<()> {
    for hook in [Hook::Ingress, Hook::Xdp] {
        for l4 in [L4::Tcp(SYN), L4::Udp] {
            let mut lab = Lab::new()?;
            let ext = external(&mut lab)?;
            for n in nets() {
                one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
                let (vip, backend) = ((n.vip, 80), (n.remote_pod, 8080));
                let mut ports = Vec::new();
                // Two clients with the same source port.
                for client in [(n.client, 40_000), (n.other_client, 40_000)] {
                    let sent = Frame::new(l4.clone(), client, vip);
                    let (action, out) = lab.run(hook, ext, &sent.bytes())?;
                    assert_eq!(action, if hook == Hook::Xdp { Action::Tx } else { Action::Redirect });
                    let port = source_port(&out, n.vip.is_ipv6());
                    assert!((10_240..30_000).contains(&port), "port {port}");
                    ports.push(port);
                    let onward = |f: Frame| {
                        f.with(|f| {
                            f.ttl -= 1;
                            // From tc the kernel sets them on the way out.
                            if hook == Hook::Xdp {
                                f.src_mac = NODE_MAC;
                                f.dst_mac = ROUTER_MAC;
                            }
                        })
                    };
                    assert_frame("request", &out, &onward(sent.between((n.node, port), backend)).bytes());

                    let reply_l4 = if l4 == L4::Udp { L4::Udp } else { L4::Tcp(SYN_ACK) };
                    let answer = Frame::new(reply_l4, backend, (n.node, port));
                    let (action, out) = lab.run(hook, ext, &answer.bytes())?;
                    assert_eq!(action, if hook == Hook::Xdp { Action::Tx } else { Action::Redirect });
                    assert_frame("answer", &out, &onward(answer.between(vip, client)).bytes());
                }
                assert_ne!(ports[0], ports[1], "the answers must be told apart");
            }
        }
    }
    Ok(())
}

#[test]
fn source_ports_run_out_with_a_counter() -> Result<()> {
    let mut lab = Lab::with(Options { snat_ports: (20_000, 20_001), ..Options::default() })?;
    let ext = external(&mut lab)?;
    let n = nets()[0];
    one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
    let mut actions = Vec::new();
    for port in 1..=3 {
        let sent = udp((n.client, port), (n.vip, 80));
        actions.push(lab.run(Hook::Ingress, ext, &sent.bytes())?.0);
    }
    assert_eq!(actions, [Action::Redirect, Action::Redirect, Action::Drop]);
    assert_eq!(lab.counters()?, [("flow_created", 2), ("drop_snat_exhausted", 1)]);
    assert_eq!(lab.flow_entries(), 4);
    Ok(())
}

#[test]
fn a_full_flow_table_refuses_new_flows_and_keeps_the_old() -> Result<()> {
    let mut lab = Lab::with(Options { flow_entries: 8, ..Options::default() })?;
    let n = nets()[0];
    one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
    let actions: Vec<Action> = (1..=6)
        .map(|port| lab.run(Hook::Ingress, lab.pod, &udp((n.pod, port), (n.vip, 80)).bytes()).unwrap().0)
        .collect();
    assert_eq!(actions[..4], [Action::Pass; 4]);
    assert_eq!(actions[4..], [Action::Drop; 2]);
    assert_eq!(lab.counters()?, [("flow_created", 4), ("drop_flow_table_full", 2)]);
    assert_eq!(lab.flow_entries(), 8, "no half flow stays behind");
    let sent = udp((n.pod, 1), (n.vip, 80));
    let (_, out) = lab.run(Hook::Ingress, lab.pod, &sent.bytes())?;
    assert_frame("old flow", &out, &sent.between((n.pod, 1), (n.remote_pod, 8080)).bytes());
    Ok(())
}

/// Two frontends with a common backend, and a client that uses one source port for both.
#[test]
fn one_client_port_to_two_frontends_of_one_backend() -> Result<()> {
    let mut lab = Lab::new()?;
    for n in nets() {
        let service = one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
        lab.frontend((n.vip, 81), proto::UDP, service, 0)?;
        let (client, backend) = ((n.pod, 40_000), (n.remote_pod, 8080));
        let (_, first) = lab.run(Hook::Ingress, lab.pod, &udp(client, (n.vip, 80)).bytes())?;
        let (_, second) = lab.run(Hook::Ingress, lab.pod, &udp(client, (n.vip, 81)).bytes())?;
        let (a, b) = (source_port(&first, n.vip.is_ipv6()), source_port(&second, n.vip.is_ipv6()));
        assert_eq!(a, 40_000);
        assert_ne!(b, 40_000);
        for (port, vip) in [(a, 80), (b, 81)] {
            let answer = udp(backend, (n.pod, port));
            let (_, out) = lab.run(Hook::Egress, lab.pod, &answer.bytes())?;
            assert_frame("answer", &out, &answer.between((n.vip, vip), client).bytes());
        }
    }
    Ok(())
}

#[test]
fn hairpin_goes_back_out_and_its_answer_too() -> Result<()> {
    let mut lab = Lab::new()?;
    for n in nets() {
        one_backend(&mut lab, n, (n.pod, 8080), true)?;
        let (pod, vip) = ((n.pod, 40_000), (n.vip, 80));
        let sent = tcp(SYN, pod, vip);
        let (action, out) = lab.run(Hook::Ingress, lab.pod, &sent.bytes())?;
        assert_eq!(action, Action::Redirect);
        let port = source_port(&out, n.vip.is_ipv6());
        assert_frame("request", &out, &sent.between((n.vip, port), (n.pod, 8080)).returned().bytes());

        let answer = tcp(SYN_ACK, (n.pod, 8080), (n.vip, port));
        let (action, out) = lab.run(Hook::Ingress, lab.pod, &answer.bytes())?;
        assert_eq!(action, Action::Redirect);
        assert_frame("answer", &out, &answer.between(vip, pod).returned().bytes());
    }
    Ok(())
}

/// An answer frame with the quoted transport checksum, which the program may choose, copied over.
fn with_quoted_check(mut want: Vec<u8>, got: &[u8], is_v6: bool, is_tcp: bool) -> Vec<u8> {
    let (ip, icmp, inner) = if is_v6 { (14, 54, 62) } else { (14, 34, 42) };
    let check = inner + if is_v6 { 40 } else { 20 } + if is_tcp { 16 } else { 6 };
    assert_eq!(want.len(), got.len());
    want[check..check + 2].copy_from_slice(&got[check..check + 2]);
    // The ICMP checksum over the quotation as it came, by RFC 1071.
    want[icmp + 2..icmp + 4].fill(0);
    let mut sum = 0u64;
    let mut add = |bytes: &[u8]| {
        for pair in bytes.chunks(2) {
            sum += u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        }
    };
    add(&want[icmp..]);
    if is_v6 {
        add(&want[ip + 8..ip + 40]);
        add(&u16::try_from(want.len() - icmp).unwrap().to_be_bytes());
        add(&[0, 58]);
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    want[icmp + 2..icmp + 4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    want
}

/// The program sets the IP header's type of service and "don't fragment" as routers do; the builder does not.
fn as_router(mut frame: Vec<u8>) -> Vec<u8> {
    if frame[12] == 0x08 {
        frame[15] = 0xc0;
        frame[18..20].fill(0);
        frame[20..22].copy_from_slice(&[0x40, 0]);
        frame[24..26].fill(0);
        let mut sum =
            frame[14..34].chunks(2).map(|p| u32::from(u16::from_be_bytes([p[0], p[1]]))).sum::<u32>();
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        frame[24..26].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }
    frame
}

/// What of a packet an ICMP error of ours quotes: the IP header, and 20 bytes of TCP or 8 of UDP.
fn quotation(f: &Frame) -> Vec<u8> {
    let header = if f.src.is_ipv6() { 40 } else { 20 + f.options };
    let bytes = f.ip_bytes();
    bytes[..header + if matches!(f.l4, L4::Tcp(_)) { 20 } else { 8 }].to_vec()
}

#[track_caller]
fn assert_icmp(got: &[u8], from: IpAddr, about: &Frame, error: IcmpError) {
    let want = icmp_error((NODE_MAC, CLIENT_MAC), from, about.src, 64, error, &quotation(about));
    let want = with_quoted_check(as_router(want), got, from.is_ipv6(), matches!(about.l4, L4::Tcp(_)));
    assert_frame("ICMP error", got, &want);
}

#[test]
fn no_endpoints_means_port_unreachable_at_once() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    let mut count = 0;
    for n in nets() {
        let service = lab.service(&[], &[])?;
        for p in [proto::TCP, proto::UDP] {
            lab.frontend((n.vip, 80), p, service, flags::EXTERNAL_LOCAL)?;
        }
        for l4 in [L4::Tcp(SYN), L4::Udp] {
            for (dev, src) in [(lab.pod, n.pod), (ext, n.client)] {
                let sent = Frame::new(l4.clone(), (src, 40_000), (n.vip, 80));
                let (action, out) = lab.run(Hook::Ingress, dev, &sent.bytes())?;
                assert_eq!(action, Action::Redirect);
                assert_icmp(&out, n.vip, &sent, IcmpError::PortUnreachable);
                count += 1;
            }
            // XDP leaves refusals to tc.
            let sent = Frame::new(l4, (n.client, 40_000), (n.vip, 80)).bytes();
            assert_eq!(lab.run(Hook::Xdp, ext, &sent)?, (Action::Pass, sent));
        }
    }
    assert_eq!(lab.counters()?, [("reject_no_endpoints", count), ("xdp_left_to_tc", 4)]);
    assert_eq!(lab.flow_entries(), 0);
    Ok(())
}

/// A checksum that the device would still have to fill must not spoil the quotation: the field is a fixed point of that.
#[test]
fn a_quoted_checksum_survives_checksum_offload() -> Result<()> {
    let mut lab = Lab::new()?;
    for n in nets() {
        let service = lab.service(&[], &[])?;
        lab.frontend((n.vip, 80), proto::TCP, service, 0)?;
        let sent = tcp(SYN, (n.pod, 40_000), (n.vip, 80));
        let (_, out) = lab.run(Hook::Ingress, lab.pod, &sent.bytes())?;
        let start = if n.vip.is_ipv6() { 62 + 40 } else { 42 + 20 };
        let tcp = &out[start..start + 20];
        let mut sum = tcp.chunks(2).map(|p| u32::from(u16::from_be_bytes([p[0], p[1]]))).sum::<u32>();
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        assert_eq!(!(sum as u16), u16::from_be_bytes([tcp[16], tcp[17]]), "what the device would store");
    }
    Ok(())
}

#[test]
fn policy_local_without_local_endpoints_drops() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    for n in nets() {
        let id = lab.backend((n.remote_pod, 8080), false)?;
        let service = lab.service(&[id], &[])?;
        lab.frontend((n.vip, 80), proto::TCP, service, flags::EXTERNAL_LOCAL)?;
        lab.frontend((n.vip, 81), proto::TCP, service, flags::EXTERNAL_LOCAL | flags::INTERNAL_LOCAL)?;
        let from_outside = tcp(SYN, (n.client, 40_000), (n.vip, 80)).bytes();
        assert_eq!(lab.run(Hook::Ingress, ext, &from_outside)?.0, Action::Drop);
        let from_pod = tcp(SYN, (n.pod, 40_000), (n.vip, 80));
        let (action, out) = lab.run(Hook::Ingress, lab.pod, &from_pod.bytes())?;
        assert_eq!(action, Action::Pass, "a pod reaches all endpoints");
        assert_frame("short circuit", &out, &from_pod.between((n.pod, 40_000), (n.remote_pod, 8080)).bytes());
        assert_eq!(
            lab.run(Hook::Ingress, lab.pod, &tcp(SYN, (n.pod, 1), (n.vip, 81)).bytes())?.0,
            Action::Drop
        );
    }
    assert_eq!(lab.counters()?, [("flow_created", 2), ("drop_no_local_endpoints_external", 4)]);
    Ok(())
}

#[test]
fn affinity_remembers_the_client_across_frontends() -> Result<()> {
    let mut lab = Lab::new()?;
    for n in nets() {
        let ids: Vec<u32> =
            (0..8).map(|i| lab.backend((n.remote_pod, 9000 + i), false)).collect::<Result<Vec<_>>>()?;
        let service = lab.service(&ids, &[])?;
        for id in &ids {
            lab.member(service, *id, member::CLUSTER)?;
        }
        for port in [80, 81] {
            lab.frontend((n.vip, port), proto::TCP, service, flags::AFFINITY)?;
        }
        let backend_port = |lab: &Lab, sport: u16, vport: u16| -> u16 {
            let (_, out) =
                lab.run(Hook::Ingress, lab.pod, &tcp(SYN, (n.pod, sport), (n.vip, vport)).bytes()).unwrap();
            let l4 = if n.vip.is_ipv6() { 54 } else { 34 };
            u16::from_be_bytes([out[l4 + 2], out[l4 + 3]])
        };
        let first = backend_port(&lab, 1, 80);
        for sport in 2..40 {
            assert_eq!(backend_port(&lab, sport, if sport % 2 == 0 { 80 } else { 81 }), first);
        }
        // The remembered endpoint leaves the set: another one, and that one is remembered.
        let gone = ids[usize::from(first - 9000)];
        lab.remove_member(service, gone)?;
        let rest: Vec<u32> = ids.iter().copied().filter(|id| *id != gone).collect();
        lab.set_service(service, &rest, &[])?;
        let second = backend_port(&lab, 100, 80);
        assert_ne!(second, first);
        for sport in 101..120 {
            assert_eq!(backend_port(&lab, sport, 80), second);
        }
    }
    Ok(())
}

#[test]
fn ipv4_options_and_ipv6_extension_headers_are_walked() -> Result<()> {
    let mut lab = Lab::new()?;
    for n in nets() {
        one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
        let (client, backend) = ((n.pod, 40_000), (n.remote_pod, 8080));
        for l4 in [L4::Tcp(SYN), L4::Udp] {
            let sent = Frame::new(l4, client, (n.vip, 80))
                .with(|f| if n.vip.is_ipv6() { f.extension = Extension::Options } else { f.options = 40 });
            let (_, out) = lab.run(Hook::Ingress, lab.pod, &sent.bytes())?;
            assert_frame("request", &out, &sent.between(client, backend).bytes());
            let answer = sent.between(backend, client);
            let (_, out) = lab.run(Hook::Egress, lab.pod, &answer.bytes())?;
            assert_frame("answer", &out, &answer.between((n.vip, 80), client).bytes());
        }
    }
    assert_eq!(lab.counters()?, [("flow_created", 4)]);
    Ok(())
}

#[test]
fn extension_headers_that_bind_the_address_are_left_alone() -> Result<()> {
    let mut lab = Lab::new()?;
    let n = nets()[1];
    one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
    let sent = |e| tcp(SYN, (n.pod, 40_000), (n.vip, 80)).with(|f| f.extension = e);
    for e in [Extension::Routing(1), Extension::Authentication] {
        let frame = sent(e).bytes();
        assert_eq!(lab.run(Hook::Ingress, lab.pod, &frame)?, (Action::Pass, frame), "{e:?}");
    }
    assert_eq!(lab.counters()?, [("pass_extension_header", 1)]);
    let done = sent(Extension::Routing(0));
    let (_, out) = lab.run(Hook::Ingress, lab.pod, &done.bytes())?;
    assert_frame("no segments left", &out, &done.between((n.pod, 40_000), (n.remote_pod, 8080)).bytes());
    Ok(())
}

#[test]
fn fragments_of_a_datagram_go_to_one_backend() -> Result<()> {
    let mut lab = Lab::new()?;
    for n in nets() {
        let ids: Vec<u32> =
            (0..8).map(|i| lab.backend((n.remote_pod, 9000 + i), false)).collect::<Result<Vec<_>>>()?;
        let service = lab.service(&ids, &[])?;
        lab.frontend((n.vip, 80), proto::UDP, service, 0)?;
        lab.address(n.vip, flags::KIND_CLUSTER_IP)?;
        let part = |offset, more| {
            udp((n.pod, 40_000), (n.vip, 80)).with(|f| f.fragment = Some(Fragment { id: 7, offset, more }))
        };
        let (_, out) = lab.run(Hook::Ingress, lab.pod, &part(0, true).bytes())?;
        let l4 = if n.vip.is_ipv6() { 62 } else { 34 };
        let port = u16::from_be_bytes([out[l4 + 2], out[l4 + 3]]);
        assert!((9000..9008).contains(&port), "port {port}");
        let (_, out) = lab.run(Hook::Ingress, lab.pod, &part(16, false).bytes())?;
        let want = udp((n.pod, 40_000), (n.remote_pod, port))
            .with(|f| f.fragment = Some(Fragment { id: 7, offset: 16, more: false }));
        assert_frame("later fragment", &out, &want.bytes());
        // Another datagram is not mistaken for it.
        let other =
            part(16, false).with(|f| f.fragment = Some(Fragment { id: 8, offset: 16, more: false })).bytes();
        assert_eq!(lab.run(Hook::Ingress, lab.pod, &other)?.0, Action::Drop, "held");
    }
    assert_eq!(lab.counters()?, [("flow_created", 2), ("fragment_held", 2)]);
    Ok(())
}

#[test]
fn vlan_tagged_frames_are_translated_behind_their_tag() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    for n in nets() {
        one_backend(&mut lab, n, (n.pod, 8080), true)?;
        let sent = tcp(SYN, (n.client, 40_000), (n.vip, 80)).with(|f| f.vlan = Some(100));
        let xdp = lab.run(Hook::Xdp, ext, &sent.bytes())?;
        assert_eq!(xdp, (Action::Pass, sent.bytes()), "XDP leaves tags to tc");
        let (action, out) = lab.run(Hook::Ingress, ext, &sent.bytes())?;
        assert_eq!(action, Action::Pass);
        assert_frame("tagged", &out, &sent.between((n.client, 40_000), (n.pod, 8080)).bytes());
    }
    Ok(())
}

/// A pod's own stack, a router on the way, and a router towards the client complain about packets of flows.
#[test]
fn icmp_errors_are_translated_both_ways() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    for n in nets() {
        one_backend(&mut lab, n, (n.pod, 8080), true)?;
        for l4 in [L4::Udp, L4::Tcp(SYN)] {
            let (client, vip, backend) = ((n.client, 40_000), (n.vip, 80), (n.pod, 8080));
            let sent = Frame::new(l4.clone(), client, vip);
            lab.run(Hook::Ingress, ext, &sent.bytes())?;
            let seen = sent.between(client, backend);
            let macs = (CLIENT_MAC, NODE_MAC);
            let quote = |f: &Frame| quotation(f);
            let fix = |want: Vec<u8>, got: &[u8]| {
                if l4 == L4::Udp { want } else { with_quoted_check(want, got, n.vip.is_ipv6(), true) }
            };

            // From the backend itself about what it got: leaves by the device to the client.
            let error = icmp_error(macs, n.pod, n.client, 64, IcmpError::PortUnreachable, &quote(&seen));
            assert_eq!(
                lab.run(Hook::Ingress, lab.pod, &error)?,
                (Action::Pass, error.clone()),
                "not at ingress"
            );
            let (action, out) = lab.run(Hook::Egress, ext, &error)?;
            assert_eq!(action, Action::Pass);
            let want = icmp_error(macs, n.vip, n.client, 64, IcmpError::PortUnreachable, &quote(&sent));
            assert_frame("backend's error", &out, &fix(want, &out));

            // From a router between node and backend: keeps its own address.
            let error = icmp_error(macs, n.router, n.client, 64, IcmpError::TooBig(1400), &quote(&seen));
            let (_, out) = lab.run(Hook::Egress, ext, &error)?;
            let want = icmp_error(macs, n.router, n.client, 64, IcmpError::TooBig(1400), &quote(&sent));
            assert_frame("router's error", &out, &fix(want, &out));

            // From a router towards the client about an answer: comes in, goes to the backend.
            let answer = Frame::new(l4.clone(), vip, client);
            let error = icmp_error(macs, n.router, n.vip, 64, IcmpError::TooBig(1400), &quote(&answer));
            let (_, out) = lab.run(Hook::Ingress, ext, &error)?;
            let answered = answer.between(backend, client);
            let want = icmp_error(macs, n.router, n.pod, 64, IcmpError::TooBig(1400), &quote(&answered));
            assert_frame("error about an answer", &out, &fix(want, &out));
        }
    }
    assert_eq!(lab.counters()?, [("flow_created", 4), ("icmp_translated", 12)]);
    Ok(())
}

#[test]
fn icmp_errors_of_transit_flows_reach_the_client() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    for n in nets() {
        one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
        let (client, vip, backend) = ((n.client, 40_000), (n.vip, 80), (n.remote_pod, 8080));
        let sent = udp(client, vip);
        let (_, out) = lab.run(Hook::Ingress, ext, &sent.bytes())?;
        let port = source_port(&out, n.vip.is_ipv6());
        let seen = sent.between((n.node, port), backend).with(|f| f.ttl -= 1);
        let macs = (CLIENT_MAC, NODE_MAC);
        let error = icmp_error(macs, n.remote_pod, n.node, 64, IcmpError::PortUnreachable, &quotation(&seen));
        let (action, out) = lab.run(Hook::Ingress, ext, &error)?;
        assert_eq!(action, Action::Redirect);
        let quoted = quotation(&sent.clone().with(|f| f.ttl -= 1));
        let want = icmp_error(macs, n.vip, n.client, 63, IcmpError::PortUnreachable, &quoted);
        assert_frame("error", &out, &want);
    }
    Ok(())
}

#[test]
fn an_icmp_error_for_somebody_else_is_not_believed() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    for n in nets() {
        one_backend(&mut lab, n, (n.pod, 8080), true)?;
        let sent = udp((n.client, 40_000), (n.vip, 80));
        lab.run(Hook::Ingress, ext, &sent.bytes())?;
        let answer = udp((n.vip, 80), (n.client, 40_000));
        let macs = (CLIENT_MAC, NODE_MAC);
        let forged = icmp_error(macs, n.router, n.node, 64, IcmpError::TooBig(600), &quotation(&answer));
        assert_eq!(lab.run(Hook::Ingress, ext, &forged)?, (Action::Pass, forged.clone()));
    }
    Ok(())
}

#[test]
fn transit_tells_the_sender_when_ttl_or_mtu_end_it() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    ip("link set ext0 mtu 1400")?;
    for n in nets() {
        one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
        for l4 in [L4::Udp, L4::Tcp(ACK)] {
            let dying = Frame::new(l4.clone(), (n.client, 40_000), (n.vip, 80)).with(|f| f.ttl = 1);
            assert_eq!(lab.run(Hook::Xdp, ext, &dying.bytes())?, (Action::Pass, dying.bytes()));
            let (action, out) = lab.run(Hook::Ingress, ext, &dying.bytes())?;
            assert_eq!(action, Action::Redirect);
            assert_icmp(&out, n.vip, &dying, IcmpError::TimeExceeded);

            let big = Frame::new(l4, (n.client, 40_000), (n.vip, 80)).with(|f| f.payload = vec![7; 1400]);
            assert_eq!(lab.run(Hook::Xdp, ext, &big.bytes())?, (Action::Pass, big.bytes()));
            let (action, out) = lab.run(Hook::Ingress, ext, &big.bytes())?;
            assert_eq!(action, Action::Redirect);
            assert_icmp(&out, n.vip, &big, IcmpError::TooBig(1400));
        }
    }
    let counters = lab.counters()?;
    assert!(
        counters.contains(&("drop_ttl_exceeded", 4)) && counters.contains(&("drop_too_big", 4)),
        "{counters:?}"
    );
    Ok(())
}

#[test]
fn transit_without_route_or_address_drops_with_a_reason() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    let n = nets()[0];
    let nowhere: IpAddr = "203.0.113.1".parse()?;
    one_backend(&mut lab, n, (nowhere, 8080), false)?;
    let sent = udp((n.client, 40_000), (n.vip, 80)).bytes();
    assert_eq!(lab.run(Hook::Ingress, ext, &sent)?.0, Action::Drop);
    assert_eq!(lab.counters()?, [("drop_no_route", 1)]);
    ip("route add 203.0.113.0/24 via 192.0.2.254 dev ext0")?;
    let known = lab.device(ext)?;
    lab.set_device(ext, Device { snat4: Device::default().snat4, ..known })?;
    assert_eq!(lab.run(Hook::Ingress, ext, &sent)?.0, Action::Drop);
    assert_eq!(lab.counters()?, [("drop_no_snat_address", 1), ("drop_no_route", 1)]);
    assert_eq!(lab.flow_entries(), 0);
    Ok(())
}

/// Frames cut off at every length are never changed and never crash anything; damaged headers neither.
#[test]
fn short_and_damaged_frames_pass_untouched() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    for n in nets() {
        one_backend(&mut lab, n, (n.pod, 8080), true)?;
        for l4 in [L4::Tcp(SYN), L4::Udp] {
            let whole = Frame::new(l4, (n.client, 40_000), (n.vip, 80)).with(|f| f.payload.clear()).bytes();
            let headers = whole.len();
            for len in 14..headers {
                let cut = &whole[..len];
                for hook in [Hook::Ingress, Hook::Egress, Hook::Xdp] {
                    // The test harness of the kernel wants 14 bytes of Ethernet header and, for tc, an IP header.
                    let Ok((action, out)) = lab.run(hook, ext, cut) else { continue };
                    assert_eq!((action, out.as_slice()), (Action::Pass, cut), "{hook:?} {len} of {headers}");
                }
            }
        }
        let mut bad = tcp(SYN, (n.client, 40_000), (n.vip, 80)).bytes();
        bad[14] = if n.vip.is_ipv6() { 0x60 } else { 0x44 };
        if !n.vip.is_ipv6() {
            assert_eq!(lab.run(Hook::Ingress, ext, &bad)?, (Action::Pass, bad.clone()), "header length 16");
        }
    }
    Ok(())
}

#[test]
fn a_slot_that_points_at_nothing_drops_with_a_reason() -> Result<()> {
    let mut lab = Lab::new()?;
    for n in nets() {
        let service = lab.service(&[0], &[])?;
        lab.frontend((n.vip, 80), proto::TCP, service, 0)?;
        assert_eq!(
            lab.run(Hook::Ingress, lab.pod, &tcp(SYN, (n.pod, 1), (n.vip, 80)).bytes())?.0,
            Action::Drop
        );
    }
    assert_eq!(lab.counters()?, [("drop_bad_map", 2)]);
    Ok(())
}

/// A flow must open even if its first packet does not fit: only then can the sender be told.
#[test]
fn a_first_packet_that_is_too_big_is_answered() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    ip("link set ext0 mtu 1400")?;
    for n in nets() {
        one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
        let big = udp((n.client, 40_000), (n.vip, 80)).with(|f| f.payload = vec![7; 1400]);
        let (action, out) = lab.run(Hook::Ingress, ext, &big.bytes())?;
        assert_eq!(action, Action::Redirect);
        assert_icmp(&out, n.vip, &big, IcmpError::TooBig(1400));
    }
    Ok(())
}

/// A client that has closed its side still gets the rest of the answer: its port is not given to another.
#[test]
fn a_half_closed_connection_keeps_its_port() -> Result<()> {
    let mut lab = Lab::with(Options { snat_ports: (20_000, 20_007), ..Options::default() })?;
    let ext = external(&mut lab)?;
    let n = nets()[0];
    one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
    let client = (n.client, 1);
    let (_, out) = lab.run(Hook::Ingress, ext, &tcp(SYN, client, (n.vip, 80)).bytes())?;
    let port = source_port(&out, false);
    lab.run(Hook::Ingress, ext, &tcp(SYN_ACK, (n.remote_pod, 8080), (n.node, port)).bytes())?;
    lab.run(Hook::Ingress, ext, &tcp(FIN_ACK, client, (n.vip, 80)).bytes())?;
    let mut opened = 0;
    for other in 2..200 {
        let (action, out) =
            lab.run(Hook::Ingress, ext, &tcp(SYN, (n.other_client, other), (n.vip, 80)).bytes())?;
        if action == Action::Redirect {
            opened += 1;
            assert_ne!(source_port(&out, false), port, "connection {other} got the port of a live one");
        }
    }
    assert_eq!(opened, 7, "all other ports were free");
    let rest = tcp(ACK, (n.remote_pod, 8080), (n.node, port));
    let (_, out) = lab.run(Hook::Ingress, ext, &rest.bytes())?;
    assert_eq!(out[30..34], [198, 51, 100, 7], "the answer goes to the client that asked");
    Ok(())
}

#[test]
fn segments_that_end_unknown_connections_open_nothing() -> Result<()> {
    let mut lab = Lab::new()?;
    for n in nets() {
        one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
        for (port, flags) in [(1, RST), (2, RST | ACK), (3, FIN_ACK), (4, SYN | 1), (5, SYN | RST)] {
            let stray = tcp(flags, (n.pod, port), (n.vip, 80)).bytes();
            assert_eq!(lab.run(Hook::Ingress, lab.pod, &stray)?.0, Action::Drop, "flags {flags:#x}");
        }
    }
    assert_eq!(lab.counters()?, [("drop_no_flow", 10)]);
    assert_eq!(lab.flow_entries(), 0);
    Ok(())
}

/// On a switch that floods, every node sees the packets of every client.
#[test]
fn frames_for_other_hosts_are_left_alone() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    for n in nets() {
        let nobody = lab.service(&[], &[])?;
        one_backend(&mut lab, n, (n.pod, 8080), true)?;
        lab.frontend((n.vip, 81), proto::UDP, nobody, 0)?;
        for mac in [[2, 9, 9, 9, 9, 9], [0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
            for port in [80, 81] {
                let frame = udp((n.client, 40_000), (n.vip, port)).with(|f| f.dst_mac = mac).bytes();
                for hook in [Hook::Ingress, Hook::Xdp] {
                    assert_eq!(
                        lab.run(hook, ext, &frame)?,
                        (Action::Pass, frame.clone()),
                        "{hook:?} {mac:x?}"
                    );
                }
            }
        }
    }
    assert_eq!(lab.flow_entries(), 0);
    assert_eq!(lab.counters()?, []);
    Ok(())
}

/// RFC 1122 section 3.2.2, RFC 4443 section 2.4.
#[test]
fn no_icmp_error_goes_to_a_source_that_is_not_one_host() -> Result<()> {
    let mut lab = Lab::new()?;
    let sources: [&[&str]; 2] =
        [&["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255"], &["::", "::1", "ff02::1"]];
    for (n, sources) in nets().into_iter().zip(sources) {
        let nobody = lab.service(&[], &[])?;
        lab.frontend((n.vip, 80), proto::UDP, nobody, 0)?;
        for source in sources {
            let frame = udp((source.parse()?, 40_000), (n.vip, 80)).bytes();
            assert_eq!(lab.run(Hook::Ingress, lab.pod, &frame)?.0, Action::Drop, "{source}");
        }
    }
    assert_eq!(lab.counters()?, [("reject_no_endpoints", 7), ("drop_icmp_build_failed", 7)]);
    Ok(())
}

#[test]
fn icmp_errors_have_a_limit() -> Result<()> {
    let mut lab = Lab::new()?;
    let n = nets()[0];
    let nobody = lab.service(&[], &[])?;
    lab.frontend((n.vip, 80), proto::UDP, nobody, 0)?;
    let frame = udp((n.pod, 40_000), (n.vip, 80)).bytes();
    // 1000 a second on each CPU: a machine that cannot send more than that is not this slow.
    let limited = (0..1_000_000).any(|_| lab.run(Hook::Ingress, lab.pod, &frame).unwrap().0 == Action::Drop);
    assert!(limited);
    assert!(lab.counters()?.contains(&("drop_icmp_rate_limited", 1)), "{:?}", lab.counters());
    Ok(())
}

/// The client's port was used through the Service before, and now without it.
#[test]
fn a_direct_connection_after_one_through_the_service() -> Result<()> {
    let mut lab = Lab::new()?;
    for n in nets() {
        one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
        let (client, backend) = ((n.pod, 40_000), (n.remote_pod, 8080));
        lab.run(Hook::Ingress, lab.pod, &tcp(SYN, client, (n.vip, 80)).bytes())?;
        lab.run(Hook::Egress, lab.pod, &tcp(SYN_ACK, backend, client).bytes())?;
        lab.run(Hook::Ingress, lab.pod, &tcp(FIN_ACK, client, (n.vip, 80)).bytes())?;
        lab.run(Hook::Egress, lab.pod, &tcp(FIN_ACK, backend, client).bytes())?;
        let direct = tcp(SYN, client, backend).bytes();
        assert_eq!(lab.run(Hook::Ingress, lab.pod, &direct)?, (Action::Pass, direct.clone()));
        let answer = tcp(SYN_ACK, backend, client).bytes();
        assert_eq!(lab.run(Hook::Egress, lab.pod, &answer)?, (Action::Pass, answer.clone()));
    }
    assert_eq!(lab.flow_entries(), 0);
    Ok(())
}

#[test]
fn a_client_outside_with_the_backends_address_is_no_hairpin() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    for n in nets() {
        one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
        let sent = udp((n.remote_pod, 40_000), (n.vip, 80));
        let (action, out) = lab.run(Hook::Ingress, ext, &sent.bytes())?;
        assert_eq!(action, Action::Redirect);
        let port = source_port(&out, n.vip.is_ipv6());
        let (_, l4_src) = if n.vip.is_ipv6() { (22, &out[22..38]) } else { (26, &out[26..30]) };
        let node = match n.node {
            IpAddr::V4(a) => a.octets().to_vec(),
            IpAddr::V6(a) => a.octets().to_vec(),
        };
        assert_eq!(l4_src, node, "leaves under the node's address, port {port}");
    }
    Ok(())
}

/// Short frames are padded to 60 bytes: the padding is not a header.
#[test]
fn padding_is_not_taken_for_a_header() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    let n = nets()[0];
    one_backend(&mut lab, n, (n.pod, 8080), true)?;
    let mut frame = tcp(SYN, (n.client, 40_000), (n.vip, 80)).with(|f| f.payload.clear()).bytes();
    // The IP header says 28 bytes: eight of TCP, and the rest is padding.
    frame[16..18].copy_from_slice(&28u16.to_be_bytes());
    for hook in [Hook::Ingress, Hook::Xdp] {
        assert_eq!(lab.run(hook, ext, &frame)?, (Action::Pass, frame.clone()), "{hook:?}");
    }
    assert_eq!(lab.flow_entries(), 0);
    Ok(())
}

/// XDP can hand frames over to another device only if its driver takes them.
#[test]
fn xdp_leaves_transit_by_other_devices_to_tc_unless_they_take_frames() -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    let other = lab.external("ext1", &["192.0.3.1/24"])?;
    ip("neigh replace 192.0.3.254 lladdr 02:00:00:00:00:ee dev ext1 nud permanent")?;
    ip("route replace 10.244.2.0/24 via 192.0.3.254 dev ext1")?;
    let n = nets()[0];
    one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
    let sent = udp((n.client, 40_000), (n.vip, 80)).bytes();
    assert_eq!(lab.run(Hook::Xdp, ext, &sent)?, (Action::Pass, sent.clone()));
    assert_eq!(lab.run(Hook::Ingress, ext, &sent)?.0, Action::Redirect);
    let known = lab.device(other)?;
    lab.set_device(other, Device { flags: known.flags | lb_common::device::flags::XDP_TARGET, ..known })?;
    let (action, out) = lab.run(Hook::Xdp, ext, &sent)?;
    assert_eq!(action, Action::Redirect);
    assert_eq!(out[26..30], [192, 0, 3, 1], "under the address of the device it leaves by");
    Ok(())
}

/// New flows spread over all backends.
#[test]
fn new_flows_use_every_backend() -> Result<()> {
    let mut lab = Lab::new()?;
    for n in nets() {
        let ids: Vec<u32> =
            (0..4).map(|i| lab.backend((n.remote_pod, 9000 + i), false)).collect::<Result<Vec<_>>>()?;
        let service = lab.service(&ids, &[])?;
        lab.frontend((n.vip, 80), proto::UDP, service, 0)?;
        let mut counts = [0u32; 4];
        for sport in 1..=400 {
            let (_, out) = lab.run(Hook::Ingress, lab.pod, &udp((n.pod, sport), (n.vip, 80)).bytes())?;
            let l4 = if n.vip.is_ipv6() { 54 } else { 34 };
            counts[usize::from(u16::from_be_bytes([out[l4 + 2], out[l4 + 3]]) - 9000)] += 1;
        }
        // Binomial with mean 100 and standard deviation 8.7: six of those on either side.
        assert!(counts.iter().all(|c| (48..=152).contains(c)), "{counts:?}");
    }
    Ok(())
}

/// The kernel routes what it forwards before it gives it another source (POSTROUTING): so do rules by source, with each packet of
/// a flow, whoever routes it.
#[test]
fn transit_is_routed_by_the_source_that_packets_come_with() -> Result<()> {
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 0xdd];
    const WRONG: [u8; 6] = [2, 0, 0, 0, 0, 0xcc];
    for (n, family, routers) in [
        (nets()[0], "-4", ["192.0.2.253", "192.0.2.252"]),
        (nets()[1], "-6", ["2001:db8::fd", "2001:db8::fc"]),
    ] {
        let mut lab = Lab::new()?;
        let ext = external(&mut lab)?;
        for (router, mac) in routers.iter().zip(["02:00:00:00:00:dd", "02:00:00:00:00:cc"]) {
            ip(&format!("neigh replace {router} lladdr {mac} dev ext0 nud permanent"))?;
        }
        // Requests of this client, and nothing that leaves under an address of ours or the Service's.
        for (from, router, table) in [(n.client, 0, 100), (n.node, 1, 101), (n.vip, 1, 102)] {
            ip(&format!("{family} rule add from {from} lookup {table}"))?;
            ip(&format!("{family} route add default via {} dev ext0 table {table}", routers[router]))?;
        }
        one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
        let send = |lab: &Lab, frame: &Frame| -> Result<([u8; 6], Vec<u8>)> {
            let (action, out) = lab.run(Hook::Xdp, ext, &frame.bytes())?;
            assert_eq!(action, Action::Tx, "{frame:?}");
            Ok((out[..6].try_into()?, out))
        };
        for (client, router) in [(n.client, OTHER), (n.other_client, ROUTER_MAC)] {
            let request = udp((client, 40_000), (n.vip, 80));
            let (mac, out) = send(&lab, &request)?;
            assert_eq!(mac, router, "the packet that opens the flow");
            let answer = udp((n.remote_pod, 8080), (n.node, source_port(&out, n.vip.is_ipv6())));
            assert_eq!(send(&lab, &answer)?.0, ROUTER_MAC, "an answer, not {WRONG:x?}");
            for what in ["by the tables", "by the cache"] {
                assert_eq!(send(&lab, &request)?.0, router, "{what}");
                assert_eq!(send(&lab, &answer)?.0, ROUTER_MAC, "{what}");
            }
        }
    }
    Ok(())
}

//! What XDP remembers about flows for a second: nothing that it does differs from what the tables say. Needs root.

use std::{net::IpAddr, thread::sleep, time::Duration};

use anyhow::{Result, ensure};
use lb_common::conntrack::flags;
use lb_tests::{
    frame::Frame,
    lab::{Action, Dev, Hook, Lab, OneCpu, Options, ip},
    packets::{ACK, FIN_ACK, Net, SYN, SYN_ACK, assert_frame, external, nets, one_backend, tcp, udp},
};

/// Some ticks of the kernel: a flow is cached from the tick after its first packet on.
const TICKS: Duration = Duration::from_millis(40);
/// A second that lasts longer than any test, and one that is over in ticks.
const LONG: u32 = 1 << 28;
const SHORT: u32 = 2;

fn lab(flow_cache: u32) -> Result<(Lab, Dev, OneCpu)> {
    lab_with_second(flow_cache, LONG)
}

fn lab_with_second(flow_cache: u32, jiffies_per_s: u32) -> Result<(Lab, Dev, OneCpu)> {
    let cpu = OneCpu::here();
    let mut lab = Lab::with(Options { flow_cache, jiffies_per_s, ..Options::default() })?;
    let ext = external(&mut lab)?;
    Ok((lab, ext, cpu))
}

/// A UDP packet and one from the middle of a TCP connection.
fn requests(n: Net, port: u16) -> [Frame; 2] {
    [udp((n.client, port), (n.vip, 80)), tcp(ACK, (n.client, port), (n.vip, 80))]
}

/// Opens a flow and has it noted.
fn open(lab: &Lab, ext: Dev, frame: &[u8]) -> Result<Vec<u8>> {
    lab.run(Hook::Xdp, ext, frame)?;
    sleep(TICKS);
    Ok(lab.run(Hook::Xdp, ext, frame)?.1)
}

/// Whether the next packet was translated as before without the table.
fn is_cached(lab: &mut Lab, ext: Dev, frame: &[u8], translated: &[u8]) -> Result<bool> {
    lab.forget_flows()?;
    let (action, out) = lab.run(Hook::Xdp, ext, frame)?;
    ensure!(action == Action::Pass, "{action:?}");
    assert_frame("the same backend", &out, translated);
    Ok(lab.flow_entries() == 0)
}

#[test]
fn flows_are_cached_until_their_epoch_or_their_second_ends() -> Result<()> {
    for n in nets() {
        for frame in requests(n, 40_000) {
            let frame = frame.bytes();
            let (mut lab, ext, _cpu) = lab(1024)?;
            one_backend(&mut lab, n, (n.pod, 8080), true)?;
            let translated = open(&lab, ext, &frame)?;
            ensure!(is_cached(&mut lab, ext, &frame, &translated)?, "not cached");
            lab.renew_epochs()?;
            ensure!(!is_cached(&mut lab, ext, &frame, &translated)?, "cached beyond its epoch");
            let translated = open(&lab, ext, &frame)?;
            ensure!(is_cached(&mut lab, ext, &frame, &translated)?, "not cached again");

            let (mut lab, ext, _cpu) = lab_with_second(1024, SHORT)?;
            one_backend(&mut lab, n, (n.pod, 8080), true)?;
            let translated = open(&lab, ext, &frame)?;
            sleep(TICKS);
            ensure!(!is_cached(&mut lab, ext, &frame, &translated)?, "cached beyond its second");
        }
    }
    Ok(())
}

#[test]
fn without_slots_nothing_is_cached() -> Result<()> {
    let (mut lab, ext, _cpu) = lab(0)?;
    let n = nets()[0];
    one_backend(&mut lab, n, (n.pod, 8080), true)?;
    let frame = udp((n.client, 40_000), (n.vip, 80)).bytes();
    let translated = open(&lab, ext, &frame)?;
    ensure!(!is_cached(&mut lab, ext, &frame, &translated)?);
    Ok(())
}

/// What goes out, by the tables alone and with caches large and tiny, where flows share slots.
#[test]
fn caches_change_nothing_about_any_packet() -> Result<()> {
    fn all(flow_cache: u32) -> Result<Vec<(Action, Vec<u8>)>> {
        let (mut lab, ext, _cpu) = lab(flow_cache)?;
        for n in nets() {
            one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
            let local = lab.backend((n.pod, 9000), true)?;
            let service = lab.service(&[local], &[local])?;
            lab.frontend((n.vip, 81), lb_common::proto::UDP, service, 0)?;
        }
        let mut seen = Vec::new();
        for round in 0..4u8 {
            for n in nets() {
                for port in 0..24 {
                    for request in requests(n, 40_000 + port) {
                        let (action, out) = lab.run(Hook::Xdp, ext, &request.bytes())?;
                        let reply = answer(&request, n, &out).with(|f| f.payload = vec![round; 10]);
                        seen.push((action, out));
                        seen.push(lab.run(Hook::Xdp, ext, &reply.bytes())?);
                    }
                    let local =
                        udp((n.client, 40_000 + port), (n.vip, 81)).with(|f| f.payload = vec![round; 33]);
                    seen.push(lab.run(Hook::Xdp, ext, &local.bytes())?);
                }
            }
            sleep(TICKS);
        }
        Ok(seen)
    }
    /// The backend's answer to a translated request, which holds the port to answer to.
    fn answer(request: &Frame, n: Net, translated: &[u8]) -> Frame {
        let l4 = if n.vip.is_ipv6() { 54 } else { 34 };
        let port = u16::from_be_bytes([translated[l4], translated[l4 + 1]]);
        let ends: [(IpAddr, u16); 2] = [(n.remote_pod, 8080), (n.node, port)];
        match request.l4 {
            lb_tests::frame::L4::Udp => udp(ends[0], ends[1]),
            _ => tcp(ACK, ends[0], ends[1]),
        }
    }
    let plain = all(0)?;
    ensure!(plain.iter().any(|(action, _)| *action == Action::Tx));
    for flow_cache in [1024, 16] {
        for (i, (with, without)) in all(flow_cache)?.iter().zip(&plain).enumerate() {
            assert_eq!(with.0, without.0, "packet {i} with {flow_cache} slots");
            assert_frame(&format!("packet {i} with {flow_cache} slots"), &with.1, &without.1);
        }
    }
    Ok(())
}

#[test]
fn a_cached_flow_ends_with_its_connection() -> Result<()> {
    for n in nets() {
        let (mut lab, ext, _cpu) = lab(1024)?;
        let service = one_backend(&mut lab, n, (n.pod, 8080), true)?;
        let other = lab.backend((n.pod, 9090), true)?;
        let (client, vip) = ((n.client, 40_000), (n.vip, 80));
        let segment = |flags| tcp(flags, client, vip).bytes();
        let egress =
            |lab: &Lab, flags| lab.run(Hook::Egress, ext, &tcp(flags, (n.pod, 8080), client).bytes());
        lab.run(Hook::Xdp, ext, &segment(SYN))?;
        egress(&lab, SYN_ACK)?;
        let first = open(&lab, ext, &segment(ACK))?;
        lab.run(Hook::Xdp, ext, &segment(FIN_ACK))?;
        egress(&lab, FIN_ACK)?;
        lab.set_service(service, &[other], &[other])?;
        let (_, opened) = lab.run(Hook::Xdp, ext, &segment(SYN))?;
        let (_, second) = lab.run(Hook::Xdp, ext, &segment(ACK))?;
        let l4 = if n.vip.is_ipv6() { 54 } else { 34 };
        let port = |out: &[u8]| u16::from_be_bytes([out[l4 + 2], out[l4 + 3]]);
        assert_eq!([port(&first), port(&opened), port(&second)], [8080, 9090, 9090], "{n:?}");
    }
    Ok(())
}

#[test]
fn j2_a_reset_is_not_kept_back_by_the_cache() -> Result<()> {
    for n in nets() {
        let (mut lab, ext, _cpu) = lab(1024)?;
        one_backend(&mut lab, n, (n.pod, 8080), true)?;
        let frame = tcp(ACK, (n.client, 40_000), (n.vip, 80)).bytes();
        open(&lab, ext, &frame)?;
        lab.flag_flows(flags::GONE)?;
        lab.renew_epochs()?;
        let (action, out) = lab.run(Hook::Xdp, ext, &frame)?;
        assert_eq!(action, Action::Pass);
        assert_frame("left to tc, which resets", &out, &frame);
    }
    Ok(())
}

#[test]
fn cached_ways_out_have_an_mtu_and_end_with_the_ttl() -> Result<()> {
    for n in nets() {
        let (mut lab, ext, _cpu) = lab(1024)?;
        one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
        ip("link set ext0 mtu 1400")?;
        let request = |ttl, bytes| {
            udp((n.client, 40_000), (n.vip, 80)).with(|f| (f.ttl, f.payload) = (ttl, vec![7; bytes])).bytes()
        };
        let header = if n.vip.is_ipv6() { 48 } else { 28 };
        open(&lab, ext, &request(64, 10))?;
        let run = |frame: &[u8]| lab.run(Hook::Xdp, ext, frame);
        assert_eq!(run(&request(64, 1400 - header))?.0, Action::Tx);
        for left in [request(64, 1401 - header), request(1, 10)] {
            assert_eq!(run(&left)?, (Action::Pass, left.clone()), "{n:?}");
        }
        assert_eq!(run(&request(2, 10))?.0, Action::Tx);
    }
    Ok(())
}

/// The kernel forgets neighbours that it sends nothing to.
#[test]
fn the_stack_sends_one_packet_a_second_to_each_neighbour() -> Result<()> {
    let (mut lab, ext, _cpu) = lab(1024)?;
    let n = nets()[0];
    one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
    let frames: Vec<_> = (0..8).map(|port| udp((n.client, 40_000 + port), (n.vip, 80)).bytes()).collect();
    let run_all = |lab: &Lab| -> Result<usize> {
        let actions = frames.iter().map(|f| Ok(lab.run(Hook::Xdp, ext, f)?.0));
        let actions = actions.collect::<Result<Vec<_>>>()?;
        Ok(actions.iter().filter(|a| **a == Action::Pass).count())
    };
    assert_eq!(run_all(&lab)?, 0, "a look at the neighbour is as good");
    lab.age_neighbours()?;
    lab.renew_epochs()?;
    assert_eq!(run_all(&lab)?, 1, "of eight flows to one neighbour");
    assert_eq!(run_all(&lab)?, 0);
    Ok(())
}

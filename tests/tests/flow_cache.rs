//! What the programs remember about flows for a second: nothing that it does differs from what the tables say. Needs root.

use std::{net::IpAddr, process::Command, thread::sleep};

use anyhow::{Context as _, Result, ensure};
use aya::util::nr_cpus;
use lb_common::{conntrack::flags, proto};
use lb_tests::{
    frame::Frame,
    lab::{Action, Dev, Hook, Lab, OneCpu, Options, TICKS, ip},
    packets::{ACK, FIN_ACK, Net, SYN, SYN_ACK, assert_frame, external, nets, one_backend, tcp, udp},
};

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
    open_at(Hook::Xdp, lab, ext, frame)
}

fn open_at(hook: Hook, lab: &Lab, ext: Dev, frame: &[u8]) -> Result<Vec<u8>> {
    lab.run(hook, ext, frame)?;
    sleep(TICKS);
    Ok(lab.run(hook, ext, frame)?.1)
}

/// Whether the next packet was translated as before without the table.
fn is_cached(hook: Hook, lab: &mut Lab, ext: Dev, frame: &[u8], translated: &[u8]) -> Result<bool> {
    lab.forget_flows()?;
    let (action, out) = lab.run(hook, ext, frame)?;
    ensure!(action == Action::Pass, "{action:?}");
    assert_frame("the same backend", &out, translated);
    Ok(lab.flow_entries() == 0)
}

/// More packets than it takes until those that are none of ours are noted.
const ENOUGH: usize = 10;

#[test]
fn flows_are_cached_until_their_epoch_or_their_second_ends() -> Result<()> {
    for (hook, n) in [Hook::Xdp, Hook::Ingress].into_iter().flat_map(|hook| nets().map(|n| (hook, n))) {
        for frame in requests(n, 40_000) {
            let frame = frame.bytes();
            let (mut lab, ext, _cpu) = lab(1024)?;
            one_backend(&mut lab, n, (n.pod, 8080), true)?;
            let translated = open_at(hook, &lab, ext, &frame)?;
            ensure!(is_cached(hook, &mut lab, ext, &frame, &translated)?, "not cached");
            lab.renew_epochs()?;
            ensure!(!is_cached(hook, &mut lab, ext, &frame, &translated)?, "cached beyond its epoch");
            let translated = open_at(hook, &lab, ext, &frame)?;
            ensure!(is_cached(hook, &mut lab, ext, &frame, &translated)?, "not cached again");

            let (mut lab, ext, _cpu) = lab_with_second(1024, SHORT)?;
            one_backend(&mut lab, n, (n.pod, 8080), true)?;
            let translated = open_at(hook, &lab, ext, &frame)?;
            sleep(TICKS);
            ensure!(!is_cached(hook, &mut lab, ext, &frame, &translated)?, "cached beyond its second");
        }
    }
    Ok(())
}

/// Answers that leave are translated as their flow was noted.
#[test]
fn answers_are_cached_where_they_leave() -> Result<()> {
    for n in nets() {
        let (mut lab, ext, _cpu) = lab(1024)?;
        one_backend(&mut lab, n, (n.pod, 8080), true)?;
        for request in requests(n, 40_000) {
            lab.run(Hook::Ingress, ext, &request.bytes())?;
            let answer = request.between((n.pod, 8080), (n.client, 40_000)).bytes();
            let translated = open_at(Hook::Egress, &lab, ext, &answer)?;
            assert_ne!(translated, answer);
            ensure!(is_cached(Hook::Egress, &mut lab, ext, &answer, &translated)?, "not cached");
            lab.renew_epochs()?;
            assert_eq!(lab.run(Hook::Egress, ext, &answer)?, (Action::Pass, answer), "no flow any more");
        }
    }
    Ok(())
}

/// Packets that are none of ours are noted until the agent has added something.
#[test]
fn nothing_is_noted_until_the_agent_adds_frontends() -> Result<()> {
    for hook in [Hook::Xdp, Hook::Ingress] {
        let (mut lab, ext, _cpu) = lab(1024)?;
        for (n, request) in nets().into_iter().flat_map(|n| requests(n, 40_000).map(|r| (n, r))) {
            let frame = request.bytes();
            lab.know_address(n.vip)?;
            let pass = |lab: &Lab| -> Result<bool> { Ok(lab.run(hook, ext, &frame)?.1 == frame) };
            for _ in 0..ENOUGH {
                ensure!(pass(&lab)?, "none of ours");
            }
            let id = lab.backend((n.pod, 8080), true)?;
            let service = lab.service(&[id], &[id])?;
            let proto = if request.l4 == lb_tests::frame::L4::Udp { proto::UDP } else { proto::TCP };
            lab.silent_frontend((n.vip, 80), proto, service, 0)?;
            ensure!(pass(&lab)?, "not noted");
            lab.renew_epochs()?;
            ensure!(!pass(&lab)?, "noted beyond its epoch");
        }
    }
    Ok(())
}

/// A client asks a pod itself, and then from the same port a Service with that pod behind it: the answers have one tuple.
#[test]
fn a_flow_ends_what_was_noted_about_the_tuple_of_its_answers() -> Result<()> {
    for n in nets() {
        let (mut lab, ext, _cpu) = lab(1024)?;
        one_backend(&mut lab, n, (n.pod, 8080), true)?;
        for request in requests(n, 40_000) {
            let answer = request.between((n.pod, 8080), (n.client, 40_000)).bytes();
            for _ in 0..ENOUGH {
                assert_eq!(lab.run(Hook::Egress, ext, &answer)?.1, answer, "none of ours");
            }
            let before = lab.epochs()?;
            lab.run(Hook::Ingress, ext, &request.bytes())?;
            let after = lab.epochs()?;
            lab.set_epochs(&before)?;
            assert_eq!(lab.run(Hook::Egress, ext, &answer)?.1, answer, "not noted");
            lab.set_epochs(&after)?;
            let (action, out) = lab.run(Hook::Egress, ext, &answer)?;
            assert_eq!(action, Action::Pass);
            assert_frame("from the Service", &out, &request.between((n.vip, 80), (n.client, 40_000)).bytes());
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
    for hook in [Hook::Xdp, Hook::Ingress] {
        let translated = open_at(hook, &lab, ext, &frame)?;
        ensure!(!is_cached(hook, &mut lab, ext, &frame, &translated)?);
    }
    Ok(())
}

/// What goes out, by the tables alone and with caches large and tiny, where flows share slots.
#[test]
fn caches_change_nothing_about_any_packet() -> Result<()> {
    fn all(hook: Hook, flow_cache: u32) -> Result<Vec<(Action, Vec<u8>)>> {
        let (mut lab, ext, _cpu) = lab(flow_cache)?;
        for n in nets() {
            one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
            let local = lab.backend((n.pod, 9000), true)?;
            let service = lab.service(&[local], &[local])?;
            lab.frontend((n.vip, 81), proto::UDP, service, 0)?;
        }
        let mut seen = Vec::new();
        for round in 0..4u8 {
            let filled = |frame: Frame, bytes| frame.with(|f| f.payload = vec![round; bytes]).bytes();
            for n in nets() {
                for port in 0..24 {
                    let client = (n.client, 40_000 + port);
                    for request in requests(n, client.1) {
                        let (action, out) = lab.run(hook, ext, &request.bytes())?;
                        let reply = filled(answer(&request, n, &out), 10);
                        seen.push((action, out));
                        seen.push(lab.run(hook, ext, &reply)?);
                    }
                    seen.push(lab.run(hook, ext, &filled(udp(client, (n.vip, 81)), 33))?);
                    // At egress with a cache for tc: the answer to it; and what is none of ours, at all hooks.
                    let answer = filled(udp((n.pod, 9000), client), 21);
                    let others = [udp(client, (n.pod, 7)), tcp(ACK, client, (n.remote_pod, 7))];
                    for at in [hook, Hook::Egress] {
                        seen.push(lab.run(at, ext, &answer)?);
                        for other in &others {
                            seen.push(lab.run(at, ext, &filled(other.clone(), 12))?);
                        }
                    }
                }
            }
            sleep(TICKS);
        }
        // The kernel writes the MAC addresses of what it is told to send, the cache those of what it sends itself.
        if hook != Hook::Xdp {
            seen.iter_mut()
                .filter(|(action, _)| *action == Action::Redirect)
                .for_each(|(_, f)| f[..12].fill(0));
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
    for (hook, sent) in [(Hook::Xdp, Action::Tx), (Hook::Ingress, Action::Redirect)] {
        let plain = all(hook, 0)?;
        ensure!(plain.iter().any(|(action, _)| *action == sent));
        let tiny = 8 * u32::try_from(nr_cpus().map_err(|(_, e)| e)?)?;
        for flow_cache in [1024, tiny] {
            let cached = all(hook, flow_cache)?;
            assert_eq!(cached.len(), plain.len());
            for (i, (with, without)) in cached.iter().zip(&plain).enumerate() {
                assert_eq!(with.0, without.0, "{hook:?}: packet {i} with {flow_cache} slots");
                assert_frame(&format!("{hook:?}: packet {i} with {flow_cache} slots"), &with.1, &without.1);
            }
        }
    }
    Ok(())
}

/// The classifier writes the MAC addresses that the neighbour and the device have.
#[test]
fn noted_packets_leave_for_the_router() -> Result<()> {
    for n in nets() {
        let (mut lab, ext, _cpu) = lab(1024)?;
        one_backend(&mut lab, n, (n.remote_pod, 8080), false)?;
        let link = Command::new("ip").args(["-o", "link", "show", "ext0"]).output()?;
        let link = String::from_utf8(link.stdout)?;
        let own = link.split("link/ether ").nth(1).and_then(|rest| rest.get(..17)).context("no address")?;
        let own: Vec<u8> = own.split(':').map(|b| u8::from_str_radix(b, 16)).collect::<Result<_, _>>()?;
        for request in requests(n, 40_000) {
            let frame = request.bytes();
            open_at(Hook::Ingress, &lab, ext, &frame)?;
            let (action, out) = lab.run(Hook::Ingress, ext, &frame)?;
            assert_eq!(action, Action::Redirect);
            // As `packets::external` makes the router.
            assert_eq!(out[..12], [&[2, 0, 0, 0, 0, 0xee][..], &own].concat());
        }
    }
    Ok(())
}

/// A tag costs a read, so only packets behind one that the cache did not know look at theirs: the next eight.
#[test]
fn tags_are_asked_after_a_packet_that_the_cache_did_not_know() -> Result<()> {
    for n in nets() {
        let (mut lab, ext, _cpu) = lab(1024)?;
        one_backend(&mut lab, n, (n.pod, 8080), true)?;
        let known = udp((n.client, 40_000), (n.vip, 80)).bytes();
        let translated = open(&lab, ext, &known)?;
        for _ in 0..8 {
            lab.run(Hook::Xdp, ext, &known)?;
        }
        lab.clear_flow_tags()?;
        ensure!(is_cached(Hook::Xdp, &mut lab, ext, &known, &translated)?, "asked for its tag");
        lab.run(Hook::Xdp, ext, &udp((n.client, 40_001), (n.vip, 80)).bytes())?;
        ensure!(!is_cached(Hook::Xdp, &mut lab, ext, &known, &translated)?, "not asked for its tag");
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
        open_at(Hook::Ingress, &lab, ext, &request(64, 10))?;
        let at_tc = |frame: &[u8]| lab.run(Hook::Ingress, ext, frame);
        assert_eq!(at_tc(&request(64, 1400 - header))?.0, Action::Redirect);
        for refused in [request(64, 1401 - header), request(1, 10)] {
            let (action, out) = at_tc(&refused)?;
            // An ICMP error goes back to who sent it.
            assert_eq!((action, &out[..6]), (Action::Redirect, &refused[6..12]), "{n:?}");
        }
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

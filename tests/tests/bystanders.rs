//! Packets that no Service has to do with: what one bit says about them, and who says so. Needs root.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use lb_common::{
    V4,
    addr::v6,
    bystander::{Bit, WORDS},
};
use lb_tests::{
    lab::{Action, Hook, Lab},
    packets::{ACK, Net, SYN, assert_frame, external, nets, one_backend, tcp, udp},
};

fn of_address(addr: IpAddr) -> Bit {
    match addr {
        IpAddr::V4(a) => Bit::of_address::<V4>(&a.into()),
        IpAddr::V6(a) => Bit::of_address(&v6(a)),
    }
}

/// Sets the bit alone, or all others.
fn set(lab: &mut Lab, bit: Bit, alone: bool) -> Result<()> {
    (0..WORDS).try_for_each(|i| {
        let word = if i == bit.index() { bit.mask() } else { 0 };
        lab.set_bystanders(i, if alone { word } else { !word })
    })
}

/// A packet that is not ours passes by everything, also where tables and cache would know better: so nothing else was asked.
fn passes_by_its_bit_alone(n: Net, hook: Hook, bit: Bit, of_the_wire: bool) -> Result<()> {
    let mut lab = Lab::new()?;
    let ext = external(&mut lab)?;
    one_backend(&mut lab, n, (n.pod, 8080), true)?;
    let (client, vip, pod) = ((n.client, 40_000), (n.vip, 80), (n.pod, 8080));
    for request in [udp(client, vip), tcp(SYN, client, vip), tcp(ACK, client, vip)] {
        let (asked, told) = match hook {
            Hook::Egress => {
                ensure!(lab.run(Hook::Ingress, ext, &request.bytes())?.0 == Action::Pass);
                (request.between(pod, client), request.between(vip, client))
            }
            _ => (request.clone(), request.between(client, pod)),
        };
        let (asked, told) = (asked.bytes(), told.bytes());
        for alone in [false, true, false, true] {
            set(&mut lab, bit, alone)?;
            let (action, out) = lab.run(hook, ext, &asked)?;
            assert_eq!(action, Action::Pass);
            if alone && !of_the_wire {
                assert_frame("a bystander", &out, &asked);
            } else {
                assert_frame("of a flow", &out, &told);
            }
        }
    }
    Ok(())
}

#[test]
fn what_comes_in_passes_by_its_destination() -> Result<()> {
    nets().into_iter().try_for_each(|n| passes_by_its_bit_alone(n, Hook::Ingress, of_address(n.vip), false))
}

#[test]
fn what_leaves_passes_by_its_source_port() -> Result<()> {
    let port = Bit::of_port(lb_common::Be16::new(8080));
    nets().into_iter().try_for_each(|n| passes_by_its_bit_alone(n, Hook::Egress, port, false))
}

/// What comes from a wire is mostly for Services: XDP does not look.
#[test]
fn frames_from_the_wire_do_not() -> Result<()> {
    nets().into_iter().try_for_each(|n| passes_by_its_bit_alone(n, Hook::Xdp, of_address(n.vip), true))
}

//! Packets that no Service has to do with: what one bit says about them, and who says so. Needs root.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use lb_common::{
    Be16, V4,
    addr::v6,
    bystander::{Bit, WORDS},
};
use lb_tests::{
    lab::{Action, Hook, Lab, Options},
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
fn passes_by_its_bit_alone(hook: Hook, bit_of: impl Fn(Net) -> Bit, of_the_wire: bool) -> Result<()> {
    for (n, flow_cache) in nets().into_iter().flat_map(|n| [(n, 1024), (n, 0)]) {
        passes(
            &mut Lab::with(Options { flow_cache, ..Options::default() })?,
            n,
            hook,
            bit_of(n),
            of_the_wire,
        )?;
    }
    Ok(())
}

fn passes(lab: &mut Lab, n: Net, hook: Hook, bit: Bit, of_the_wire: bool) -> Result<()> {
    let ext = external(lab)?;
    one_backend(lab, n, (n.pod, 8080), true)?;
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
            set(lab, bit, alone)?;
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
    passes_by_its_bit_alone(Hook::Ingress, |n| of_address(n.vip), false)
}

#[test]
fn what_leaves_passes_by_its_source_port() -> Result<()> {
    passes_by_its_bit_alone(Hook::Egress, |_| Bit::of_port(Be16::new(8080)), false)
}

/// What comes from a wire is mostly for Services: XDP does not look.
#[test]
fn frames_from_the_wire_do_not() -> Result<()> {
    passes_by_its_bit_alone(Hook::Xdp, |n| of_address(n.vip), true)
}

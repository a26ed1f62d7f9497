//! P6: the same packet with few and many Services, and with few and many endpoints.

use std::{net::IpAddr, os::fd::AsFd as _};

use anyhow::{Context as _, Result, ensure};
use lb_common::proto;

use super::{
    Effort,
    measure::{Feeder, Timing, compare, runs},
    packet::{World, flows_created, world},
    report::Row,
    sys::ProgType,
    traffic::{NEW, Net, nets, nth},
};
use crate::{frame::L4, lab::Hook};

const SERVICES: [u32; 4] = [10, 1_000, 10_000, 50_000];
const ENDPOINTS: [u32; 5] = [1, 10, 100, 1_000, 5_000];
/// Of each Service, where it is their number that varies.
const ENDPOINTS_EACH: u32 = 10;
/// The map of backends holds this many; Services beyond share them.
const BACKENDS: u32 = 100_000;
/// Flows of the uniform cases: their entries alone are larger than a core's cache.
const FLOWS: u32 = 1 << 16;

const HOT: f64 = 1.03;
const UNIFORM: f64 = 1.5;

/// How packets are spread, and over what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    /// One established flow of one Service.
    Hot,
    /// Established flows of all Services alike.
    Uniform,
    /// A new flow with each packet, of all Services alike.
    New,
}

impl Load {
    const ALL: [Self; 3] = [Self::Hot, Self::Uniform, Self::New];

    const fn name(self) -> &'static str {
        match self {
            Self::Hot => "one hot flow",
            Self::Uniform => "65,536 flows, uniform",
            Self::New => "new flows, uniform",
        }
    }
    const fn bar(self) -> f64 {
        match self {
            Self::Hot => HOT,
            Self::Uniform | Self::New => UNIFORM,
        }
    }
}

pub fn run(effort: Effort) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for net in nets() {
        // IPv6 differs in key sizes only: its ends will do.
        let all = |sizes: &[u32]| -> Vec<u32> {
            let last = sizes.len() - 1;
            let ends_only = net.is_v6 || effort == Effort::Small;
            let chosen = sizes.iter().enumerate().filter(|(i, _)| !ends_only || *i == 0 || *i == last);
            chosen.map(|(_, n)| effort.at_most(*n, 40)).collect()
        };
        let services = |n| (n, ENDPOINTS_EACH);
        rows.extend(series(&net, "Services", &all(&SERVICES), services, effort)?);
        if effort == Effort::Small {
            break;
        }
        rows.extend(series(&net, "endpoints of one Service", &all(&ENDPOINTS), |n| (1, n), effort)?);
    }
    Ok(rows)
}

/// The first size is what the others are compared with.
fn series(
    net: &Net,
    of: &str,
    sizes: &[u32],
    shape: impl Fn(u32) -> (u32, u32),
    effort: Effort,
) -> Result<Vec<Row>> {
    let mut times = Vec::new();
    for size in sizes {
        let (services, endpoints) = shape(*size);
        let mut world = world()?;
        fill(&mut world, net, services, endpoints)?;
        for load in Load::ALL {
            let timing = time(&world, net, load, services, effort)
                .with_context(|| format!("{} {services} x {endpoints}, {}", net.name(), load.name()))?;
            times.push((load, *size, timing));
        }
    }
    let mut rows = Vec::new();
    for load in Load::ALL {
        let mut of_load = times.iter().filter(|(l, ..)| *l == load);
        let Some((_, few, first)) = of_load.next() else { continue };
        // Above the empty program: what the feeder costs would only hide the difference.
        let above = |what: String, t: &Timing| {
            let row = Row { ours: Some(t.over()), ..Row::timed("P6", what, t) };
            row.against(first.over()).noted("above empty")
        };
        rows.push(above(format!("{} {}, {few} {of}", net.name(), load.name()), first));
        for (_, size, timing) in of_load {
            let what = format!("{} {}, {size} {of} against {few}", net.name(), load.name());
            rows.push(above(what, timing).ratio_at_most(load.bar()));
        }
    }
    Ok(rows)
}

/// That many Services with that many endpoints each.
fn fill(world: &mut World, net: &Net, services: u32, endpoints: u32) -> Result<()> {
    let distinct = (services * endpoints).min(BACKENDS);
    let first = if net.is_v6 { net.local } else { IpAddr::from([10, 244, 0, 0]) };
    let ids: Vec<u32> =
        (0..distinct).map(|i| world.lab.backend((nth(first, i), 8080), true)).collect::<Result<_>>()?;
    for s in 0..services {
        let of = |e| ids[((s * endpoints + e) % distinct) as usize];
        let set: Vec<u32> = (0..endpoints).map(of).collect();
        let service = world.lab.service(&set, &[])?;
        world.lab.frontend((nth(net.vip, s), 80), proto::UDP, service, 0)?;
    }
    Ok(())
}

fn time(world: &World, net: &Net, load: Load, services: u32, effort: Effort) -> Result<Timing> {
    let dev = world.external;
    let feed = match load {
        Load::Hot => net.requests(&L4::Udp, net.client, 1, 1, dev),
        Load::Uniform => net.requests(&L4::Udp, net.client, effort.at_most(FLOWS, 64), services, dev),
        Load::New => net.requests(&L4::Udp, net.new_client, NEW, services, dev),
    };
    let program = world.lab.program_fd(Hook::Xdp)?;
    let ours = Feeder::new(ProgType::Xdp, &feed, program.as_fd())?;
    let empty = Feeder::empty(ProgType::Xdp, &feed)?;
    let repeat = if load == Load::New { effort.repeat_new() } else { effort.repeat() };
    if load != Load::New {
        ours.run(feed.flows)?;
    }
    let before = flows_created(&world.lab)?;
    let (timing, ran) = compare(effort, repeat, &ours, &empty)?;
    let created = flows_created(&world.lab)? - before;
    let expected = if load == Load::New { runs(effort, repeat) } else { 0 };
    ensure!(created == expected, "{created} flows created, not {expected}");
    ensure!(ran.code == 2, "the program returned {}", ran.code);
    let (_, dst) = net.ends(&ran.frame).context("a short frame")?;
    let is_service = |s: &u32| nth(net.vip, *s) == dst;
    ensure!(!(0..services).any(|s| is_service(&s)), "{dst} was not translated");
    Ok(timing)
}

//! The same on a device of this host, with packets that another host sends: by turns an empty program that sends them back,
//! and the agent's. Nothing but packets to the one address and port is touched: other traffic goes on, also of this shell.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd as _, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use lb_common::verdict::Counter;

use super::{
    agent::{Agents, Hook, Told, cpus},
    code::Code,
    objects,
    stream::{XDP_PASS, XDP_TX},
};
use crate::bench::{
    Effort, Plan,
    insn::{Insn, Size},
    measure,
    report::Row,
    sys::{self, MapType, ProgType},
};

/// What to measure on.
#[derive(Clone, Debug)]
pub struct Device {
    pub name: String,
    /// Where the other host sends to.
    pub target: SocketAddr,
    /// Where the Service's packets go.
    pub backend: SocketAddr,
}

/// A new XDP program may reset a card's queues.
const SETTLE: Duration = Duration::from_secs(1);
const WAIT_FOR_PACKETS: Duration = Duration::from_secs(30);

/// What happened in one turn.
#[derive(Clone, Copy, Debug)]
struct Turn {
    mpps: f64,
    /// Time of all CPUs that were not idle, per packet.
    ns: f64,
    dropped: u64,
}

pub fn run(plan: &Plan, program: &std::path::Path, device: &Device) -> Result<Vec<Row>> {
    let name = std::ffi::CString::new(device.name.as_str())?;
    // SAFETY: a valid C string.
    let ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) };
    ensure!(ifindex > 0, "no device {}", device.name);
    ensure!(device.target.is_ipv4() == device.backend.is_ipv4(), "target and backend are of two families");
    let (rounds, time) = match plan.effort {
        Effort::Full => (3, Duration::from_secs(5)),
        Effort::Short => (1, Duration::from_secs(3)),
        Effort::Small => (1, Duration::from_millis(200)),
    };
    let (mut empty, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        empty.push(empty_turn(device, ifindex, time).context("with the empty program")?);
        for _ in 0..2 {
            ours.push(our_turn(device, program, time).context("with the agent")?);
        }
        empty.push(empty_turn(device, ifindex, time).context("with the empty program")?);
    }
    Ok(rows(device, &empty, &ours))
}

fn rows(device: &Device, empty: &[Turn], ours: &[Turn]) -> Vec<Row> {
    let of = |turns: &[Turn], f: fn(&Turn) -> f64| turns.iter().map(f).collect::<Vec<_>>();
    let row = |what: &str, unit, f: fn(&Turn) -> f64| {
        let (a, b) = (of(ours, f), of(empty, f));
        let what = format!("{}: {what}, XDP against an empty XDP_TX", device.name);
        let row = Row::value("P2", what, unit, measure::median(&a)).against(measure::median(&b));
        Row { rounds: ours.len() as u32, spread: Some(measure::spread(&a)), ..row }
    };
    let lost = |turns: &[Turn]| turns.iter().map(|t| t.dropped).sum::<u64>() as f64;
    vec![
        row("packets per second", "Mpps", |t| t.mpps)
            .noted("what the sender offers is the most that can be seen"),
        row("processor time per packet", "ns", |t| t.ns),
        Row::value(
            "P2",
            format!("{}: frames dropped by device or agent", device.name),
            "packets",
            lost(ours),
        )
        .noted(&format!("with the empty program {}", lost(empty))),
    ]
}

fn empty_turn(device: &Device, ifindex: u32, time: Duration) -> Result<Turn> {
    let counts = sys::map(MapType::PerCpuArray, 8, 1)?;
    let program = sys::load(ProgType::Xdp, &returning(device.target, &counts))?;
    let _link = sys::attach_xdp(program.as_fd(), ifindex)?;
    let count = || -> Result<u64> {
        let bytes = sys::value(&counts, 0, cpus()? * 8)?;
        Ok(bytes.chunks_exact(8).map(|c| c.try_into().map_or(0, u64::from_ne_bytes)).sum())
    };
    turn(device, time, count, || Ok(0))
}

fn our_turn(device: &Device, program: &std::path::Path, time: Duration) -> Result<Turn> {
    let (service, slice) = objects::single(device.target, device.backend);
    let options =
        vec![format!("--external-device={}", device.name), "--pod-device=none".into(), "--xdp=native".into()];
    let told = Told { services: vec![service], slices: vec![slice], options };
    let agents = Agents::start(program, None, Hook::Xdp, told)?;
    let dropped = || {
        let drops = Counter::ALL.iter().filter(|(_, name)| name.starts_with("drop_"));
        drops.map(|(counter, _)| agents.count(*counter)).sum()
    };
    // Records are numbered from 0 on: a Service with two ports has two.
    turn(device, time, || agents.xdp_packets(4), dropped)
        .with_context(|| format!("counted: {}\n{}", agents.counts(), agents.log()))
}

/// Waits until packets come, then counts them.
fn turn(
    device: &Device,
    time: Duration,
    count: impl Fn() -> Result<u64>,
    dropped: impl Fn() -> Result<u64>,
) -> Result<Turn> {
    let deadline = Instant::now() + WAIT_FOR_PACKETS;
    while count()? == 0 {
        ensure!(Instant::now() < deadline, "no packet to {} came by {}", device.target, device.name);
        thread::sleep(Duration::from_millis(20));
    }
    thread::sleep(SETTLE.min(time));
    let now = || -> Result<(Instant, u64, u64, u64)> {
        Ok((Instant::now(), count()?, busy_ns()?, dropped()? + lost_by(&device.name)))
    };
    let (start, packets, busy, lost) = now()?;
    thread::sleep(time);
    let (end, packets_then, busy_then, lost_then) = now()?;
    let packets = packets_then - packets;
    ensure!(packets > 0, "packets stopped coming");
    Ok(Turn {
        mpps: packets as f64 / (end - start).as_secs_f64() / 1e6,
        ns: (busy_then - busy) as f64 / packets as f64,
        dropped: lost_then - lost,
    })
}

/// Time of all CPUs that they were neither idle nor waiting for disks (proc(5), /proc/stat).
fn busy_ns() -> Result<u64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let first = stat.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<u64> = first.split_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect();
    let busy = ticks.iter().enumerate().filter(|(i, _)| ![3, 4].contains(i) && *i < 8);
    // SAFETY: reads a constant of the system.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) }.max(1) as u64;
    Ok(busy.map(|(_, n)| n).sum::<u64>() * 1_000_000_000 / per_second)
}

/// Frames that the device had no room for.
fn lost_by(device: &str) -> u64 {
    let read = |name: &str| -> u64 {
        let path = format!("/sys/class/net/{device}/statistics/{name}");
        fs::read_to_string(path).ok().and_then(|n| n.trim().parse().ok()).unwrap_or(0)
    };
    read("rx_dropped") + read("rx_missed_errors") + read("rx_over_errors")
}

/// Sends packets to one address and port back where they came from, and counts them.
fn returning(target: SocketAddr, counts: &OwnedFd) -> Vec<Insn> {
    const MAP_LOOKUP: i32 = 1;
    let mut code = Code::default();
    let pass = code.label();
    let (ethertype, address_at, address, port_at): (u16, i16, Vec<u8>, i16) = match target.ip() {
        IpAddr::V4(ip) => (0x0800, 30, ip.octets().to_vec(), 36),
        IpAddr::V6(ip) => (0x86dd, 38, ip.octets().to_vec(), 56),
    };
    code.put([
        Insn::mov_reg(6, 1),
        Insn::load(Size::Word, 7, 6, 0),
        Insn::load(Size::Word, 8, 6, 4),
        Insn::mov_reg(2, 7),
        Insn::add(2, i32::from(port_at) + 2),
        // To the instruction after the next.
        Insn::jump_if_at_least(8, 2, 1),
    ]);
    code.goto(pass);
    code.put([Insn::load(Size::Half, 1, 7, 12)]);
    code.if_not(1, ethertype.to_be().into(), pass);
    for (i, word) in address.chunks_exact(4).enumerate() {
        let word = u32::from_ne_bytes([word[0], word[1], word[2], word[3]]);
        code.put([Insn::load(Size::Word, 1, 7, address_at + 4 * i as i16)]);
        code.if_not_word(1, word, pass);
    }
    code.put([Insn::load(Size::Half, 1, 7, port_at)]);
    code.if_not(1, target.port().to_be().into(), pass);
    // The addresses of the Ethernet header change places.
    for (size, to, from) in [(Size::Word, 0, 6), (Size::Half, 4, 10)] {
        code.put([
            Insn::load(size, 1, 7, to),
            Insn::load(size, 2, 7, from),
            Insn::store(size, 7, 2, to),
            Insn::store(size, 7, 1, from),
        ]);
    }
    code.put([Insn::store_imm(Size::Word, 10, -4, 0), Insn::mov_reg(2, 10), Insn::add(2, -4)]);
    code.put(Insn::map(1, counts.as_fd()));
    code.put([Insn::call(MAP_LOOKUP)]);
    let counted = code.label();
    code.if_not(0, 0, counted);
    code.goto(pass);
    code.place(counted);
    code.count(0, 0, 1);
    code.put([Insn::mov(0, XDP_TX), Insn::exit()]);
    code.place(pass);
    code.put([Insn::mov(0, XDP_PASS), Insn::exit()]);
    code.done()
}

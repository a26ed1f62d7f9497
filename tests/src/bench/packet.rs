//! P1: what a program costs above an empty one.

use std::{net::IpAddr, os::fd::AsFd as _};

use anyhow::{Context as _, Result, ensure};
use lb_common::{maps::capacity, proto};

use super::{
    Effort,
    measure::{self, Feed, Feeder, Timing, compare, runs},
    report::Row,
    sys::ProgType,
    traffic::{CLIENTS, NEW, Net, nets, nth},
};
use crate::{
    frame::L4,
    lab::{Action, Dev, Hook, Lab, Options, ip},
    packets::{self, ACK, SYN},
};

/// Flows of the cases that are not hot: more than the branch predictor learns, less than the cache holds.
const SOME_FLOWS: u32 = 1024;

/// Entries of the flow tables: several cases open 144,000 flows each, and none ends.
const FLOW_ENTRIES: u32 = 2_000_000;

/// Bars of the suite.
const ESTABLISHED_NS: f64 = 40.0;
const NEW_NS: f64 = 35.0;
const V6_TO_V4: f64 = 1.25;
const REPLY_TO_REQUEST: f64 = 1.2;

/// A node with a Service for local backends and one for remote ones.
pub struct World {
    pub lab: Lab,
    pub external: Dev,
}

/// The real object with maps as large as the agent makes them, in a namespace with routes to everything.
pub fn world() -> Result<World> {
    world_with(Options { flow_cache: capacity::FLOW_CACHE, ..Options::default() })
}

/// The same with another cache, or a second of another length.
pub fn world_with(options: Options) -> Result<World> {
    let mut lab = Lab::with(Options { default_sizes: true, flow_entries: FLOW_ENTRIES, ..options })?;
    let external = packets::external(&mut lab)?;
    ip("route add 198.18.0.0/15 via 192.0.2.254 dev ext0")?;
    Ok(World { lab, external })
}

/// The way of one kind of packet through one program.
pub struct Case {
    pub what: String,
    pub hook: Hook,
    pub feed: Feed,
    /// Makes the flows that `feed` is about.
    pub before: Option<(Hook, Feed)>,
    action: Action,
    /// What the frame's source or destination is to become.
    becomes: Becomes,
    bar: Option<f64>,
    /// What other cases are compared with it as.
    pub role: Role,
}

impl Case {
    /// False for those that differ from another case in the number of flows only.
    pub fn is_one_path(&self) -> bool {
        self.role == Role::New || self.feed.flows == 1
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Becomes {
    Same,
    To(IpAddr),
    From(IpAddr),
}

/// Which comparisons a case takes part in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Request,
    Reply,
    New,
    None,
}

pub const fn kind_of(hook: Hook) -> ProgType {
    match hook {
        Hook::Xdp => ProgType::Xdp,
        Hook::Ingress | Hook::Egress => ProgType::SchedCls,
    }
}

/// Action by a program's code, as `Lab::run` has it.
const fn action(hook: Hook, code: i32) -> Option<Action> {
    match (hook, code) {
        (Hook::Xdp, 2) | (Hook::Ingress | Hook::Egress, -1) => Some(Action::Pass),
        (Hook::Xdp, 3) => Some(Action::Tx),
        _ => None,
    }
}

pub fn run(effort: Effort) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut timed = Vec::new();
    for net in nets() {
        let mut world = world()?;
        serve(&mut world.lab, &net)?;
        if rows.is_empty() {
            rows = touching(&world, effort)?;
        }
        // The kernel takes tens of milliseconds to prepare for a run of an XDP program: the small form does with UDP.
        let protocols = [(L4::Udp, "UDP"), (L4::Tcp(ACK), "TCP")];
        for (l4, name) in &protocols[..if effort == Effort::Small { 1 } else { 2 }] {
            for case in cases(&world, &net, l4)? {
                let timing = time(&world, &net, &case, effort)?;
                let what = format!("{} {name} {}", net.name(), case.what);
                let row = Row::timed("P1", what, &timing);
                rows.push(case.bar.map_or(row.clone(), |bar| row.over_at_most(bar)));
                timed.push((net.is_v6, *name, case, timing));
            }
        }
        rows.extend(without_cache(&net, effort)?);
    }
    rows.extend(ratios(&timed));
    Ok(rows)
}

/// What packets pay that the flow cache has no place for, or no longer: for each flow one a second at least.
fn without_cache(net: &Net, effort: Effort) -> Result<Vec<Row>> {
    let mut world = world_with(Options { flow_cache: 0, ..Options::default() })?;
    serve(&mut world.lab, net)?;
    let by_xdp = |case: &Case| case.hook == Hook::Xdp && !matches!(case.role, Role::New);
    let mut rows = Vec::new();
    for case in cases(&world, net, &L4::Udp)?.into_iter().filter(by_xdp) {
        let timing = time(&world, net, &case, effort)?;
        rows.push(Row::timed("P1", format!("{} UDP {}, without flow cache", net.name(), case.what), &timing));
    }
    Ok(rows)
}

/// What any program pays for looking at the packet at all.
fn touching(world: &World, effort: Effort) -> Result<Vec<Row>> {
    let feed = nets()[0].requests(&L4::Udp, nets()[0].client, 1, 1, world.external);
    let mut rows = Vec::new();
    for (kind, name) in [(ProgType::Xdp, "xdp"), (ProgType::SchedCls, "tc")] {
        let (ours, empty) = (Feeder::touching(kind, &feed)?, Feeder::empty(kind, &feed)?);
        let (timing, _) = compare(effort, effort.repeat(), &ours, &empty)?;
        rows.push(Row::timed(
            "P1",
            format!("an empty {name} program that reads and writes addresses"),
            &timing,
        ));
    }
    Ok(rows)
}

/// The first Service address is for a backend of this node, the second for one of another.
pub fn serve(lab: &mut Lab, net: &Net) -> Result<()> {
    for (vip, backend, is_local) in [(net.vip, net.local, true), (nth(net.vip, 1), net.remote, false)] {
        let id = lab.backend((backend, 8080), is_local)?;
        let service = lab.service(&[id], if is_local { std::slice::from_ref(&id) } else { &[] })?;
        for p in [proto::TCP, proto::UDP] {
            lab.frontend((vip, 80), p, service, 0)?;
        }
    }
    Ok(())
}

pub fn cases(world: &World, net: &Net, l4: &L4) -> Result<Vec<Case>> {
    let (external, pod) = (world.external, world.lab.pod);
    let first = if *l4 == L4::Udp { L4::Udp } else { L4::Tcp(SYN) };
    let requests = |flows, dev| net.requests(l4, net.client, flows, 1, dev);
    let mut cases = Vec::new();
    let plain = |what: &str, hook, feed: Feed| Case {
        what: what.into(),
        hook,
        feed,
        before: None,
        action: Action::Pass,
        becomes: Becomes::To(net.local),
        bar: None,
        role: Role::None,
    };
    for (hook, dev, name) in [(Hook::Xdp, external, "xdp"), (Hook::Ingress, pod, "tc ingress")] {
        let bar = (hook == Hook::Xdp).then_some(ESTABLISHED_NS);
        let hot = requests(1, dev);
        cases.push(Case {
            bar,
            role: Role::Request,
            ..plain(&format!("{name} established, hot"), hook, hot)
        });
        let some = plain(&format!("{name} established, {SOME_FLOWS} flows"), hook, requests(SOME_FLOWS, dev));
        cases.push(some);
        let clients = if hook == Hook::Xdp { net.new_client } else { nth(net.new_client, CLIENTS) };
        let new = net.requests(&first, clients, NEW, 1, dev);
        let bar = (hook == Hook::Xdp).then_some(NEW_NS);
        cases.push(Case { bar, role: Role::New, ..plain(&format!("{name} new flow"), hook, new) });
    }
    let replies = net.replies(l4, (net.local, 8080), 1, external);
    cases.push(Case {
        before: Some((Hook::Ingress, requests(1, pod))),
        becomes: Becomes::From(net.vip),
        role: Role::Reply,
        ..plain("tc egress reply, hot", Hook::Egress, replies)
    });
    cases.extend(transit(world, net, l4)?);
    cases.extend(others(world, net, l4));
    Ok(cases)
}

/// From the wire to a backend on another node, under this node's address, and back.
fn transit(world: &World, net: &Net, l4: &L4) -> Result<Vec<Case>> {
    let vip = nth(net.vip, 1);
    let feed = |frame: Vec<u8>| Feed { frame, fields: vec![], flows: 1, ifindex: world.external.ifindex };
    let request = net.frame(l4, (net.client, 2000), (vip, 80)).bytes();
    // One packet a second is left to the stack, for the neighbour's sake.
    let run = || world.lab.run(Hook::Xdp, world.external, &request);
    let (action, sent) = match run()? {
        (Action::Pass, _) => run()?,
        done => done,
    };
    ensure!(action == Action::Tx, "a frame in transit: {action:?}");
    let (node, _) = net.ends(&sent).context("a short frame")?;
    let port = net.source_port(&sent).context("a short frame")?;
    let reply = net.frame(l4, (net.remote, 8080), (node, port)).bytes();
    let case = |what: &str, feed, becomes| Case {
        what: what.into(),
        hook: Hook::Xdp,
        feed,
        before: None,
        // Clients and other nodes are behind one device.
        action: Action::Tx,
        becomes,
        bar: None,
        role: Role::None,
    };
    Ok(vec![
        case("xdp in transit with SNAT, hot", feed(request), Becomes::To(net.remote)),
        case("xdp in transit with SNAT, reply, hot", feed(reply), Becomes::From(vip)),
    ])
}

/// Traffic that is nobody's business here, also where an address or a port alone do not tell.
fn others(world: &World, net: &Net, l4: &L4) -> Vec<Case> {
    let (external, pod) = (world.external, world.lab.pod);
    let (from, to) = ((net.client, 2000), (net.remote, 9999));
    let mut cases = Vec::new();
    for (what, hook, dev, from, to) in [
        ("xdp other traffic", Hook::Xdp, external, from, to),
        ("tc ingress other traffic", Hook::Ingress, pod, from, to),
        ("tc ingress other traffic, address of a Service", Hook::Ingress, pod, from, (net.vip, 9999)),
        ("tc egress other traffic", Hook::Egress, external, from, to),
        ("tc egress other traffic, port of a backend", Hook::Egress, external, (net.client, 8080), to),
    ] {
        let frame = net.frame(l4, from, to).bytes();
        cases.push(Case {
            what: what.into(),
            hook,
            feed: Feed { frame, fields: vec![], flows: 1, ifindex: dev.ifindex },
            before: None,
            action: Action::Pass,
            becomes: Becomes::Same,
            bar: None,
            role: Role::None,
        });
    }
    cases
}

fn time(world: &World, net: &Net, case: &Case, effort: Effort) -> Result<Timing> {
    let check = || -> Result<Timing> {
        let feeder =
            |hook, feed: &Feed| Feeder::new(kind_of(hook), feed, world.lab.program_fd(hook)?.as_fd());
        let is_new = case.role == Role::New;
        if let Some((hook, feed)) = &case.before {
            feeder(*hook, feed)?.run(feed.flows)?;
        }
        let ours = feeder(case.hook, &case.feed)?;
        if !is_new {
            ours.run(case.feed.flows)?;
        }
        let empty = Feeder::empty(kind_of(case.hook), &case.feed)?;
        let repeat = if is_new { effort.repeat_new() } else { effort.repeat() };
        let before = flows_created(&world.lab)?;
        let (timing, ran) = compare(effort, repeat, &ours, &empty)?;
        let created = flows_created(&world.lab)? - before;
        let expected = if is_new { measure::runs(effort, repeat) } else { 0 };
        ensure!(created == expected, "{created} flows created in {} runs", runs(effort, repeat));
        ensure!(action(case.hook, ran.code) == Some(case.action), "the program returned {}", ran.code);
        let (was, is) = (net.ends(&case.feed.frame), net.ends(&ran.frame));
        let right = match (case.becomes, is) {
            (Becomes::Same, is) => is == was,
            (Becomes::To(addr), Some((_, dst))) => dst == addr,
            (Becomes::From(addr), Some((src, _))) => src == addr,
            (_, None) => false,
        };
        ensure!(right, "the frame goes between {is:?}, not {:?}", case.becomes);
        Ok(timing)
    };
    check().with_context(|| format!("{} {}", net.name(), case.what))
}

pub fn flows_created(lab: &Lab) -> Result<u64> {
    let counters = lab.counters()?;
    Ok(counters.iter().find(|(name, _)| *name == "flow_created").map_or(0, |(_, n)| *n))
}

/// Families and directions against each other, by what each costs above the empty program.
fn ratios(timed: &[(bool, &str, Case, Timing)]) -> Vec<Row> {
    let over = |v6: bool, l4: &str, hook: Option<Hook>, role: Role| {
        let is = |c: &Case| c.role == role && hook.is_none_or(|hook| hook == c.hook);
        timed.iter().find(|(v, l, c, _)| *v == v6 && *l == l4 && is(c)).map(|(.., t)| t.over())
    };
    let mut rows = Vec::new();
    for l4 in ["UDP", "TCP"] {
        for (hook, name) in [(Hook::Xdp, "xdp"), (Hook::Ingress, "tc ingress")] {
            let pair = |role| over(true, l4, Some(hook), role).zip(over(false, l4, Some(hook), role));
            if let Some((v6, v4)) = pair(Role::Request) {
                let what = format!("{l4} {name} established: IPv6 against IPv4, above empty");
                rows.push(Row::value("P1", what, "ns", v6).against(v4).ratio_at_most(V6_TO_V4));
            }
        }
        for (v6, name) in [(false, "IPv4"), (true, "IPv6")] {
            let pair = over(v6, l4, None, Role::Reply).zip(over(v6, l4, Some(Hook::Ingress), Role::Request));
            if let Some((reply, request)) = pair {
                let what = format!("{name} {l4} tc: reply against request, above empty");
                rows.push(
                    Row::value("P1", what, "ns", reply).against(request).ratio_at_most(REPLY_TO_REQUEST),
                );
            }
        }
    }
    rows
}

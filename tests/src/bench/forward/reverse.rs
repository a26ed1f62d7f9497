//! P7: answers, from backends on other nodes back to the clients, beside the requests.

use anyhow::{Context as _, Result};

use super::{
    Bench,
    cast::{ACK, Flows, SYN},
    chain::End,
    hot,
    objects::WITH_TCP,
    run::{self, Exit, Path, Times},
    stream::{self, Shape},
};
use crate::bench::report::Row;

const FLOWS: u32 = 1 << 10;
const REPLY_TO_REQUEST: f64 = 1.2;
const V6_TO_V4: f64 = 1.25;

/// Times above an empty redirect.
struct Over {
    shape: Shape,
    request: f64,
    reply: f64,
}

pub fn run(bench: &Bench) -> Result<Vec<Row>> {
    let (mut rows, mut over) = (Vec::new(), Vec::new());
    for is_tcp in [false, true] {
        for is_v6 in [false, true] {
            let shape = Shape { is_v6, is_tcp };
            let flows = Flows::new(shape, FLOWS, bench.services.min(WITH_TCP));
            let times = time(bench, &flows).with_context(|| shape.name())?;
            for (what, of) in [("requests", 0), ("replies", 2)] {
                let what = format!("{} {what}, {FLOWS} flows: XDP", shape.name());
                rows.push(run::share(run::row("P7", what, &times[of + 1], Some(&times[of]))));
            }
            let above = |of: usize| times[of + 1].median() - times[of].median();
            over.push(Over { shape, request: above(0), reply: above(2) });
        }
    }
    for o in &over {
        let what = format!("{}: reply against request, above an empty redirect", o.shape.name());
        let row = Row::value("P7", what, "ns", o.reply).against(o.request);
        rows.push(row.ratio_at_most(REPLY_TO_REQUEST));
    }
    for [v4, v6] in over.as_chunks::<2>().0 {
        for (what, v4_ns, v6_ns) in [("requests", v4.request, v6.request), ("replies", v4.reply, v6.reply)] {
            let l4 = if v4.shape.is_tcp { "TCP" } else { "UDP" };
            let what = format!("{l4} {what}: IPv6 against IPv4, above an empty redirect");
            rows.push(Row::value("P7", what, "ns", v6_ns).against(v4_ns).ratio_at_most(V6_TO_V4));
        }
    }
    Ok(rows)
}

/// Empty redirect and ours, of requests, then of replies.
fn time(bench: &Bench, flows: &Flows) -> Result<Vec<Times>> {
    let table = stream::table(flows.count)?;
    let count = flows.count;
    let request = |flags| hot::requests(&bench.node, 0, flows, flags, &table);
    let reply = |flags| -> Result<Path> {
        let stream = flows.replies(&bench.node.chain, 0, flags, &table);
        bench.node.path(0, End::Server, &[&stream], Exit::Outside(End::Client), &flows.answered())
    };
    // Both ends have spoken, as in a handshake.
    hot::open(&bench.node, &request(SYN)?, count)?;
    reply(SYN | ACK)?.deliver(count, true).context("the first replies")?;
    let (ours, ours_back) = (request(ACK)?, reply(ACK)?);
    ours.deliver(count, true)?;
    ours_back.deliver(count, true).context("replies")?;
    let forth = hot::untouched(&bench.redirect, 0, flows, ACK, Exit::Outside(End::Server))?;
    let stream = flows.replies(&bench.redirect.chain, 0, ACK, &table);
    let back = bench.redirect.path(
        0,
        End::Server,
        &[&stream],
        Exit::Outside(End::Client),
        &flows.untouched_reply(0),
    )?;
    forth.deliver(count, true)?;
    back.deliver(count, true)?;
    let paths = [&forth, &ours, &back, &ours_back];
    hot::rounds(&bench.node, bench.effort.rounds().min(5), run::frames(bench.effort), &paths)
}

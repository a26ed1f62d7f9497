//! `lb-agent flows`.

use std::{net::SocketAddr, path::Path};

use bytemuck::Pod;
use lb_common::{
    Addr,
    addr::ToIp,
    conntrack::{Flow, Stage, flags, stage},
    tuple::Tuple,
};
use serde::Serialize;

use super::{
    Error,
    table::{
        Column::{Number, Text},
        Table,
    },
};
use crate::{
    maps::{FlowTable, FlowTables, KernelClock, MapError, read_error, reply_answered},
    plan::op::Protocol,
};

#[derive(Debug, Serialize)]
pub struct FlowRow {
    pub protocol: String,
    pub client: SocketAddr,
    pub frontend: SocketAddr,
    pub backend: SocketAddr,
    /// What the backend sees as the client.
    pub source: SocketAddr,
    pub stage: &'static str,
    /// Seconds since the flow began.
    pub age_s: u32,
    /// Seconds since its last packet in either direction.
    pub idle_s: u32,
    /// Index into the map SERVICES.
    pub service: u32,
}

pub fn read(dir: &Path) -> Result<Vec<FlowRow>, Error> {
    let clock = KernelClock::open(dir)?;
    let flows = FlowTables::open(&dir.join("maps"))?;
    let now = Now { jiffies: clock.jiffies()?, per_s: clock.jiffies_per_s().max(1) };
    let mut rows = Vec::new();
    read_table(&flows.v4, now, &mut rows)?;
    read_table(&flows.v6, now, &mut rows)?;
    rows.sort_by(|a, b| {
        (a.frontend, &a.protocol, a.client, a.backend).cmp(&(b.frontend, &b.protocol, b.client, b.backend))
    });
    Ok(rows)
}

#[derive(Clone, Copy)]
struct Now {
    jiffies: u32,
    per_s: u32,
}

impl Now {
    /// Seconds since a stamp; 0 for one that was taken after the clock was read.
    fn since(self, then: u32) -> u32 {
        let jiffies = self.jiffies.wrapping_sub(then);
        if jiffies > u32::MAX / 2 { 0 } else { jiffies / self.per_s }
    }
}

fn read_table<A: Addr + ToIp>(table: &FlowTable<A>, now: Now, rows: &mut Vec<FlowRow>) -> Result<(), MapError>
where
    Tuple<A>: Pod,
    Flow<A>: Pod,
{
    let mut walk = table.walk();
    while let Some((keys, flows)) = walk.next_chunk().map_err(read_error::<A>)? {
        for (key, flow) in keys.iter().zip(flows).filter(|(_, f)| f.flags & flags::REPLY == 0) {
            let partner = table.get(&flow.rewritten(key.proto).reversed()).map_err(read_error::<A>)?;
            rows.push(row(key, flow, partner.as_ref(), now));
        }
    }
    Ok(())
}

fn row<A: Addr + ToIp>(key: &Tuple<A>, flow: &Flow<A>, reply: Option<&Flow<A>>, now: Now) -> FlowRow {
    let reply_seen = reply.map_or(0, |r| r.tcp_seen);
    let stage = stage(key.proto, flow.tcp_seen, reply_seen, reply.is_some_and(reply_answered));
    let idle = now.since(flow.last_seen);
    FlowRow {
        protocol: Protocol::from_number(key.proto).map_or_else(|| key.proto.to_string(), |p| p.to_string()),
        client: SocketAddr::new(key.src.to_ip(), key.sport.get()),
        frontend: SocketAddr::new(key.dst.to_ip(), key.dport.get()),
        backend: SocketAddr::new(flow.dst.to_ip(), flow.dport.get()),
        source: SocketAddr::new(flow.src.to_ip(), flow.sport.get()),
        stage: match stage {
            Stage::Opening => "opening",
            Stage::Established => "established",
            Stage::Closing => "closing",
        },
        age_s: now.since(flow.created),
        idle_s: reply.map_or(idle, |r| idle.min(now.since(r.last_seen))),
        service: flow.service,
    }
}

pub fn table(rows: &[FlowRow]) -> Table<8> {
    let mut table = Table::new([
        Text("PROTO"),
        Text("CLIENT"),
        Text("FRONTEND"),
        Text("BACKEND"),
        Text("SEEN AS"),
        Text("STAGE"),
        Number("AGE"),
        Number("IDLE"),
    ]);
    for r in rows {
        table.push([
            r.protocol.clone(),
            r.client.to_string(),
            r.frontend.to_string(),
            r.backend.to_string(),
            r.source.to_string(),
            r.stage.into(),
            duration(r.age_s),
            duration(r.idle_s),
        ]);
    }
    table
}

/// Seconds as `59s`, `1m00s`, `1h00m`, `1d00h`.
fn duration(s: u32) -> String {
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..86_400 => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
        _ => format!("{}d{:02}h", s / 86_400, s % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_show_two_units() {
        assert_eq!(
            [0, 59, 60, 3599, 3600, 86_399, 86_400].map(duration),
            ["0s", "59s", "1m00s", "59m59s", "1h00m", "23h59m", "1d00h"]
        );
    }

    #[test]
    fn a_stamp_from_the_future_is_no_age() {
        let now = Now { jiffies: 10, per_s: 100 };
        assert_eq!(now.since(11), 0);
        assert_eq!(now.since(10u32.wrapping_sub(300)), 3);
    }
}

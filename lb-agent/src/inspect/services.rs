//! `lb-agent services`.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use lb_common::frontend::{FrontendValue, SlotRange, flags};
use serde::Serialize;

use super::{
    Error, endpoint,
    table::{
        Column::{Number, Text},
        Table,
    },
};
use crate::{
    maps::{Maps, ServiceCounters},
    plan::{ActualState, op::Frontend},
};

/// One Service port in one family. All its frontends share the endpoints and the counters.
#[derive(Debug, Serialize)]
pub struct ServiceRow {
    /// `namespace/name:port` and more, as the agent keeps it; empty if the record has lost its name.
    pub name: String,
    /// Index into the map SERVICES.
    pub id: u32,
    pub frontends: Vec<FrontendRow>,
    /// Endpoints for traffic policy Cluster, and those on this node for Local. An endpoint counts once, however many
    /// slots it has.
    pub cluster_backends: usize,
    pub local_backends: usize,
    /// Seconds; `null` without session affinity.
    pub affinity_timeout_s: Option<u32>,
    pub packets: u64,
    pub bytes: u64,
    pub connections: u64,
    /// How many of the packets XDP translated.
    pub xdp_packets: u64,
}

#[derive(Debug, Serialize)]
pub struct FrontendRow {
    pub kind: &'static str,
    pub address: std::net::IpAddr,
    pub port: u16,
    pub protocol: String,
    /// Which endpoints clients on this node get, and clients from outside.
    pub internal: &'static str,
    pub external: &'static str,
}

pub fn read(dir: &Path) -> Result<Vec<ServiceRow>, Error> {
    let maps = dir.join("maps");
    let state = Maps::open(&maps)?.read_actual()?;
    let counters = ServiceCounters::open(&maps)?;
    let mut frontends: BTreeMap<u32, Vec<(&Frontend, &FrontendValue)>> = BTreeMap::new();
    for (frontend, value) in &state.frontends {
        frontends.entry(value.service).or_default().push((frontend, value));
    }
    let known = state.services.keys().chain(frontends.keys()).copied().collect::<BTreeSet<u32>>();
    // A frontend may name a record beyond the end, should somebody have damaged the map.
    let sums = counters.sums(known.last().map_or(0, |last| last.saturating_add(1))).unwrap_or_default();
    let mut rows = Vec::with_capacity(known.len());
    for id in known {
        let service = state.services.get(&id).cloned().unwrap_or_default();
        let frontends = frontends.remove(&id).unwrap_or_default();
        let affinity = frontends.iter().any(|(_, v)| v.flags & flags::AFFINITY != 0);
        let sums = sums.get(id as usize).copied().unwrap_or_default();
        rows.push(ServiceRow {
            name: service.name.unwrap_or_default(),
            id,
            frontends: frontends.into_iter().map(frontend_row).collect(),
            cluster_backends: distinct(&state, service.record.cluster),
            local_backends: distinct(&state, service.record.local),
            affinity_timeout_s: affinity.then_some(service.record.affinity_timeout_s),
            packets: sums.packets,
            bytes: sums.bytes,
            connections: sums.connections,
            xdp_packets: sums.xdp_packets,
        });
    }
    rows.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
    Ok(rows)
}

fn frontend_row((frontend, value): (&Frontend, &FrontendValue)) -> FrontendRow {
    let policy = |bit| if value.flags & bit != 0 { "Local" } else { "Cluster" };
    FrontendRow {
        kind: match value.flags & flags::KIND_MASK {
            flags::KIND_CLUSTER_IP => "ClusterIP",
            flags::KIND_NODE_PORT => "NodePort",
            flags::KIND_LOAD_BALANCER => "LoadBalancer",
            flags::KIND_EXTERNAL_IP => "ExternalIP",
            _ => "unknown",
        },
        address: frontend.addr,
        port: frontend.port,
        protocol: frontend.protocol.to_string(),
        internal: policy(flags::INTERNAL_LOCAL),
        external: policy(flags::EXTERNAL_LOCAL),
    }
}

/// Number of different backends in a range.
fn distinct(state: &ActualState, range: SlotRange) -> usize {
    let base = range.base() as usize;
    let end = base.saturating_add(range.len() as usize).min(state.slots.len());
    state.slots.get(base..end).unwrap_or_default().iter().collect::<BTreeSet<_>>().len()
}

pub fn table(rows: &[ServiceRow]) -> Table<10> {
    let mut table = Table::new([
        Text("NAME"),
        Text("KIND"),
        Text("FRONTEND"),
        Text("PROTO"),
        Text("POLICY"),
        Text("AFFINITY"),
        Text("BACKENDS"),
        Number("PACKETS"),
        Number("BYTES"),
        Number("CONNECTIONS"),
    ]);
    for row in rows {
        let name = if row.name.is_empty() { format!("(record {})", row.id) } else { row.name.clone() };
        let affinity = row.affinity_timeout_s.map_or("-".into(), |s| format!("{s}s"));
        let backends = format!("{} ({} local)", row.cluster_backends, row.local_backends);
        let counts = [row.packets, row.bytes, row.connections].map(|n| n.to_string());
        if row.frontends.is_empty() {
            let [p, b, c] = counts.clone();
            let none = || "-".to_string();
            table.push([
                name.clone(),
                none(),
                none(),
                none(),
                none(),
                affinity.clone(),
                backends.clone(),
                p,
                b,
                c,
            ]);
        }
        for (i, f) in row.frontends.iter().enumerate() {
            // All frontends share the counters: printed once, so that a column can be summed.
            let [p, b, c] = if i == 0 { counts.clone() } else { [(); 3].map(|()| String::new()) };
            table.push([
                name.clone(),
                f.kind.into(),
                endpoint(f.address, f.port),
                f.protocol.clone(),
                policy(f),
                affinity.clone(),
                backends.clone(),
                p,
                b,
                c,
            ]);
        }
    }
    table
}

/// One word where inside and outside get the same, or where only outside is configurable.
fn policy(f: &FrontendRow) -> String {
    if f.internal == f.external || f.kind != "ClusterIP" {
        f.external.into()
    } else {
        format!("{} ({} outside)", f.internal, f.external)
    }
}

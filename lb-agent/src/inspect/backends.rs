//! `lb-agent backends`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
};

use lb_common::frontend::SlotRange;
use serde::Serialize;

use super::{
    Error, endpoint,
    table::{Column::Text, Table},
};
use crate::{
    maps::Maps,
    plan::{
        ActualState,
        op::{Backend, Family},
    },
};

#[derive(Debug, Serialize)]
pub struct BackendRow {
    pub address: IpAddr,
    pub port: u16,
    pub protocol: String,
    /// On this node.
    pub local: bool,
    /// Index into the map BACKENDS4 or BACKENDS6.
    pub id: u32,
    /// Names of the Services that send new flows here, in either set.
    pub services: Vec<String>,
}

pub fn read(dir: &Path) -> Result<Vec<BackendRow>, Error> {
    let state = Maps::open(&dir.join("maps"))?.read_actual()?;
    let users = users(&state);
    let row = |family: Family, (id, b): (&u32, &Backend)| BackendRow {
        address: b.addr,
        port: b.port,
        protocol: b.protocol.to_string(),
        local: b.local,
        id: *id,
        services: users.get(&(family, *id)).into_iter().flatten().map(|name| (*name).to_string()).collect(),
    };
    let v4 = state.backends4.iter().map(|b| row(Family::V4, b));
    let v6 = state.backends6.iter().map(|b| row(Family::V6, b));
    let mut rows: Vec<BackendRow> = v4.chain(v6).collect();
    rows.sort_by(|a, b| (a.address, a.port, &a.protocol, a.id).cmp(&(b.address, b.port, &b.protocol, b.id)));
    Ok(rows)
}

/// Names of the records whose slots name a backend. A record's family is that of its frontends.
fn users(state: &ActualState) -> BTreeMap<(Family, u32), BTreeSet<&str>> {
    let families: BTreeMap<u32, Family> =
        state.frontends.iter().map(|(f, v)| (v.service, Family::of(f.addr))).collect();
    let mut users: BTreeMap<(Family, u32), BTreeSet<&str>> = BTreeMap::new();
    for (id, service) in &state.services {
        let Some(family) = families.get(id) else { continue };
        let name = service.name.as_deref().unwrap_or("(no name)");
        for range in [service.record.cluster, service.record.local] {
            for backend in slots(state, range) {
                users.entry((*family, *backend)).or_default().insert(name);
            }
        }
    }
    users
}

fn slots(state: &ActualState, range: SlotRange) -> &[u32] {
    let base = range.base() as usize;
    let end = base.saturating_add(range.len() as usize).min(state.slots.len());
    state.slots.get(base..end).unwrap_or_default()
}

pub fn table(rows: &[BackendRow]) -> Table<4> {
    let mut table = Table::new([Text("BACKEND"), Text("PROTO"), Text("WHERE"), Text("SERVICES")]);
    for row in rows {
        let services = if row.services.is_empty() { "-".into() } else { row.services.join(", ") };
        let place = if row.local { "this node" } else { "elsewhere" };
        table.push([endpoint(row.address, row.port), row.protocol.clone(), place.into(), services]);
    }
    table
}

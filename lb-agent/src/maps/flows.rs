//! The flow tables.

use std::{io, path::Path};

use aya::maps::MapType;
use lb_common::{V4, V6, conntrack::Flow, maps::name, tuple::Tuple};

use super::{MapError, Table};

/// The flows of one family.
pub type FlowTable<A> = Table<Tuple<A>, Flow<A>>;

/// `FLOWS4` and `FLOWS6`.
pub struct FlowTables {
    pub v4: FlowTable<V4>,
    pub v6: FlowTable<V6>,
}

impl FlowTables {
    /// Opens the maps pinned in `dir`.
    pub fn open(dir: &Path) -> Result<Self, MapError> {
        let hash = &[MapType::Hash];
        Ok(Self { v4: Table::open(dir, name::FLOWS4, hash)?, v6: Table::open(dir, name::FLOWS6, hash)? })
    }
}

/// A failed read of a flow table.
pub(crate) fn read_error<A: lb_common::Addr>(source: io::Error) -> MapError {
    MapError::Read { map: if A::IS_V6 { name::FLOWS6 } else { name::FLOWS4 }, source }
}

/// True once the answers' entry has seen a packet: it is created with both stamps equal and no flags.
pub(crate) fn reply_answered<A: lb_common::Addr>(reply: &Flow<A>) -> bool {
    reply.last_seen != reply.created || reply.tcp_seen != 0
}

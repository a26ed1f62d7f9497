//! The flow tables.

use std::{io, ops::Deref, path::Path, sync::Arc};

use aya::maps::MapType;
use bytemuck::Pod;
use lb_common::{V4, V6, conntrack::Flow, maps::name, tuple::Tuple};

use super::{FlowEpochs, MapError, Table};

/// The flows of one family. What is removed or changed here is removed from the programs' caches too.
#[derive(Debug)]
pub struct FlowTable<A> {
    table: Table<Tuple<A>, Flow<A>>,
    epochs: Arc<FlowEpochs>,
}

impl<A> Deref for FlowTable<A> {
    type Target = Table<Tuple<A>, Flow<A>>;
    fn deref(&self) -> &Self::Target {
        &self.table
    }
}

impl<A: lb_common::Addr> FlowTable<A>
where
    Tuple<A>: Pod,
    Flow<A>: Pod,
{
    fn open(dir: &Path, name: &'static str, epochs: &Arc<FlowEpochs>) -> Result<Self, MapError> {
        Ok(Self { table: Table::open(dir, name, &[MapType::Hash])?, epochs: epochs.clone() })
    }

    /// Writes an entry.
    pub fn put(&self, key: &Tuple<A>, flow: &Flow<A>) -> io::Result<()> {
        self.table.put(key, flow)?;
        self.epochs.renew_nothing(key);
        Ok(())
    }

    /// Deletes an entry; false if there was none.
    pub fn delete(&self, key: &Tuple<A>) -> io::Result<bool> {
        let was_there = self.table.delete(key)?;
        self.epochs.renew(key);
        Ok(was_there)
    }

    /// The same for one that has been silent for a second at least: no cache has it.
    pub fn delete_silent(&self, key: &Tuple<A>) -> io::Result<bool> {
        self.table.delete(key)
    }

    /// Replaces an entry; false if there was none.
    pub fn replace(&self, key: &Tuple<A>, flow: &Flow<A>) -> io::Result<bool> {
        let was_there = self.table.replace(key, flow)?;
        self.epochs.renew(key);
        Ok(was_there)
    }
}

/// `FLOWS4` and `FLOWS6`.
pub struct FlowTables {
    pub v4: FlowTable<V4>,
    pub v6: FlowTable<V6>,
}

impl FlowTables {
    /// Opens the maps pinned in `dir`.
    pub fn open(dir: &Path) -> Result<Self, MapError> {
        let epochs = Arc::new(FlowEpochs::open(dir)?);
        Ok(Self {
            v4: FlowTable::open(dir, name::FLOWS4, &epochs)?,
            v6: FlowTable::open(dir, name::FLOWS6, &epochs)?,
        })
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

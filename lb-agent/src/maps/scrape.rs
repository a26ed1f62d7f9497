//! What metrics show of the maps, read at the moment of a scrape.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
};

use aya::maps::MapType;
use bytemuck::Pod;
use lb_common::{
    V4, V6,
    affinity::{AffinityKey, AffinityValue},
    maps::name,
    socket::{SocketKey, SocketOrigin},
    verdict::Counter,
};

use super::{Counters, FlowTables, MapError, Maps, Table, apply};
use crate::{
    metrics::{DatapathStats, MapSample, ServiceSample},
    sweep::FlowEntries,
};

/// Handles of its own for reading, and what is known about the flow tables, which are too large to be counted at every
/// scrape.
pub struct Scrape {
    maps: Maps,
    counters: Counters,
    flows: FlowTables,
    flow_entries: Arc<FlowEntries>,
    affinity4: Table<AffinityKey<V4>, AffinityValue>,
    affinity6: Table<AffinityKey<V6>, AffinityValue>,
    sockets: Table<SocketKey, SocketOrigin>,
    failing: Mutex<bool>,
}

impl Scrape {
    /// Opens the maps pinned in `dir`.
    pub fn open(dir: &Path, flow_entries: Arc<FlowEntries>) -> Result<Self, MapError> {
        let lru = &[MapType::LruHash];
        Ok(Self {
            maps: Maps::open(dir)?,
            counters: Counters::open(dir)?,
            flows: FlowTables::open(dir)?,
            flow_entries,
            affinity4: Table::open(dir, name::AFFINITY4, lru)?,
            affinity6: Table::open(dir, name::AFFINITY6, lru)?,
            sockets: Table::open(dir, name::SOCKETS, lru)?,
            failing: Mutex::new(false),
        })
    }

    /// The value, or nothing; said once until it works again.
    fn read<T: Default>(&self, value: Result<T, MapError>) -> T {
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        match value {
            Ok(v) => {
                *failing = false;
                v
            }
            Err(e) => {
                if !*failing {
                    tracing::warn!(error = %crate::chain(&e), "a metric is missing");
                }
                *failing = true;
                T::default()
            }
        }
    }

    fn read_services(&self) -> Result<Vec<ServiceSample>, MapError> {
        let names = self
            .maps
            .names
            .entries()
            .map_err(|source| MapError::Read { map: name::SERVICE_NAMES, source })?;
        let end = names.iter().map(|(id, _)| id.saturating_add(1)).max().unwrap_or(0);
        let sums = self.maps.stats.sums(end)?;
        let mut samples = Vec::with_capacity(names.len());
        for (id, name) in names {
            let sum = sums.get(id as usize).copied().unwrap_or_default();
            samples.push(ServiceSample {
                service: apply::name_text(&name),
                packets: sum.packets,
                bytes: sum.bytes,
                connections: sum.connections,
            });
        }
        samples.sort_by(|a, b| a.service.cmp(&b.service));
        // After a crash two records can share a name until the first plan: one sample per name.
        samples.dedup_by(|a, b| a.service == b.service);
        Ok(samples)
    }

    fn read_maps(&self) -> Result<Vec<MapSample>, MapError> {
        let m = &self.maps;
        let mut samples = vec![
            counted(name::FRONTENDS4, &m.frontends4)?,
            counted(name::FRONTENDS6, &m.frontends6)?,
            counted(name::SERVICE_NAMES, &m.names)?,
            counted(name::AFFINITY_MEMBERS, &m.members)?,
            counted(name::AFFINITY4, &self.affinity4)?,
            counted(name::AFFINITY6, &self.affinity6)?,
            counted(name::SOCKETS, &self.sockets)?,
        ];
        let mut push = |map, entries, capacity: u32| {
            samples.push(MapSample { map, entries, capacity: u64::from(capacity) });
        };
        let ranges = |map, keys: std::io::Result<usize>| {
            keys.map(|n| (map, n as u64)).map_err(|source| MapError::Read { map, source })
        };
        let ranges4 = ranges(name::SOURCE_RANGES4, m.ranges4.keys().map(|k| k.len()))?;
        let ranges6 = ranges(name::SOURCE_RANGES6, m.ranges6.keys().map(|k| k.len()))?;
        push(ranges4.0, ranges4.1, m.ranges4.capacity());
        push(ranges6.0, ranges6.1, m.ranges6.capacity());
        let (mut services, mut slots) = (0, 0);
        m.services.read(u32::MAX, |_, record| {
            services += u64::from(record.in_use != 0);
            slots += u64::from(record.cluster.len()) + u64::from(record.local.len());
        })?;
        push(name::SERVICES, services, m.services.capacity());
        push(name::SLOTS, slots, m.slots.capacity());
        let used = |flags: u16| flags & lb_common::backend::flags::IN_USE != 0;
        let (mut backends4, mut backends6) = (0, 0);
        m.backends4.read(u32::MAX, |_, b| backends4 += u64::from(used(b.flags)))?;
        m.backends6.read(u32::MAX, |_, b| backends6 += u64::from(used(b.flags)))?;
        push(name::BACKENDS4, backends4, m.backends4.capacity());
        push(name::BACKENDS6, backends6, m.backends6.capacity());
        push(name::FLOWS4, self.flow_entries.v4.load(Ordering::Relaxed), self.flows.v4.capacity());
        push(name::FLOWS6, self.flow_entries.v6.load(Ordering::Relaxed), self.flows.v6.capacity());
        Ok(samples)
    }
}

/// Counts a map's entries by walking it: 27 ms for 100,000.
fn counted<K: Pod, V: Pod>(map: &'static str, table: &Table<K, V>) -> Result<MapSample, MapError> {
    let mut entries = 0;
    let mut walk = table.walk();
    while let Some((keys, _)) = walk.next_chunk().map_err(|source| MapError::Read { map, source })? {
        entries += keys.len() as u64;
    }
    Ok(MapSample { map, entries, capacity: u64::from(table.capacity()) })
}

impl DatapathStats for Scrape {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        let sum = |c: &(Counter, &'static str)| Ok((c.1, self.counters.sum(c.0)?));
        self.read(Counter::ALL.iter().map(sum).collect())
    }
    fn services(&self) -> Vec<ServiceSample> {
        self.read(self.read_services())
    }
    fn maps(&self) -> Vec<MapSample> {
        self.read(self.read_maps())
    }
}

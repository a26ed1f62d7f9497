//! What a map is, as the object defines it or as a pin has it.

use std::{io, path::Path};

use aya::{maps::MapInfo, util::nr_cpus};

use super::bpf::EntrySize;

// enum bpf_map_type.
const ARRAY: u32 = 2;
const PERCPU_HASH: u32 = 5;
const PERCPU_ARRAY: u32 = 6;
const LRU_PERCPU_HASH: u32 = 10;

/// What must agree between a pin and its definition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Definition {
    kind: u32,
    key: u32,
    value: u32,
    flags: u32,
    pub entries: u32,
}

impl Definition {
    pub fn of_object(map: &aya_obj::Map, entries: Option<u32>) -> Self {
        Self {
            kind: map.map_type(),
            key: map.key_size(),
            value: map.value_size(),
            flags: map.map_flags(),
            entries: entries.unwrap_or_else(|| map.max_entries()),
        }
    }

    pub fn of_pin(path: &Path) -> io::Result<Self> {
        let info = MapInfo::from_pin(path).map_err(io::Error::other)?;
        Ok(Self {
            kind: info.map_type().map_err(io::Error::other)? as u32,
            key: info.key_size(),
            value: info.value_size(),
            flags: info.map_flags(),
            entries: info.max_entries(),
        })
    }

    /// True if the content of one fits the other as it is, as far as there is room.
    pub const fn same_but_for_capacity(&self, other: &Self) -> bool {
        self.kind == other.kind
            && self.key == other.key
            && self.value == other.value
            && self.flags == other.flags
    }

    pub const fn is_array(&self) -> bool {
        matches!(self.kind, ARRAY | PERCPU_ARRAY)
    }

    /// Per-CPU values are transferred for all possible CPUs, each padded to 8 bytes (Documentation/bpf/map_hash.rst).
    pub fn entry_size(&self) -> io::Result<EntrySize> {
        let value = match self.kind {
            PERCPU_HASH | PERCPU_ARRAY | LRU_PERCPU_HASH => {
                let cpus = nr_cpus().map_err(|(_, e)| e)?;
                (self.value as usize).next_multiple_of(8) * cpus
            }
            _ => self.value as usize,
        };
        Ok(EntrySize { key: self.key as usize, value })
    }
}

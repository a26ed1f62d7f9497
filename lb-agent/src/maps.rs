//! The kernel's maps, opened from their pins: the only part of the agent that reads or writes them.
//!
//! [`Maps`] is what the planner's operations are applied to, and has one owner. The other handles ([`Devices`],
//! [`FlowTables`], [`Counters`], [`ServiceCounters`], [`KernelClock`]) are opened by whoever needs them. Whether a map exists and is pinned is
//! `datapath`'s business; what its entries mean is `lb_common`'s.

use std::{
    io,
    path::{Path, PathBuf},
};

use aya::maps::{MapData, MapType};
use lb_common::{
    V4, V6,
    affinity::MemberKey,
    backend::Backend as RawBackend,
    cidr::{self, ServiceCidr},
    frontend::{FrontendKey, FrontendValue, ServiceName, ServiceRecord},
    maps::name,
};

use crate::plan::Capacities;

mod actual;
mod apply;
mod bystanders;
mod clock;
mod devices;
mod epochs;
mod flows;
mod mmap;
mod ranges;
mod scrape;
mod stats;
pub(crate) mod sys;
mod table;

pub use apply::{Applied, Refused};
pub(crate) use apply::{wait_for_packets, wait_in_place};
pub use bystanders::{Bystanders, survey};
pub use clock::{ClockError, KernelClock};
pub use devices::Devices;
pub use epochs::FlowEpochs;
pub use flows::{FlowTable, FlowTables};
pub(crate) use flows::{read_error, reply_answered};
pub use mmap::MmapArray;
use ranges::{RangeKey4, RangeKey6};
pub use scrape::Scrape;
pub use stats::{Counters, ServiceCounters};
pub use table::{Table, Walk, Written};

/// Why a map could not be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    #[error(
        "no map is pinned at {path}: run `lb-agent run` with this --state-dir first, or name the right one"
    )]
    Missing { path: PathBuf },
    #[error("cannot open the map pinned at {path}; opening needs root or CAP_BPF")]
    Open {
        path: PathBuf,
        #[source]
        source: aya::maps::MapError,
    },
    #[error(
        "the map pinned at {path} has {what} {found} where this version expects {expected}: it is not a map of this \
         agent, or damaged; `lb-agent cleanup` removes it"
    )]
    Layout { path: PathBuf, what: &'static str, found: String, expected: String },
    #[error("cannot map {path} into memory")]
    Mmap {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("index {index} is beyond the end of {map}, which has {capacity} elements ({option})")]
    OutOfRange { map: &'static str, index: u32, capacity: u32, option: &'static str },
    #[error("cannot read {map}")]
    Read {
        map: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot write {map}")]
    Write {
        map: &'static str,
        #[source]
        source: io::Error,
    },
}

/// The option of `lb-agent run` that sets a map's capacity.
pub fn capacity_option(map: &str) -> &'static str {
    match map {
        name::FRONTENDS4 | name::FRONTENDS6 => "--max-frontends",
        name::SERVICES | name::SERVICE_NAMES | name::SERVICE_STATS => "--max-services",
        name::SLOTS => "--max-slots",
        // One member per backend of a Service with affinity: sized like the backends.
        name::BACKENDS4 | name::BACKENDS6 | name::AFFINITY_MEMBERS => "--max-backends",
        name::FLOWS4 | name::FLOWS6 => "--max-flows",
        name::AFFINITY4 | name::AFFINITY6 => "--max-affinity",
        name::SOCKETS => "--max-sockets",
        name::SOURCE_RANGES4 | name::SOURCE_RANGES6 => "--max-source-ranges",
        _ => "fixed",
    }
}

/// Opens a pin and compares it with what the caller is going to read through it: the kernel copies by the map's sizes,
/// so a stranger's map with larger values would overrun ours.
fn open_pin(
    dir: &Path,
    name: &'static str,
    kinds: &[MapType],
    key_size: usize,
    value_size: usize,
) -> Result<(MapData, u32), MapError> {
    let path = dir.join(name);
    if !path.try_exists().unwrap_or(true) {
        return Err(MapError::Missing { path });
    }
    let open = |source| MapError::Open { path: path.clone(), source };
    let data = MapData::from_pin(&path).map_err(open)?;
    let info = data.info().map_err(open)?;
    let kind = info.map_type().map_err(open)?;
    let layout = |what, found: String, expected: String| {
        Err(MapError::Layout { path: path.clone(), what, found, expected })
    };
    if !kinds.contains(&kind) {
        return layout("type", format!("{kind:?}"), format!("{kinds:?}"));
    }
    if info.key_size() as usize != key_size {
        return layout("key size", info.key_size().to_string(), key_size.to_string());
    }
    if info.value_size() as usize != value_size {
        return layout("value size", info.value_size().to_string(), value_size.to_string());
    }
    Ok((data, info.max_entries()))
}

/// The maps that the planner's operations write.
pub struct Maps {
    frontends4: Table<FrontendKey<V4>, FrontendValue>,
    frontends6: Table<FrontendKey<V6>, FrontendValue>,
    services: MmapArray<ServiceRecord>,
    slots: MmapArray<u32>,
    backends4: MmapArray<RawBackend<V4>>,
    backends6: MmapArray<RawBackend<V6>>,
    members: Table<MemberKey, u32>,
    ranges4: Table<RangeKey4, u32>,
    ranges6: Table<RangeKey6, u32>,
    cidrs4: MmapArray<ServiceCidr<V4>>,
    cidrs6: MmapArray<ServiceCidr<V6>>,
    names: Table<u32, ServiceName>,
    stats: ServiceCounters,
    epochs: FlowEpochs,
    bystanders: Bystanders,
}

impl Maps {
    /// Opens the maps pinned in `dir` (`<state_dir>/v<LAYOUT_VERSION>/maps`).
    pub fn open(dir: &Path) -> Result<Self, MapError> {
        let (hash, trie) = (&[MapType::Hash], &[MapType::LpmTrie]);
        Ok(Self {
            frontends4: Table::open(dir, name::FRONTENDS4, hash)?,
            frontends6: Table::open(dir, name::FRONTENDS6, hash)?,
            services: MmapArray::open(dir, name::SERVICES)?,
            slots: MmapArray::open(dir, name::SLOTS)?,
            backends4: MmapArray::open(dir, name::BACKENDS4)?,
            backends6: MmapArray::open(dir, name::BACKENDS6)?,
            members: Table::open(dir, name::AFFINITY_MEMBERS, hash)?,
            ranges4: Table::open(dir, name::SOURCE_RANGES4, trie)?,
            ranges6: Table::open(dir, name::SOURCE_RANGES6, trie)?,
            cidrs4: MmapArray::open_packed(dir, name::SERVICE_CIDRS4, cidr::CAPACITY)?,
            cidrs6: MmapArray::open_packed(dir, name::SERVICE_CIDRS6, cidr::CAPACITY)?,
            names: Table::open(dir, name::SERVICE_NAMES, hash)?,
            stats: ServiceCounters::open(dir)?,
            epochs: FlowEpochs::open(dir)?,
            bystanders: Bystanders::open(dir)?,
        })
    }

    /// How much fits. Maps keep the size that they were made with, whatever the settings say now.
    pub fn capacities(&self) -> Capacities {
        Capacities {
            frontends: self.frontends4.capacity().min(self.frontends6.capacity()),
            services: self.services.capacity().min(self.names.capacity()),
            slots: self.slots.capacity(),
            backends: self.backends4.capacity().min(self.backends6.capacity()),
            members: self.members.capacity(),
            source_ranges: self.ranges4.capacity().min(self.ranges6.capacity()),
        }
    }

    /// Writes hash maps entry by entry from now on, as on a kernel without batches.
    pub fn without_batches(&mut self) {
        self.frontends4.without_batches();
        self.frontends6.without_batches();
        self.members.without_batches();
        self.names.without_batches();
        self.ranges4.without_batches();
        self.ranges6.without_batches();
    }
}

//! Counters of the data path, which each CPU has of its own: summed when read.

use std::{io, path::Path};

use aya::{
    maps::{Map, MapData, MapType, PerCpuArray},
    util::nr_cpus,
};
use lb_common::{
    frontend::{ServiceStats, stats_index},
    maps::name,
    verdict::Counter,
};

use super::{
    MapError, MmapArray,
    sys::{self, Batch, Command},
};

fn open<T: aya::Pod>(dir: &Path, name: &'static str) -> Result<PerCpuArray<MapData, T>, MapError> {
    let (data, _) = super::open_pin(dir, name, &[MapType::PerCpuArray], size_of::<u32>(), size_of::<T>())?;
    PerCpuArray::try_from(Map::PerCpuArray(data))
        .map_err(|source| MapError::Open { path: dir.join(name), source })
}

fn read_error(map: &'static str) -> impl Fn(aya::maps::MapError) -> MapError {
    move |e| MapError::Read { map, source: io_error(e) }
}

fn io_error(e: aya::maps::MapError) -> io::Error {
    match e {
        aya::maps::MapError::SyscallError(e) => e.io_error,
        e => io::Error::other(e),
    }
}

/// `COUNTERS`.
pub struct Counters(PerCpuArray<MapData, u64>);

impl Counters {
    /// Opens the map pinned in `dir`.
    pub fn open(dir: &Path) -> Result<Self, MapError> {
        open(dir, name::COUNTERS).map(Self)
    }

    /// A counter's value since the map was made.
    pub fn sum(&self, counter: Counter) -> Result<u64, MapError> {
        let values = self.0.get(&(counter as u32), 0).map_err(read_error(name::COUNTERS))?;
        Ok(values.iter().fold(0, |sum, v| sum.wrapping_add(*v)))
    }
}

/// `SERVICE_STATS`: of each CPU that there may be, as many elements as there are records.
pub struct ServiceCounters {
    counts: MmapArray<ServiceStats>,
    cpus: u32,
    records: u32,
}

/// Elements that are zeroed by one system call.
const CHUNK: usize = 1024;

impl ServiceCounters {
    /// Opens the map pinned in `dir`.
    pub fn open(dir: &Path) -> Result<Self, MapError> {
        let counts = MmapArray::open(dir, name::SERVICE_STATS)?;
        let cpus = nr_cpus().map_err(|(_, source)| MapError::Read { map: name::SERVICE_STATS, source })?;
        let cpus = u32::try_from(cpus).unwrap_or(u32::MAX);
        Ok(Self { records: counts.capacity() / cpus, counts, cpus })
    }

    /// What the record's Service has seen, over all CPUs; nothing for records that there are not. One system call a
    /// CPU: a mapping for each would cost more, and ones that stay memory.
    pub fn sum(&self, service: u32) -> Result<ServiceStats, MapError> {
        let mut sum = ServiceStats::default();
        if service < self.records {
            for cpu in 0..self.cpus {
                let mut counted = ServiceStats::default();
                let index = stats_index(cpu, self.records, service);
                let (key, to) = (std::ptr::from_ref(&index) as u64, std::ptr::from_mut(&mut counted) as u64);
                // SAFETY: a key and a value of the sizes that the map was opened with.
                unsafe { sys::elem(self.counts.fd(), Command::LookupElem, key, to, 0) }
                    .map_err(|source| MapError::Read { map: name::SERVICE_STATS, source })?;
                add(&mut sum, counted);
            }
        }
        Ok(sum)
    }

    /// The same of the first `end` records, reading nothing twice and keeping nothing mapped.
    pub fn sums(&self, end: u32) -> Result<Vec<ServiceStats>, MapError> {
        let end = end.min(self.records);
        let mut sums = vec![ServiceStats::default(); end as usize];
        for cpu in 0..self.cpus {
            let first = stats_index(cpu, self.records, 0);
            self.counts.read_range(first..first + end, |i, counted| {
                if let Some(sum) = sums.get_mut((i - first) as usize) {
                    add(sum, counted);
                }
            })?;
        }
        Ok(sums)
    }

    /// Starts the counts of these records at 0.
    pub(super) fn zero(&self, services: &[u32]) -> Result<(), MapError> {
        let of_cpus = |service: &u32| {
            let service = *service;
            (0..self.cpus).map(move |cpu| stats_index(cpu, self.records, service))
        };
        let keys: Vec<u32> = services.iter().filter(|s| **s < self.records).flat_map(of_cpus).collect();
        let zeros = vec![ServiceStats::default(); keys.len().min(CHUNK)];
        for keys in keys.chunks(CHUNK) {
            let batch = Batch {
                in_batch: 0,
                out_batch: 0,
                keys: keys.as_ptr() as u64,
                values: zeros.as_ptr() as u64,
                count: keys.len() as u32,
            };
            // SAFETY: so many keys and values, of the sizes that the map was opened with.
            let (_, result) = unsafe { sys::batch(self.counts.fd(), Command::UpdateBatch, &batch) };
            result.map_err(|source| MapError::Write { map: name::SERVICE_STATS, source })?;
        }
        Ok(())
    }
}

fn add(sum: &mut ServiceStats, counted: ServiceStats) {
    sum.packets = sum.packets.wrapping_add(counted.packets);
    sum.bytes = sum.bytes.wrapping_add(counted.bytes);
    sum.connections = sum.connections.wrapping_add(counted.connections);
    sum.xdp_packets = sum.xdp_packets.wrapping_add(counted.xdp_packets);
}

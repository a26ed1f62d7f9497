//! Counters of the data path: per-CPU arrays, summed when read.

use std::{io, os::fd::AsFd as _, path::Path};

use aya::{
    maps::{Map, MapData, MapType, PerCpuArray},
    util::nr_cpus,
};
use lb_common::{frontend::ServiceStats, maps::name, verdict::Counter};

use super::{
    MapError,
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

/// `SERVICE_STATS`: of each record as many values as there are possible CPUs.
pub struct ServiceCounters {
    data: MapData,
    cpus: usize,
}

/// Records whose counts are zeroed by one system call.
const CHUNK: usize = 1024;

impl ServiceCounters {
    /// Opens the map pinned in `dir`.
    pub fn open(dir: &Path) -> Result<Self, MapError> {
        let (key, value) = (size_of::<u32>(), size_of::<ServiceStats>());
        let (data, _) = super::open_pin(dir, name::SERVICE_STATS, &[MapType::PerCpuArray], key, value)?;
        let cpus = nr_cpus().map_err(|(_, source)| MapError::Read { map: name::SERVICE_STATS, source })?;
        Ok(Self { data, cpus })
    }

    /// What the record's Service has seen, over all CPUs.
    pub fn sum(&self, service: u32) -> Result<ServiceStats, MapError> {
        let mut values = vec![ServiceStats::default(); self.cpus];
        let (key, to) = (std::ptr::from_ref(&service) as u64, values.as_mut_ptr() as u64);
        // SAFETY: a key and as many values as there are possible CPUs, of sizes that were compared with the map's when it was
        // opened; values of 32 bytes need no padding between CPUs.
        unsafe { sys::elem(self.data.fd().as_fd(), Command::LookupElem, key, to, 0) }
            .map_err(|source| MapError::Read { map: name::SERVICE_STATS, source })?;
        Ok(values.iter().fold(ServiceStats::default(), |sum, v| ServiceStats {
            packets: sum.packets.wrapping_add(v.packets),
            bytes: sum.bytes.wrapping_add(v.bytes),
            connections: sum.connections.wrapping_add(v.connections),
            xdp_packets: sum.xdp_packets.wrapping_add(v.xdp_packets),
        }))
    }

    /// Starts the counts of these records at 0.
    pub(super) fn zero(&self, services: &[u32]) -> Result<(), MapError> {
        let zeros = vec![ServiceStats::default(); self.cpus * services.len().min(CHUNK)];
        let values = zeros.as_ptr() as u64;
        for keys in services.chunks(CHUNK) {
            let batch = Batch {
                in_batch: 0,
                out_batch: 0,
                keys: keys.as_ptr() as u64,
                values,
                count: keys.len() as u32,
            };
            // SAFETY: so many keys, and for each as many values as there are possible CPUs.
            let (_, result) = unsafe { sys::batch(self.data.fd().as_fd(), Command::UpdateBatch, &batch) };
            match result {
                Ok(()) => {}
                // Batches of per-CPU arrays are younger than those of hash maps (5.13).
                Err(_) => keys.iter().try_for_each(|key| self.zero_one(*key, values))?,
            }
        }
        Ok(())
    }

    fn zero_one(&self, service: u32, values: u64) -> Result<(), MapError> {
        let key = std::ptr::from_ref(&service) as u64;
        // SAFETY: a key, and at least as many values as there are possible CPUs.
        unsafe { sys::elem(self.data.fd().as_fd(), Command::UpdateElem, key, values, 0) }
            .map_err(|source| MapError::Write { map: name::SERVICE_STATS, source })
    }
}

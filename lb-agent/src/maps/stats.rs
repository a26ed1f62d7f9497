//! Counters of the data path: per-CPU arrays, summed when read.

use std::{io, path::Path};

use aya::{
    maps::{Map, MapData, MapType, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use lb_common::{frontend::ServiceStats, maps::name, verdict::Counter};

use super::MapError;

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

/// `SERVICE_STATS`.
pub struct ServiceCounters(PerCpuArray<MapData, ServiceStats>);

impl ServiceCounters {
    /// Opens the map pinned in `dir`.
    pub fn open(dir: &Path) -> Result<Self, MapError> {
        open(dir, name::SERVICE_STATS).map(Self)
    }

    /// What the record's Service has seen, over all CPUs.
    pub fn sum(&self, service: u32) -> Result<ServiceStats, MapError> {
        let values = self.0.get(&service, 0).map_err(read_error(name::SERVICE_STATS))?;
        Ok(values.iter().fold(ServiceStats::default(), |sum, v| ServiceStats {
            packets: sum.packets.wrapping_add(v.packets),
            bytes: sum.bytes.wrapping_add(v.bytes),
            connections: sum.connections.wrapping_add(v.connections),
            xdp_packets: sum.xdp_packets.wrapping_add(v.xdp_packets),
        }))
    }

    /// Starts the record's counts at 0.
    pub(super) fn zero(&mut self, service: u32) -> Result<(), MapError> {
        let write = |source| MapError::Write { map: name::SERVICE_STATS, source };
        let cpus = nr_cpus().map_err(|(_, e)| write(e))?;
        let zeros = PerCpuValues::try_from(vec![ServiceStats::default(); cpus]).map_err(write)?;
        self.0.set(service, zeros, 0).map_err(|e| write(io_error(e)))
    }
}

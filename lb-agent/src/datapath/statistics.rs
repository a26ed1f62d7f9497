//! Moves what Services have been counted to a map of another size: each CPU has a part of its own, as long as `SERVICES`.

use std::{io, os::fd::AsFd as _};

use aya::util::nr_cpus;
use lb_common::frontend::stats_index;

use super::{
    bpf::{self, Batch, BatchReader, EntrySize},
    definition::Definition,
    migrate,
    state_dir::StateDir,
};

/// Copies what fits of `SERVICE_STATS`: what is cut off has no Service, which `migrate` has made sure of.
pub fn copy(state: &StateDir, map: &str, old: &Definition, new: &Definition) -> io::Result<()> {
    let cpus = nr_cpus().map_err(|(_, source)| source)? as u32;
    let records = (old.entries / cpus, new.entries / cpus);
    let (from, to) = migrate::open_both(state, map)?;
    let size = old.entry_size()?;
    let mut reader = BatchReader::new(from.as_fd(), size);
    while let Some(batch) = reader.next(bpf::CHUNK)? {
        let mut moved = rekeyed(&batch, size, records);
        let all = moved.count;
        if all > 0 {
            bpf::update_batch(to.as_fd(), &mut moved, all).1?;
        }
    }
    Ok(())
}

/// The elements of the old map with their indices in the new one, without those that have none.
fn rekeyed(batch: &Batch, size: EntrySize, (old, new): (u32, u32)) -> Batch {
    let mut moved = Batch::default();
    for (key, value) in batch.keys.chunks_exact(size.key).zip(batch.values.chunks_exact(size.value)) {
        let Ok(index) = key.try_into().map(u32::from_ne_bytes) else { continue };
        let (cpu, record) = (index / old.max(1), index % old.max(1));
        if record < new {
            moved.keys.extend_from_slice(&stats_index(cpu, new, record).to_ne_bytes());
            moved.values.extend_from_slice(value);
            moved.count += 1;
        }
    }
    moved
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two CPUs; values that tell which of them counted for which record.
    fn moved(old: u32, new: u32) -> Vec<(u32, u8)> {
        let all = 0..2 * old;
        let batch = Batch {
            keys: all.clone().flat_map(u32::to_ne_bytes).collect(),
            values: all.clone().map(|i| (10 * (i / old) + i % old) as u8).collect(),
            count: all.len(),
        };
        let moved = rekeyed(&batch, EntrySize { key: 4, value: 1 }, (old, new));
        let keys = moved.keys.chunks_exact(4).map(|k| u32::from_ne_bytes(k.try_into().unwrap()));
        assert_eq!(moved.count, keys.len());
        keys.zip(moved.values.iter().copied()).collect()
    }

    #[test]
    fn each_record_keeps_its_counts_on_each_cpu() {
        assert_eq!(moved(2, 3), [(0, 0), (1, 1), (3, 10), (4, 11)]);
        assert_eq!(moved(3, 2), [(0, 0), (1, 1), (2, 10), (3, 11)]);
        assert_eq!(moved(2, 2), [(0, 0), (1, 1), (2, 10), (3, 11)]);
    }
}

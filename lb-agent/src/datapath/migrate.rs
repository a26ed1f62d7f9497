//! Pinned maps whose definition has changed: a capacity option, or (in development) a layout without a new version.
//!
//! aya takes any pin for the map of that name, so each is compared with its definition first. Where only the capacity
//! differs, the old map moves to `maps-old/`, a new one is made, and the content is copied before any program
//! uses it; once all hooks run the new programs, what the old ones wrote in between is copied as well, and the old map
//! goes. What is lost: changes to flows that were already there (TCP flags, times) made during those milliseconds, counts
//! of that time, and, when a table shrinks below what is in it, what does not fit. When the *planner's* maps do not fit
//! any more, all of them start empty: half a set of ids would be worse than the moment until the first plan.

use std::{
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use aya::{maps::MapInfo, util::nr_cpus};
use aya_obj::Object;
use lb_common::maps::name;
use tracing::{info, warn};

use super::{
    Error,
    bpf::{self, BatchReader, EntrySize},
    load,
    state_dir::{StateDir, entries},
};
use crate::settings::Capacities;

/// Entries moved by one system call.
const CHUNK: usize = 4096;

/// What the planner reads back as the state that it left: kept together, or given up together.
const PLANNED: [&str; 13] = [
    name::FRONTENDS4,
    name::FRONTENDS6,
    name::SERVICES,
    name::SLOTS,
    name::BACKENDS4,
    name::BACKENDS6,
    name::AFFINITY_MEMBERS,
    name::SERVICE_NAMES,
    name::SERVICE_STATS,
    name::SERVICE_CIDRS4,
    name::SERVICE_CIDRS6,
    name::SOURCE_RANGES4,
    name::SOURCE_RANGES6,
];

/// What programs write, so that it may grow until they are replaced.
const BY_PROGRAMS: [&str; 7] = [
    name::FLOWS4,
    name::FLOWS6,
    name::AFFINITY4,
    name::AFFINITY6,
    name::SOCKETS,
    name::FRAGMENTS4,
    name::FRAGMENTS6,
];

// enum bpf_map_type.
const ARRAY: u32 = 2;
const PERCPU_HASH: u32 = 5;
const PERCPU_ARRAY: u32 = 6;
const LRU_PERCPU_HASH: u32 = 10;

/// What must agree between a pin and its definition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Definition {
    kind: u32,
    key: u32,
    value: u32,
    flags: u32,
    entries: u32,
}

impl Definition {
    fn of_object(map: &aya_obj::Map, entries: Option<u32>) -> Self {
        Self {
            kind: map.map_type(),
            key: map.key_size(),
            value: map.value_size(),
            flags: map.map_flags(),
            entries: entries.unwrap_or_else(|| map.max_entries()),
        }
    }

    fn of_pin(path: &Path) -> io::Result<Self> {
        let info = MapInfo::from_pin(path).map_err(io::Error::other)?;
        Ok(Self {
            kind: info.map_type().map_err(io::Error::other)? as u32,
            key: info.key_size(),
            value: info.value_size(),
            flags: info.map_flags(),
            entries: info.max_entries(),
        })
    }

    const fn same_but_for_capacity(&self, other: &Self) -> bool {
        self.kind == other.kind
            && self.key == other.key
            && self.value == other.value
            && self.flags == other.flags
    }

    const fn is_array(&self) -> bool {
        matches!(self.kind, ARRAY | PERCPU_ARRAY)
    }

    /// Per-CPU values are transferred for all possible CPUs, each padded to 8 bytes (Documentation/bpf/map_hash.rst).
    fn entry_size(&self) -> io::Result<EntrySize> {
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

/// Maps that wait in `maps-old/`.
#[derive(Debug, Default)]
pub struct Migration(Vec<Moved>);

#[derive(Debug)]
struct Moved {
    map: &'static str,
    old: Definition,
    new: Definition,
}

/// What the comparison of all pins with their definitions says.
#[derive(Debug, Default)]
struct Comparison {
    moved: Vec<Moved>,
    given_up: Vec<&'static str>,
}

impl Migration {
    /// Compares all pins with their definitions and moves those away that do not fit. Afterwards the programs can be loaded.
    pub fn prepare(object: &Object, state: &StateDir, capacities: &Capacities) -> Result<Self, Error> {
        complete_interrupted(state)?;
        let Comparison { mut moved, mut given_up } = compare(object, state, capacities)?;
        if !planned_maps_are_whole(object, state, &given_up) || !planned_maps_fit(&moved, state)? {
            warn!("the Services do not fit the new capacities as they are laid out: all are programmed anew");
            moved.retain(|m| !PLANNED.contains(&m.map));
            given_up.retain(|map| !PLANNED.contains(map));
            given_up.extend(PLANNED.into_iter().filter(|map| state.maps().join(map).exists()));
        }
        for map in given_up {
            let path = state.maps().join(map);
            fs::remove_file(&path).map_err(|source| Error::Pin { path, action: "unlink", source })?;
        }
        for m in &moved {
            let (from, to) = (state.maps().join(m.map), state.old_maps().join(m.map));
            fs::rename(&from, &to).map_err(|source| Error::Pin { path: from, action: "rename", source })?;
        }
        Ok(Self(moved))
    }

    /// Copies the content into the new maps, before a program uses them or the planner changes them.
    pub fn copy(&mut self, state: &StateDir) -> Result<(), Error> {
        for moved in &self.0 {
            let lost = copy_map(state, moved)
                .map_err(|source| Error::Migrate { map: moved.map.to_owned(), source })?;
            if lost > 0 {
                warn!(
                    map = moved.map,
                    entries = lost,
                    "these entries do not fit the new capacity and are lost"
                );
            }
        }
        let (by_programs, complete): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.0).into_iter().partition(|m| BY_PROGRAMS.contains(&m.map));
        self.0 = by_programs;
        complete.iter().try_for_each(|m| drop_old(state, m.map))
    }

    /// After every hook runs the new programs: copies what the old ones have added since, and removes the old maps.
    pub fn finish(self, state: &StateDir) -> Result<(), Error> {
        for moved in self.0 {
            copy_missing(state, moved.map, &moved.old)
                .map_err(|source| Error::Migrate { map: moved.map.to_owned(), source })?;
            drop_old(state, moved.map)?;
        }
        Ok(())
    }
}

fn drop_old(state: &StateDir, map: &str) -> Result<(), Error> {
    let path = state.old_maps().join(map);
    fs::remove_file(&path).map_err(|source| Error::Pin { path, action: "unlink", source })
}

fn compare(object: &Object, state: &StateDir, capacities: &Capacities) -> Result<Comparison, Error> {
    let sizes = load::max_entries(capacities);
    let mut found = Comparison::default();
    for map in name::ALL {
        let Some(definition) = object.maps.get(map) else { continue };
        let path = state.maps().join(map);
        if !path.exists() {
            continue;
        }
        let entries = sizes.iter().find(|(sized, _)| *sized == map).map(|(_, entries)| *entries);
        let new = Definition::of_object(definition, entries);
        let old = Definition::of_pin(&path).map_err(|source| Error::Pin {
            path,
            action: "BPF_OBJ_GET_INFO_BY_FD",
            source,
        })?;
        if old == new {
            continue;
        }
        if old.same_but_for_capacity(&new) {
            info!(map, old = old.entries, new = new.entries, "capacity has changed: the map is replaced");
            found.moved.push(Moved { map, old, new });
        } else {
            warn!(map, ?old, ?new, "the pinned map has another layout: its content is given up");
            found.given_up.push(map);
        }
    }
    Ok(found)
}

/// False if a part of what the planner has laid out is missing.
fn planned_maps_are_whole(object: &Object, state: &StateDir, given_up: &[&str]) -> bool {
    let mut all = PLANNED.into_iter().filter(|map| object.maps.contains_key(*map));
    let is_there = |map: &str| state.maps().join(map).exists() && !given_up.contains(&map);
    match all.next() {
        Some(first) => {
            let expected = is_there(first);
            all.all(|map| is_there(map) == expected)
        }
        None => true,
    }
}

/// What a run that was killed left in `maps-old/`.
fn complete_interrupted(state: &StateDir) -> Result<(), Error> {
    let old_maps = state.old_maps();
    let listed = entries(&old_maps);
    let fail = |path: &Path, action| {
        let path = path.to_owned();
        move |source| Error::Pin { path, action, source }
    };
    for old in listed.map_err(fail(&old_maps, "readdir"))? {
        let Some(map) = old.file_name().and_then(|n| n.to_str()) else { continue };
        let new = state.maps().join(map);
        if !new.exists() {
            fs::rename(&old, &new).map_err(fail(&old, "rename"))?;
            continue;
        }
        // Entries of the new map are the younger ones, whichever of the two the running programs use.
        let was = Definition::of_pin(&old).map_err(fail(&old, "BPF_OBJ_GET_INFO_BY_FD"))?;
        let is = Definition::of_pin(&new).map_err(fail(&new, "BPF_OBJ_GET_INFO_BY_FD"))?;
        if BY_PROGRAMS.contains(&map) && was.same_but_for_capacity(&is) {
            copy_missing(state, map, &was)
                .map_err(|source| Error::Migrate { map: map.to_owned(), source })?;
            fs::remove_file(&old).map_err(fail(&old, "unlink"))?;
        } else {
            // Nothing but the agent writes these, and it never got to that: the old one is whole.
            fs::rename(&old, &new).map_err(fail(&old, "rename"))?;
        }
    }
    Ok(())
}

fn open_both(state: &StateDir, map: &str) -> io::Result<(OwnedFd, OwnedFd)> {
    Ok((bpf::open_pin(&state.old_maps().join(map))?, bpf::open_pin(&state.maps().join(map))?))
}

/// Returns how many entries did not fit.
fn copy_map(state: &StateDir, moved: &Moved) -> io::Result<usize> {
    let new = &moved.new;
    let (from, to) = open_both(state, moved.map)?;
    let mut reader = BatchReader::new(from.as_fd(), moved.old.entry_size()?);
    let (mut read, mut written) = (0, 0);
    let mut room = new.entries as usize;
    while let Some(mut batch) = reader.next(CHUNK)? {
        read += batch.count;
        if new.is_array() && written >= room {
            break;
        }
        // An array is read from index 0 upwards.
        let limit = if new.is_array() { room - written } else { batch.count };
        let (done, result) = bpf::update_batch(to.as_fd(), &mut batch, limit);
        written += done;
        match result {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::E2BIG) => room = written,
            Err(e) => return Err(e),
        }
    }
    // Arrays are always full of elements; whether any in use were cut off has been checked before.
    Ok(if new.is_array() { 0 } else { read - written })
}

fn copy_missing(state: &StateDir, map: &str, old: &Definition) -> io::Result<()> {
    let (from, to) = open_both(state, map)?;
    let size = old.entry_size()?;
    let mut reader = BatchReader::new(from.as_fd(), size);
    while let Some(batch) = reader.next(CHUNK)? {
        for (key, value) in batch.keys.chunks_exact(size.key).zip(batch.values.chunks_exact(size.value)) {
            match bpf::update(to.as_fd(), key, value, bpf::BPF_NOEXIST) {
                Ok(()) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EEXIST | libc::E2BIG)) => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
}

/// False if something that the planner has laid out lies beyond a new capacity.
fn planned_maps_fit(moved: &[Moved], state: &StateDir) -> Result<bool, Error> {
    // Statistics have an element per service record, used or not.
    let shrunk = moved.iter().filter(|m| PLANNED.contains(&m.map) && m.map != name::SERVICE_STATS);
    for m in shrunk.filter(|m| m.new.entries < m.old.entries) {
        let used = used(&state.maps().join(m.map), &m.old)
            .map_err(|source| Error::Migrate { map: m.map.to_owned(), source })?;
        if used > m.new.entries as usize {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Entries of a hash, or the length of an array up to its last element that is not zero.
fn used(path: &Path, definition: &Definition) -> io::Result<usize> {
    let map = bpf::open_pin(path)?;
    let size = definition.entry_size()?;
    let mut reader = BatchReader::new(map.as_fd(), size);
    let (mut read, mut used) = (0, 0);
    while let Some(batch) = reader.next(CHUNK)? {
        let last = batch.values.iter().rposition(|byte| *byte != 0);
        if let (true, Some(last)) = (definition.is_array(), last) {
            used = read + last / size.value + 1;
        }
        read += batch.count;
    }
    Ok(if definition.is_array() { used } else { read })
}

//! Pinned maps whose definition has changed: a capacity option, or (in development) a layout without a new version.
//!
//! aya takes any pin for the map of that name, so each is compared with its definition first. Where only the capacity
//! differs, the old map moves to `maps-old/`, a new one is made, and the content is copied before any program uses it.
//! When the *planner's* maps do not fit any more, all of them start empty: half a set of ids would be worse than the moment
//! until the first plan.
//!
//! Flows go on meanwhile, and hooks can only be changed one by one: a flow that one hook has opened in the old table, and
//! another one looks for in the new, would be lost. So each flow belongs to one table at any time, on all hooks:
//!
//! 1. Our tc programs are put *beside* those of the last run, on every hook. Those go first, and open all flows; what they
//!    do not know passes on to ours.
//! 2. The old programs lose their frontends (`gates`). From now on they serve the flows of the old table, and ours open all
//!    others in the new one.
//! 3. The old table does not grow any more: what it has and the new one lacks is copied (`carry`).
//! 4. The new table knows everything. Ours take the hooks over, one by one, XDP too; the old table goes.
//!
//! What is lost: counts of that time, and, when a table shrinks below what is in it, what does not fit. A source port may be
//! given twice while the last copy runs (once in each table); and a client with affinity that opens two connections within
//! these milliseconds may see two backends. If an agent is killed in between, the next one copies once and changes hook by
//! hook.

use std::{
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use aya_obj::Object;
use lb_common::maps::name;
use tracing::{info, warn};

use super::{
    Error,
    bpf::{self, BatchReader},
    catch_up::{self, Progress},
    definition::Definition,
    elements::{self, Write},
    gates::{self, Gates},
    load,
    state_dir::{StateDir, entries},
    statistics,
};
use crate::settings::Capacities;

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

/// Maps that wait in `maps-old/`.
#[derive(Debug, Default)]
pub struct Migration {
    moved: Vec<Moved>,
    /// Present until the old programs have stopped to open flows.
    gates: Option<Gates>,
    progress: Progress,
    /// Programs of the last run use maps that are not pinned any more, and may still open flows from them.
    gave_up: bool,
}

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
        let gave_up = !given_up.is_empty();
        if gave_up && !given_up.contains(&name::BYSTANDERS) && state.maps().join(name::BYSTANDERS).exists() {
            // First, so that the programs that run keep one that is about what they keep.
            given_up.insert(0, name::BYSTANDERS);
        }
        for map in given_up {
            let path = state.maps().join(map);
            fs::remove_file(&path).map_err(|source| Error::Pin { path, action: "unlink", source })?;
        }
        for m in &moved {
            let (from, to) = (state.maps().join(m.map), state.old_maps().join(m.map));
            fs::rename(&from, &to).map_err(|source| Error::Pin { path: from, action: "rename", source })?;
        }
        Ok(Self { moved, gave_up, ..Default::default() })
    }

    /// Copies the content into the new maps, before a program uses them or the planner changes them.
    pub fn copy(&mut self, state: &StateDir) -> Result<(), Error> {
        if self.moved.is_empty() {
            return Ok(());
        }
        self.progress = Progress::begin(state)?;
        for moved in &self.moved {
            let lost = copy_map(state, moved).map_err(failure(moved.map))?;
            if lost > 0 {
                warn!(
                    map = moved.map,
                    entries = lost,
                    "these entries do not fit the new capacity and are lost"
                );
            }
        }
        let is_here = |name: &&str| self.moved.iter().any(|m| m.map == *name);
        if catch_up::MAPS.iter().any(is_here) && gates::NAMES.iter().all(is_here) {
            self.gates = Some(Gates::open(state).map_err(failure(name::FRONTENDS4))?);
        }
        self.complete(state, |m| !BY_PROGRAMS.contains(&m.map))
    }

    /// True if the pinned maps have the frontends and backends that the running programs know.
    pub const fn has_all(&self) -> bool {
        !self.gave_up
    }

    /// After the socket hooks run the new programs: what only they write is complete.
    pub fn sockets_taken_over(&mut self, state: &StateDir) -> Result<(), Error> {
        self.complete(state, |m| m.map == name::SOCKETS)
    }

    /// True while our programs are to stand beside those of the last run, which open the flows.
    pub const fn is_pending(&self) -> bool {
        self.gates.is_some()
    }

    /// With our programs on every hook beside the others: from now on only ours open flows, and the new table knows
    /// everything. Without (`everywhere` is false): the hooks are taken over as they are.
    pub fn switch(&mut self, state: &StateDir, everywhere: bool) -> Result<(), Error> {
        let Some(gates) = self.gates.take().filter(|_| everywhere) else { return Ok(()) };
        let maps = self.maps();
        self.progress.switch(state, &maps, &gates)
    }

    /// After every hook runs the new programs: copies what the old ones have written last, and removes the old maps.
    pub fn finish(mut self, state: &StateDir) -> Result<(), Error> {
        if self.moved.is_empty() {
            return Ok(());
        }
        let maps = self.maps();
        self.progress.all_news(state, &maps)?;
        self.complete(state, |_| true)
    }

    fn maps(&self) -> Vec<&'static str> {
        self.moved.iter().map(|m| m.map).collect()
    }

    /// Removes the old ones of these maps, after a last look at those that nothing else carries over.
    fn complete(&mut self, state: &StateDir, which: impl Fn(&Moved) -> bool) -> Result<(), Error> {
        let (complete, others) = std::mem::take(&mut self.moved).into_iter().partition(which);
        self.moved = others;
        for moved in complete {
            if BY_PROGRAMS.contains(&moved.map) && !catch_up::MAPS.contains(&moved.map) {
                copy_missing(state, moved.map, &moved.old).map_err(failure(moved.map))?;
            }
            drop_old(state, moved.map)?;
        }
        Ok(())
    }
}

/// For what cannot be done to a map.
pub fn failure(map: &str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Migrate { map: map.to_owned(), source }
}

fn drop_old(state: &StateDir, map: &str) -> Result<(), Error> {
    let path = state.old_maps().join(map);
    fs::remove_file(&path).map_err(|source| Error::Pin { path, action: "unlink", source })
}

/// The capacities with flow tables no smaller than those of the last run, unless their size was asked for: a default that has
/// shrunk with the node's memory is no reason to lose flows.
pub fn with_room_for_flows(state: &StateDir, asked: Capacities) -> Capacities {
    let pinned = [name::FLOWS4, name::FLOWS6].map(|map| Definition::of_pin(&state.maps().join(map)));
    let largest = pinned.iter().flatten().map(|table| table.entries / 2).max();
    let flows = if asked.keep_flows { asked.flows.max(largest.unwrap_or(0)) } else { asked.flows };
    Capacities { flows, ..asked }
}

fn compare(object: &Object, state: &StateDir, capacities: &Capacities) -> Result<Comparison, Error> {
    let sizes = load::max_entries(capacities, load::possible_cpus()?);
    let mut found = Comparison::default();
    let mut fitting_gates = Vec::new();
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
            if gates::NAMES.contains(&map) {
                fitting_gates.push(Moved { map, old, new });
            }
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
    if found.moved.iter().any(|m| catch_up::MAPS.contains(&m.map)) {
        // So that each set of programs has its own.
        found.moved.extend(fitting_gates);
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
            copy_missing(state, map, &was).map_err(failure(map))?;
            fs::remove_file(&old).map_err(fail(&old, "unlink"))?;
        } else {
            // Nothing but the agent writes these, and it never got to that: the old one is whole.
            fs::rename(&old, &new).map_err(fail(&old, "rename"))?;
        }
    }
    Ok(())
}

/// A map that has been moved, and the one in its place.
pub fn open_both(state: &StateDir, map: &str) -> io::Result<(OwnedFd, OwnedFd)> {
    Ok((bpf::open_pin(&state.old_maps().join(map))?, bpf::open_pin(&state.maps().join(map))?))
}

/// Returns how many entries did not fit.
fn copy_map(state: &StateDir, moved: &Moved) -> io::Result<usize> {
    let new = &moved.new;
    if moved.map == name::SERVICE_STATS {
        return statistics::copy(state, moved.map, &moved.old, new).map(|()| 0);
    }
    let (from, to) = open_both(state, moved.map)?;
    let mut reader = BatchReader::new(from.as_fd(), moved.old.entry_size()?);
    let (mut read, mut written) = (0, 0);
    let mut room = new.entries as usize;
    while let Some(mut batch) = reader.next(bpf::CHUNK)? {
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
    while let Some(batch) = reader.next(bpf::CHUNK)? {
        for (key, value) in batch.keys.chunks_exact(size.key).zip(batch.values.chunks_exact(size.value)) {
            match elements::update(to.as_fd(), key, value, Write::New) {
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
        let used = used(&state.maps().join(m.map), &m.old).map_err(failure(m.map))?;
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
    while let Some(batch) = reader.next(bpf::CHUNK)? {
        let last = batch.values.iter().rposition(|byte| *byte != 0);
        if let (true, Some(last)) = (definition.is_array(), last) {
            used = read + last / size.value + 1;
        }
        read += batch.count;
    }
    Ok(if definition.is_array() { used } else { read })
}

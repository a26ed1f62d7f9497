//! Backends of one family: which id is which endpoint, who uses it, what the kernel has.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, RandomState},
    net::IpAddr,
};

use hashbrown::HashTable;

use super::{
    endpoints::SocketAddr,
    ids::{Ids, sorted},
    op::{Backend, Family, MapOp, Protocol},
    rejection::Anomaly,
};

/// What makes a backend: all Services that name it share the id.
type Key = (IpAddr, u16, Protocol);

/// What the kernel's element says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Written {
    No,
    Remote,
    Local,
}

#[derive(Clone, Debug)]
struct Entry {
    key: Key,
    written: Written,
    /// Records that use it.
    refs: u32,
    /// Records that have it in their Local set: an endpoint of this node.
    local_refs: u32,
}

impl Entry {
    fn wanted(&self) -> Written {
        match (self.refs, self.local_refs) {
            (0, _) => Written::No,
            // Slices of different Services may disagree about the node of one endpoint; that it is here wins.
            (_, 0) => Written::Remote,
            _ => Written::Local,
        }
    }
}

/// The hasher takes numbers in one step, and what is derived for a [`Key`] in five.
fn hash(hasher: &RandomState, (addr, port, protocol): &Key) -> u64 {
    let rest = u32::from(*port) << 8 | u32::from(protocol.number());
    match addr {
        IpAddr::V4(a) => hasher.hash_one(u64::from(a.to_bits()) << 32 | u64::from(rest)),
        IpAddr::V6(a) => hasher.hash_one((a.to_bits(), rest)),
    }
}

#[derive(Clone, Debug)]
pub(super) struct Backends {
    family: Family,
    ids: Ids,
    /// Ids by the key of their entry: 100,000 keys are not kept twice.
    by_key: HashTable<u32>,
    hasher: RandomState,
    /// By id: they are dense.
    entries: Vec<Option<Entry>>,
    /// Ids whose use has changed since the last plan was finished.
    touched: Vec<u32>,
    /// Elements that no valid state has.
    strays: Vec<u32>,
}

impl Backends {
    /// What the kernel has, used by nobody yet.
    pub(super) fn recover(
        family: Family,
        capacity: u32,
        actual: BTreeMap<u32, Backend>,
        anomalies: &mut Vec<Anomaly>,
    ) -> Self {
        let valid = |id: u32, b: &Backend| (1..capacity).contains(&id) && Family::of(b.addr) == family;
        let used = actual.iter().filter(|(id, b)| valid(**id, b)).map(|(id, _)| *id);
        let mut backends = Self {
            family,
            ids: Ids::new(capacity, used),
            by_key: HashTable::with_capacity(actual.len()),
            hasher: RandomState::new(),
            entries: Vec::new(),
            touched: Vec::new(),
            strays: Vec::new(),
        };
        for (id, backend) in actual {
            if !valid(id, &backend) {
                anomalies.push(Anomaly::BackendInvalid { family, backend: id, capacity });
                backends.strays.push(id);
                continue;
            }
            let key = (backend.addr, backend.port, backend.protocol);
            let written = if backend.local { Written::Local } else { Written::Remote };
            backends.insert(id, Entry { key, written, refs: 0, local_refs: 0 });
            match backends.find(&key) {
                Some(first) => anomalies.push(Anomaly::DuplicateBackend { family, first, second: id }),
                None => backends.name(id, &key),
            }
        }
        backends
    }

    /// True if `id` is a backend of that protocol.
    pub(super) fn is(&self, id: u32, protocol: Protocol) -> bool {
        self.entries.get(id as usize).and_then(Option::as_ref).is_some_and(|e| e.key.2 == protocol)
    }

    /// The id of an endpoint, now used by one more record. `None`: all ids are taken.
    pub(super) fn acquire(&mut self, at: SocketAddr, protocol: Protocol, is_local: bool) -> Option<u32> {
        let key = (at.0, at.1, protocol);
        let id = match self.find(&key) {
            Some(id) => id,
            None => {
                let id = self.ids.allocate()?;
                self.insert(id, Entry { key, written: Written::No, refs: 0, local_refs: 0 });
                self.name(id, &key);
                id
            }
        };
        self.hold(id, is_local);
        Some(id)
    }

    /// One more record uses `id`.
    pub(super) fn hold(&mut self, id: u32, is_local: bool) {
        if let Some(entry) = self.entry(id) {
            entry.refs += 1;
            entry.local_refs += u32::from(is_local);
            self.touched.push(id);
        }
    }

    /// One record less uses `id`. What the kernel never had is forgotten at once, the rest by [`Self::finish`].
    pub(super) fn release(&mut self, id: u32, is_local: bool) {
        let Some(entry) = self.entry(id) else { return };
        entry.refs -= 1;
        entry.local_refs -= u32::from(is_local);
        if entry.refs == 0 && entry.written == Written::No {
            self.forget(id);
            self.ids.release(id);
        } else {
            self.touched.push(id);
        }
    }

    fn entry(&mut self, id: u32) -> Option<&mut Entry> {
        self.entries.get_mut(id as usize)?.as_mut()
    }

    /// The id that an endpoint is found by.
    fn find(&self, key: &Key) -> Option<u32> {
        let is = |id: &u32| {
            self.entries.get(*id as usize).is_some_and(|e| e.as_ref().is_some_and(|e| e.key == *key))
        };
        self.by_key.find(hash(&self.hasher, key), is).copied()
    }

    /// Has [`Self::find`] find the entry `id`, which has this key.
    fn name(&mut self, id: u32, key: &Key) {
        let Self { by_key, hasher, entries, .. } = self;
        let rehash = |id: &u32| {
            let entry = entries.get(*id as usize).and_then(Option::as_ref);
            entry.map_or(0, |e| hash(hasher, &e.key))
        };
        by_key.insert_unique(hash(hasher, key), id, rehash);
    }

    fn insert(&mut self, id: u32, entry: Entry) {
        let i = id as usize;
        if self.entries.capacity() <= i {
            // Not twice as many: most clusters stay as large as they are.
            self.entries.reserve_exact((i + 1 - self.entries.len()).max(64 + i / 8));
        }
        if self.entries.len() <= i {
            self.entries.resize_with(i + 1, || None);
        }
        self.entries[i] = Some(entry);
    }

    fn forget(&mut self, id: u32) {
        if let Some(entry) = self.entries.get_mut(id as usize).and_then(Option::take) {
            let hash = hash(&self.hasher, &entry.key);
            if let Ok(found) = self.by_key.find_entry(hash, |known| *known == id) {
                found.remove();
            }
        }
    }

    /// Has [`Self::finish`] look at all of them: after a restart some are used by nobody.
    pub(super) fn touch_all(&mut self) {
        self.touched.extend((0..).zip(&self.entries).filter(|(_, e)| e.is_some()).map(|(id, _)| id));
    }

    /// Operations for all changes since the last call: `writes` for before, `clears` for after the grace period.
    /// Cleared ids are `freed`: to be given back.
    pub(super) fn finish(&mut self, writes: &mut Vec<MapOp>, clears: &mut Vec<MapOp>, freed: &mut Vec<u32>) {
        let family = self.family;
        clears.extend(self.strays.drain(..).map(|id| MapOp::ClearBackend { family, id }));
        for id in sorted(&mut self.touched) {
            let Some(entry) = self.entry(id) else { continue };
            let wanted = entry.wanted();
            if wanted == entry.written {
                continue;
            }
            entry.written = wanted;
            if wanted == Written::No {
                clears.push(MapOp::ClearBackend { family, id });
                self.forget(id);
                freed.push(id);
                continue;
            }
            let (addr, port, protocol) = entry.key;
            let backend = Backend { addr, port, protocol, local: wanted == Written::Local };
            writes.push(MapOp::WriteBackend { id, backend });
        }
    }

    /// These ids are free again.
    pub(super) fn give_back(&mut self, freed: &[u32]) {
        for id in freed {
            self.ids.release(*id);
        }
    }

    #[cfg(test)]
    pub(super) fn used(&self) -> usize {
        assert_eq!(self.entries.iter().flatten().count(), self.ids.used());
        assert_eq!(self.by_key.len(), self.ids.used());
        self.ids.used()
    }
}

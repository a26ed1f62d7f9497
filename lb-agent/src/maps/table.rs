//! Typed handle of a hash map (or any map that is read entry by entry), with batches.

use std::{io, marker::PhantomData, os::fd::AsFd as _, path::Path};

use aya::maps::{MapData, MapType};
use bytemuck::Pod;

use super::{
    MapError,
    sys::{self, Batch, Command},
};

/// Entries per batch. More gains nothing (100,000 entries cost the same in chunks of 4096 as in one), and keys and values
/// of a chunk stay within a few hundred kilobytes.
const CHUNK: usize = 4096;

/// A map from `K` to `V`. All methods take a shared reference: the kernel synchronizes.
#[derive(Debug)]
pub struct Table<K, V> {
    data: MapData,
    capacity: u32,
    batches: bool,
    _types: PhantomData<(K, V)>,
}

/// What became of a batch of writes.
#[derive(Debug, Default)]
pub struct Written {
    pub done: usize,
    /// Entries that the kernel refused.
    pub refused: usize,
    /// Why the first of them was refused.
    pub first_error: Option<io::Error>,
}

impl Written {
    fn refuse(&mut self, error: io::Error) {
        self.refused += 1;
        self.first_error.get_or_insert(error);
    }
}

impl<K: Pod, V: Pod> Table<K, V> {
    /// Opens the pin `dir/name` after checking that it is what `K` and `V` describe.
    pub fn open(dir: &Path, name: &'static str, kinds: &[MapType]) -> Result<Self, MapError> {
        let (data, capacity) = super::open_pin(dir, name, kinds, size_of::<K>(), size_of::<V>())?;
        Ok(Self { data, capacity, batches: true, _types: PhantomData })
    }

    /// Number of entries that fit.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Writes entry by entry from now on, as on a kernel without batches.
    pub fn without_batches(&mut self) {
        self.batches = false;
    }

    /// The value at `key`.
    pub fn get(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = V::zeroed();
        let (k, v) = (std::ptr::from_ref(key) as u64, std::ptr::from_mut(&mut value) as u64);
        // SAFETY: both point at values whose sizes were compared with the map's when it was opened.
        absent_is_none(unsafe { sys::elem(self.data.fd().as_fd(), Command::LookupElem, k, v, 0) })
            .map(|found| found.map(|()| value))
    }

    /// Adds or replaces an entry.
    pub fn put(&self, key: &K, value: &V) -> io::Result<()> {
        let (k, v) = (std::ptr::from_ref(key) as u64, std::ptr::from_ref(value) as u64);
        // SAFETY: both point at values whose sizes were compared with the map's when it was opened.
        unsafe { sys::elem(self.data.fd().as_fd(), Command::UpdateElem, k, v, 0) }
    }

    /// Replaces an entry; false if there was none.
    pub fn replace(&self, key: &K, value: &V) -> io::Result<bool> {
        let (k, v) = (std::ptr::from_ref(key) as u64, std::ptr::from_ref(value) as u64);
        // SAFETY: both point at values whose sizes were compared with the map's when it was opened.
        absent_is_none(unsafe {
            sys::elem(self.data.fd().as_fd(), Command::UpdateElem, k, v, sys::BPF_EXIST)
        })
        .map(|found| found.is_some())
    }

    /// Deletes an entry; false if there was none.
    pub fn delete(&self, key: &K) -> io::Result<bool> {
        let k = std::ptr::from_ref(key) as u64;
        // SAFETY: the key's size was compared with the map's; a deletion has no value.
        absent_is_none(unsafe { sys::elem(self.data.fd().as_fd(), Command::DeleteElem, k, 0, 0) })
            .map(|found| found.is_some())
    }

    /// Adds or replaces entries in the order given. One that is refused does not stop the others.
    ///
    /// # Panics
    /// If there are not as many values as keys.
    pub fn put_all(&self, keys: &[K], values: &[V]) -> Written {
        assert_eq!(keys.len(), values.len());
        self.write_all(
            keys,
            Command::UpdateBatch,
            |i| values[i..].as_ptr() as u64,
            |i| self.put(&keys[i], &values[i]),
        )
    }

    /// Deletes entries. One that does not exist counts as done.
    pub fn delete_all(&self, keys: &[K]) -> Written {
        self.write_all(keys, Command::DeleteBatch, |_| 0, |i| self.delete(&keys[i]).map(drop))
    }

    /// Batches as far as they go; where a batch stops, that chunk's rest one by one.
    fn write_all(
        &self,
        keys: &[K],
        command: Command,
        values_from: impl Fn(usize) -> u64,
        single: impl Fn(usize) -> io::Result<()>,
    ) -> Written {
        let mut written = Written::default();
        let mut batches = self.batches && keys.len() > 1;
        let mut start = 0;
        while start < keys.len() {
            let end = keys.len().min(start + CHUNK);
            let mut done = 0;
            if batches {
                let batch = Batch {
                    in_batch: 0,
                    out_batch: 0,
                    keys: keys[start..].as_ptr() as u64,
                    values: values_from(start),
                    count: (end - start) as u32,
                };
                // SAFETY: `end - start` keys, and as many values, follow these addresses; sizes were compared with the
                // map's when it was opened.
                match unsafe { sys::batch(self.data.fd().as_fd(), command, &batch) } {
                    (_, Ok(())) => done = end - start,
                    (_, Err(e)) if sys::is_unsupported(&e) => batches = false,
                    // The entry after the last one done was refused: it is tried again, alone.
                    (count, Err(_)) => done = count as usize,
                }
            }
            written.done += done;
            for i in start + done..end {
                match single(i) {
                    Ok(()) => written.done += 1,
                    Err(e) => written.refuse(e),
                }
            }
            start = end;
        }
        written
    }

    /// Begins a walk over all entries.
    pub fn walk(&self) -> Walk<'_, K, V> {
        let chunk = CHUNK.min(self.capacity as usize).max(16);
        Walk { table: self, keys: Vec::new(), values: Vec::new(), position: 0, chunk, state: State::Begin }
    }

    /// All keys, one system call each: for maps whose batches differ from those of hash maps (tries). Somebody else who
    /// deletes meanwhile can make keys appear twice.
    pub fn keys(&self) -> io::Result<Vec<K>> {
        let mut keys: Vec<K> = Vec::new();
        // A key that is gone makes the kernel begin anew; this ends all the same.
        while keys.len() <= self.capacity as usize {
            let mut next = K::zeroed();
            let last = keys.last().map_or(0, |key| std::ptr::from_ref(key) as u64);
            let to = std::ptr::from_mut(&mut next) as u64;
            // SAFETY: both point at keys, whose size was compared with the map's, or the first is 0.
            let found = unsafe { sys::elem(self.data.fd().as_fd(), Command::GetNextKey, last, to, 0) };
            if absent_is_none(found)?.is_none() {
                break;
            }
            keys.push(next);
        }
        Ok(keys)
    }

    /// All entries, in no order. For maps of bounded size; [`Table::walk`] for the others.
    pub fn entries(&self) -> io::Result<Vec<(K, V)>> {
        let mut all = Vec::new();
        let mut walk = self.walk();
        while let Some((keys, values)) = walk.next_chunk()? {
            all.extend(keys.iter().copied().zip(values.iter().copied()));
        }
        Ok(all)
    }
}

fn absent_is_none(result: io::Result<()>) -> io::Result<Option<()>> {
    match result {
        Ok(()) => Ok(Some(())),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

enum State {
    Begin,
    Middle,
    End,
}

/// A walk over a hash map chunk by chunk (BPF_MAP_LOOKUP_BATCH, kernel 5.6). It goes bucket by bucket: an entry that is
/// there from beginning to end is seen once, whatever else is added or deleted meanwhile.
pub struct Walk<'t, K, V> {
    table: &'t Table<K, V>,
    keys: Vec<K>,
    values: Vec<V>,
    /// The kernel's cursor: the next bucket.
    position: u64,
    chunk: usize,
    state: State,
}

impl<K: Pod, V: Pod> Walk<'_, K, V> {
    /// The next entries, or `None` at the end.
    pub fn next_chunk(&mut self) -> io::Result<Option<(&[K], &[V])>> {
        loop {
            if matches!(self.state, State::End) {
                return Ok(None);
            }
            self.keys.resize(self.chunk, K::zeroed());
            self.values.resize(self.chunk, V::zeroed());
            let mut next = 0u64;
            let batch = Batch {
                in_batch: if matches!(self.state, State::Begin) {
                    0
                } else {
                    std::ptr::from_ref(&self.position) as u64
                },
                out_batch: std::ptr::from_mut(&mut next) as u64,
                keys: self.keys.as_mut_ptr() as u64,
                values: self.values.as_mut_ptr() as u64,
                count: self.chunk as u32,
            };
            // SAFETY: room for `chunk` keys and values of the sizes that were compared with the map's; the positions
            // are 8 bytes, the kernel uses 4 of them for hash maps.
            let (count, result) =
                unsafe { sys::batch(self.table.data.fd().as_fd(), Command::LookupBatch, &batch) };
            match result {
                Ok(()) => (self.position, self.state) = (next, State::Middle),
                // The end; what was found on the way is valid.
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => self.state = State::End,
                // One bucket holds more than the chunk.
                Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => {
                    self.chunk *= 2;
                    continue;
                }
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => continue,
                Err(e) => return Err(e),
            }
            if count > 0 {
                let n = count as usize;
                return Ok(Some((&self.keys[..n], &self.values[..n])));
            }
        }
    }
}

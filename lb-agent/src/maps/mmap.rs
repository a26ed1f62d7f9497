//! Array maps of type BPF_F_MMAPABLE, written through memory: a store is seen by the next packet.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use aya::maps::{MapData, MapType};
use bytemuck::Pod;

use super::MapError;

/// The kernel places array elements at multiples of this (`array->elem_size = round_up(value_size, 8)`).
const WORD: usize = size_of::<u64>();

/// An array map in memory. Elements are read and written as 64-bit atomic words, in ascending order: each word, and
/// so each element of up to 8 bytes, is old or new to a packet, never a mixture.
#[derive(Debug)]
pub struct MmapArray<T> {
    words: NonNull<AtomicU64>,
    len: u32,
    name: &'static str,
    _type: PhantomData<T>,
}

// SAFETY: the memory belongs to the mapping alone, which lives as long as the value, and is only touched through atomics.
unsafe impl<T> Send for MmapArray<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for MmapArray<T> {}

impl MmapArray<u64> {
    /// Replaces the element at `index`, whoever else does; beyond the end nothing happens.
    pub fn set(&self, index: u32, value: u64) {
        if let Some([word]) = self.element(index) {
            word.store(value, Ordering::Release);
        }
    }
}

impl<T: Pod> MmapArray<T> {
    const WORDS_PER_ELEMENT: usize = size_of::<T>().div_ceil(WORD);

    /// Maps the pin `dir/name` after checking that it is an array of `T`.
    pub fn open(dir: &Path, name: &'static str) -> Result<Self, MapError> {
        Self::open_packed(dir, name, 1)
    }

    /// The same for an array each of whose values is `per_value` of `T`, which has a multiple of 8 bytes.
    pub fn open_packed(dir: &Path, name: &'static str, per_value: u32) -> Result<Self, MapError> {
        let value_bytes = size_of::<T>() * per_value as usize;
        let (data, values) = super::open_pin(dir, name, &[MapType::Array], size_of::<u32>(), value_bytes)?;
        let len = values * per_value;
        Self::map(&data, len, name).map_err(|source| MapError::Mmap { path: dir.join(name), source })
    }

    fn map(data: &MapData, len: u32, name: &'static str) -> io::Result<Self> {
        // SAFETY: a new mapping of a length that the kernel checks against the map's; the descriptor is open.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                Self::bytes(len),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                data.fd().as_fd().as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let words =
            NonNull::new(address.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self { words, len, name, _type: PhantomData })
    }

    const fn bytes(len: u32) -> usize {
        len as usize * Self::WORDS_PER_ELEMENT * WORD
    }

    /// Number of elements.
    pub fn capacity(&self) -> u32 {
        self.len
    }

    fn element(&self, index: u32) -> Option<&[AtomicU64]> {
        if index >= self.len {
            return None;
        }
        // SAFETY: `index` is below the number of mapped elements; pages are aligned for AtomicU64, which has the
        // layout of u64; the mapping outlives the borrow of self.
        Some(unsafe {
            std::slice::from_raw_parts(
                self.words.as_ptr().add(index as usize * Self::WORDS_PER_ELEMENT),
                Self::WORDS_PER_ELEMENT,
            )
        })
    }

    /// The element at `index`, or `None` beyond the end.
    pub fn load(&self, index: u32) -> Option<T> {
        let words = self.element(index)?;
        let mut value = T::zeroed();
        for (bytes, word) in bytemuck::bytes_of_mut(&mut value).chunks_mut(WORD).zip(words) {
            bytes.copy_from_slice(&word.load(Ordering::Acquire).to_ne_bytes()[..bytes.len()]);
        }
        Some(value)
    }

    /// Replaces the element at `index`. Earlier stores, to this and other arrays, are visible to whoever sees this one.
    pub fn store(&mut self, index: u32, value: &T) -> Result<(), MapError> {
        let words = self.element(index).ok_or(MapError::OutOfRange {
            map: self.name,
            index,
            capacity: self.len,
            option: super::capacity_option(self.name),
        })?;
        for (bytes, word) in bytemuck::bytes_of(value).chunks(WORD).zip(words) {
            let mut padded = [0; WORD];
            padded[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(padded), Ordering::Release);
        }
        Ok(())
    }
}

impl<T> Drop for MmapArray<T> {
    fn drop(&mut self) {
        let bytes = self.len as usize * size_of::<T>().div_ceil(WORD) * WORD;
        // SAFETY: exactly what `map` mapped; no borrow of it can be left.
        unsafe { libc::munmap(self.words.as_ptr().cast(), bytes) };
    }
}

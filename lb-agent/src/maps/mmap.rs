//! Array maps of type BPF_F_MMAPABLE, written through memory: a store is seen by the next packet.
//!
//! The kernel makes every page of a mapping resident at once, so an array is mapped in windows, and only those that are
//! written or looked up in stay: ids are dense and low, and what a small cluster leaves empty costs no memory here.

use std::{
    io,
    marker::PhantomData,
    ops::Range,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    path::{Path, PathBuf},
    ptr::NonNull,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use aya::maps::{MapData, MapType};
use bytemuck::Pod;

use super::MapError;
use crate::machine;

/// The kernel places array elements at multiples of this (`array->elem_size = round_up(value_size, 8)`).
const WORD: usize = size_of::<u64>();

/// Part of an array in memory.
#[derive(Debug)]
struct Window {
    words: NonNull<AtomicU64>,
    bytes: usize,
}

// SAFETY: the memory belongs to the mapping alone, which lives as long as the value, and is only touched through atomics.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Window {
    /// Maps `bytes` of an array from `offset` on, a multiple of the page size.
    fn map(data: &MapData, offset: usize, bytes: usize) -> io::Result<Self> {
        // SAFETY: a new mapping of a place and length that the kernel checks against the map's; the descriptor is open.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                data.fd().as_fd().as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let words =
            NonNull::new(address.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self { words, bytes })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: `bytes` are mapped, a multiple of the word; pages are aligned for AtomicU64, which has the layout of u64;
        // the mapping outlives the borrow of self.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.bytes / WORD) }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: exactly what `map` mapped; no borrow of it can be left.
        unsafe { libc::munmap(self.words.as_ptr().cast(), self.bytes) };
    }
}

/// An array map in memory. Elements are read and written as 64-bit atomic words, in ascending order: each word, and
/// so each element of up to 8 bytes, is old or new to a packet, never a mixture.
#[derive(Debug)]
pub struct MmapArray<T> {
    data: MapData,
    windows: Box<[OnceLock<Window>]>,
    /// Elements of each window but the last: as many as a page has bytes, so that every window begins with a page.
    per_window: u32,
    len: u32,
    name: &'static str,
    path: PathBuf,
    _type: PhantomData<T>,
}

impl MmapArray<u64> {
    /// Replaces the element at `index`, whoever else does; beyond what one window holds, which is mapped from the start, nothing
    /// happens.
    pub fn set(&self, index: u32, value: u64) {
        if let Ok(Some([word])) = self.element(index) {
            word.store(value, Ordering::Release);
        }
    }

    /// Replaces the element at `index`, whoever else does.
    pub fn put(&self, index: u32, value: u64) -> Result<(), MapError> {
        self.at(index)?.store(value, Ordering::Release);
        Ok(())
    }

    /// Clears these bits of the element at `index`, whoever else clears others. Visible before anything that the caller does
    /// next.
    pub fn clear_bits(&self, index: u32, bits: u64) -> Result<(), MapError> {
        let word = self.at(index)?;
        if word.load(Ordering::Acquire) & bits != 0 {
            word.fetch_and(!bits, Ordering::SeqCst);
        }
        Ok(())
    }

    fn at(&self, index: u32) -> Result<&AtomicU64, MapError> {
        self.element(index)?.and_then(<[_]>::first).ok_or_else(|| self.out_of_range(index))
    }
}

impl<T: Pod> MmapArray<T> {
    const WORDS_PER_ELEMENT: usize = size_of::<T>().div_ceil(WORD);

    /// Opens the pin `dir/name` after checking that it is an array of `T` that can be mapped.
    pub fn open(dir: &Path, name: &'static str) -> Result<Self, MapError> {
        Self::open_packed(dir, name, 1)
    }

    /// The same for an array each of whose values is `per_value` of `T`, which has a multiple of 8 bytes.
    pub fn open_packed(dir: &Path, name: &'static str, per_value: u32) -> Result<Self, MapError> {
        let value_bytes = size_of::<T>() * per_value as usize;
        let (data, values) = super::open_pin(dir, name, &[MapType::Array], size_of::<u32>(), value_bytes)?;
        let (len, per_window) = (values * per_value, machine::page_bytes());
        let windows = (0..len.div_ceil(per_window)).map(|_| OnceLock::new()).collect();
        let array = Self { data, windows, per_window, len, name, path: dir.join(name), _type: PhantomData };
        array.window(0)?;
        Ok(array)
    }

    /// Number of elements.
    pub fn capacity(&self) -> u32 {
        self.len
    }

    fn map(&self, index: u32) -> Result<Window, MapError> {
        let first = index * self.per_window;
        let elements = self.per_window.min(self.len - first);
        let bytes = |elements: u32| elements as usize * Self::WORDS_PER_ELEMENT * WORD;
        Window::map(&self.data, bytes(first), bytes(elements))
            .map_err(|source| MapError::Mmap { path: self.path.clone(), source })
    }

    /// A window that stays mapped, or `None` beyond the end.
    fn window(&self, index: u32) -> Result<Option<&Window>, MapError> {
        let Some(place) = self.windows.get(index as usize) else { return Ok(None) };
        if let Some(window) = place.get() {
            return Ok(Some(window));
        }
        let window = self.map(index)?;
        Ok(Some(place.get_or_init(|| window)))
    }

    fn element(&self, index: u32) -> Result<Option<&[AtomicU64]>, MapError> {
        if index >= self.len {
            return Ok(None);
        }
        let window = self.window(index / self.per_window)?;
        Ok(window.and_then(|w| {
            w.words().chunks_exact(Self::WORDS_PER_ELEMENT).nth((index % self.per_window) as usize)
        }))
    }

    /// The element at `index`, or `None` beyond the end.
    pub fn load(&self, index: u32) -> Result<Option<T>, MapError> {
        Ok(self.element(index)?.map(value))
    }

    /// The map.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.data.fd().as_fd()
    }

    /// Reads the first `end` elements, and keeps nothing mapped for it.
    pub fn read(&self, end: u32, each: impl FnMut(u32, T)) -> Result<(), MapError> {
        self.read_range(0..end, each)
    }

    /// Reads these elements as far as they exist, and keeps nothing mapped for it.
    pub fn read_range(&self, range: Range<u32>, mut each: impl FnMut(u32, T)) -> Result<(), MapError> {
        let end = range.end.min(self.len);
        for i in range.start / self.per_window..end.div_ceil(self.per_window) {
            let Some(place) = self.windows.get(i as usize) else { break };
            let passing;
            let window = match place.get() {
                Some(window) => window,
                None => {
                    passing = self.map(i)?;
                    &passing
                }
            };
            let first = i * self.per_window;
            let skipped = range.start.saturating_sub(first);
            let elements = window.words().chunks_exact(Self::WORDS_PER_ELEMENT).skip(skipped as usize);
            for (index, words) in (first + skipped..end).zip(elements) {
                each(index, value(words));
            }
        }
        Ok(())
    }

    fn out_of_range(&self, index: u32) -> MapError {
        let option = super::capacity_option(self.name);
        MapError::OutOfRange { map: self.name, index, capacity: self.len, option }
    }

    /// Replaces the element at `index`. Earlier stores, to this and other arrays, are visible to whoever sees this one.
    pub fn store(&mut self, index: u32, value: &T) -> Result<(), MapError> {
        let words = self.element(index)?.ok_or_else(|| self.out_of_range(index))?;
        for (bytes, word) in bytemuck::bytes_of(value).chunks(WORD).zip(words) {
            let mut padded = [0; WORD];
            padded[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(padded), Ordering::Release);
        }
        Ok(())
    }
}

fn value<T: Pod>(words: &[AtomicU64]) -> T {
    let mut value = T::zeroed();
    for (bytes, word) in bytemuck::bytes_of_mut(&mut value).chunks_mut(WORD).zip(words) {
        bytes.copy_from_slice(&word.load(Ordering::Acquire).to_ne_bytes()[..bytes.len()]);
    }
    value
}

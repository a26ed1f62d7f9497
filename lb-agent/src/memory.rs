//! The allocator: memory that is not needed any more goes back to the kernel.
//!
//! Lists are read and planned in pieces of many short-lived objects; whatever of it lies between long-lived ones stays.

/// From this size on a buffer (a page of a list, the operations of a large plan) is a mapping of its own.
#[cfg(target_env = "gnu")]
const OWN_MAPPING: libc::c_int = 128 * 1024;
/// Heaps that threads share. Each keeps holes of its own, and no thread here allocates much while others do; what lists leave
/// free, the first plan, which another thread makes, fills.
#[cfg(target_env = "gnu")]
const ARENAS: libc::c_int = 1;

/// Sets the allocator up. To be called before there are threads.
pub fn configure() {
    // SAFETY: no pointers. glibc's own limit for mappings would grow with what is freed, and buffers with it into the heap.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_MAPPING);
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}

/// Gives freed memory back. glibc by itself gives back the top of the heap alone.
pub fn give_back() {
    // SAFETY: no pointers; frees nothing that is in use.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

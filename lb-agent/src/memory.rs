//! Memory that is not needed any more.

/// Gives freed memory back to the kernel. Lists are read and planned in pieces of many short-lived objects, whose pages the
/// allocator would keep for ever; glibc's gives back the top of the heap alone unless it is told.
pub fn give_back() {
    // SAFETY: no pointers; frees nothing that is in use.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

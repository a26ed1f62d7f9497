//! Memory that is not needed any more goes back to the kernel.
//!
//! Lists are read and planned in pieces of many short-lived objects; whatever of it lies between long-lived ones stays. Of the
//! program itself, the start needs far more (options, the object, the verifier's messages, TLS) than what follows.

use std::ffi::{c_int, c_void};

use crate::machine::page_bytes;

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

/// Gives back what was freed, and what of the program nobody has needed for a while.
pub fn give_back() {
    // SAFETY: no pointers; frees nothing that is in use. glibc by itself gives back the top of the heap alone.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
    // SAFETY: the callback has the signature that is asked for, and ignores its data.
    unsafe { libc::dl_iterate_phdr(Some(unmap_program), std::ptr::null_mut()) };
}

/// Unmaps pages of the program, or of one of its libraries, that are as in its file. The next access to one maps it again, with
/// those around it, from the page cache; what runs all the time is back at once.
///
/// # Safety
/// `object` must describe an object that is loaded.
unsafe extern "C" fn unmap_program(object: *mut libc::dl_phdr_info, _: usize, _: *mut c_void) -> c_int {
    // SAFETY: as the caller says; the dynamic linker keeps the headers as long as the object.
    let (base, headers) = unsafe {
        let object = &*object;
        if object.dlpi_phdr.is_null() {
            return 0;
        }
        (object.dlpi_addr as usize, std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into()))
    };
    let page = page_bytes() as usize;
    // Without the flag for writing the program has never written to it: the dynamic linker relocates writable segments only.
    // What debuggers and uprobes have patched is as in the file again.
    for header in headers.iter().filter(|h| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_W == 0) {
        let start = base + header.p_vaddr as usize;
        let (from, end) = (start.next_multiple_of(page), (start + header.p_memsz as usize) / page * page);
        if from < end {
            // SAFETY: whole pages of a read-only mapping of a file: what is read from them afterwards is the same.
            unsafe { libc::madvise(from as *mut c_void, end - from, libc::MADV_DONTNEED) };
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::FileExt as _};

    use super::*;

    /// Read-only data that nothing else is near of: pages are mapped in groups of 64 KiB.
    static UNUSED: [u8; 512 * 1024] = [7; 512 * 1024];

    /// As /proc/self/pagemap says (Documentation/admin-guide/mm/pagemap.rst).
    fn is_mapped(byte: &u8) -> bool {
        let page = std::ptr::from_ref(byte) as u64 / u64::from(page_bytes());
        let mut entry = [0; 8];
        File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entry, page * 8).unwrap();
        u64::from_ne_bytes(entry) >> 63 == 1
    }

    #[test]
    fn what_is_not_used_of_the_program_is_not_resident_and_comes_back() {
        let middle = std::hint::black_box(&UNUSED[UNUSED.len() / 2]);
        assert_eq!(std::hint::black_box(*middle), 7);
        assert!(is_mapped(middle));
        // Where the kernel maps files in huge pages, another test may touch the same one in between.
        assert!((0..1000).any(|_| {
            give_back();
            !is_mapped(middle)
        }));
        assert_eq!(std::hint::black_box(*middle), 7);
    }
}

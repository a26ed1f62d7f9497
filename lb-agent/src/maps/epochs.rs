//! `FLOW_EPOCHS`: tells the programs that what they have cached about flows is not true any more.

use std::path::Path;

use lb_common::{
    Addr,
    flow_cache::{ALL_EPOCHS, EPOCHS, epoch_index, hash, nothing_epoch_index},
    maps::name,
    tuple::Tuple,
};

use super::{MapError, MmapArray};

/// Every epoch is the time at which it began, in ns of CLOCK_MONOTONIC, whoever began it: so each value is a new one.
#[derive(Debug)]
pub struct FlowEpochs(MmapArray<u64>);

impl FlowEpochs {
    /// Opens the map pinned in `dir`.
    pub fn open(dir: &Path) -> Result<Self, MapError> {
        MmapArray::open(dir, name::FLOW_EPOCHS).map(Self)
    }

    /// To be called after the entry of this tuple was removed or changed.
    pub fn renew<A: Addr>(&self, key: &Tuple<A>) {
        self.0.set(epoch_index(hash(key)), now_ns());
    }

    /// To be called after an entry of this tuple was made.
    pub fn renew_nothing<A: Addr>(&self, key: &Tuple<A>) {
        self.0.set(nothing_epoch_index(hash(key)), now_ns());
    }

    /// To be called after something changed that any flow may depend on.
    pub fn renew_all(&self) {
        let now = now_ns();
        (0..ALL_EPOCHS).for_each(|index| self.0.set(index, now));
    }

    /// To be called after packets may have become ours that were not.
    pub fn renew_all_nothing(&self) {
        let now = now_ns();
        (EPOCHS..ALL_EPOCHS).for_each(|index| self.0.set(index, now));
    }
}

/// As `bpf_ktime_get_ns` has it.
fn now_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid place for the result; this clock exists everywhere.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

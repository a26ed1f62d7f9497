//! Which parts of the array `SLOTS` are free.

use std::collections::{BTreeMap, BTreeSet};

/// Best fit over free runs, merged with their neighbours when given back. O(log n) each way.
#[derive(Clone, Debug)]
pub(super) struct Slots {
    /// Free runs: base to length. Never adjacent, never empty.
    by_base: BTreeMap<u32, u32>,
    /// The same as (length, base).
    by_len: BTreeSet<(u32, u32)>,
}

impl Slots {
    pub(super) fn new(capacity: u32) -> Self {
        let mut slots = Self { by_base: BTreeMap::new(), by_len: BTreeSet::new() };
        slots.insert(0, capacity);
        slots
    }

    /// The start of `len` slots that now belong to the caller.
    pub(super) fn allocate(&mut self, len: u32) -> Option<u32> {
        let &(free, base) = self.by_len.range((len, 0)..).next()?;
        self.remove(base, free);
        self.insert(base + len, free - len);
        Some(base)
    }

    /// Takes what is free of a run that lies within the capacity: all of it, unless somebody else has some.
    pub(super) fn take(&mut self, base: u32, len: u32) -> Vec<(u32, u32)> {
        let end = base + len;
        let before = self.by_base.range(..base).next_back().map(|(b, _)| *b).unwrap_or(base);
        let touching: Vec<(u32, u32)> = self.by_base.range(before..end).map(|(b, l)| (*b, *l)).collect();
        let mut taken = Vec::new();
        for (free_base, free_len) in touching {
            let free_end = free_base + free_len;
            let (from, to) = (free_base.max(base), free_end.min(end));
            if from >= to {
                continue;
            }
            self.remove(free_base, free_len);
            self.insert(free_base, from - free_base);
            self.insert(to, free_end - to);
            taken.push((from, to - from));
        }
        taken
    }

    /// Gives a run back.
    pub(super) fn release(&mut self, base: u32, len: u32) {
        let (mut base, mut len) = (base, len);
        if let Some((&before, &before_len)) = self.by_base.range(..base).next_back()
            && before + before_len == base
        {
            self.remove(before, before_len);
            base = before;
            len += before_len;
        }
        if let Some(&after_len) = self.by_base.get(&(base + len)) {
            self.remove(base + len, after_len);
            len += after_len;
        }
        self.insert(base, len);
    }

    fn insert(&mut self, base: u32, len: u32) {
        if len > 0 {
            self.by_base.insert(base, len);
            self.by_len.insert((len, base));
        }
    }

    fn remove(&mut self, base: u32, len: u32) {
        self.by_base.remove(&base);
        self.by_len.remove(&(len, base));
    }

    /// Free slots and free runs.
    #[cfg(test)]
    pub(super) fn free(&self) -> (u32, usize) {
        assert_eq!(self.by_base.len(), self.by_len.len());
        (self.by_base.values().sum(), self.by_base.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_smallest_run_that_fits_is_used_and_neighbours_merge() {
        let mut slots = Slots::new(20);
        let runs: Vec<u32> = [4, 2, 6, 3].map(|len| slots.allocate(len).unwrap()).into();
        assert_eq!(runs, [0, 4, 6, 12]);
        slots.release(0, 4);
        slots.release(6, 6);
        assert_eq!(slots.allocate(3), Some(0));
        assert_eq!(slots.allocate(6), Some(6));
        assert_eq!(slots.allocate(6), None);
        for (base, len) in [(0, 3), (4, 2), (6, 6), (12, 3)] {
            slots.release(base, len);
        }
        assert_eq!(slots.free(), (20, 1));
    }

    #[test]
    fn taking_a_run_that_is_partly_taken_yields_the_free_parts() {
        let mut slots = Slots::new(20);
        assert_eq!(slots.take(5, 5), [(5, 5)]);
        assert_eq!(slots.take(3, 10), [(3, 2), (10, 3)]);
        assert_eq!(slots.take(4, 4), []);
        assert_eq!(slots.free(), (10, 2));
    }

    proptest! {
        /// Against a bitmap: no slot is given twice, and all come back as one run.
        #[test]
        fn no_slot_has_two_owners(steps in prop::collection::vec((any::<bool>(), 1u32..9, any::<prop::sample::Index>()), 0..200)) {
            let mut slots = Slots::new(64);
            let mut taken = [false; 64];
            let mut held: Vec<(u32, u32)> = Vec::new();
            for (allocate, len, which) in steps {
                if allocate {
                    let Some(base) = slots.allocate(len) else { continue };
                    for slot in base..base + len {
                        prop_assert!(!std::mem::replace(&mut taken[slot as usize], true));
                    }
                    held.push((base, len));
                } else if !held.is_empty() {
                    let (base, len) = held.swap_remove(which.index(held.len()));
                    taken[base as usize..(base + len) as usize].fill(false);
                    slots.release(base, len);
                }
                let free = taken.iter().filter(|t| !**t).count() as u32;
                prop_assert_eq!(slots.free().0, free);
            }
            for (base, len) in held {
                slots.release(base, len);
            }
            prop_assert_eq!(slots.free(), (64, 1));
        }
    }
}

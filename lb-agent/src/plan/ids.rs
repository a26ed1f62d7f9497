//! Ids of records and backends: small, dense, never 0.

use std::collections::BTreeSet;

/// Takes what has been noted, each once.
pub(super) fn sorted<T: Ord>(noted: &mut Vec<T>) -> Vec<T> {
    let mut noted = std::mem::take(noted);
    noted.sort_unstable();
    noted.dedup();
    noted
}

/// Hands out the smallest free id, so that equal histories give equal ids.
#[derive(Clone, Debug)]
pub(super) struct Ids {
    /// Elements of the map; ids are `1..capacity`.
    capacity: u32,
    /// From here on no id was ever used.
    next: u32,
    free: BTreeSet<u32>,
}

impl Ids {
    /// All ids free except those in `used`, which must be valid.
    pub(super) fn new(capacity: u32, used: impl IntoIterator<Item = u32>) -> Self {
        let mut ids = Self { capacity, next: 1, free: BTreeSet::new() };
        let mut used: Vec<u32> = used.into_iter().collect();
        used.sort_unstable();
        for id in used {
            ids.free.extend(ids.next..id);
            ids.next = ids.next.max(id.saturating_add(1));
        }
        ids
    }

    /// True for ids that this map can have.
    pub(super) fn is_valid(&self, id: u32) -> bool {
        (1..self.capacity).contains(&id)
    }

    pub(super) fn allocate(&mut self) -> Option<u32> {
        if let Some(id) = self.free.pop_first() {
            return Some(id);
        }
        if !self.is_valid(self.next) {
            return None;
        }
        self.next += 1;
        Some(self.next - 1)
    }

    pub(super) fn release(&mut self, id: u32) {
        self.free.insert(id);
        // Give the top back, so that the set of free ids does not remember every peak for ever.
        while self.next > 1 && self.free.remove(&(self.next - 1)) {
            self.next -= 1;
        }
    }

    #[cfg(test)]
    pub(super) fn used(&self) -> usize {
        self.next as usize - 1 - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_start_at_one_fill_gaps_and_end_at_the_capacity() {
        let mut ids = Ids::new(5, [3]);
        assert_eq!([ids.allocate(), ids.allocate(), ids.allocate()], [Some(1), Some(2), Some(4)]);
        assert_eq!(ids.allocate(), None);
        ids.release(2);
        ids.release(4);
        assert_eq!(ids.used(), 2);
        assert_eq!([ids.allocate(), ids.allocate(), ids.allocate()], [Some(2), Some(4), None]);
    }

    #[test]
    fn a_map_without_elements_has_no_ids() {
        assert_eq!(Ids::new(0, []).allocate(), None);
        assert_eq!(Ids::new(1, []).allocate(), None);
    }
}

//! Names that occur again and again: shared copies of those of namespaces, Services and ports, numbers for those of nodes and
//! zones, which only endpoints have.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::{EndpointSlice, ServiceKey};

/// Names of nodes and zones by number, each as long as somebody has it.
#[derive(Clone, Debug, Default)]
pub(super) struct Ids {
    by_name: HashMap<Arc<str>, u32>,
    /// With how many have it.
    names: Vec<(Arc<str>, u32)>,
    free: Vec<u32>,
}

impl Ids {
    /// The number of a name, which one more has now.
    pub(super) fn acquire(&mut self, name: &Arc<str>) -> u32 {
        let id = match self.by_name.get(name) {
            Some(id) => *id,
            None => {
                let id = self.free.pop().unwrap_or(self.names.len() as u32);
                self.by_name.insert(name.clone(), id);
                match self.names.get_mut(id as usize) {
                    Some(place) => place.0 = name.clone(),
                    None => self.names.push((name.clone(), 0)),
                }
                id
            }
        };
        self.names[id as usize].1 += 1;
        id
    }

    /// One less has it.
    pub(super) fn release(&mut self, id: u32) {
        let Some((name, users)) = self.names.get_mut(id as usize) else { return };
        *users = users.saturating_sub(1);
        if *users == 0 {
            self.by_name.remove(name);
            *name = Arc::default();
            self.free.push(id);
        }
    }

    /// The name that somebody has by this number.
    pub(super) fn name(&self, id: u32) -> Arc<str> {
        self.names.get(id as usize).map(|(name, _)| name.clone()).unwrap_or_default()
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.by_name.is_empty() && self.free.len() == self.names.len()
    }
}

/// Each name is kept once.
#[derive(Clone, Debug, Default)]
pub(super) struct Names {
    known: HashSet<Arc<str>>,
    /// Size at which names that nobody uses any more are thrown out.
    sweep_at: usize,
}

impl Names {
    /// Smaller sets are not worth a sweep.
    const SWEEP_MIN: usize = 1024;

    fn share(&mut self, name: &mut Arc<str>) {
        if let Some(known) = self.known.get(name) {
            *name = known.clone();
            return;
        }
        if self.known.len() >= self.sweep_at.max(Self::SWEEP_MIN) {
            self.known.retain(|n| Arc::strong_count(n) > 1);
            self.sweep_at = self.known.len() * 2;
        }
        self.known.insert(name.clone());
    }

    pub(super) fn share_key(&mut self, key: &mut ServiceKey) {
        self.share(&mut key.namespace);
        self.share(&mut key.name);
    }

    pub(super) fn share_slice(&mut self, slice: &mut EndpointSlice) {
        self.share(&mut slice.key.namespace);
        if let Some(service) = &mut slice.service {
            self.share(service);
        }
        for port in &mut slice.ports {
            self.share(&mut port.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_its_number_as_long_as_somebody_has_it() {
        let mut ids = Ids::default();
        let [a, b, c]: [Arc<str>; 3] = ["a".into(), "b".into(), "c".into()];
        assert_eq!([ids.acquire(&a), ids.acquire(&b), ids.acquire(&"a".into())], [0, 1, 0]);
        ids.release(0);
        assert_eq!((ids.name(0), ids.name(1)), (a.clone(), b));
        ids.release(0);
        assert_eq!(ids.acquire(&c), 0);
        assert_eq!(ids.name(0), c);
        assert_eq!(ids.acquire(&a), 2);
        for id in 0..3 {
            ids.release(id);
        }
        assert!(ids.is_empty());
    }

    #[test]
    fn equal_names_share_memory_and_unused_ones_are_forgotten() {
        let mut names = Names::default();
        let (mut a, mut b): (Arc<str>, Arc<str>) = ("zone-a".into(), "zone-a".into());
        names.share(&mut a);
        names.share(&mut b);
        assert!(Arc::ptr_eq(&a, &b));
        for i in 0..10 * Names::SWEEP_MIN {
            names.share(&mut format!("gone-{i}").into());
        }
        assert!(names.known.len() <= 2 * Names::SWEEP_MIN, "{}", names.known.len());
        assert!(names.known.contains("zone-a"));
    }
}

//! Shared copies of names that occur again and again: nodes, zones, namespaces, port names.

use std::{collections::HashSet, sync::Arc};

use super::{EndpointSlice, ServiceKey};

/// 100,000 endpoints name a few thousand nodes: each name is kept once.
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
        for endpoint in &mut slice.endpoints {
            if let Some(node) = &mut endpoint.node {
                self.share(node);
            }
            let Some(hints) = &mut endpoint.hints else { continue };
            for name in hints.zones.iter_mut().chain(hints.nodes.iter_mut()) {
                self.share(name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

//! Objects into the model, and what that makes stale. None of it needs the maps.

use tokio::sync::watch;

use super::Core;
use crate::{
    healthcheck,
    model::{Dirty, ServiceKey, convert},
    plan::Held,
    source::{Missing, Object, ObjectRef},
};

impl<K> Core<K> {
    /// Which health check servers the node is to have, as of the last turn that succeeded.
    pub fn health_checks(&self) -> watch::Receiver<healthcheck::Desired> {
        self.health_checks.subscribe()
    }

    /// Takes in a new or changed object. A part that cannot be understood is left out and said; of an object that
    /// cannot be understood at all, the last good state stays.
    pub fn apply(&mut self, object: &Object) {
        match convert::object(object) {
            Ok(converted) => {
                // Nothing is wrong with nearly all objects, as a rule.
                if !converted.rejections.is_empty() || self.rejections.has_converted() {
                    self.rejections.converted(object.reference(), converted.rejections);
                }
                let dirty = self.model.apply(converted.object);
                self.mark(dirty);
                if !self.unconverted.is_empty() {
                    self.replan |= self.unconverted.remove(&object.reference()).is_some();
                }
            }
            Err(rejection) => {
                self.rejections.converted(object.reference(), vec![rejection]);
                self.hold(object);
            }
        }
    }

    /// Takes in what the source cannot read as of now.
    pub fn missing(&mut self, missing: &Missing) {
        let services = missing.services.iter().map(|(namespace, name)| ServiceKey::new(namespace, name));
        self.missing = Held { services: services.collect(), unknown: missing.unknown };
        self.replan = true;
    }

    /// Of an object that was never understood, what an earlier run programmed is the last good state.
    fn hold(&mut self, object: &Object) {
        let reference = object.reference();
        if self.is_started() || self.unconverted.contains_key(&reference) {
            return;
        }
        let service = match object {
            Object::Service(_) => Some(ServiceKey::new(&reference.namespace, &reference.name)),
            Object::EndpointSlice(_) | Object::SlimSlice(_) => {
                let labels = object.metadata().labels.as_ref();
                let name = labels.and_then(|l| l.get(convert::SERVICE_NAME_LABEL));
                name.map(|name| ServiceKey::new(&reference.namespace, name))
            }
            Object::Node(_) | Object::ServiceCidr(_) => return,
        };
        self.unconverted.insert(reference, service);
    }

    /// Takes in that an object is gone.
    pub fn delete(&mut self, object: &ObjectRef) {
        self.rejections.deleted(object);
        let dirty = self.model.apply(convert::deleted(object));
        self.mark(dirty);
        self.replan |= self.unconverted.remove(object).is_some();
    }

    fn mark(&mut self, dirty: Dirty) {
        match dirty {
            Dirty::Nothing => return,
            Dirty::Services(keys) => self.dirty.extend(keys),
            Dirty::All => self.all_dirty = true,
            Dirty::ServiceCidrs => self.cidrs_dirty = true,
        }
        self.revision += 1;
    }

    /// Another number after every change that makes something stale.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Something has changed since the last turn.
    pub fn is_dirty(&self) -> bool {
        self.all_dirty || self.cidrs_dirty || self.replan || self.has_room || !self.dirty.is_empty()
    }

    /// There has been a first turn.
    pub fn is_started(&self) -> bool {
        self.view.is_some()
    }
}

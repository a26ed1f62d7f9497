//! What came and is not programmed yet, counted as kube-proxy counts it.

use std::{collections::HashSet, time::SystemTime};

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::ObjectMeta, jiff::Timestamp};

use crate::{
    metrics::kube_proxy::KubeProxy,
    plan::op::Family,
    source::{Event, Kind, ObjectRef, strip::TRIGGER_TIME_ANNOTATION},
};

/// Changes since the last turn that succeeded.
#[derive(Debug)]
pub struct Changes {
    started: SystemTime,
    services: HashSet<ObjectRef>,
    slices: usize,
    /// When pods or Services changed that EndpointSlices were changed for.
    triggers: Vec<(Family, SystemTime)>,
}

impl Changes {
    pub fn new(started: SystemTime) -> Self {
        Self { started, services: HashSet::new(), slices: 0, triggers: Vec::new() }
    }

    /// Takes in an event; `changed`: it made something stale.
    pub fn note(&mut self, event: &Event, changed: bool, metrics: &KubeProxy) {
        let kind = match event {
            Event::Apply(object) => object.kind(),
            Event::Delete(object) => object.kind,
            Event::Missing(_) | Event::Synced => return,
        };
        match kind {
            Kind::Service => {
                metrics.count_service_change();
                if changed {
                    self.services.extend(reference(event));
                }
            }
            Kind::EndpointSlice => {
                metrics.count_endpoint_change();
                if changed {
                    self.slices += 1;
                    self.triggers.extend(trigger(event).filter(|(_, at)| *at > self.started));
                }
            }
            Kind::Node | Kind::ServiceCidr => return,
        }
        metrics.set_pending(self.services.len(), self.slices);
    }

    /// Everything noted so far is programmed.
    pub fn programmed(&mut self, now: SystemTime, metrics: &KubeProxy) {
        for (family, at) in self.triggers.drain(..) {
            // A clock that is behind that of the control plane makes it 0.
            metrics.network_programmed(family, now.duration_since(at).unwrap_or_default());
        }
        // Not cleared: after the first lists that would keep room for all Services.
        self.services = HashSet::new();
        self.slices = 0;
        metrics.set_pending(0, 0);
    }
}

fn reference(event: &Event) -> Option<ObjectRef> {
    match event {
        Event::Apply(object) => Some(object.reference()),
        Event::Delete(object) => Some(object.clone()),
        Event::Missing(_) | Event::Synced => None,
    }
}

/// When the change happened that the slice was written for. One that is gone tells nothing: kube-proxy counts none either.
fn trigger(event: &Event) -> Option<(Family, SystemTime)> {
    let Event::Apply(slice) = event else { return None };
    Some((family(slice.address_type()?)?, annotated(slice.metadata())?))
}

fn family(address_type: &str) -> Option<Family> {
    match address_type {
        "IPv4" => Some(Family::V4),
        "IPv6" => Some(Family::V6),
        _ => None,
    }
}

fn annotated(metadata: &ObjectMeta) -> Option<SystemTime> {
    let text = metadata.annotations.as_ref()?.get(TRIGGER_TIME_ANNOTATION)?;
    text.parse::<Timestamp>().ok().map(SystemTime::from)
}

#[cfg(test)]
#[path = "changes_tests.rs"]
mod tests;

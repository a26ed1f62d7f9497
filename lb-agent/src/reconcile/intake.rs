//! The beginning of the loop: what the source knows at start is taken in, which needs no maps. Making these (the verifier looks
//! at every program) takes as long as reading large lists does.

use std::time::{Instant, SystemTime};

use super::{Core, Error, Reconciler, Retry, Wiring, changes};
use crate::source::{Event, Kind, Object, ObjectRef};

impl Reconciler<()> {
    /// The maps are there: [`Reconciler::run`] can begin.
    pub fn with<K>(self, kernel: K) -> Reconciler<K> {
        Reconciler {
            core: self.core.map(|core| Box::new(core.with(kernel))),
            wiring: self.wiring,
            node_name: self.node_name,
            retry: self.retry,
            changes: self.changes,
            turned: self.turned,
            grace: self.grace,
            next_grace: self.next_grace,
            listened: self.listened,
            no_local: self.no_local,
        }
    }
}

impl<K> Reconciler<K> {
    pub fn new(core: Core<K>, node_name: &str, wiring: Wiring) -> Self {
        Self {
            core: Some(Box::new(core)),
            wiring,
            node_name: node_name.into(),
            retry: Retry::default(),
            changes: changes::Changes::new(SystemTime::now()),
            turned: Instant::now(),
            grace: None,
            next_grace: tokio::time::Instant::now(),
            listened: false,
            no_local: None,
        }
    }

    /// Takes in everything that the source knows at start.
    pub async fn listen(&mut self) -> Result<(), Error> {
        while !self.listened {
            let event = self.wiring.events.recv().await.ok_or(Error::SourceEnded)?;
            self.listened = self.take(event)?;
        }
        Ok(())
    }

    pub(super) fn core(&mut self) -> Result<&mut Core<K>, Error> {
        // Only `blocking` takes it out, and ends the loop if it cannot put it back.
        self.core.as_deref_mut().ok_or(Error::SourceEnded)
    }

    /// Takes in one event; true for the one that says that everything known at start has been sent.
    pub(super) fn take(&mut self, event: Event) -> Result<bool, Error> {
        self.note_node(&event);
        let core = self.core()?;
        let revision = core.revision();
        match &event {
            Event::Apply(object) => core.apply(object),
            Event::Delete(object) => core.delete(object),
            Event::Missing(missing) => core.missing(missing),
            Event::Synced => return Ok(true),
        }
        let changed = core.revision() != revision;
        let queued = core.is_dirty() && core.is_started();
        self.changes.note(&event, changed, self.wiring.metrics.kube_proxy());
        if queued {
            self.queued();
        }
        Ok(false)
    }

    /// There is something to program.
    pub(super) fn queued(&self) {
        self.wiring.status.queued(Instant::now());
        self.wiring.metrics.kube_proxy().set_last_queued(SystemTime::now());
    }

    /// This node's own object also decides what /healthz says.
    fn note_node(&self, event: &Event) {
        match event {
            Event::Apply(Object::Node(node)) if node.metadata.name.as_deref() == Some(&self.node_name) => {
                self.wiring.status.node_applied(node);
            }
            Event::Delete(ObjectRef { kind: Kind::Node, name, .. }) if *name == self.node_name => {
                self.wiring.status.node_deleted();
            }
            _ => {}
        }
    }
}

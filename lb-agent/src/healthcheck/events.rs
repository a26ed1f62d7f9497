//! Kubernetes Events about health check ports that others have: whoever looks at the Service sees them (H4).

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use crate::{model::ServiceKey, settings::SourceSettings, source};

/// As kube-proxy has them: alerts and scripts look for the reason.
const REASON: &str = "FailedToStartServiceHealthcheck";
const ACTION: &str = "Listen";
/// Says which component an Event is from.
const CONTROLLER: &str = "lb-agent";

/// The API allows 1 kB (events.k8s.io/v1: note).
const NOTE_MAX_BYTES: usize = 1024;
/// Events are best effort: a few attempts, then the log has to do.
const ATTEMPTS: u32 = 3;
const ATTEMPT_WITHIN: Duration = Duration::from_secs(10);
const ATTEMPT_AGAIN: Duration = Duration::from_secs(2);

/// Failures that may wait to be sent.
pub const PENDING: usize = 64;

/// A health check port that could not be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub service: ServiceKey,
    /// Of the Service.
    pub uid: Option<Arc<str>>,
    pub port: u16,
    /// Addresses and what is wrong with them.
    pub reason: String,
}

impl Failure {
    fn note(&self, node_name: &str) -> String {
        let Self { service, port, reason, .. } = self;
        let mut note =
            format!("node {node_name} failed to start healthcheck \"{service}\" on port {port}: {reason}");
        while note.len() > NOTE_MAX_BYTES {
            note.pop();
        }
        note
    }

    fn regarding(&self) -> ObjectReference {
        ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Service".into()),
            namespace: Some(self.service.namespace.to_string()),
            name: Some(self.service.name.to_string()),
            uid: self.uid.as_deref().map(str::to_owned),
            ..Default::default()
        }
    }
}

/// Sends an Event for each failure, until all senders are gone. Without an API server there is nobody to send to.
pub async fn report(settings: SourceSettings, node_name: String, mut failures: mpsc::Receiver<Failure>) {
    let mut recorder = None;
    while let Some(failure) = failures.recv().await {
        let SourceSettings::Kube { kubeconfig, master } = &settings else { continue };
        // Most nodes never need it.
        if recorder.is_none() {
            match source::kube::client(kubeconfig.as_deref(), master.as_deref()).await {
                Ok(client) => {
                    let reporter =
                        Reporter { controller: CONTROLLER.into(), instance: Some(node_name.clone()) };
                    recorder = Some(Recorder::new(client, reporter));
                }
                Err(error) => tracing::warn!(%error, "cannot send an Event"),
            }
        }
        if let Some(recorder) = &recorder {
            publish(recorder, &failure, &node_name).await;
        }
    }
}

async fn publish(recorder: &Recorder, failure: &Failure, node_name: &str) {
    let event = Event {
        type_: EventType::Warning,
        reason: REASON.into(),
        note: Some(failure.note(node_name)),
        action: ACTION.into(),
        secondary: None,
    };
    let regarding = failure.regarding();
    for attempt in 1..=ATTEMPTS {
        let problem = match timeout(ATTEMPT_WITHIN, recorder.publish(&event, &regarding)).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(elapsed) => elapsed.to_string(),
        };
        tracing::warn!(service = %failure.service, attempt, error = problem, "cannot send an Event");
        sleep(ATTEMPT_AGAIN).await;
    }
}

#[cfg(test)]
#[path = "events_tests.rs"]
mod tests;

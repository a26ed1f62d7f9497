//! ServiceCIDRs: they exist from Kubernetes 1.33 on, and a role made for an earlier version of this agent does not allow
//! reading them. Neither is a failure: nothing waits for them for long, and nothing stops without them.

use std::{pin::pin, time::Duration};

use futures::StreamExt as _;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::{
    Api,
    runtime::{
        utils::Backoff as _,
        watcher::{self, DefaultBackoff},
    },
};
use tokio::time::{sleep, timeout};

use super::{Closed, Kind, Known, Source, link};

/// How long everything else waits for the first answer, so that the first plan knows them where it can.
const PATIENCE: Duration = Duration::from_secs(5);
/// When to look again whether the server has them by now.
const LOOK_AGAIN: Duration = Duration::from_secs(600);

impl Source {
    /// Watches ServiceCIDRs until the receiver is gone.
    pub(super) async fn watch_service_cidrs(&self, api: Api<ServiceCIDR>) -> Result<(), Closed> {
        let mut known = Known::new(Kind::ServiceCidr);
        let mut backoff = DefaultBackoff::default();
        let mut told = false;
        loop {
            let mut stream = pin!(watcher::watcher(api.clone(), watcher::Config::default()));
            let pause = loop {
                let next = if known.complete {
                    stream.next().await
                } else {
                    match timeout(PATIENCE, stream.next()).await {
                        Ok(next) => next,
                        Err(_) => {
                            self.complete(&mut known).await?;
                            continue;
                        }
                    }
                };
                match next {
                    Some(Ok(event)) => {
                        if !matches!(event, watcher::Event::Init) {
                            told = false;
                        }
                        if matches!(event, watcher::Event::Apply(_) | watcher::Event::Delete(_)) {
                            backoff.reset();
                        }
                        self.take(event, &mut known).await?;
                    }
                    Some(Err(error)) => {
                        self.complete(&mut known).await?;
                        if let Some(pause) = self.service_cidr_failure(&error, &mut told, &mut backoff) {
                            break pause;
                        }
                        sleep(backoff.next().unwrap_or(PATIENCE)).await;
                    }
                    None => break PATIENCE,
                }
            };
            sleep(pause).await;
        }
    }

    /// Says once that there are none, and how long to wait before another watch is begun; `None` goes on with this one.
    fn service_cidr_failure(
        &self,
        error: &watcher::Error,
        told: &mut bool,
        backoff: &mut DefaultBackoff,
    ) -> Option<Duration> {
        let absent = link::is_absent(error);
        if !std::mem::replace(told, true) && !link::is_stale(error) {
            let error = link::describe(error);
            if absent {
                tracing::info!(
                    error,
                    "no ServiceCIDRs from this server; what --service-cidr says counts, and it is asked again in 10 minutes"
                );
            } else {
                tracing::warn!(error, "cannot list or watch ServiceCIDRs; those known stay");
            }
        }
        if absent {
            Some(LOOK_AGAIN)
        } else if link::is_stale(error) {
            Some(backoff.next().unwrap_or(PATIENCE))
        } else {
            None
        }
    }
}

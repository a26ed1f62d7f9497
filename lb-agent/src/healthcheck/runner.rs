//! Opens and closes sockets as [`Desired`] changes. A socket that nothing has changed for stays open; one that cannot be
//! opened is reported once and tried again.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    sync::{Arc, atomic::AtomicU32},
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep_until},
};

use super::{
    Desired,
    events::Failure,
    limit,
    server::{self, Answer},
};
use crate::{health::Status, model::ServiceKey, plan::op::Family};

/// First and longest pause between two attempts to get the ports that others have.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// Follows `desired` until its sender is gone. What cannot be opened goes to `failures`, once per failure.
pub async fn run(
    mut desired: watch::Receiver<Desired>,
    status: Arc<Status>,
    failures: mpsc::Sender<Failure>,
) {
    limit::raise();
    let mut runner = Runner { sockets: BTreeMap::new(), status, failures, retry: None };
    // What was published before this began.
    desired.mark_changed();
    loop {
        tokio::select! {
            changed = desired.changed() => {
                if changed.is_err() {
                    return;
                }
                let changes = runner.changes(&desired.borrow_and_update());
                runner.carry_out(changes).await;
            }
            () = until(runner.retry.as_ref().map(|r| r.at)) => runner.try_again(),
        }
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// One address of one Service.
type Place = (ServiceKey, SocketAddr);

struct Runner {
    sockets: BTreeMap<Place, Socket>,
    status: Arc<Status>,
    failures: mpsc::Sender<Failure>,
    /// While there is something to try again.
    retry: Option<Retry>,
}

struct Retry {
    places: BTreeSet<Place>,
    pause: Duration,
    at: Instant,
}

/// A socket, or the wish for one.
struct Socket {
    local_endpoints: Arc<AtomicU32>,
    uid: Option<Arc<str>>,
    task: Option<JoinHandle<()>>,
}

/// What is different from what is open.
#[derive(Default)]
struct Changes {
    close: Vec<Place>,
    open: Vec<(Place, Socket)>,
}

impl Runner {
    fn changes(&self, desired: &Desired) -> Changes {
        let mut changes = Changes::default();
        let mut wanted = BTreeSet::new();
        for (key, server) in &desired.servers {
            for ip in &desired.addresses {
                let Some(count) = server.local_endpoints.get(&Family::of(*ip)) else { continue };
                let place = (key.clone(), SocketAddr::new(*ip, server.port));
                let is_same = |s: &Socket| Arc::ptr_eq(&s.local_endpoints, count);
                if !self.sockets.get(&place).is_some_and(is_same) {
                    let socket =
                        Socket { local_endpoints: count.clone(), uid: server.uid.clone(), task: None };
                    changes.open.push((place, socket));
                } else {
                    wanted.insert(place);
                }
            }
        }
        changes.close = self.sockets.keys().filter(|place| !wanted.contains(*place)).cloned().collect();
        changes
    }

    /// Closes before it opens: a port may go from one Service to another.
    async fn carry_out(&mut self, changes: Changes) {
        for place in changes.close {
            let Some(Socket { task, .. }) = self.sockets.remove(&place) else { continue };
            self.forget_retry(&place);
            if let Some(task) = task {
                task.abort();
                // The port is free once the task has been dropped; being cancelled is what it was asked for.
                let _ = task.await;
                tracing::debug!(service = %place.0, address = %place.1, "health check closed");
            }
        }
        let mut failed: BTreeMap<ServiceKey, Vec<(SocketAddr, io::Error)>> = BTreeMap::new();
        for (place, socket) in changes.open {
            self.sockets.insert(place.clone(), socket);
            if let Err(error) = self.open(&place) {
                // A node without that family has nobody to answer to.
                if error.raw_os_error() != Some(libc::EAFNOSUPPORT) {
                    failed.entry(place.0.clone()).or_default().push((place.1, error));
                }
                self.retry_later(place);
            }
        }
        for (service, errors) in failed {
            self.report(service, &errors);
        }
    }

    fn open(&mut self, place: &Place) -> io::Result<()> {
        let Some(socket) = self.sockets.get_mut(place) else { return Ok(()) };
        let listener = server::listen(place.1)?;
        let answer = Answer {
            service: place.0.clone(),
            local_endpoints: socket.local_endpoints.clone(),
            status: self.status.clone(),
        };
        socket.task = Some(tokio::spawn(server::serve(listener, Arc::new(answer))));
        tracing::debug!(service = %place.0, address = %place.1, "health check opened");
        Ok(())
    }

    fn retry_later(&mut self, place: Place) {
        let at = Instant::now() + RETRY_FIRST;
        let retry =
            self.retry.get_or_insert_with(|| Retry { places: BTreeSet::new(), pause: RETRY_FIRST, at });
        // A new one does not wait as long as the others do by now.
        (retry.pause, retry.at) = (RETRY_FIRST, retry.at.min(at));
        retry.places.insert(place);
    }

    fn forget_retry(&mut self, place: &Place) {
        if let Some(retry) = &mut self.retry {
            retry.places.remove(place);
            if retry.places.is_empty() {
                self.retry = None;
            }
        }
    }

    fn try_again(&mut self) {
        let Some(mut retry) = self.retry.take() else { return };
        retry.places.retain(|place| {
            let opened = self.open(place).is_ok();
            if opened {
                tracing::info!(service = %place.0, address = %place.1, "health checks are answered now");
            }
            !opened
        });
        if !retry.places.is_empty() {
            retry.pause = (retry.pause * 2).min(RETRY_MAX);
            retry.at = Instant::now() + retry.pause;
            self.retry = Some(retry);
        }
    }

    /// Says it once per failure: the log here, an Event elsewhere (H4).
    fn report(&self, service: ServiceKey, errors: &[(SocketAddr, io::Error)]) {
        let Some((at, _)) = errors.first() else { return };
        let uid = self.sockets.get(&(service.clone(), *at)).and_then(|s| s.uid.clone());
        let reasons: Vec<_> = errors.iter().map(|(at, error)| format!("{at}: {error}")).collect();
        let failure = Failure { service, uid, port: at.port(), reason: reasons.join("; ") };
        tracing::error!(
            service = %failure.service, port = failure.port, reason = failure.reason,
            "cannot answer health checks: load balancers will send nothing of this Service here; trying again until it works"
        );
        // With so many at once that they do not fit, the others tell enough.
        let _ = self.failures.try_send(failure);
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.sockets.values().filter_map(|s| s.task.as_ref()).for_each(JoinHandle::abort);
    }
}

#[cfg(test)]
#[path = "runner_tests.rs"]
mod tests;

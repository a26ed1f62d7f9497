//! Whether the watch of a kind works, and telling so: once per change, not once per attempt.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Instant,
};

use kube::{core::Status, runtime::watcher};

use crate::source::{Kind, status::SourceStatus};

/// Which kinds are being watched: a bit each.
pub(super) struct Links {
    up: AtomicU8,
    status: Arc<SourceStatus>,
}

const ALL_UP: u8 = 0b111;

const fn bit(kind: Kind) -> u8 {
    match kind {
        Kind::Service => 0b001,
        Kind::EndpointSlice => 0b010,
        Kind::Node => 0b100,
        // Not every server has them, and nothing waits for them.
        Kind::ServiceCidr => 0,
    }
}

impl Links {
    pub fn new(status: Arc<SourceStatus>) -> Self {
        Self { up: AtomicU8::new(0), status }
    }

    fn set(&self, kind: Kind, up: bool) {
        let bit = bit(kind);
        let before = if up {
            self.up.fetch_or(bit, Ordering::AcqRel) | bit
        } else {
            self.up.fetch_and(!bit, Ordering::AcqRel) & !bit
        };
        self.status.set_connected(before == ALL_UP);
    }
}

/// The watch of one kind.
pub(super) struct Link {
    kind: Kind,
    links: Arc<Links>,
    status: Arc<SourceStatus>,
    failing_since: Option<Instant>,
}

impl Link {
    pub fn new(kind: Kind, links: Arc<Links>, status: Arc<SourceStatus>) -> Self {
        Self { kind, links, status, failing_since: None }
    }

    pub fn is_failing(&self) -> bool {
        self.failing_since.is_some()
    }

    /// The API server answered.
    pub fn works(&mut self) {
        self.links.set(self.kind, true);
        if let Some(since) = self.failing_since.take() {
            tracing::info!(kind = %self.kind, after_s = since.elapsed().as_secs(), "hearing from the API server again");
        }
    }

    /// A request failed. `stale`: only in that the place to resume from is too old, which happens in normal operation.
    pub fn failed(&mut self, error: &watcher::Error, stale: bool) {
        self.status.count_reconnect();
        let error = describe(error);
        if stale {
            tracing::info!(kind = %self.kind, error, "reading the whole list again");
            return;
        }
        self.links.set(self.kind, false);
        if self.failing_since.is_some() {
            tracing::debug!(kind = %self.kind, error, "still no answer from the API server");
            return;
        }
        self.failing_since = Some(Instant::now());
        tracing::warn!(
            kind = %self.kind, error,
            "cannot list or watch; what is programmed stays, trying again until it works"
        );
    }
}

/// True if resuming from the last known version will never work: it is too old (410; 400 from servers that cannot make
/// sense of it), or newer than the server's own, which was restored from a backup.
///
/// The watcher starts over by itself only if the API server says so within the stream, not if it refuses the request.
pub(super) fn is_stale(error: &watcher::Error) -> bool {
    let status = match error {
        watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status)) => status,
        watcher::Error::WatchError(status) => status,
        _ => return false,
    };
    matches!(status.code, 400 | 410) || status.message.contains("Too large resource version")
}

/// True if the server does not have this kind, or does not let us see it: asking again soon would change nothing.
pub(super) fn is_absent(error: &watcher::Error) -> bool {
    use watcher::Error::{InitialListFailed, WatchFailed, WatchStartFailed};
    match error {
        InitialListFailed(kube::Error::Api(status))
        | WatchStartFailed(kube::Error::Api(status))
        | WatchFailed(kube::Error::Api(status)) => matches!(status.code, 403 | 404),
        _ => false,
    }
}

/// One line that says what went wrong. The errors of the kube crate print whole structures.
pub(super) fn describe(error: &watcher::Error) -> String {
    use watcher::Error::{InitialListFailed, NoResourceVersion, WatchError, WatchFailed, WatchStartFailed};
    let (what, cause) = match error {
        InitialListFailed(cause) => ("list", cause),
        WatchStartFailed(cause) => ("watch", cause),
        WatchFailed(cause) => ("reading the watch", cause),
        WatchError(status) => return format!("watch: {}", answer(status)),
        NoResourceVersion => return "the server gives no resourceVersion; is it an API server?".into(),
    };
    match cause {
        kube::Error::Api(status) => format!("{what}: {}", answer(status)),
        other => {
            // The last cause is the system's own word ("Connection refused"); those before it repeat each other.
            let mut last: &dyn std::error::Error = other;
            while let Some(source) = last.source() {
                last = source;
            }
            format!("{what}: {last}")
        }
    }
}

fn answer(status: &Status) -> String {
    let hint = match status.code {
        401 => " (credentials are not accepted)",
        403 => " (the ClusterRole of this agent does not allow it)",
        404 => " (is this the API server?)",
        _ => "",
    };
    format!("the API server answers {} {}: {}{hint}", status.code, status.reason, status.message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: u16, message: &str) -> Box<Status> {
        Box::new(Status { code, message: message.into(), ..Default::default() })
    }

    #[test]
    fn only_what_a_list_can_cure_is_stale() {
        let start = |code| watcher::Error::WatchStartFailed(kube::Error::Api(status(code, "")));
        assert!(is_stale(&start(410)));
        assert!(is_stale(&watcher::Error::WatchError(status(410, "too old resource version"))));
        assert!(is_stale(&watcher::Error::WatchError(status(
            504,
            "Too large resource version: 7, current: 3"
        ))));
        assert!(!is_stale(&start(503)));
        assert!(!is_stale(&start(403)));
        assert!(!is_stale(&watcher::Error::InitialListFailed(kube::Error::Api(status(410, "")))));
    }

    #[test]
    fn all_kinds_make_a_connection() {
        let status = Arc::new(SourceStatus::default());
        let links = Arc::new(Links::new(status.clone()));
        let mut all: Vec<Link> = [Kind::Service, Kind::EndpointSlice, Kind::Node]
            .into_iter()
            .map(|kind| Link::new(kind, links.clone(), status.clone()))
            .collect();
        for link in &mut all {
            assert!(!status.connected());
            link.works();
        }
        assert!(status.connected());
        all[1].failed(&watcher::Error::NoResourceVersion, false);
        assert!(!status.connected());
        all[1].works();
        assert!(status.connected());
    }
}

//! Objects from YAML and JSON files in a directory, watched for changes.
//!
//! What is wrong is reported once and changes nothing: an invalid document leaves the last good state of its object, an
//! unreadable file or directory that of all its objects.

mod parse;
mod store;
mod watch;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Notify, mpsc},
    task::JoinError,
    time::{Instant, timeout, timeout_at},
};

use self::{
    store::{Changes, Finding, Store},
    watch::Watch,
};
use super::{Closed, Event, Missing, send, status::SourceStatus};

/// Files are looked at when nothing has happened for this long: writers are often halfway at the first event.
const QUIET: Duration = Duration::from_millis(100);
/// ... but not later than this after the first event.
const QUIET_MAX: Duration = Duration::from_secs(2);
/// A look without an event: for targets of symbolic links elsewhere, network file systems, and a directory that was
/// replaced. Only file attributes are read then.
const POLL: Duration = Duration::from_secs(10);
/// The same while the kernel tells nothing.
const POLL_UNWATCHED: Duration = Duration::from_secs(1);

/// The directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the manifests in {}: {source}; --source manifests:DIR needs a directory", dir.display())]
    Directory { dir: PathBuf, source: io::Error },
    #[error("the reader of the manifests in {} failed: {source}", dir.display())]
    Failed { dir: PathBuf, source: JoinError },
}

/// Sends everything in `dir`, then [`Event::Synced`], then every change, until the receiver is gone.
pub async fn run(dir: PathBuf, tx: mpsc::Sender<Event>, status: Arc<SourceStatus>) -> Result<(), Error> {
    // Only a start with a wrong path is an error; later the directory may come and go.
    std::fs::read_dir(&dir).map_err(|source| Error::Directory { dir: dir.clone(), source })?;
    let changed = Arc::new(Notify::new());
    let mut watch = Watch::new(&dir, changed.clone());
    let mut store = Store::new(dir.clone());
    let mut told = Told::default();
    loop {
        watch.renew();
        let busy = watch.busy();
        let changes;
        (store, changes) = tokio::task::spawn_blocking(move || {
            let changes = store.scan(&busy);
            (store, changes)
        })
        .await
        .map_err(|source| Error::Failed { dir: dir.clone(), source })?;
        report(&dir, &changes, &status);
        status.set_connected(!store.is_unreadable());
        let readable = (!store.is_unreadable()).then(|| store.missing());
        if told.tell(changes, readable, &tx, &status).await.is_err() {
            return Ok(());
        }
        let poll = if watch.is_set() { POLL } else { POLL_UNWATCHED };
        tokio::select! {
            () = tx.closed() => return Ok(()),
            () = quiet_after_change(&changed, poll) => {}
        }
    }
}

/// What the receiver has been told of the directory as a whole.
#[derive(Default)]
struct Told {
    synced: bool,
    missing: Missing,
}

impl Told {
    /// Sends the changes, and what is missing now (`None`: nothing can be said, as the directory cannot be read); once, that
    /// everything known at start has been sent. A directory that could not be read is not an empty one.
    async fn tell(
        &mut self,
        changes: Changes,
        missing: Option<Missing>,
        tx: &mpsc::Sender<Event>,
        status: &SourceStatus,
    ) -> Result<(), Closed> {
        for event in changes.events {
            send(tx, status, event).await?;
        }
        let Some(missing) = missing else { return Ok(()) };
        if missing != self.missing {
            self.missing = missing.clone();
            send(tx, status, Event::Missing(missing)).await?;
        }
        if !std::mem::replace(&mut self.synced, true) {
            status.count_relist();
            send(tx, status, Event::Synced).await?;
        }
        Ok(())
    }
}

fn report(dir: &Path, changes: &Changes, status: &SourceStatus) {
    for finding in &changes.findings {
        match finding {
            Finding::Directory(reason) => {
                tracing::warn!(dir = %dir.display(), reason, "cannot read the manifests; all objects stay as they were");
            }
            Finding::Unreadable { file, reason } => {
                status.count_rejected();
                tracing::warn!(file = %dir.join(file).display(), reason, "cannot read file; its objects stay as they were");
            }
            Finding::Rejected { file, rejected } => {
                status.count_rejected();
                tracing::warn!(
                    file = %dir.join(file).display(),
                    document = rejected.document,
                    item = rejected.item,
                    line = rejected.line,
                    object = rejected.object.as_ref().map(tracing::field::display),
                    reason = rejected.reason,
                    "invalid document; the last good state of the object stays"
                );
            }
            Finding::Duplicate { file, object, counts } => {
                tracing::warn!(%object, file = %dir.join(file).display(), counts = %dir.join(counts).display(), "object is defined more than once; the first file by name counts");
            }
            Finding::Skipped { file, what } => {
                tracing::debug!(file = %dir.join(file).display(), what, "skipped");
            }
        }
    }
}

/// Waits for a change and then for an end of changes, or until it is time to look without one.
async fn quiet_after_change(changed: &Notify, poll: Duration) {
    if timeout(poll, changed.notified()).await.is_err() {
        return;
    }
    let deadline = Instant::now() + QUIET_MAX;
    loop {
        let quiet = (Instant::now() + QUIET).min(deadline);
        if timeout_at(quiet, changed.notified()).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_directory_that_cannot_be_read_is_not_in_sync() {
        let (tx, mut rx) = mpsc::channel(4);
        let (mut told, status) = (Told::default(), SourceStatus::default());
        told.tell(Changes::default(), None, &tx, &status).await.unwrap();
        assert!(rx.try_recv().is_err() && !told.synced);
        let missing = Missing { unknown: true, ..Missing::default() };
        for _ in 0..2 {
            told.tell(Changes::default(), Some(missing.clone()), &tx, &status).await.unwrap();
        }
        assert_eq!(rx.try_recv(), Ok(Event::Missing(missing)));
        assert_eq!(rx.try_recv(), Ok(Event::Synced));
        assert!(rx.try_recv().is_err());
    }
}

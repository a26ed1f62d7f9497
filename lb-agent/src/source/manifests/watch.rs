//! The kernel's notices about a directory (inotify).

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode, ModifyKind},
};
use tokio::sync::Notify;

/// A file that was written to and not closed is not read until nothing was written for this long. A shell empties the
/// file of `kubectl get ... > services.yaml` long before the first line is there.
const WRITER_LIMIT: Duration = Duration::from_secs(8);

/// A watch on a directory. It sticks to the directory that had the path when it was set, so it is set anew when another
/// one has taken the path.
pub(super) struct Watch {
    dir: PathBuf,
    changed: Arc<Notify>,
    writers: Arc<Writers>,
    watcher: Option<(RecommendedWatcher, DirectoryId)>,
    reported: bool,
}

/// Device and inode.
type DirectoryId = (u64, u64);

impl Watch {
    /// `changed` is told of every change.
    pub fn new(dir: &Path, changed: Arc<Notify>) -> Self {
        Self { dir: dir.to_owned(), changed, writers: Arc::default(), watcher: None, reported: false }
    }

    pub fn is_set(&self) -> bool {
        self.watcher.is_some()
    }

    /// Names of files that are being written now.
    pub fn busy(&self) -> BTreeSet<String> {
        self.writers.busy(Instant::now())
    }

    /// Sets the watch if there is none on the directory that has the path now.
    pub fn renew(&mut self) {
        use std::os::unix::fs::MetadataExt as _;
        let id = std::fs::metadata(&self.dir).ok().map(|meta| (meta.dev(), meta.ino()));
        if self.watcher.as_ref().map(|(_, id)| *id) == id {
            return;
        }
        self.watcher = None;
        let Some(id) = id else { return };
        match self.set() {
            Ok(watcher) => {
                self.watcher = Some((watcher, id));
                self.reported = false;
            }
            Err(error) if !self.reported => {
                self.reported = true;
                tracing::warn!(
                    dir = %self.dir.display(), %error,
                    "cannot watch for changes; looking every second instead (raise fs.inotify.max_user_instances and fs.inotify.max_user_watches)"
                );
            }
            Err(error) => tracing::debug!(%error, "still cannot watch for changes"),
        }
    }

    fn set(&mut self) -> notify::Result<RecommendedWatcher> {
        // What another watch has seen is never completed.
        self.writers = Arc::default();
        let (changed, writers) = (self.changed.clone(), self.writers.clone());
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading files is no change; anything unclear, such as a lost notice, is one.
            let is_change = match &event {
                Ok(event) => {
                    writers.note(event, Instant::now());
                    !matches!(event.kind, EventKind::Access(kind) if kind != AccessKind::Close(AccessMode::Write))
                }
                Err(_) => true,
            };
            if is_change {
                changed.notify_one();
            }
        })?;
        watcher.watch(&self.dir, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    }
}

/// Files that were written to and not closed yet, with the time of the last write.
#[derive(Debug, Default)]
struct Writers(Mutex<BTreeMap<String, Instant>>);

impl Writers {
    fn note(&self, event: &notify::Event, now: Instant) {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let names = event.paths.iter().filter_map(|path| path.file_name()?.to_str());
        for name in names {
            match event.kind {
                EventKind::Modify(ModifyKind::Data(_)) => drop(files.insert(name.to_owned(), now)),
                // Closed, or another file has the name now.
                EventKind::Access(AccessKind::Close(AccessMode::Write))
                | EventKind::Remove(_)
                | EventKind::Modify(ModifyKind::Name(_)) => drop(files.remove(name)),
                _ => {}
            }
        }
    }

    fn busy(&self, now: Instant) -> BTreeSet<String> {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        files.retain(|_, written| now.saturating_duration_since(*written) < WRITER_LIMIT);
        files.keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use notify::event::{DataChange, RenameMode};

    use super::*;

    #[test]
    fn a_writer_is_one_until_it_closes_or_falls_silent() {
        let (writers, t) = (Writers::default(), Instant::now());
        let note = |kind| writers.note(&notify::Event::new(kind).add_path("/d/a.yaml".into()), t);
        let write = EventKind::Modify(ModifyKind::Data(DataChange::Any));
        let busy = |after| !writers.busy(t + Duration::from_secs(after)).is_empty();
        assert!(!busy(0));
        for end in [
            EventKind::Access(AccessKind::Close(AccessMode::Write)),
            EventKind::Modify(ModifyKind::Name(RenameMode::To)),
        ] {
            note(write);
            assert!(busy(7));
            note(end);
            assert!(!busy(0));
        }
        note(write);
        note(EventKind::Access(AccessKind::Close(AccessMode::Read)));
        assert!(busy(7) && !busy(8));
    }
}

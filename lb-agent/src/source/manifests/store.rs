//! The files of a directory and the objects in them: what changed since the last look.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fs,
    hash::{DefaultHasher, Hasher as _},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use super::parse::{Format, Rejected, parse};
use crate::source::{Event, Kind, Missing, Object, ObjectRef};

/// Two writes within one tick of the file system's clock leave the same time stamp (up to 10 ms; a second on old file
/// systems). A file that was this young when it was read is read again.
const RACY: Duration = Duration::from_secs(2);

/// Everything known of a directory.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    files: BTreeMap<String, File>,
    /// Which files have an object; the first one by name counts.
    owners: BTreeMap<ObjectRef, BTreeSet<String>>,
    /// The directory itself could not be read the last time.
    unreadable: bool,
}

#[derive(Debug, Default)]
struct File {
    seen: Option<Seen>,
    /// Of the text that `objects` were made from; none before it was read for the first time.
    text_hash: Option<u64>,
    objects: BTreeMap<ObjectRef, Object>,
    /// What is in the file and could not be read since the agent started.
    lost: BTreeSet<Lost>,
    /// Why it could not be read the last time.
    error: Option<String>,
}

/// Something that is there and has no good state known here.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Lost {
    /// Whatever it is.
    Unknown,
    /// `slice_of`: as in [`Rejected`].
    Object { object: ObjectRef, slice_of: Option<String> },
}

impl Lost {
    fn of(rejected: &Rejected) -> Self {
        match &rejected.object {
            Some(object) => Self::Object { object: object.clone(), slice_of: rejected.slice_of.clone() },
            None => Self::Unknown,
        }
    }

    fn is(&self, reference: &ObjectRef) -> bool {
        matches!(self, Self::Object { object, .. } if object == reference)
    }
}

/// What tells whether a file has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    device: u64,
    inode: u64,
    size_bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    racy: bool,
}

/// What is to be said about a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The directory cannot be read; all objects stay.
    Directory(String),
    /// The file cannot be read; its objects stay.
    Unreadable { file: String, reason: String },
    /// A document is not a valid object; the last good state of that object stays.
    Rejected { file: String, rejected: Rejected },
    /// The object is also in an earlier file (or earlier in the same file), which counts.
    Duplicate { file: String, object: ObjectRef, counts: String },
    /// Something that does not matter here.
    Skipped { file: String, what: String },
}

/// What a look at the directory brought.
#[derive(Debug, Default)]
pub struct Changes {
    pub events: Vec<Event>,
    pub findings: Vec<Finding>,
}

impl Store {
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, files: BTreeMap::new(), owners: BTreeMap::new(), unreadable: false }
    }

    /// Looks at all files, reads those that changed. Files in `busy` are being written: they stay as they were.
    pub fn scan(&mut self, busy: &BTreeSet<String>) -> Changes {
        let mut changes = Changes::default();
        let names = match list(&self.dir) {
            Ok(names) => names,
            Err(error) => {
                if !self.unreadable {
                    changes.findings.push(Finding::Directory(error.to_string()));
                }
                self.unreadable = true;
                return changes;
            }
        };
        self.unreadable = false;
        let gone: Vec<_> = self.files.keys().filter(|name| !names.contains_key(*name)).cloned().collect();
        for name in gone {
            self.replace(&name, None, &mut changes);
        }
        for (name, format) in names.into_iter().filter(|(name, _)| !busy.contains(name)) {
            self.look_at(&name, format, &mut changes);
        }
        changes
    }

    pub fn is_unreadable(&self) -> bool {
        self.unreadable
    }

    /// What cannot be read at present and could not since the agent started.
    pub fn missing(&self) -> Missing {
        let mut missing = Missing::default();
        for file in self.files.values() {
            missing.unknown |= file.text_hash.is_none() && file.error.is_some();
            for lost in &file.lost {
                let (object, slice_of) = match lost {
                    Lost::Unknown => {
                        missing.unknown = true;
                        continue;
                    }
                    // Another file has it.
                    Lost::Object { object, .. } if self.owners.contains_key(object) => continue,
                    Lost::Object { object, slice_of } => (object, slice_of),
                };
                match (object.kind, slice_of) {
                    (Kind::Service, _) => {
                        missing.services.insert((object.namespace.clone(), object.name.clone()));
                    }
                    (Kind::EndpointSlice, Some(service)) => {
                        missing.services.insert((object.namespace.clone(), service.clone()));
                    }
                    (Kind::EndpointSlice, None) => missing.unknown = true,
                    (Kind::Node | Kind::ServiceCidr, _) => {}
                }
            }
        }
        missing
    }

    fn look_at(&mut self, name: &str, format: Format, changes: &mut Changes) {
        let path = self.dir.join(name);
        let old = self.files.get(name);
        match read(&path, old.and_then(|f| f.seen)) {
            Ok(None) => {}
            // Gone since the directory was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.is_symlink() => {
                self.replace(name, None, changes);
            }
            Err(error) => {
                let reason = error.to_string();
                let file = self.files.entry(name.to_owned()).or_default();
                if file.error.as_ref() != Some(&reason) {
                    changes
                        .findings
                        .push(Finding::Unreadable { file: name.to_owned(), reason: reason.clone() });
                }
                file.error = Some(reason);
                file.seen = None;
            }
            Ok(Some((seen, text))) => {
                let text_hash = Some(hash(&text));
                if let Some(file) = self.files.get_mut(name).filter(|f| f.text_hash == text_hash) {
                    (file.seen, file.error) = (Some(seen), None);
                    return;
                }
                let (objects, lost) = self.objects(name, &text, format, changes);
                let file = File { seen: Some(seen), text_hash, objects, lost, error: None };
                self.replace(name, Some(file), changes);
            }
        }
    }

    /// The objects that a file now stands for: those in `text`, and the last good state of those it spoils. Beside them
    /// what it spoils without a good state.
    fn objects(
        &self,
        name: &str,
        text: &str,
        format: Format,
        changes: &mut Changes,
    ) -> (BTreeMap<ObjectRef, Object>, BTreeSet<Lost>) {
        let parsed = parse(text, format);
        let file = || name.to_owned();
        let mut objects = BTreeMap::new();
        for object in parsed.objects {
            match objects.entry(object.reference()) {
                Entry::Vacant(entry) => {
                    entry.insert(object);
                }
                Entry::Occupied(entry) => {
                    let object = entry.key().clone();
                    changes.findings.push(Finding::Duplicate { file: file(), object, counts: file() });
                }
            }
        }
        if let Some(old) = self.files.get(name) {
            // Without a name it could be any of those that are missing now.
            let nameless = parsed.rejected.iter().any(|r| r.object.is_none());
            let spoilt =
                |r: &ObjectRef| parsed.rejected.iter().any(|rejected| rejected.object.as_ref() == Some(r));
            for (reference, object) in &old.objects {
                if !objects.contains_key(reference) && (nameless || spoilt(reference)) {
                    objects.insert(reference.clone(), object.clone());
                }
            }
        }
        let lost = self.lost(name, &parsed.rejected, &objects);
        let rejected = parsed.rejected.into_iter();
        changes.findings.extend(rejected.map(|rejected| Finding::Rejected { file: file(), rejected }));
        changes
            .findings
            .extend(parsed.skipped.into_iter().map(|what| Finding::Skipped { file: file(), what }));
        (objects, lost)
    }

    /// What is rejected in the text of a file and was never good. Once a file has been read, only what was lost already
    /// can be.
    fn lost(
        &self,
        name: &str,
        rejected: &[Rejected],
        objects: &BTreeMap<ObjectRef, Object>,
    ) -> BTreeSet<Lost> {
        let before = self.files.get(name).filter(|file| file.text_hash.is_some()).map(|file| &file.lost);
        let could_be = |lost: &Lost| {
            before.is_none_or(|before| before.contains(lost) || before.contains(&Lost::Unknown))
        };
        let is_good = |lost: &Lost| objects.keys().any(|reference| lost.is(reference));
        let mut lost: BTreeSet<Lost> =
            rejected.iter().map(Lost::of).filter(|lost| could_be(lost) && !is_good(lost)).collect();
        if rejected.iter().any(|r| r.object.is_none()) {
            // What cannot be told any more may be any of these.
            lost.extend(before.into_iter().flatten().filter(|lost| !is_good(lost)).cloned());
        }
        lost
    }

    /// Puts a new state of a file in the place of the old one, or removes it.
    fn replace(&mut self, name: &str, new: Option<File>, changes: &mut Changes) {
        let old = self.files.remove(name).unwrap_or_default().objects;
        let mut references: BTreeSet<ObjectRef> = old.keys().cloned().collect();
        if let Some(file) = new {
            references.extend(file.objects.keys().cloned());
            self.files.insert(name.to_owned(), file);
        }
        for reference in references {
            self.update(name, reference, &old, changes);
        }
    }

    /// One object of a file that has just changed: who has it now, and what does that mean for the receiver?
    fn update(
        &mut self,
        name: &str,
        reference: ObjectRef,
        old: &BTreeMap<ObjectRef, Object>,
        changes: &mut Changes,
    ) {
        let owners = self.owners.entry(reference.clone()).or_default();
        let owner_before = owners.first().cloned();
        let here = self.files.get(name).and_then(|file| file.objects.get(&reference));
        if here.is_some() {
            owners.insert(name.to_owned());
        } else {
            owners.remove(name);
        }
        let Some(owner) = owners.first().cloned() else {
            self.owners.remove(&reference);
            changes.events.push(Event::Delete(reference));
            return;
        };
        if here.is_some() && owners.len() > 1 && here != old.get(&reference) {
            let (object, file) = (reference.clone(), name.to_owned());
            let loser = if owner == file { owners.last().cloned().unwrap_or_default() } else { file };
            changes.findings.push(Finding::Duplicate { file: loser, object, counts: owner.clone() });
        }
        let changed = owner == name && here != old.get(&reference);
        if (owner_before.as_ref() != Some(&owner) || changed)
            && let Some(object) = self.files.get(&owner).and_then(|file| file.objects.get(&reference))
        {
            changes.events.push(Event::Apply(object.clone()));
        }
    }
}

/// The manifests in a directory: name and syntax. Hidden files are left alone: editors and the kubelet (`..data`) keep
/// their work there.
fn list(dir: &Path) -> io::Result<BTreeMap<String, Format>> {
    let mut names = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        if name.starts_with('.') {
            continue;
        }
        match Path::new(&name).extension().and_then(|e| e.to_str()) {
            Some("yaml" | "yml") => names.insert(name, Format::Yaml),
            Some("json") => names.insert(name, Format::Json),
            _ => None,
        };
    }
    Ok(names)
}

/// The text of a file (symbolic links followed), or `None` if it is as it was.
fn read(path: &Path, old: Option<Seen>) -> io::Result<Option<(Seen, String)>> {
    let meta = fs::metadata(path)?;
    if !meta.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let age = meta.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
    let seen = Seen {
        device: meta.dev(),
        inode: meta.ino(),
        size_bytes: meta.size(),
        modified: (meta.mtime(), meta.mtime_nsec()),
        changed: (meta.ctime(), meta.ctime_nsec()),
        racy: age.is_none_or(|age| age < RACY),
    };
    if old == Some(seen) && !seen.racy {
        return Ok(None);
    }
    let text = String::from_utf8(fs::read(path)?)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.utf8_error()))?;
    Ok(Some((seen, text)))
}

fn hash(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(text.as_bytes());
    hasher.finish()
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;

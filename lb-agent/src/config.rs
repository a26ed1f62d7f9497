//! From flags, environment and file to [`Settings`]: precedence, parsing, and errors that name the place, the value, the
//! reason and what is allowed.

mod kubeproxy;
mod options;
mod values;

use std::{
    collections::BTreeMap,
    fmt, io,
    path::{Path, PathBuf},
};

use clap::ArgMatches;
use serde::{Deserializer, de};
use serde_json::{Map, Value};
use serde_saphyr::DuplicateKeyPolicy;

pub use self::kubeproxy::Notes;
use crate::{cli::RunArgs, settings::Settings};

/// What `lb-agent run` was told: settings, and how to log.
#[derive(Clone, Debug)]
pub struct Config {
    pub settings: Settings,
    pub log: LogSettings,
    /// About a KubeProxyConfiguration, if the file is one.
    pub notes: Option<Notes>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogSettings {
    pub format: LogFormat,
    /// A filter as tracing-subscriber's `EnvFilter` reads it.
    pub filter: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// Where a value was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Flag(String),
    Env(String),
    File(PathBuf, String),
    /// Nobody gave it; the text says what it is.
    Default(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(name) => write!(f, "flag --{name}"),
            Self::Env(name) => write!(f, "environment variable {name}"),
            Self::File(path, key) => write!(f, "{}: {key}", path.display()),
            Self::Default(what) => f.write_str(what),
        }
    }
}

/// The agent was told something that it cannot do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{origin}: {value:?}: {reason}; allowed: {allowed}")]
    Invalid { origin: Origin, value: String, reason: String, allowed: String },
    #[error("cannot read the options in {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    #[error("{}: {invalid}", path.display())]
    KubeProxy { path: PathBuf, invalid: kubeproxy::Invalid },
    #[error("cannot read this node's name from {HOSTNAME}: {0}; give it with --hostname-override")]
    Hostname(io::Error),
}

/// The kernel's host name, as gethostname(2) gives it.
const HOSTNAME: &str = "/proc/sys/kernel/hostname";

/// Reads the file that `args` names, if any, and makes settings of everything. `matches` is what `args` was made from
/// (the matches of the subcommand `run`); it tells flags from environment variables.
pub fn load(args: &RunArgs, matches: &ArgMatches) -> Result<Config, Error> {
    let file = match &args.config {
        Some(path) => Some(FileOptions::read(path)?),
        None => None,
    };
    options::Options { args, matches, file }.config()
}

/// What the file says.
#[derive(Debug)]
struct FileOptions {
    path: PathBuf,
    args: RunArgs,
    /// The names of options there, by id, where they are not the agent's own.
    keys: BTreeMap<&'static str, String>,
    notes: Option<Notes>,
}

impl FileOptions {
    fn read(path: &Path) -> Result<Self, Error> {
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        let own = |args| Self { path: path.to_owned(), args, keys: BTreeMap::new(), notes: None };
        // A file with comments only is a file without options, not a document without a mapping.
        if text
            .lines()
            .all(|l| l.trim().is_empty() || l.trim_start().starts_with('#') || l.trim_end() == "---")
        {
            return Ok(own(RunArgs::default()));
        }
        match document(text) {
            Some((root, duplicate)) if kubeproxy::is_typed(&root) => {
                let reading = kubeproxy::read(&root)
                    .map_err(|invalid| Error::KubeProxy { path: path.to_owned(), invalid })?;
                let kubeproxy::Reading { args, keys, ignored, unknown } = reading;
                let notes = Some(Notes { path: path.to_owned(), ignored, unknown, duplicate });
                Ok(Self { path: path.to_owned(), args, keys, notes })
            }
            // What is wrong with it, if anything, shows in reading it as what it is.
            _ => serde_saphyr::from_str(text)
                .map(own)
                .map_err(|error| Error::File { path: path.to_owned(), reason: reason(&error) }),
        }
    }
}

/// The mapping in a file, and why it was not to be had without having the last of two equal keys win.
fn document(text: &str) -> Option<(Map<String, Value>, Option<String>)> {
    match serde_saphyr::from_str(text) {
        Ok(root) => Some((root, None)),
        Err(strict) => {
            let options = serde_saphyr::options! { duplicate_keys: DuplicateKeyPolicy::LastWins };
            let root = serde_saphyr::from_str_with_options(text, options).ok()?;
            Some((root, Some(reason(&strict))))
        }
    }
}

/// serde-saphyr draws a multi-line snippet; its first line holds the reason and the place.
fn reason(error: &serde_saphyr::Error) -> String {
    error.without_snippet().to_string()
}

/// Accepts a YAML list of strings, and one string for a list of one.
pub(crate) fn list_or_string<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct Visitor;
    impl<'de> de::Visitor<'de> for Visitor {
        type Value = Vec<String>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string or a list of strings")
        }
        fn visit_str<E: de::Error>(self, s: &str) -> Result<Vec<String>, E> {
            Ok(s.split(',').map(str::to_owned).collect())
        }
        fn visit_unit<E: de::Error>(self) -> Result<Vec<String>, E> {
            Ok(Vec::new())
        }
        fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<String>, A::Error> {
            let mut list = Vec::new();
            while let Some(item) = seq.next_element()? {
                list.push(item);
            }
            Ok(list)
        }
    }
    deserializer.deserialize_any(Visitor)
}

/// The mount of the unified cgroup hierarchy, if there is one: `/proc/self/mounts` in, path out. The usual place wins over
/// others, such as the one of hybrid hosts (`/sys/fs/cgroup/unified`).
pub fn cgroup2_mount(mounts: &str) -> Option<PathBuf> {
    let mut found = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let (_, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(unescape(path)))
    });
    let first = found.next()?;
    let usual = Path::new("/sys/fs/cgroup");
    if first != usual && found.any(|path| path == usual) { Some(usual.to_owned()) } else { Some(first) }
}

/// Undoes the octal escapes of proc(5): space, tab, newline and backslash.
fn unescape(path: &str) -> String {
    path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;

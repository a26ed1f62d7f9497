//! A KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1) as a file of options: whoever replaces kube-proxy need not
//! translate its configuration.
//!
//! A pure function from text to option values: [`read`]. Every field of the type is known ([`fields`]), is decoded as
//! kube-proxy decodes it ([`decode`]) and is held to kube-proxy's own rules ([`rules`]); those that mean something here
//! become values of the agent's options ([`effects`]), which the rest of `config` treats like any others. The others, and
//! those that the type does not have, are named in [`Notes`]. docs/configuration.md has the table.

mod decode;
mod effects;
mod fields;
mod rules;

use std::{collections::BTreeMap, path::PathBuf};

use serde_json::{Map, Value};

use self::decode::Document;
use crate::cli::RunArgs;

pub const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
pub const KIND: &str = "KubeProxyConfiguration";

/// A field with a value that kube-proxy would refuse as well.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {value}: {reason}")]
pub struct Invalid {
    /// As in `conntrack.udpTimeout` or `nodePortAddresses[1]`.
    pub field: String,
    /// As JSON.
    pub value: String,
    pub reason: String,
}

impl Invalid {
    fn new(field: impl Into<String>, value: &Value, reason: impl Into<String>) -> Self {
        Self { field: field.into(), value: value.to_string(), reason: reason.into() }
    }

    fn text(field: impl Into<String>, value: &str, reason: impl Into<String>) -> Self {
        Self::new(field, &Value::String(value.to_owned()), reason)
    }
}

/// What a file says.
#[derive(Debug, Default)]
pub struct Reading {
    /// Values of the agent's options.
    pub args: RunArgs,
    /// Which field each of them comes from, by the option's id.
    pub keys: BTreeMap<&'static str, String>,
    /// Fields that are set but mean nothing here.
    pub ignored: Vec<String>,
    /// Fields that the type does not have.
    pub unknown: Vec<String>,
}

/// What the user has to know about the file, once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notes {
    pub path: PathBuf,
    pub ignored: Vec<String>,
    pub unknown: Vec<String>,
    /// Why strict decoding failed where that is not for unknown fields: a key that is there twice.
    pub duplicate: Option<String>,
}

impl Notes {
    /// Says what there is to say: one line for each kind.
    pub fn log(&self) {
        let file = self.path.display();
        if let Some(reason) = &self.duplicate {
            tracing::warn!(%file, reason, "a key is in the configuration twice; the last one counts");
        }
        if !self.unknown.is_empty() {
            let fields = self.unknown.join(", ");
            tracing::warn!(%file, fields, "a KubeProxyConfiguration has no such fields; they are ignored");
        }
        if !self.ignored.is_empty() {
            let fields = self.ignored.join(", ");
            tracing::info!(%file, fields, "fields of the KubeProxyConfiguration that mean nothing here are ignored");
        }
    }
}

/// True for a document that says what it is, as Kubernetes objects do. The agent's own options have no such keys.
pub fn is_typed(root: &Map<String, Value>) -> bool {
    root.contains_key("apiVersion") || root.contains_key("kind")
}

/// Reads a document that [`is_typed`].
pub fn read(root: &Map<String, Value>) -> Result<Reading, Invalid> {
    for (field, expected) in [("apiVersion", API_VERSION), ("kind", KIND)] {
        let value = root.get(field).unwrap_or(&Value::Null);
        if value.as_str() != Some(expected) {
            let reason = format!(
                "must be {expected} ({API_VERSION} {KIND} is the only type that can be read; a file of the agent's own \
                 options has neither apiVersion nor kind)"
            );
            return Err(Invalid::new(field, value, reason));
        }
    }
    let document = Document::decode(root)?;
    rules::check(&document)?;
    Ok(effects::of(document))
}

#[cfg(test)]
#[path = "kubeproxy_tests.rs"]
mod tests;

//! Manifests of one rule as `kubectl get -o yaml` prints them, and ways to change them as a controller would.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use crate::{place::Family, traffic::Proto};

/// The documents of `tests/fixtures/semantics/NAME.yaml`.
#[derive(Clone, Debug)]
pub struct Fixture {
    pub documents: Vec<Value>,
    /// As they were read, for [`Self::endpoints`].
    original: Vec<Value>,
}

/// Where fixtures are.
pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/semantics")
}

impl Fixture {
    pub fn load(name: &str) -> anyhow::Result<Self> {
        let path = directory().join(format!("{name}.yaml"));
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let documents: Vec<Value> =
            serde_saphyr::from_multiple(&text).with_context(|| format!("{} is no YAML", path.display()))?;
        ensure!(!documents.is_empty(), "{} is empty", path.display());
        Ok(Self { original: documents.clone(), documents })
    }

    /// The object of that kind and name.
    ///
    /// # Panics
    /// If the fixture has none.
    pub fn object(&mut self, kind: &str, name: &str) -> &mut Value {
        let mut all = self.documents.iter_mut();
        all.find(|d| d["kind"] == kind && d["metadata"]["name"] == name)
            .unwrap_or_else(|| panic!("the fixture has no {kind} {name}"))
    }

    /// All EndpointSlices.
    pub fn slices(&mut self) -> impl Iterator<Item = &mut Value> {
        self.documents.iter_mut().filter(|d| d["kind"] == "EndpointSlice")
    }

    /// Sets the conditions of a pod's endpoints in all slices.
    ///
    /// # Panics
    /// If no slice has that pod.
    pub fn condition(&mut self, pod: &str, conditions: Value) -> &mut Self {
        let all = self.slices().filter_map(|s| s["endpoints"].as_array_mut()).flatten();
        let mut changed = 0;
        for endpoint in all.filter(|e| e["targetRef"]["name"] == pod) {
            endpoint["conditions"] = conditions.clone();
            changed += 1;
        }
        assert!(changed > 0, "no slice has an endpoint of {pod}");
        self
    }

    /// Leaves just these pods in all slices, each as the fixture has it: others go, those that went come back.
    pub fn endpoints(&mut self, pods: &[&str]) -> &mut Self {
        let original = self.original.clone();
        let is_slice = |d: &&Value| d["kind"] == "EndpointSlice";
        for (slice, original) in self.slices().zip(original.iter().filter(is_slice)) {
            let all = original["endpoints"].as_array().into_iter().flatten();
            let kept = all.filter(|e| pods.iter().any(|p| e["targetRef"]["name"] == *p));
            slice["endpoints"] = kept.cloned().collect();
        }
        self
    }
}

/// Conditions of an endpoint as the EndpointSlice controller writes them.
pub fn conditions(ready: bool, serving: bool, terminating: bool) -> Value {
    json!({ "ready": ready, "serving": serving, "terminating": terminating })
}

/// A running pod that is ready.
pub fn ready() -> Value {
    conditions(true, true, false)
}

/// A pod that is being deleted and still passes its readiness probe.
pub fn draining() -> Value {
    conditions(false, true, true)
}

/// A pod that is being deleted and answers no more.
pub fn ended() -> Value {
    conditions(false, false, true)
}

/// A running pod that is not ready.
pub fn unready() -> Value {
    conditions(false, false, false)
}

/// The number of a Service's port for a protocol: that of this name, or the first one.
pub fn port(service: &Value, proto: Proto, name: Option<&str>, field: &str) -> Option<u16> {
    let protocol = if proto == Proto::Tcp { "TCP" } else { "UDP" };
    let mut ports = service["spec"]["ports"].as_array()?.iter();
    let port = ports.find(|p| p["protocol"] == protocol && name.is_none_or(|wanted| p["name"] == wanted))?;
    port[field].as_u64().and_then(|n| u16::try_from(n).ok())
}

/// The first address of a family among strings, or among the `ip` fields of objects.
pub fn address(list: &Value, family: Family) -> Option<IpAddr> {
    let texts = list.as_array()?.iter().filter_map(|v| v.as_str().or_else(|| v["ip"].as_str()));
    texts.filter_map(|t| t.parse::<IpAddr>().ok()).find(|ip| ip.is_ipv4() == (family == Family::V4))
}

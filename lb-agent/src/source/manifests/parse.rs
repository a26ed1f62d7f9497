//! From the text of one file to objects. Bytes in, values out: no file system, no logging.

use std::fmt;

use k8s_openapi::{
    Resource,
    api::{
        core::v1::{Node, Service},
        discovery::v1::EndpointSlice,
        networking::v1::ServiceCIDR,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::{Deserialize, de::DeserializeOwned};

use crate::source::{
    Kind, Object, ObjectRef,
    strip::{Strip, is_foreign},
};

/// Which syntax a file is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Yaml,
    Json,
}

/// What a file holds.
#[derive(Debug, Default)]
pub struct Parsed {
    /// In the order of the file; an object can be there more than once.
    pub objects: Vec<Object>,
    pub rejected: Vec<Rejected>,
    /// Objects of kinds that do not matter here, and of other proxies.
    pub skipped: Vec<String>,
}

/// A document, or an item of a list, that is not a valid object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// From 1 on; empty documents do not count.
    pub document: usize,
    /// Index in `items`, if the document is a list.
    pub item: Option<usize>,
    /// Line in the file, from 1 on, where it is known.
    pub line: Option<u64>,
    pub reason: String,
    /// Which object it would have been, if that much could be read.
    pub object: Option<ObjectRef>,
    /// Of an EndpointSlice: whose endpoints are in it, if that much could be read.
    pub slice_of: Option<String>,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "document {}", self.document)?;
        if let Some(item) = self.item {
            write!(f, ", item {item}")?;
        }
        if let Some(line) = self.line {
            write!(f, ", line {line}")?;
        }
        if let Some(object) = &self.object {
            write!(f, " ({object})")?;
        }
        write!(f, ": {}", self.reason)
    }
}

/// Reads all documents of a file. One that is wrong does not spoil the others.
pub fn parse(text: &str, format: Format) -> Parsed {
    let mut parsed = Parsed::default();
    match format {
        Format::Yaml => {
            for (i, (first_line, document)) in documents(text).into_iter().enumerate() {
                yaml_document(document, Place { document: i + 1, first_line, item: None }, &mut parsed);
            }
        }
        Format::Json => json_documents(text, &mut parsed),
    }
    parsed
}

/// What an object says that it is.
struct Named {
    object: ObjectRef,
    /// Of an EndpointSlice: label `kubernetes.io/service-name`.
    slice_of: Option<String>,
}

/// Where something is in a file.
#[derive(Clone, Copy)]
struct Place {
    document: usize,
    first_line: u64,
    item: Option<usize>,
}

/// Why something is not an object.
struct Wrong {
    /// Line within the document, from 1 on.
    line: Option<u64>,
    reason: String,
}

impl From<serde_saphyr::Error> for Wrong {
    fn from(error: serde_saphyr::Error) -> Self {
        let line = error.location().map(|l| l.line()).filter(|line| *line > 0);
        Self { line, reason: error.without_snippet().to_string() }
    }
}

impl From<serde_json::Error> for Wrong {
    fn from(error: serde_json::Error) -> Self {
        let line = u64::try_from(error.line()).ok().filter(|line| *line > 0);
        Self { line, reason: error.to_string() }
    }
}

impl Parsed {
    fn reject(&mut self, place: Place, object: Option<Named>, wrong: impl Into<Wrong>) {
        let (object, slice_of) = object.map_or((None, None), |named| (Some(named.object), named.slice_of));
        let Wrong { line, reason } = wrong.into();
        self.rejected.push(Rejected {
            document: place.document,
            item: place.item,
            line: line.map(|line| place.first_line + line - 1),
            reason,
            object,
            slice_of,
        });
    }
}

/// Splits a stream at its `---` lines: (number of the first line, text). A line that begins with `---` and then white
/// space is a document marker wherever it stands, also within a block scalar (YAML 1.2.2, rules 203 and 206), so that
/// this needs no parser, and a document with a syntax error ends where the next one begins.
fn documents(text: &str) -> Vec<(u64, &str)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut starts = vec![(1, 0)];
    let mut offset = 0;
    for (i, line) in (1u64..).zip(text.split_inclusive('\n')) {
        let marker =
            line.strip_prefix("---").is_some_and(|rest| rest.trim_start() != rest || rest.is_empty());
        if marker && offset > 0 {
            starts.push((i, offset));
        }
        offset += line.len();
    }
    let ends = starts.iter().skip(1).map(|(_, offset)| *offset).chain([text.len()]);
    let documents = starts.iter().zip(ends).map(|((line, start), end)| (*line, &text[*start..end]));
    documents.filter(|(_, document)| !is_empty(document)).collect()
}

/// True if a document is only comments, directives and markers.
fn is_empty(document: &str) -> bool {
    document.lines().all(|line| {
        let line = line.strip_prefix("---").unwrap_or(line).trim();
        line.is_empty() || line.starts_with(['#', '%']) || line == "..."
    })
}

/// What tells an object, a list of objects and everything else apart.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Head {
    api_version: Option<String>,
    kind: Option<String>,
    metadata: Option<HeadMeta>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct HeadMeta {
    name: Option<String>,
    namespace: Option<String>,
    /// Whatever it is: a wrong one must not cost the name.
    labels: serde_json::Value,
}

/// What a document says that it is.
enum Declared {
    Object(Kind),
    /// A list, and what its items are if they do not say so themselves.
    List(Option<(String, String)>),
    Other(String),
}

impl Head {
    fn declared(&self) -> Result<Declared, Wrong> {
        let missing = |what| Wrong { line: None, reason: format!("{what} is missing") };
        let kind = self.kind.as_deref().ok_or_else(|| missing("kind"))?;
        let api_version = self.api_version.as_deref().ok_or_else(|| missing("apiVersion"))?;
        let group = api_version.split_once('/').map_or("", |(group, _)| group);
        let ours = match (group, kind) {
            ("", "List") => return Ok(Declared::List(None)),
            ("", Service::KIND) => (Kind::Service, Service::API_VERSION),
            ("", Node::KIND) => (Kind::Node, Node::API_VERSION),
            ("discovery.k8s.io", EndpointSlice::KIND) => (Kind::EndpointSlice, EndpointSlice::API_VERSION),
            ("networking.k8s.io", ServiceCIDR::KIND) => (Kind::ServiceCidr, ServiceCIDR::API_VERSION),
            ("", "ServiceList" | "NodeList")
            | ("discovery.k8s.io", "EndpointSliceList")
            | ("networking.k8s.io", "ServiceCIDRList") => {
                let item = kind.trim_end_matches("List").to_owned();
                return Ok(Declared::List(Some((api_version.to_owned(), item))));
            }
            _ => return Ok(Declared::Other(format!("{api_version} {kind}"))),
        };
        if api_version != ours.1 {
            let reason = format!("apiVersion {api_version} of {kind} is not supported, only {}", ours.1);
            return Err(Wrong { line: None, reason });
        }
        Ok(Declared::Object(ours.0))
    }

    /// The object that this would be.
    fn reference(&self, kind: Kind) -> Option<Named> {
        let meta = self.metadata.as_ref()?;
        let name = meta.name.clone().filter(|name| !name.is_empty())?;
        let slice_of = meta.labels.get("kubernetes.io/service-name").and_then(|v| v.as_str());
        Some(Named {
            object: ObjectRef { kind, namespace: namespace(kind, meta.namespace.as_deref()), name },
            slice_of: slice_of.filter(|_| kind == Kind::EndpointSlice).map(str::to_owned),
        })
    }
}

/// Some kinds have no namespace; everything else without one is in `default`, as with kubectl.
fn namespace(kind: Kind, given: Option<&str>) -> String {
    match given {
        _ if !kind.is_namespaced() => String::new(),
        None | Some("") => "default".into(),
        Some(namespace) => namespace.to_owned(),
    }
}

fn yaml<T: DeserializeOwned>(document: &str) -> Result<T, Wrong> {
    // No limit on size (a cluster's EndpointSlices can be one list), but the default ones on aliases stay: a few lines
    // must not become gigabytes.
    let options = serde_saphyr::options! { budget: None, with_snippet: false };
    Ok(serde_saphyr::from_str_with_options(document, options)?)
}

fn yaml_document(document: &str, place: Place, parsed: &mut Parsed) {
    let head: Head = match yaml(document) {
        Ok(head) => head,
        Err(wrong) => return parsed.reject(place, None, wrong),
    };
    match head.declared() {
        Err(wrong) => parsed.reject(place, None, wrong),
        Ok(Declared::Other(what)) => parsed.skipped.push(what),
        Ok(Declared::List(items)) => match yaml(document) {
            Ok(list) => list_items(list, items.as_ref(), place, parsed),
            Err(wrong) => parsed.reject(place, None, wrong),
        },
        Ok(Declared::Object(kind)) => {
            let object = match kind {
                Kind::Service => yaml::<Service>(document).map(Object::from),
                Kind::EndpointSlice => yaml::<EndpointSlice>(document).map(Object::from),
                Kind::Node => yaml::<Node>(document).map(Object::from),
                Kind::ServiceCidr => yaml::<ServiceCIDR>(document).map(Object::from),
            };
            accept(object, head.reference(kind), place, parsed);
        }
    }
}

/// One JSON value after the other; a syntax error ends the file, as there is no telling where the next value begins.
fn json_documents(text: &str, parsed: &mut Parsed) {
    let values = serde_json::Deserializer::from_str(text).into_iter::<serde_json::Value>();
    for (i, value) in values.enumerate() {
        let place = Place { document: i + 1, first_line: 1, item: None };
        match value {
            Ok(value) => json_value(value, place, parsed),
            Err(error) => return parsed.reject(place, None, error),
        }
    }
}

fn json_value(value: serde_json::Value, place: Place, parsed: &mut Parsed) {
    let head = match Head::deserialize(&value) {
        Ok(head) => head,
        Err(error) => return parsed.reject(place, None, error),
    };
    match head.declared() {
        Err(wrong) => parsed.reject(place, None, wrong),
        Ok(Declared::Other(what)) => parsed.skipped.push(what),
        Ok(Declared::List(_)) if place.item.is_some() => {
            parsed.reject(place, None, Wrong { line: None, reason: "a list within a list".into() });
        }
        Ok(Declared::List(items)) => match List::deserialize(value) {
            Ok(list) => list_items(list, items.as_ref(), place, parsed),
            Err(error) => parsed.reject(place, None, error),
        },
        Ok(Declared::Object(kind)) => {
            let object = match kind {
                Kind::Service => Service::deserialize(value).map(Object::from),
                Kind::EndpointSlice => EndpointSlice::deserialize(value).map(Object::from),
                Kind::Node => Node::deserialize(value).map(Object::from),
                Kind::ServiceCidr => ServiceCIDR::deserialize(value).map(Object::from),
            };
            accept(object.map_err(Wrong::from), head.reference(kind), place, parsed);
        }
    }
}

#[derive(Deserialize)]
struct List {
    #[serde(default)]
    items: Vec<serde_json::Value>,
}

fn list_items(list: List, kind: Option<&(String, String)>, place: Place, parsed: &mut Parsed) {
    for (i, mut item) in list.items.into_iter().enumerate() {
        // The API server leaves both out of the items of a typed list.
        if let (Some((api_version, kind)), Some(object)) = (kind, item.as_object_mut()) {
            object.entry("apiVersion").or_insert_with(|| api_version.as_str().into());
            object.entry("kind").or_insert_with(|| kind.as_str().into());
        }
        json_value(item, Place { item: Some(i), ..place }, parsed);
    }
}

/// Takes an object in, if it has a name and is ours.
fn accept(object: Result<Object, Wrong>, named: Option<Named>, place: Place, parsed: &mut Parsed) {
    let mut object = match object {
        Ok(object) => object,
        Err(wrong) => return parsed.reject(place, named, wrong),
    };
    let Some(reference) = named.map(|named| named.object) else {
        return parsed.reject(place, None, Wrong { line: None, reason: "metadata.name is missing".into() });
    };
    match &mut object {
        Object::Service(o) => prepare(o.as_mut(), |o| &mut o.metadata, &reference),
        Object::EndpointSlice(o) => {
            prepare(o.as_mut(), |o| &mut o.metadata, &reference);
            // A file has not been through the API server, which fills this in.
            for port in o.ports.iter_mut().flatten() {
                port.name.get_or_insert_default();
            }
        }
        // Manifests are decoded in full.
        Object::SlimSlice(o) => prepare(o.as_mut(), |o| &mut o.metadata, &reference),
        Object::Node(o) => prepare(o.as_mut(), |o| &mut o.metadata, &reference),
        Object::ServiceCidr(o) => prepare(o.as_mut(), |o| &mut o.metadata, &reference),
    }
    if is_foreign(object.kind(), object.metadata()) {
        parsed.skipped.push(format!("{reference}, which is not for this proxy"));
    } else {
        parsed.objects.push(object);
    }
}

fn prepare<K: Strip>(object: &mut K, meta: impl Fn(&mut K) -> &mut ObjectMeta, reference: &ObjectRef) {
    object.strip();
    let meta = meta(object);
    meta.namespace = Some(reference.namespace.clone()).filter(|namespace| !namespace.is_empty());
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;

//! Where objects come from: a source sends [`Event`]s until its receiver is dropped.

pub mod kube;
pub mod manifests;
pub mod slim;
pub mod status;
pub mod strip;

use std::{collections::BTreeSet, fmt, sync::Arc};

use k8s_openapi::{
    api::{
        core::v1::{Node, Service},
        discovery::v1::EndpointSlice,
        networking::v1::ServiceCIDR,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use tokio::sync::mpsc;

use self::slim::SlimSlice;
use crate::{settings::SourceSettings, source::status::SourceStatus};

/// The kinds of objects that matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Service,
    EndpointSlice,
    Node,
    ServiceCidr,
}

impl Kind {
    /// Objects of this kind have a namespace.
    pub const fn is_namespaced(self) -> bool {
        matches!(self, Self::Service | Self::EndpointSlice)
    }
}

/// What an object is called. `namespace` is empty for kinds without namespaces.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectRef {
    pub kind: Kind,
    pub namespace: String,
    pub name: String,
}

/// An object as the API describes it.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    Service(Box<Service>),
    EndpointSlice(Box<EndpointSlice>),
    /// The same from a source that has many of them.
    SlimSlice(Box<SlimSlice>),
    Node(Box<Node>),
    ServiceCidr(Box<ServiceCIDR>),
}

/// Objects that are there and cannot be read, and could not be read since the agent started: what an earlier run knew of
/// them may still be in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// Services that are missing themselves, or of whose EndpointSlices one is: namespace and name.
    pub services: BTreeSet<(String, String)>,
    /// Something that cannot even be told what it is.
    pub unknown: bool,
}

/// What a source tells.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The object is new or has changed.
    Apply(Object),
    /// The object is gone. Also sent for objects that a fresh list no longer has.
    Delete(ObjectRef),
    /// These cannot be read, as of now. Not sent before there is one; before [`Event::Synced`] if there is one by then.
    Missing(Missing),
    /// Everything known at start has been sent: until then nothing may be programmed. Sent once.
    Synced,
}

impl Object {
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) | Self::SlimSlice(_) => Kind::EndpointSlice,
            Self::Node(_) => Kind::Node,
            Self::ServiceCidr(_) => Kind::ServiceCidr,
        }
    }

    pub const fn metadata(&self) -> &ObjectMeta {
        match self {
            Self::Service(o) => &o.metadata,
            Self::EndpointSlice(o) => &o.metadata,
            Self::SlimSlice(o) => &o.metadata,
            Self::Node(o) => &o.metadata,
            Self::ServiceCidr(o) => &o.metadata,
        }
    }

    /// `addressType` of an EndpointSlice.
    pub fn address_type(&self) -> Option<&str> {
        match self {
            Self::EndpointSlice(o) => Some(&o.address_type),
            Self::SlimSlice(o) => Some(&o.address_type),
            Self::Service(_) | Self::Node(_) | Self::ServiceCidr(_) => None,
        }
    }

    /// What the object is called.
    pub fn reference(&self) -> ObjectRef {
        let meta = self.metadata();
        ObjectRef {
            kind: self.kind(),
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
        }
    }
}

impl From<Service> for Object {
    fn from(object: Service) -> Self {
        Self::Service(Box::new(object))
    }
}

impl From<EndpointSlice> for Object {
    fn from(object: EndpointSlice) -> Self {
        Self::EndpointSlice(Box::new(object))
    }
}

impl From<Node> for Object {
    fn from(object: Node) -> Self {
        Self::Node(Box::new(object))
    }
}

impl From<ServiceCIDR> for Object {
    fn from(object: ServiceCIDR) -> Self {
        Self::ServiceCidr(Box::new(object))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
        })
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name)
        } else {
            write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}

/// A source that could not start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Kube(#[from] kube::Error),
    #[error(transparent)]
    Manifests(#[from] manifests::Error),
}

/// Runs the source that `settings` names. Returns an error if it cannot start (or, for manifests, can no longer watch),
/// and `Ok` when the receiver of `tx` is gone. A Kubernetes source never ends for reasons of its own.
pub async fn run(
    settings: SourceSettings,
    node_name: String,
    tx: mpsc::Sender<Event>,
    status: Arc<SourceStatus>,
) -> Result<(), Error> {
    match settings {
        SourceSettings::Kube { kubeconfig, master } => {
            let client = kube::client(kubeconfig.as_deref(), master.as_deref()).await?;
            kube::run(client, &node_name, tx, status).await;
        }
        SourceSettings::Manifests(dir) => manifests::run(dir, tx, status).await?,
    }
    Ok(())
}

/// The receiver of the events is gone: the agent is shutting down.
#[derive(Debug)]
pub(crate) struct Closed;

/// Sends one event and counts it.
pub(crate) async fn send(
    tx: &mpsc::Sender<Event>,
    status: &SourceStatus,
    event: Event,
) -> Result<(), Closed> {
    tx.send(event).await.map_err(|_| Closed)?;
    status.count_event();
    Ok(())
}

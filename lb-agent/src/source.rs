//! Where objects come from: a source sends [`Event`]s until its receiver is dropped.

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};

/// The kinds of objects that matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Service,
    EndpointSlice,
    Node,
}

/// What an object is called. `namespace` is empty for Nodes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectRef {
    pub kind: Kind,
    pub namespace: String,
    pub name: String,
}

/// An object as the API describes it.
#[derive(Clone, Debug)]
pub enum Object {
    Service(Box<Service>),
    EndpointSlice(Box<EndpointSlice>),
    Node(Box<Node>),
}

/// What a source tells.
#[derive(Clone, Debug)]
pub enum Event {
    /// The object is new or has changed.
    Apply(Object),
    /// The object is gone. Also sent for objects that a fresh list no longer has.
    Delete(ObjectRef),
    /// Everything known at start has been sent: until then nothing may be programmed. Sent once.
    Synced,
}

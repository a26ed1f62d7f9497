//! The agent: reads Kubernetes objects, fills the maps of the kernel programs, watches over them.

pub mod datapath;
pub mod host;
pub mod plan;
pub mod settings;
pub mod source;

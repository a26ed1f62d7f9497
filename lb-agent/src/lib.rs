//! The agent: reads Kubernetes objects, fills the maps of the kernel programs, watches over them.

pub mod datapath;
pub mod model;
pub mod plan;
pub mod settings;
pub mod source;

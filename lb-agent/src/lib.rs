//! The agent: reads Kubernetes objects, fills the maps of the kernel programs, watches over them.

pub mod cleanup;
pub mod cli;
pub mod config;
pub mod datapath;
pub mod health;
pub mod http;
pub mod inspect;
pub mod maps;
pub mod metrics;
pub mod model;
pub mod plan;
pub mod run;
pub mod settings;
pub mod source;
pub mod sweep;

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

/// An error with everything that caused it, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        text.push_str(": ");
        text.push_str(&e.to_string());
        cause = e.source();
    }
    text
}

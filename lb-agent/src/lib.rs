//! The agent: reads Kubernetes objects, fills the maps of the kernel programs, watches over them.

pub mod cli;
pub mod config;
pub mod configz;
pub mod datapath;
pub mod health;
pub mod healthcheck;
pub mod host;
pub mod http;
pub mod inspect;
mod machine;
pub mod maps;
pub mod memory;
pub mod metrics;
pub mod model;
pub mod plan;
pub mod reconcile;
pub mod run;
pub mod settings;
mod sockets;
pub mod source;
pub mod sweep;

/// An error with everything that caused it, on one line. Causes that the text already tells are not repeated.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        let why = e.to_string();
        if !text.contains(&why) {
            text.push_str(": ");
            text.push_str(&why);
        }
        cause = e.source();
    }
    text
}

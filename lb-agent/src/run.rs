//! The whole agent, from settings to its end.

use crate::settings::Settings;

/// Why the agent ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("this build has no data path yet (node {node})")]
    NotWired { node: String },
}

/// Runs the agent until it is told to stop (SIGTERM, SIGINT).
pub async fn run(settings: Settings) -> Result<(), Error> {
    Err(Error::NotWired { node: settings.node_name })
}

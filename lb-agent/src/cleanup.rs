//! Removes everything that the agent ever put on the node.

use std::path::Path;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{dir}: this build cannot clean up yet")]
    NotWired { dir: String },
}

pub fn cleanup(state_dir: &Path) -> Result<(), Error> {
    Err(Error::NotWired { dir: state_dir.display().to_string() })
}

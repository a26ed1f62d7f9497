//! Prints what is in the kernel's maps.

use std::path::Path;

use crate::cli::Output;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{dir}: this build cannot read maps yet")]
    NotWired { dir: String },
}

fn not_wired(state_dir: &Path) -> Result<(), Error> {
    Err(Error::NotWired { dir: state_dir.display().to_string() })
}

pub fn services(state_dir: &Path, _output: Output) -> Result<(), Error> {
    not_wired(state_dir)
}

pub fn backends(state_dir: &Path, _output: Output) -> Result<(), Error> {
    not_wired(state_dir)
}

pub fn flows(state_dir: &Path, _output: Output) -> Result<(), Error> {
    not_wired(state_dir)
}

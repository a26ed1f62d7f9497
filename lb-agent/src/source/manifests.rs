//! Objects from files.

use std::{path::PathBuf, sync::Arc};

use tokio::sync::mpsc;

use super::{Event, status::SourceStatus};

/// The directory cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no such directory")]
    Missing,
}

pub async fn run(_dir: PathBuf, _tx: mpsc::Sender<Event>, _status: Arc<SourceStatus>) -> Result<(), Error> {
    Err(Error::Missing)
}

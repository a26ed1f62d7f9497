//! Objects from the API server.

use std::{path::Path, sync::Arc};

use kube::Client;
use tokio::sync::mpsc;

use super::{Event, status::SourceStatus};

/// The API server cannot be spoken to, as far as that is known before the first request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no way to the API server: give --kubeconfig or --master")]
    NoConfig,
}

pub async fn client(_kubeconfig: Option<&Path>, _master: Option<&str>) -> Result<Client, Error> {
    Err(Error::NoConfig)
}

pub async fn run(_client: Client, _node_name: &str, _tx: mpsc::Sender<Event>, _status: Arc<SourceStatus>) {}

//! How to reach the API server, and as whom.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use kube::{
    Client, Config,
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};

/// Time to connect. The API server is near.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection that says nothing for this long is dead. API servers send a bookmark every minute
/// (k8s.io/apiserver/pkg/storage/cacher: bookmarkFrequency); one that does not is only asked again.
const SILENCE_LIMIT: Duration = Duration::from_secs(90);

/// Every pod has its service account there (unless it is told not to).
const SERVICE_ACCOUNT_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// The API server cannot be spoken to, as far as that is known before the first request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot use the kubeconfig {}: {source}", path.display())]
    Kubeconfig { path: PathBuf, source: Box<KubeconfigError> },
    #[error("cannot use the kubeconfig of $KUBECONFIG or ~/.kube/config: {0}")]
    DefaultKubeconfig(#[source] Box<KubeconfigError>),
    #[error("cannot use this pod's service account: {0}")]
    ServiceAccount(#[source] InClusterError),
    #[error(
        "no way to the API server: this is no pod, and there is no kubeconfig; give --kubeconfig or --master, or use --source manifests:DIR"
    )]
    Nowhere,
    #[error("--master {url:?} is not a URL: {reason}")]
    Master { url: String, reason: String },
    #[error("cannot make a client for the API server: {0}")]
    Client(#[source] Box<kube::Error>),
}

/// A client made from `kubeconfig`; without it from the pod's service account, then from `$KUBECONFIG` or
/// `~/.kube/config`. `master` overrides the address in each of them, and alone it means no credentials.
pub async fn client(kubeconfig: Option<&Path>, master: Option<&str>) -> Result<Client, Error> {
    let mut config = config(kubeconfig, master.is_some()).await?;
    if let Some(url) = master {
        let address = url.parse().map_err(|error: axum::http::uri::InvalidUri| Error::Master {
            url: url.into(),
            reason: error.to_string(),
        })?;
        match &mut config {
            Some(config) => config.cluster_url = address,
            None => config = Some(Config::new(address)),
        }
    }
    let mut config = config.ok_or(Error::Nowhere)?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(SILENCE_LIMIT);
    // Or the time that a connection lay idle would count.
    config.reset_reader_on_write = true;
    // Every request here is repeated with a back-off of its own; silent retries would only hide that.
    config.default_retry = false;
    tracing::info!(server = %config.cluster_url, "using the API server");
    Client::try_from(config).map_err(|source| Error::Client(Box::new(source)))
}

async fn config(kubeconfig: Option<&Path>, has_master: bool) -> Result<Option<Config>, Error> {
    if let Some(path) = kubeconfig {
        let wrong = |source| Error::Kubeconfig { path: path.to_owned(), source: Box::new(source) };
        let file = Kubeconfig::read_from(path).map_err(wrong)?;
        let options = KubeConfigOptions::default();
        return Config::from_custom_kubeconfig(file, &options).await.map(Some).map_err(wrong);
    }
    if Path::new(SERVICE_ACCOUNT_TOKEN).exists() {
        // With --master the address in the environment does not matter, and need not be there.
        let config = if has_master { Config::incluster_dns() } else { Config::incluster() };
        if !has_master {
            tracing::warn!(
                "using the address of the API server that pods get; it is a ClusterIP as a rule, which works on a new node only once \
                 this agent has programmed it: give --master"
            );
        }
        return config.map(Some).map_err(Error::ServiceAccount);
    }
    match Config::from_kubeconfig(&KubeConfigOptions::default()).await {
        Ok(config) => Ok(Some(config)),
        Err(KubeconfigError::FindPath) => Ok(None),
        Err(KubeconfigError::ReadConfig(error, _)) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::DefaultKubeconfig(Box::new(error))),
    }
}

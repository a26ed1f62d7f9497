//! Counts the answers of health probes, as kube-proxy does.

use axum::{
    Router,
    extract::{Request, State},
    middleware::{Next, from_fn_with_state},
    response::Response,
};

use super::kube_proxy::{KubeProxy, Probe};

/// The same routes, with the answers of /healthz and /livez counted.
pub fn counted(routes: Router, metrics: KubeProxy) -> Router {
    routes.layer(from_fn_with_state(metrics, count))
}

async fn count(State(metrics): State<KubeProxy>, request: Request, next: Next) -> Response {
    let probe = match request.uri().path() {
        "/healthz" => Some(Probe::Healthz),
        "/livez" => Some(Probe::Livez),
        _ => None,
    };
    let response = next.run(request).await;
    if let Some(probe) = probe {
        metrics.count_probe(probe, response.status().as_u16());
    }
    response
}

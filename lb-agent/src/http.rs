//! The HTTP servers: who answers where. A port that is taken never stops the agent; the server tries again.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderName, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{any, get},
};
use serde_json::Value;
use tokio::net::TcpListener;

use crate::{
    health::{Health, Status},
    metrics::{self, Metrics, probes::counted},
};

/// First and longest pause between two attempts to get a port.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// kube-proxy sends it with every answer that is not for scrapers.
const NOSNIFF: [(HeaderName, &str); 1] = [(header::X_CONTENT_TYPE_OPTIONS, "nosniff")];

/// What /proxyMode says. Scripts compare it with `iptables`, `ipvs` and `nftables` to know whose rules they will find on the
/// node: there are none of those here. No newline after it, as with kube-proxy.
pub const PROXY_MODE: &str = "ebpf";

/// Routes of the address for load balancers and the kubelet. Any method will do, as with kube-proxy.
pub fn healthz_routes(status: Arc<Status>) -> Router {
    Router::new()
        .route("/healthz", any(healthz))
        .route("/livez", any(livez))
        .route("/readyz", any(readyz))
        .with_state(status)
}

/// Routes of the address for monitoring (H7). `configz` is what /configz shows.
pub fn metrics_routes(status: Arc<Status>, metrics: Arc<Metrics>, configz: Value) -> Router {
    let scrape = Router::new().route("/metrics", get(scrape)).with_state(metrics);
    let configz = Arc::new(configz);
    healthz_routes(status)
        .merge(scrape)
        .route("/proxyMode", any(|| async { (NOSNIFF, PROXY_MODE) }))
        .route("/configz", any(move || async move { (NOSNIFF, Json(&*configz)).into_response() }))
}

/// Runs both servers for ever; `None` turns one off. One address for both is fine.
pub async fn serve(
    healthz: Option<SocketAddr>,
    metrics: Option<SocketAddr>,
    status: Arc<Status>,
    registry: Arc<Metrics>,
    configz: Value,
) {
    let probes = registry.kube_proxy().clone();
    let metrics_routes = metrics_routes(status.clone(), registry, configz);
    if healthz.is_some() && healthz == metrics {
        let routes = counted(metrics_routes, probes);
        return serve_one("metrics", "metrics-bind-address", metrics, routes, &status).await;
    }
    let healthz_routes = counted(healthz_routes(status.clone()), probes);
    tokio::join!(
        serve_one("healthz", "healthz-bind-address", healthz, healthz_routes, &status),
        serve_one("metrics", "metrics-bind-address", metrics, metrics_routes, &status),
    );
}

/// One server: waits for its port, serves, and starts over should serving ever end.
async fn serve_one(
    name: &'static str,
    flag: &'static str,
    address: Option<SocketAddr>,
    routes: Router,
    status: &Status,
) {
    let Some(address) = address else { return };
    loop {
        let listener = bind(name, flag, address, status).await;
        status.set_listening(name, true);
        tracing::info!(server = name, %address, "listening");
        if let Err(error) = axum::serve(listener, routes.clone()).await {
            tracing::warn!(server = name, %address, %error, "server ended; starting it again");
        }
        status.set_listening(name, false);
        tokio::time::sleep(RETRY_FIRST).await;
    }
}

/// Gets the port, however long that takes; says so once if it does not work at once.
async fn bind(name: &'static str, flag: &'static str, address: SocketAddr, status: &Status) -> TcpListener {
    let mut pause = RETRY_FIRST;
    let mut reported = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) if !reported => {
                status.set_listening(name, false);
                reported = true;
                tracing::error!(
                    server = name, %address, %error,
                    "cannot listen; free the port or choose another one with --{flag} (empty: off); trying again until it works, the rest goes on"
                );
            }
            Err(error) => tracing::debug!(server = name, %address, %error, "still cannot listen"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_MAX);
    }
}

fn answer(health: Health) -> Response {
    let code = if health.is_ok() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, NOSNIFF, Json(health)).into_response()
}

async fn healthz(State(status): State<Arc<Status>>) -> Response {
    answer(status.health(Instant::now(), SystemTime::now()))
}

async fn livez(State(status): State<Arc<Status>>) -> Response {
    answer(status.liveness(Instant::now(), SystemTime::now()))
}

async fn readyz(State(status): State<Arc<Status>>) -> Response {
    if status.is_ready() {
        (StatusCode::OK, "ok\n").into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not everything known at start is programmed yet\n").into_response()
    }
}

async fn scrape(State(metrics): State<Arc<Metrics>>) -> Response {
    // Reading maps takes system calls, which must not hold up the event loop.
    match tokio::task::spawn_blocking(move || metrics.encode()).await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Ok(Err(error)) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("cannot encode: {error}\n")).into_response()
        }
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("cannot collect: {error}\n")).into_response()
        }
    }
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;

//! One socket of a health check server: what it says, and to whom.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, Response, StatusCode, header},
};
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};

use crate::{health::Status, model::ServiceKey};

/// How many endpoints a node has: weighted balancers (Google's) divide new connections by it. Added in Kubernetes 1.31.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// Connections of one socket at a time. A balancer has a handful of checkers; more wait in the backlog.
const CONNECTIONS: usize = 128;
/// Time for a request to arrive, so that silent clients do not hold the places of others. Checkers ask every few seconds.
pub const REQUEST_WITHIN: Duration = Duration::from_secs(30);
/// Pause after a connection could not be accepted (no file descriptors: a second may help, trying at once does not).
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);

/// What a socket answers from.
#[derive(Debug)]
pub struct Answer {
    pub service: ServiceKey,
    pub local_endpoints: Arc<AtomicU32>,
    pub status: Arc<Status>,
}

impl Answer {
    /// The answer to every request: kube-proxy's, to the letter.
    pub fn response(&self, now: Instant) -> Response<Body> {
        let count = self.local_endpoints.load(Ordering::Relaxed);
        let healthy = self.status.is_healthy(now);
        let ServiceKey { namespace, name } = &self.service;
        // Names of objects hold nothing that JSON escapes (model/convert.rs: is_name).
        let body = format!(
            "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{namespace}\",\n\t\t\"name\": \"{name}\"\n\t}},\n\
             \t\"localEndpoints\": {count},\n\t\"serviceProxyHealthy\": {healthy}\n}}"
        );
        let mut response = Response::new(Body::from(body));
        if count == 0 || !healthy {
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        }
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(WEIGHT, HeaderValue::from(count));
        response
    }
}

/// Opens a socket of exactly one family.
pub fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    // Connections of an earlier server that are still closing must not keep the port.
    socket.set_reuse_address(true)?;
    // An address may still be tentative (RFC 4862), or come later than the object that names it: nothing to wait for.
    if at.is_ipv6() {
        socket.set_only_v6(true)?;
        socket.set_freebind_v6(true)?;
    } else {
        socket.set_freebind_v4(true)?;
    }
    socket.bind(&at.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Answers until dropped; its connections end with it, so that nobody hears of a Service that is gone.
pub async fn serve(listener: TcpListener, answer: Arc<Answer>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        // Never closed.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(service = %answer.service, %error, "cannot accept a health check");
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        let answer = answer.clone();
        connections.spawn(async move {
            // Whoever hangs up or sends nonsense has no answer to get.
            let _ = converse(stream, &answer).await;
            drop(place);
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn converse(stream: TcpStream, answer: &Answer) -> Result<(), hyper::Error> {
    let service = service_fn(|_| async { Ok::<_, Infallible>(answer.response(Instant::now())) });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_WITHIN)
        // Some checkers compare the names of headers as they are usually written.
        .title_case_headers(true)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::source::status::SourceStatus;

/// Only a test that fails waits for it.
const DEADLINE: Duration = Duration::from_secs(30);

/// Status code, headers and body of a GET.
async fn get(address: SocketAddr, path: &str) -> std::io::Result<(u16, String, String)> {
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    Ok((head.split(' ').nth(1).unwrap().parse().unwrap(), head.to_lowercase(), body.to_owned()))
}

/// Waits for an answer: the server may not have its port yet.
async fn get_soon(address: SocketAddr, path: &str) -> (u16, String, String) {
    let poll = async {
        loop {
            if let Ok(answer) = get(address, path).await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, poll).await.expect("no answer in time")
}

/// A port that nobody has. Somebody else could take it in between; then the server under test waits, and the test fails.
async fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

fn shared() -> (Arc<Status>, Arc<Metrics>) {
    let status = Arc::new(Status::default());
    (status.clone(), Arc::new(Metrics::new(Arc::new(SourceStatus::default()), status)))
}

#[tokio::test]
async fn h5_each_path_answers_as_the_status_is() {
    let (status, metrics) = shared();
    let (healthz, scrape) = (free_port().await, free_port().await);
    let server = tokio::spawn(serve(Some(healthz), Some(scrape), status.clone(), metrics, Value::Null));

    let (code, head, body) = get_soon(healthz, "/healthz").await;
    assert_eq!(code, 200);
    assert!(head.contains("application/json") && head.contains("x-content-type-options: nosniff"), "{head}");
    let json: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&json["healthy"], &json["nodeEligible"]), (&true.into(), &true.into()));

    assert_eq!(get_soon(healthz, "/readyz").await.0, 503);
    status.mark_ready();
    assert_eq!(get_soon(healthz, "/readyz").await.0, 200);

    status.node_deleted();
    let (code, _, body) = get_soon(healthz, "/healthz").await;
    let json: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((code, &json["healthy"], &json["nodeEligible"]), (503, &true.into(), &false.into()));
    assert_eq!(get_soon(healthz, "/livez").await.0, 200);
    let long_ago = Instant::now().checked_sub(crate::health::PENDING_LIMIT).unwrap();
    status.queued(long_ago);
    assert_eq!(get_soon(healthz, "/livez").await.0, 503);

    let (code, head, body) = get_soon(scrape, "/metrics").await;
    assert_eq!(code, 200);
    assert!(head.contains("application/openmetrics-text; version=1.0.0"), "{head}");
    assert!(body.contains("lb_ready 1.0\n") && body.ends_with("# EOF\n"), "{body}");
    assert!(body.contains("lb_http_listening{server=\"healthz\"} 1\n"), "{body}");
    assert_eq!(get_soon(scrape, "/livez").await.0, 503);
    // Metrics name Services; they are only on the address that is meant for them.
    for path in ["/metrics", "/proxyMode", "/configz"] {
        assert_eq!(get_soon(healthz, path).await.0, 404, "{path}");
    }
    server.abort();
}

#[tokio::test]
async fn a_port_in_use_is_taken_as_soon_as_it_is_free() {
    let (status, metrics) = shared();
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (healthz, scrape) = (taken.local_addr().unwrap(), free_port().await);
    let server = tokio::spawn(serve(Some(healthz), Some(scrape), status.clone(), metrics, Value::Null));
    // The other server works meanwhile, and says what is missing.
    let missing = async {
        while !get_soon(scrape, "/metrics").await.2.contains("lb_http_listening{server=\"healthz\"} 0\n") {}
    };
    tokio::time::timeout(DEADLINE, missing).await.unwrap();
    drop(taken);
    assert_eq!(get_soon(healthz, "/livez").await.0, 200);
    server.abort();
}

#[tokio::test]
async fn one_address_serves_both() {
    let (status, metrics) = shared();
    let address = free_port().await;
    let server = tokio::spawn(serve(Some(address), Some(address), status, metrics, Value::Null));
    for path in ["/healthz", "/livez", "/metrics"] {
        assert_eq!(get_soon(address, path).await.0, 200, "{path}");
    }
    server.abort();
}

#[tokio::test]
async fn nothing_is_served_where_nothing_is_wanted() {
    let (status, metrics) = shared();
    // Ends at once.
    tokio::time::timeout(DEADLINE, serve(None, None, status, metrics, Value::Null)).await.unwrap();
}

#[tokio::test]
async fn h7_scripts_find_the_mode_and_the_settings() {
    let (status, metrics) = shared();
    let address = free_port().await;
    let configz = serde_json::json!({"kubeproxy.config.k8s.io": {"Mode": "ebpf"}});
    let server = tokio::spawn(serve(None, Some(address), status, metrics, configz.clone()));
    let (code, head, body) = get_soon(address, "/proxyMode").await;
    // Scripts compare the whole body.
    assert_eq!((code, body.as_str()), (200, "ebpf"));
    assert!(head.contains("content-type: text/plain; charset=utf-8"), "{head}");
    assert!(head.contains("x-content-type-options: nosniff"), "{head}");
    let (code, head, body) = get_soon(address, "/configz").await;
    assert_eq!((code, serde_json::from_str::<Value>(&body).unwrap()), (200, configz));
    assert!(head.contains("content-type: application/json"), "{head}");
    assert!(head.contains("x-content-type-options: nosniff"), "{head}");
    server.abort();
}

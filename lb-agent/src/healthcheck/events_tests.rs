//! Against a server that stands in for the API.

use axum::{
    Json, Router,
    extract::State,
    http::{Method, StatusCode, Uri},
};
use serde_json::Value;
use tokio::net::TcpListener;

use super::*;

const DEADLINE: Duration = Duration::from_secs(30);

type Seen = mpsc::UnboundedSender<(Method, String, Value)>;

/// Tells every request, and says that it has made what it was given.
async fn api() -> (String, mpsc::UnboundedReceiver<(Method, String, Value)>) {
    async fn take(
        State(seen): State<Seen>,
        method: Method,
        uri: Uri,
        Json(body): Json<Value>,
    ) -> (StatusCode, Json<Value>) {
        let _ = seen.send((method, uri.path().to_owned(), body.clone()));
        (StatusCode::CREATED, Json(body))
    }
    let (seen_in, seen) = mpsc::unbounded_channel();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(axum::serve(listener, Router::new().fallback(take).with_state(seen_in)).into_future());
    (url, seen)
}

fn failure(reason: &str) -> Failure {
    Failure {
        service: ServiceKey::new("shop", "web"),
        uid: Some("a-uid".into()),
        port: 31000,
        reason: reason.into(),
    }
}

#[tokio::test]
async fn h4_a_failure_is_an_event_on_the_service() {
    let (url, mut seen) = api().await;
    let (failures_in, failures) = mpsc::channel(PENDING);
    let source = SourceSettings::Kube { kubeconfig: None, master: Some(url) };
    let task = tokio::spawn(report(source, "node1".into(), failures));
    failures_in.send(failure("0.0.0.0:31000: Address already in use (os error 98)")).await.unwrap();
    let (method, path, event) = timeout(DEADLINE, seen.recv()).await.unwrap().unwrap();
    assert_eq!((method, path.as_str()), (Method::POST, "/apis/events.k8s.io/v1/namespaces/shop/events"));
    let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    assert_eq!((text("/type"), text("/reason")), ("Warning", "FailedToStartServiceHealthcheck"));
    assert_eq!(text("/action"), "Listen");
    assert_eq!(
        text("/note"),
        "node node1 failed to start healthcheck \"shop/web\" on port 31000: 0.0.0.0:31000: Address already in use (os error 98)"
    );
    assert_eq!((text("/regarding/kind"), text("/regarding/apiVersion")), ("Service", "v1"));
    assert_eq!((text("/regarding/namespace"), text("/regarding/name")), ("shop", "web"));
    assert_eq!(text("/regarding/uid"), "a-uid");
    assert_eq!((text("/reportingController"), text("/reportingInstance")), ("lb-agent", "node1"));
    // Ends with whoever finds failures.
    drop(failures_in);
    timeout(DEADLINE, task).await.unwrap().unwrap();
    assert!(seen.try_recv().is_err(), "one request");
}

#[tokio::test]
async fn h4_manifests_have_nobody_to_tell() {
    let (failures_in, failures) = mpsc::channel(PENDING);
    failures_in.send(failure("x")).await.unwrap();
    drop(failures_in);
    let source = SourceSettings::Manifests("/nowhere".into());
    timeout(DEADLINE, report(source, "node1".into(), failures)).await.unwrap();
}

#[test]
fn h4_a_note_is_never_longer_than_the_api_takes() {
    let note = failure(&"ä".repeat(2000)).note("node1");
    assert!(note.len() <= 1024 && note.len() > 1020, "{}", note.len());
}

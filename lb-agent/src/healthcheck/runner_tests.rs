//! Real sockets on loopback.

use std::{net::IpAddr, sync::atomic::Ordering};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch::Sender,
    time::{sleep, timeout},
};

use super::{super::Server, *};
use crate::health::PENDING_LIMIT;

/// Only a test that fails waits for it.
const DEADLINE: Duration = Duration::from_secs(30);

struct Running {
    desired: Sender<Desired>,
    status: Arc<Status>,
    failures: mpsc::Receiver<Failure>,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn start(addresses: &[&str]) -> Running {
    let addresses = addresses.iter().map(|a| a.parse().unwrap()).collect();
    let (desired, follow) = watch::channel(Desired { addresses, ..Desired::default() });
    let (failures_in, failures) = mpsc::channel(8);
    let status = Arc::new(Status::default());
    let task = tokio::spawn(run(follow, status.clone(), failures_in));
    Running { desired, status, failures, task }
}

fn key(name: &str) -> ServiceKey {
    ServiceKey::new("shop", name)
}

fn server(port: u16, v4: u32, v6: Option<u32>) -> Server {
    let count = |n| Arc::new(AtomicU32::new(n));
    let mut local_endpoints = BTreeMap::from([(Family::V4, count(v4))]);
    local_endpoints.extend(v6.map(|n| (Family::V6, count(n))));
    Server { port, uid: Some("a-uid".into()), local_endpoints }
}

impl Running {
    fn put(&self, name: &str, server: Server) {
        self.desired.send_modify(|d| drop(d.servers.insert(key(name), server)));
    }
    fn remove(&self, name: &str) {
        self.desired.send_modify(|d| drop(d.servers.remove(&key(name))));
    }
    fn set_count(&self, name: &str, n: u32) {
        self.desired.borrow().servers[&key(name)].local_endpoints[&Family::V4].store(n, Ordering::Relaxed);
    }
}

/// A port that nobody has on any address: below those that the kernel gives to clients, and another one for each call and
/// (as far as can be) for each process that tests at the same time.
async fn free_port() -> u16 {
    static CALLS: AtomicU32 = AtomicU32::new(0);
    loop {
        let n = std::process::id().wrapping_mul(61).wrapping_add(CALLS.fetch_add(1, Ordering::Relaxed));
        let port = 12_000 + u16::try_from(n % 16_000).unwrap();
        if TcpListener::bind((std::net::Ipv6Addr::UNSPECIFIED, port)).await.is_ok() {
            return port;
        }
    }
}

/// Head and body of the answer to one request.
async fn ask(at: SocketAddr, request: &str) -> std::io::Result<(String, String)> {
    let mut stream = TcpStream::connect(at).await?;
    let request = format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    let (head, body) = text.split_once("\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok((head.to_owned(), body.to_owned()))
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::new([127, 0, 0, 1].into(), port)
}

/// The status code, or `None` if nobody listens.
async fn code(at: SocketAddr) -> Option<u16> {
    let (head, _) = ask(at, "GET /").await.ok()?;
    head.split(' ').nth(1)?.parse().ok()
}

async fn wait_for_code(at: SocketAddr, expected: Option<u16>) {
    let poll = async {
        while code(at).await != expected {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(DEADLINE, poll).await.unwrap_or_else(|_| panic!("{at} never came to {expected:?}"));
}

#[tokio::test]
async fn h1_every_path_gets_the_answer_of_kube_proxy() {
    let (running, port) = (start(&["127.0.0.1"]), free_port().await);
    running.put("web", server(port, 2, None));
    wait_for_code(local(port), Some(200)).await;
    for request in ["GET /", "GET /healthz", "GET /a/b?c=d", "POST /x", "OPTIONS *"] {
        let (head, body) = ask(local(port), request).await.unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{request}: {head}");
        // What Go prints (pkg/proxy/healthcheck/service_health.go), with its tabs and without a newline at the end.
        assert_eq!(
            body,
            "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}"
        );
    }
    assert_eq!(ask(local(port), "HEAD /").await.unwrap().1, "");
}

#[tokio::test]
async fn h1_200_needs_an_endpoint_and_a_healthy_proxy() {
    let (running, port) = (start(&["127.0.0.1"]), free_port().await);
    running.put("web", server(port, 0, None));
    wait_for_code(local(port), Some(503)).await;
    let (_, body) = ask(local(port), "GET /").await.unwrap();
    let json: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&json["localEndpoints"], &json["serviceProxyHealthy"]), (&0.into(), &true.into()));
    running.set_count("web", 1);
    assert_eq!(code(local(port)).await, Some(200));
    let long_ago = std::time::Instant::now().checked_sub(PENDING_LIMIT).unwrap();
    running.status.queued(long_ago);
    let (head, body) = ask(local(port), "GET /").await.unwrap();
    assert!(head.starts_with("HTTP/1.1 503 Service Unavailable\r\n"), "{head}");
    let json: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&json["localEndpoints"], &json["serviceProxyHealthy"]), (&1.into(), &false.into()));
    running.status.programmed(std::time::SystemTime::now());
    assert_eq!(code(local(port)).await, Some(200));
    // A node that is going away is for /healthz to tell: kube-proxy asks Health(), not NodeEligible().
    running.status.node_deleted();
    assert_eq!(code(local(port)).await, Some(200));
}

#[tokio::test]
async fn h2_headers_are_those_of_kube_proxy() {
    let (running, port) = (start(&["127.0.0.1"]), free_port().await);
    running.put("web", server(port, 7, None));
    wait_for_code(local(port), Some(200)).await;
    for (count, status) in [(7, "200 OK"), (0, "503 Service Unavailable")] {
        running.set_count("web", count);
        let (head, body) = ask(local(port), "GET /").await.unwrap();
        let lines: BTreeSet<_> = head.lines().filter(|l| !l.starts_with("Date: ")).collect();
        let (status, weight) =
            (format!("HTTP/1.1 {status}"), format!("X-Load-Balancing-Endpoint-Weight: {count}"));
        let length = format!("Content-Length: {}", body.len());
        let expected = [
            status.as_str(),
            "Content-Type: application/json",
            "X-Content-Type-Options: nosniff",
            weight.as_str(),
            length.as_str(),
            "Connection: close",
        ];
        assert_eq!(lines, expected.into());
    }
}

#[tokio::test]
async fn h4_a_socket_is_open_as_long_as_nothing_changes_for_it() {
    let running = start(&["127.0.0.1"]);
    let (port, other, moved) = (free_port().await, free_port().await, free_port().await);
    running.put("web", server(port, 1, None));
    wait_for_code(local(port), Some(200)).await;
    // A connection that stays open sees whether its server does.
    let mut open = TcpStream::connect(local(port)).await.unwrap();
    running.put("second", server(other, 1, None));
    wait_for_code(local(other), Some(200)).await;
    open.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut start = [0; 15];
    open.read_exact(&mut start).await.unwrap();
    assert_eq!(&start, b"HTTP/1.1 200 OK");

    running.put("web", server(moved, 1, None));
    wait_for_code(local(moved), Some(200)).await;
    assert_eq!(code(local(port)).await, None);
    // Open connections end with the server, and not by being idle.
    timeout(server::REQUEST_WITHIN / 2, open.read_to_end(&mut Vec::new())).await.unwrap().ok();
    running.remove("web");
    wait_for_code(local(moved), None).await;
    assert_eq!(code(local(other)).await, Some(200));
}

#[tokio::test]
async fn h4_ports_can_change_hands_at_once() {
    let running = start(&["127.0.0.1"]);
    let (one, two) = (free_port().await, free_port().await);
    running.put("a", server(one, 1, None));
    running.put("b", server(two, 0, None));
    wait_for_code(local(one), Some(200)).await;
    wait_for_code(local(two), Some(503)).await;
    running.desired.send_modify(|d| {
        d.servers.insert(key("a"), server(two, 1, None));
        d.servers.insert(key("b"), server(one, 0, None));
    });
    wait_for_code(local(one), Some(503)).await;
    wait_for_code(local(two), Some(200)).await;
    // A Service that is made again within one turn.
    running.put("a", server(two, 0, None));
    wait_for_code(local(two), Some(503)).await;
}

#[tokio::test]
async fn h4_sockets_follow_the_addresses_and_each_family_answers_for_itself() {
    let (running, port) = (start(&["0.0.0.0"]), free_port().await);
    let v6 = SocketAddr::new("::1".parse().unwrap(), port);
    running.put("web", server(port, 1, Some(0)));
    wait_for_code(local(port), Some(200)).await;
    assert_eq!(code(v6).await, None);
    let set = |list: &[&str]| {
        let addresses = list.iter().map(|a| a.parse::<IpAddr>().unwrap()).collect();
        running.desired.send_modify(|d| d.addresses = addresses);
    };
    set(&["0.0.0.0", "::"]);
    wait_for_code(v6, Some(503)).await;
    assert_eq!(code(local(port)).await, Some(200));
    let second = SocketAddr::new([127, 0, 0, 2].into(), port);
    assert_eq!(code(second).await, Some(200));
    // From everything to a list.
    set(&["127.0.0.2"]);
    wait_for_code(second, Some(200)).await;
    wait_for_code(local(port), None).await;
    wait_for_code(v6, None).await;
    // An address that the node does not have (yet) is nothing to fail for.
    set(&["127.0.0.1", "203.0.113.77", "2001:db8::77"]);
    wait_for_code(local(port), Some(200)).await;
    set(&[]);
    wait_for_code(local(port), None).await;
    drop(running);
}

#[tokio::test]
async fn h4_a_port_that_is_taken_is_told_once_and_had_as_soon_as_it_is_free() {
    let mut running = start(&["127.0.0.1", "127.0.0.2"]);
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = taken.local_addr().unwrap().port();
    running.put("web", server(port, 1, None));
    let failure = timeout(DEADLINE, running.failures.recv()).await.unwrap().unwrap();
    assert_eq!((&failure.service, failure.uid.as_deref(), failure.port), (&key("web"), Some("a-uid"), port));
    assert!(failure.reason.contains(&format!("127.0.0.1:{port}: Address already in use")), "{failure:?}");
    // The other address answers meanwhile, and other Services have their ports.
    wait_for_code(SocketAddr::new([127, 0, 0, 2].into(), port), Some(200)).await;
    let other = free_port().await;
    running.put("other", server(other, 1, None));
    wait_for_code(local(other), Some(200)).await;
    // Longer than the first few retries take.
    sleep(RETRY_FIRST * 4).await;
    drop(taken);
    wait_for_code(local(port), Some(200)).await;
    assert!(running.failures.try_recv().is_err(), "once per failure, not per attempt");
    // A new failure is told anew.
    running.remove("web");
    wait_for_code(local(port), None).await;
    let _taken = TcpListener::bind(local(port)).await.unwrap();
    running.put("web", server(port, 1, None));
    assert_eq!(timeout(DEADLINE, running.failures.recv()).await.unwrap().unwrap().service, key("web"));
}

#[tokio::test]
async fn h4_a_service_that_goes_while_its_port_is_taken_is_not_tried_again() {
    let mut running = start(&["127.0.0.1"]);
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = taken.local_addr().unwrap();
    running.put("web", server(at.port(), 1, None));
    timeout(DEADLINE, running.failures.recv()).await.unwrap().unwrap();
    running.remove("web");
    let marker = free_port().await;
    running.put("marker", server(marker, 1, None));
    wait_for_code(local(marker), Some(200)).await;
    drop(taken);
    // The retry would have been due several times.
    sleep(RETRY_FIRST * 4).await;
    assert_eq!(code(at).await, None);
}

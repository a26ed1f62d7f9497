//! The Kubernetes source against a server that lists and watches as the API server does, and against a real cluster if
//! `LB_TEST_KUBECONFIG` names one.

mod api_server;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use api_server::{ApiServer, Cut, NODES, SERVICE_CIDRS, SERVICES, SLICES};
use lb_agent::source::{Event, Kind, Object, kube, status::SourceStatus};
use serde_json::{Value, json};
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};

/// Services of other proxies are read: packets to their ClusterIPs are not to be dropped.
const SELECTORS: [(&str, &str); 3] = [
    (SERVICES, "!service.kubernetes.io/headless"),
    (SLICES, "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name"),
    (SERVICE_CIDRS, ""),
];

/// Far longer than any back-off in these tests; only a test that fails waits for it.
const DEADLINE: Duration = Duration::from_secs(30);

struct Bed {
    server: Arc<ApiServer>,
    rx: mpsc::Receiver<Event>,
    status: Arc<SourceStatus>,
    task: JoinHandle<()>,
}

/// A server with three Services, a slice and a node, and a source that speaks to it.
async fn start() -> Bed {
    let server = ApiServer::start().await;
    for name in ["a", "b", "c"] {
        server.apply(SERVICES, name, service("10.96.0.1"));
    }
    server.apply(SLICES, "a-1", json!({"addressType": "IPv4", "endpoints": [], "ports": []}));
    server.apply(NODES, "n1", json!({"spec": {"podCIDR": "10.1.0.0/24"}}));
    connect(server).await
}

async fn kube_run(client: ::kube::Client, tx: mpsc::Sender<Event>, status: Arc<SourceStatus>) {
    kube::run(client, "n1", tx, status).await;
}

/// The address leads nowhere (RFC 5737): the one given as master must win.
fn kubeconfig() -> String {
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "http://192.0.2.1:9"}}],
        "users": [{"name": "u", "user": {}}],
    });
    config.to_string()
}

async fn connect(server: Arc<ApiServer>) -> Bed {
    let config = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(config.path(), kubeconfig()).unwrap();
    let master = format!("http://{}", server.address);
    let client = kube::client(Some(config.path()), Some(&master)).await.unwrap();
    let status = Arc::new(SourceStatus::default());
    let (tx, rx) = mpsc::channel(64);
    let task = tokio::spawn(kube_run(client, tx, status.clone()));
    Bed { server, rx, status, task }
}

fn service(ip: &str) -> Value {
    json!({
        "metadata": {
            "managedFields": [{"manager": "kubectl"}],
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}", "service.kubernetes.io/topology-mode": "Auto"},
        },
        "spec": {"clusterIP": ip, "ports": [{"port": 80}]},
    })
}

impl Bed {
    async fn next(&mut self) -> Event {
        timeout(DEADLINE, self.rx.recv()).await.expect("no event in time").expect("the source ended")
    }

    /// The names in `Apply` and `Delete` events up to `Synced`.
    async fn synced(&mut self) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        loop {
            match self.next().await {
                Event::Synced => return names,
                event => assert!(names.insert(name(&event)), "sent twice: {event:?}"),
            }
        }
    }

    /// As many events as these, in any order.
    async fn expect(&mut self, names: &[&str]) {
        let mut got = Vec::new();
        for _ in names {
            got.push(name(&self.next().await));
        }
        got.sort();
        assert_eq!(got, names);
    }

    async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let poll = async {
            while !condition(self) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(DEADLINE, poll).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    fn count(&self, path: &str, watch: bool) -> usize {
        self.server.requests().iter().filter(|r| r.path == path && r.is_watch() == watch).count()
    }

    /// Waits until the three watches stand that matter for being connected.
    async fn watching(&self) {
        self.until("all watches stand", |bed| {
            [SERVICES, SLICES, NODES].iter().all(|path| bed.count(path, true) > 0)
        })
        .await;
    }
}

fn name(event: &Event) -> String {
    match event {
        Event::Apply(object) => format!("+{}", object.reference().name),
        Event::Delete(reference) => format!("-{}", reference.name),
        Event::Missing(_) => "missing".into(),
        Event::Synced => "synced".into(),
    }
}

#[tokio::test]
async fn lists_in_pages_then_syncs_then_follows() {
    let mut bed = start().await;
    assert_eq!(bed.synced().await, ["+a", "+a-1", "+b", "+c", "+n1"].map(String::from).into());
    bed.watching().await;
    bed.server.apply(SERVICES, "a", service("10.96.0.9"));
    let Event::Apply(Object::Service(changed)) = bed.next().await else { panic!() };
    assert_eq!(changed.spec.unwrap().cluster_ip.as_deref(), Some("10.96.0.9"));
    bed.server.delete(SLICES, "a-1");
    let Event::Delete(gone) = bed.next().await else { panic!() };
    assert_eq!((gone.kind, &*gone.namespace, &*gone.name), (Kind::EndpointSlice, "ns", "a-1"));
    assert!(bed.status.connected());
    assert_eq!(bed.status.relists(), 4);
}

#[tokio::test]
async fn asks_only_for_what_is_needed() {
    let mut bed = start().await;
    bed.synced().await;
    bed.watching().await;
    let requests = bed.server.requests();
    for request in &requests {
        if request.path == NODES {
            assert_eq!(request.get("fieldSelector"), "metadata.name=n1", "{request:?}");
        } else {
            assert!(SELECTORS.contains(&(&request.path, request.get("labelSelector"))), "{request:?}");
        }
        if request.is_watch() {
            assert_eq!(request.get("allowWatchBookmarks"), "true", "{request:?}");
            assert_eq!(request.get("resourceVersion"), "15", "{request:?}");
        } else {
            // There are many of these, and a page is in memory as a whole.
            let many = ["/services", "/endpointslices"].iter().any(|kind| request.path.ends_with(kind));
            let limit = if many { "250" } else { "500" };
            assert_eq!(request.get("limit"), limit, "{request:?}");
        }
    }
    let pages: Vec<_> =
        requests.iter().filter(|r| r.path == SERVICES && !r.is_watch()).map(|r| r.get("continue")).collect();
    assert_eq!(pages, ["", "b"]);
}

#[tokio::test]
async fn drops_what_the_agent_never_reads() {
    let mut bed = start().await;
    loop {
        if let Event::Apply(Object::Service(service)) = bed.next().await {
            assert_eq!(service.metadata.managed_fields, None);
            let annotations: Vec<_> = service.metadata.annotations.unwrap().into_keys().collect();
            assert_eq!(annotations, ["service.kubernetes.io/topology-mode"]);
            return;
        }
    }
}

#[tokio::test]
async fn is_not_in_sync_before_all_kinds_are_listed() {
    let server = ApiServer::start().await;
    server.apply(SERVICES, "a", service("10.96.0.1"));
    server.refuse(NODES, Some(403));
    let mut bed = connect(server).await;
    bed.expect(&["+a"]).await;
    // Two refusals: there was time for a premature Synced.
    bed.until("asked for nodes twice", |bed| bed.count(NODES, false) >= 2).await;
    assert!(bed.rx.try_recv().is_err());
    assert!(!bed.status.connected());
    bed.server.refuse(NODES, None);
    assert_eq!(bed.next().await, Event::Synced);
}

#[tokio::test]
async fn c7_service_cidrs_are_followed() {
    let server = ApiServer::start().await;
    server.apply(SERVICE_CIDRS, "kubernetes", json!({"spec": {"cidrs": ["10.96.0.0/16"]}}));
    let mut bed = connect(server).await;
    assert_eq!(bed.synced().await, ["+kubernetes".to_owned()].into());
    bed.until("the watch stands", |bed| bed.count(SERVICE_CIDRS, true) > 0).await;
    bed.server.apply(SERVICE_CIDRS, "more", json!({"spec": {"cidrs": ["10.97.0.0/16"]}}));
    let Event::Apply(Object::ServiceCidr(more)) = bed.next().await else { panic!() };
    assert_eq!(more.spec.unwrap().cidrs.unwrap(), ["10.97.0.0/16"]);
    bed.server.delete(SERVICE_CIDRS, "kubernetes");
    let Event::Delete(gone) = bed.next().await else { panic!() };
    assert_eq!((gone.kind, &*gone.namespace, &*gone.name), (Kind::ServiceCidr, "", "kubernetes"));
}

#[tokio::test]
async fn c7_a_server_without_service_cidrs_is_as_good_as_any() {
    for code in [404, 403, 503] {
        let server = ApiServer::start().await;
        server.apply(SERVICES, "a", service("10.96.0.1"));
        server.refuse(SERVICE_CIDRS, Some(code));
        let mut bed = connect(server).await;
        assert_eq!(bed.synced().await, ["+a".to_owned()].into(), "{code}");
        bed.watching().await;
        bed.until("connected", |bed| bed.status.connected()).await;
        // Only what may pass by itself is tried again soon.
        if code == 503 {
            bed.until("asked again", |bed| bed.count(SERVICE_CIDRS, false) > 1).await;
        } else {
            assert_eq!(bed.count(SERVICE_CIDRS, false), 1, "{code}");
        }
    }
}

async fn gone(as_status: bool) {
    let mut bed = start().await;
    bed.synced().await;
    bed.watching().await;
    bed.server.refuse(SERVICES, Some(503));
    bed.server.cut(Cut::MidLine);
    // While nobody listens, one goes, one changes, one is new, and the history of that is lost.
    bed.until("the watch is being tried again", |bed| bed.count(SERVICES, true) >= 2).await;
    bed.server.delete(SERVICES, "b");
    bed.server.apply(SERVICES, "d", service("10.96.0.4"));
    bed.server.compact(as_status);
    bed.server.refuse(SERVICES, None);
    let mut names = BTreeSet::new();
    while !names.contains("-b") {
        let event = bed.next().await;
        assert_ne!(event, Event::Synced, "sent a second time");
        names.insert(name(&event));
    }
    assert!(names.contains("+d"), "{names:?}");
    assert!(!names.contains("-a") && !names.contains("-c"), "{names:?}");
    // And it follows again.
    bed.until("watching again", |bed| bed.status.connected()).await;
    bed.server.apply(SERVICES, "e", service("10.96.0.5"));
    while name(&bed.next().await) != "+e" {}
}

#[tokio::test]
async fn lists_again_when_history_is_gone_as_a_status() {
    gone(true).await;
}

#[tokio::test]
async fn lists_again_when_history_is_gone_as_an_event() {
    gone(false).await;
}

#[tokio::test]
async fn resumes_where_a_connection_broke_off() {
    for how in [Cut::MidLine, Cut::Clean] {
        let mut bed = start().await;
        bed.synced().await;
        bed.watching().await;
        bed.server.cut(how);
        bed.server.apply(SERVICES, "d", service("10.96.0.4"));
        bed.expect(&["+d"]).await;
        bed.server.apply(SLICES, "d-1", json!({"addressType": "IPv4", "endpoints": []}));
        bed.expect(&["+d-1"]).await;
        assert_eq!(bed.status.relists(), 4, "{how:?}: listed again");
    }
}

#[tokio::test]
async fn resumes_from_the_last_bookmark() {
    let mut bed = start().await;
    bed.synced().await;
    bed.watching().await;
    let version = bed.server.bookmark(SERVICES, "Service", "v1").to_string();
    // An event of the same watch, after the bookmark was written, proves that the bookmark was read.
    bed.server.apply(SERVICES, "d", service("10.96.0.4"));
    bed.expect(&["+d"]).await;
    let bookmark = bed.server.bookmark(SERVICES, "Service", "v1").to_string();
    assert_ne!(version, bookmark);
    bed.server.apply(SLICES, "d-1", json!({"addressType": "IPv4", "endpoints": []}));
    bed.expect(&["+d-1"]).await;
    bed.until("resumed from the bookmark", |bed| {
        bed.server.cut(Cut::Clean);
        let requests = bed.server.requests();
        requests.iter().any(|r| r.path == SERVICES && r.is_watch() && r.get("resourceVersion") == bookmark)
    })
    .await;
    assert_eq!(bed.status.relists(), 4);
}

#[tokio::test]
async fn outlives_an_api_server_that_is_away() {
    let mut bed = start().await;
    bed.synced().await;
    bed.watching().await;
    bed.server.stop().await;
    bed.until("the loss is noticed", |bed| !bed.status.connected()).await;
    bed.server.apply(SERVICES, "d", service("10.96.0.4"));
    bed.server.delete(SERVICES, "a");
    assert!(bed.rx.try_recv().is_err(), "an event while the server is away");
    bed.server.restart().await;
    bed.expect(&["+d", "-a"]).await;
    // The other kinds have nothing to tell, and still count as connected after a while.
    bed.until("connected again", |bed| bed.status.connected()).await;
    assert_eq!(bed.status.relists(), 4, "listed again");
    assert!(bed.status.reconnects() > 0);
}

#[tokio::test]
async fn waits_for_an_api_server_that_comes_later() {
    let server = ApiServer::start().await;
    server.apply(SERVICES, "a", service("10.96.0.1"));
    server.stop().await;
    let mut bed = connect(server).await;
    bed.until("it tried", |bed| bed.status.reconnects() >= 3).await;
    bed.server.restart().await;
    assert_eq!(bed.synced().await, ["+a"].map(String::from).into());
}

/// The server does not speak TLS; that the client does, and survives it, is what is seen here.
#[tokio::test]
async fn a_failed_handshake_is_one_more_failure() {
    let server = ApiServer::start().await;
    let master = format!("https://{}", server.address);
    let config = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(config.path(), kubeconfig()).unwrap();
    let client = kube::client(Some(config.path()), Some(&master)).await.unwrap();
    let (tx, mut rx) = mpsc::channel(64);
    let status = Arc::new(SourceStatus::default());
    let task = tokio::spawn(kube_run(client, tx, status.clone()));
    let tried = async {
        while status.reconnects() < 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(DEADLINE, tried).await.expect("never tried");
    assert!(!status.connected() && rx.try_recv().is_err() && !task.is_finished());
    task.abort();
}

#[tokio::test]
async fn ends_with_its_receiver() {
    let mut bed = start().await;
    bed.synced().await;
    drop(bed.rx);
    timeout(DEADLINE, bed.task).await.expect("still running").unwrap();
}

#[tokio::test]
async fn a_kubeconfig_that_is_missing_is_named() {
    let error = kube::client(Some("/nowhere/kubeconfig".as_ref()), None).await.err().unwrap();
    assert!(error.to_string().contains("/nowhere/kubeconfig"), "{error}");
}

#[tokio::test]
async fn a_real_cluster_if_there_is_one() {
    let Some(path) = std::env::var_os("LB_TEST_KUBECONFIG") else {
        // Written past the test harness, which hides the output of tests that pass.
        use std::io::Write as _;
        let line = "NOT RUN: a_real_cluster_if_there_is_one (LB_TEST_KUBECONFIG names no cluster)\n";
        std::io::stderr().write_all(line.as_bytes()).unwrap();
        return;
    };
    let client = kube::client(Some(path.as_ref()), None).await.unwrap();
    let (tx, mut rx) = mpsc::channel(64);
    let status = Arc::new(SourceStatus::default());
    let task = tokio::spawn(kube::run(client, "no-such-node", tx, status));
    let mut names = BTreeSet::new();
    loop {
        match timeout(DEADLINE, rx.recv()).await.expect("no event in time").expect("the source ended") {
            Event::Synced => break,
            event => names.insert(name(&event)),
        };
    }
    // Every cluster has the Service of its own API server.
    assert!(names.contains("+kubernetes"), "{names:?}");
    drop(rx);
    timeout(DEADLINE, task).await.expect("still running").unwrap();
}

use std::sync::Mutex;

use super::{
    core::tests::{FakeKernel, rules, service, slice},
    *,
};
use crate::{
    maps::{Applied, MapError},
    plan::{ActualState, Capacities, MapOp},
    source::{Object, status::SourceStatus},
};

/// A kernel that the test can look into while the loop has it.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<FakeKernel>>);

impl Kernel for Shared {
    fn capacities(&self) -> Capacities {
        self.0.lock().unwrap().capacities()
    }
    fn read_actual(&self) -> Result<ActualState, MapError> {
        self.0.lock().unwrap().read_actual()
    }
    fn apply(&mut self, ops: &[MapOp]) -> Result<Applied, MapError> {
        self.0.lock().unwrap().apply(ops)
    }
}

struct Running {
    kernel: Shared,
    events: mpsc::Sender<Event>,
    addresses: watch::Sender<BTreeSet<IpAddr>>,
    audit: Arc<Notify>,
    status: Arc<Status>,
    metrics: Arc<Metrics>,
    task: tokio::task::JoinHandle<Result<(), Error>>,
}

fn start() -> Running {
    start_with(BTreeSet::from([[192, 168, 0, 1].into()]))
}

fn start_with(addresses: BTreeSet<IpAddr>) -> Running {
    let kernel = Shared::default();
    let (events_in, events) = mpsc::channel(16);
    let (addresses_in, addresses) = watch::channel(addresses);
    let (retired, _) = mpsc::unbounded_channel();
    let status = Arc::new(Status::default());
    let audit = Arc::new(Notify::new());
    let metrics = Arc::new(Metrics::new(Arc::new(SourceStatus::default()), status.clone()));
    let wiring = Wiring {
        events,
        addresses,
        audit: audit.clone(),
        retired,
        status: status.clone(),
        metrics: metrics.clone(),
    };
    let reconciler = Reconciler::new(Core::new(kernel.clone(), rules()), "node1", wiring);
    let task = tokio::spawn(reconciler.run());
    Running { kernel, events: events_in, addresses: addresses_in, audit, status, metrics, task }
}

impl Running {
    /// Waits for a line of the scrape that begins like this.
    async fn sample(&self, start: &str) {
        let there = async {
            while !self.metrics.encode().unwrap().lines().any(|line| line.starts_with(start)) {
                sleep(Duration::from_millis(1)).await;
            }
        };
        if timeout(Duration::from_secs(20), there).await.is_err() {
            panic!("{start} not in\n{}", self.metrics.encode().unwrap());
        }
    }

    async fn frontends(&self, n: usize) {
        let there = async {
            while self.kernel.0.lock().unwrap().state.frontends.len() != n {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(20), there).await.expect("frontends in time");
    }
}

#[tokio::test]
async fn what_the_source_knows_at_start_is_taken_in_before_there_are_maps() {
    let (events_in, events) = mpsc::channel(1);
    let (_addresses_in, addresses) = watch::channel(BTreeSet::from([[192, 168, 0, 1].into()]));
    let status = Arc::new(Status::default());
    let wiring = Wiring {
        events,
        addresses,
        audit: Arc::default(),
        retired: mpsc::unbounded_channel().0,
        status: status.clone(),
        metrics: Arc::new(Metrics::new(Arc::default(), status.clone())),
    };
    let mut reconciler = Reconciler::new(Core::without_maps(rules()), "node1", wiring);
    let sent = tokio::spawn(async move {
        // More than the channel holds.
        for object in [service(0), slice(0, &[0]), service(1), slice(1, &[1])] {
            events_in.send(Event::Apply(object)).await.unwrap();
        }
        events_in.send(Event::Synced).await.unwrap();
        events_in
    });
    timeout(Duration::from_secs(20), reconciler.listen()).await.expect("listened to in time").unwrap();
    let events = sent.await.unwrap();
    let kernel = Shared::default();
    let task = tokio::spawn(reconciler.with(kernel.clone()).run());
    let ready = async {
        while !status.is_ready() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(20), ready).await.expect("ready in time");
    assert_eq!(kernel.0.lock().unwrap().state.frontends.len(), 2);
    drop(events);
    assert!(matches!(task.await.unwrap(), Err(Error::SourceEnded)));
}

#[tokio::test]
async fn nothing_is_programmed_before_the_source_is_in_sync() {
    let mut running = start();
    // More events than the channel holds: all but the last 16 have certainly been taken in.
    for i in 0..50 {
        running.events.send(Event::Apply(service(i))).await.unwrap();
        running.events.send(Event::Apply(slice(i, &[i]))).await.unwrap();
    }
    assert!(running.kernel.0.lock().unwrap().plans.is_empty() && !running.status.is_ready());
    running.events.send(Event::Synced).await.unwrap();
    running.frontends(50).await;
    assert_eq!(running.kernel.0.lock().unwrap().plans.len(), 1, "one plan for all");
    running.events.send(Event::Apply(service(50))).await.unwrap();
    running.frontends(51).await;
    assert!(running.status.is_ready());
    drop(running.events);
    let ended = timeout(Duration::from_secs(20), &mut running.task).await.unwrap().unwrap();
    assert!(matches!(ended, Err(Error::SourceEnded)));
}

#[tokio::test]
async fn a_failure_is_tried_again_without_an_event() {
    let running = start();
    running.kernel.0.lock().unwrap().refuse = 2;
    running.events.send(Event::Apply(service(0))).await.unwrap();
    running.events.send(Event::Synced).await.unwrap();
    running.frontends(1).await;
    assert_eq!(running.kernel.0.lock().unwrap().plans.len(), 3);
    running.task.abort();
}

#[tokio::test]
async fn an_audit_runs_on_demand() {
    let running = start();
    running.events.send(Event::Apply(service(0))).await.unwrap();
    running.events.send(Event::Synced).await.unwrap();
    running.frontends(1).await;
    running.kernel.0.lock().unwrap().state.frontends.clear();
    running.audit.notify_one();
    running.frontends(1).await;
    running.task.abort();
}

#[tokio::test]
async fn addresses_that_come_later_are_taken_in() {
    let running = start();
    let crate::source::Object::Service(mut web) = service(0) else { panic!("a Service") };
    let spec = web.spec.as_mut().unwrap();
    spec.type_ = Some("NodePort".into());
    spec.ports.as_mut().unwrap()[0].node_port = Some(30080);
    running.events.send(Event::Apply(crate::source::Object::Service(web))).await.unwrap();
    running.events.send(Event::Synced).await.unwrap();
    running.frontends(2).await;
    let more = BTreeSet::from([[192, 168, 0, 1].into(), [192, 168, 0, 2].into()]);
    running.addresses.send(more).unwrap();
    running.frontends(3).await;
    running.task.abort();
}

/// A plan without addresses would take the NodePorts of an earlier run away.
#[tokio::test]
async fn nothing_is_programmed_before_the_addresses_are_known() {
    let running = start_with(BTreeSet::new());
    running.events.send(Event::Apply(service(0))).await.unwrap();
    running.events.send(Event::Synced).await.unwrap();
    for i in 1..=16 {
        running.events.send(Event::Apply(service(i))).await.unwrap();
    }
    // Long enough for a loop that gives up waiting: it would have planned by now.
    sleep(ADDRESSES * 20).await;
    assert!(running.kernel.0.lock().unwrap().plans.is_empty());
    running.addresses.send(BTreeSet::from([[192, 168, 0, 1].into()])).unwrap();
    running.frontends(17).await;
    running.task.abort();
}

/// What kube-proxy's dashboards ask for follows what the loop does.
#[tokio::test]
async fn c8_and_the_other_metrics_of_kube_proxy_follow_the_loop() {
    let running = start();
    let mut local = service(0);
    if let Object::Service(service) = &mut local {
        service.spec.as_mut().unwrap().internal_traffic_policy = Some("Local".into());
    }
    let mut elsewhere = slice(0, &[1]);
    if let Object::EndpointSlice(slice) = &mut elsewhere {
        slice.endpoints[0].node_name = Some("node2".into());
    }
    running.events.send(Event::Apply(local)).await.unwrap();
    running.events.send(Event::Apply(elsewhere)).await.unwrap();
    running.events.send(Event::Synced).await.unwrap();
    running.frontends(1).await;
    running.sample("kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv4\"} 1").await;
    for line in [
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"internal\"} 1",
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"external\"} 0",
        "kubeproxy_sync_proxy_rules_service_changes_total 1",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total 1",
        "kubeproxy_sync_proxy_rules_service_changes_pending 0",
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending 0",
        "kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family=\"IPv6\"} 1",
        "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family=\"IPv6\"} 1",
    ] {
        running.sample(line).await;
    }

    // A slice that was written for a change of just now.
    let mut changed = slice(1, &[2]);
    if let Object::EndpointSlice(slice) = &mut changed {
        let now = k8s_openapi::jiff::Timestamp::now().to_string();
        slice.metadata.annotations =
            Some([("endpoints.kubernetes.io/last-change-trigger-time".to_owned(), now)].into());
    }
    running.events.send(Event::Apply(service(1))).await.unwrap();
    running.events.send(Event::Apply(changed)).await.unwrap();
    running.sample("kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"} 1").await;
    running.sample("kubeproxy_sync_partial_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} ").await;

    // The policy changes: nothing is dropped any more.
    running.events.send(Event::Apply(service(0))).await.unwrap();
    running
        .sample(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"internal\"} 0",
        )
        .await;
    // What cannot be programmed stays pending.
    running.kernel.0.lock().unwrap().refuse = usize::MAX;
    running.events.send(Event::Apply(service(2))).await.unwrap();
    running.sample("kubeproxy_sync_proxy_rules_service_changes_pending 1").await;
    running.task.abort();
}

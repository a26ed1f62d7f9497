//! Objects from the API server: list and watch, for ever.
//!
//! `kube::runtime::watcher` lists, watches and resumes; this module decides when to start over, remembers which objects
//! were sent so that a fresh list can take back those that are gone, and says once when something is wrong.

mod cidrs;
mod connect;
mod link;

use std::{
    collections::HashMap,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Node, Service};
use kube::{
    Api, Client, Resource,
    runtime::{
        utils::Backoff as _,
        watcher::{self, DefaultBackoff},
    },
};
use serde::de::DeserializeOwned;
use tokio::{sync::mpsc, time::timeout};

pub use self::connect::{Error, client};
use self::link::{Link, Links};
use super::{
    Closed, Event, Kind, Object, ObjectRef, send,
    slim::{Slim, SlimSlice},
    status::SourceStatus,
    strip::{Strip, foreign_labels},
};

/// A failed watch that is silent for this long after it was tried again stands: the watcher tells of failures at once (or
/// after the time to connect), but never of success.
const STANDS_AFTER: Duration = connect::CONNECT_TIMEOUT.saturating_add(Duration::from_secs(5));

/// Sends all Services, EndpointSlices, ServiceCIDRs and this node's object, then [`Event::Synced`], then every change, until the
/// receiver is gone. While the API server is away, nothing is sent.
pub async fn run(client: Client, node_name: &str, tx: mpsc::Sender<Event>, status: Arc<SourceStatus>) {
    // Lists are of the most recent state: after a restart, an old state from another server's cache could bring endpoints
    // back that are long gone. In pages, so that neither side holds a whole large cluster at once.
    let ours = |kind| {
        let without: Vec<String> = foreign_labels(kind).iter().map(|label| format!("!{label}")).collect();
        watcher::Config::default().labels(&without.join(",")).page_size(250)
    };
    let node = watcher::Config::default().fields(&format!("metadata.name={node_name}"));
    let source = Source {
        tx: tx.clone(),
        to_sync: Arc::new(AtomicUsize::new(4)),
        links: Arc::new(Links::new(status.clone())),
        status,
    };
    let all = async {
        tokio::join!(
            source.watch(Api::<Slim<Service>>::all(client.clone()), Kind::Service, ours(Kind::Service)),
            source.watch(
                Api::<SlimSlice>::all(client.clone()),
                Kind::EndpointSlice,
                ours(Kind::EndpointSlice)
            ),
            source.watch(Api::<Node>::all(client.clone()), Kind::Node, node),
            source.watch_service_cidrs(Api::all(client)),
        )
    };
    tokio::select! {
        () = tx.closed() => {}
        _ = all => {}
    }
}

/// What the watches of all kinds share.
struct Source {
    tx: mpsc::Sender<Event>,
    /// How many kinds have not been listed yet.
    to_sync: Arc<AtomicUsize>,
    links: Arc<Links>,
    status: Arc<SourceStatus>,
}

impl Source {
    /// Watches one kind until the receiver is gone.
    async fn watch<K>(&self, api: Api<K>, kind: Kind, config: watcher::Config) -> Result<(), Closed>
    where
        K: Resource + Strip + Into<Object> + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
    {
        let mut link = Link::new(kind, self.links.clone(), self.status.clone());
        let mut known = Known::new(kind);
        let mut backoff = DefaultBackoff::default();
        loop {
            let mut stream = pin!(watcher::watcher(api.clone(), config.clone()));
            loop {
                let next = if link.is_failing() {
                    match timeout(STANDS_AFTER, stream.next()).await {
                        Ok(next) => next,
                        Err(_) => {
                            link.works();
                            continue;
                        }
                    }
                } else {
                    stream.next().await
                };
                match next {
                    Some(Ok(event)) => {
                        match &event {
                            // Only says that a list is about to be asked for.
                            watcher::Event::Init => {}
                            // A list that works says nothing about the watch after it.
                            watcher::Event::InitApply(_) | watcher::Event::InitDone => link.works(),
                            watcher::Event::Apply(_) | watcher::Event::Delete(_) => {
                                link.works();
                                backoff.reset();
                            }
                        }
                        self.take(event, &mut known).await?;
                    }
                    Some(Err(error)) => {
                        let stale = link::is_stale(&error);
                        link.failed(&error, stale);
                        tokio::time::sleep(backoff.next().unwrap_or(Duration::from_secs(30))).await;
                        if stale {
                            break;
                        }
                    }
                    // The watcher never ends; should it, it is started anew.
                    None => break,
                }
            }
        }
    }

    /// Passes on what one event of the watcher means.
    async fn take<K>(&self, event: watcher::Event<K>, known: &mut Known) -> Result<(), Closed>
    where
        K: Resource + Strip + Into<Object>,
    {
        match event {
            watcher::Event::Init => known.list += 1,
            watcher::Event::InitApply(object) => {
                self.apply(strip(object), known).await?;
            }
            watcher::Event::Apply(object) => self.apply(strip(object), known).await?,
            watcher::Event::Delete(object) => {
                let object = strip(object);
                // Also for an object that does not match the selector any more.
                if known.sent.remove(&*name(&object)).is_some() {
                    send(&self.tx, &self.status, Event::Delete(object.reference())).await?;
                }
            }
            watcher::Event::InitDone => {
                self.status.count_relist();
                for reference in known.unlisted() {
                    send(&self.tx, &self.status, Event::Delete(reference)).await?;
                }
                self.listed(known).await?;
            }
        }
        Ok(())
    }

    async fn apply(&self, object: Object, known: &mut Known) -> Result<(), Closed> {
        known.sent.insert(name(&object), known.list);
        send(&self.tx, &self.status, Event::Apply(object)).await
    }

    /// A kind is complete. Whoever completes the last one says so: everything sent before is in the channel by then.
    async fn listed(&self, known: &mut Known) -> Result<(), Closed> {
        if std::mem::replace(&mut known.complete, true) {
            return Ok(());
        }
        tracing::info!(kind = %known.kind, objects = known.sent.len(), "listed");
        self.count_down().await
    }

    /// Nothing more of a kind is to be waited for, listed or not.
    async fn complete(&self, known: &mut Known) -> Result<(), Closed> {
        if std::mem::replace(&mut known.complete, true) {
            return Ok(());
        }
        self.count_down().await
    }

    async fn count_down(&self) -> Result<(), Closed> {
        if self.to_sync.fetch_sub(1, Ordering::AcqRel) == 1 {
            send(&self.tx, &self.status, Event::Synced).await?;
        }
        Ok(())
    }
}

/// What the receiver knows of one kind.
struct Known {
    kind: Kind,
    /// What was sent, by namespace and name, and during or after which list it was last. A list that breaks off takes
    /// nothing back.
    sent: HashMap<Box<str>, u32>,
    /// Number of the list that was begun last.
    list: u32,
    /// The first list is complete.
    complete: bool,
}

impl Known {
    fn new(kind: Kind) -> Self {
        Self { kind, sent: HashMap::new(), list: 0, complete: false }
    }

    /// Forgets what the list that was begun last does not have, and gives it, sorted.
    fn unlisted(&mut self) -> Vec<ObjectRef> {
        let (kind, list) = (self.kind, self.list);
        let gone = self.sent.extract_if(|_, last| *last != list).map(|(name, _)| {
            let (namespace, name) = name.split_once('/').unwrap_or_default();
            ObjectRef { kind, namespace: namespace.into(), name: name.into() }
        });
        let mut gone: Vec<_> = gone.collect();
        gone.sort_unstable();
        gone
    }
}

/// `namespace/name`: neither has a slash.
fn name(object: &Object) -> Box<str> {
    let meta = object.metadata();
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    [namespace, meta.name.as_deref().unwrap_or_default()].join("/").into()
}

fn strip<K: Strip + Into<Object>>(mut object: K) -> Object {
    object.strip();
    object.into()
}

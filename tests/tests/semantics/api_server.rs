//! An API server that keeps its EndpointSlices to itself until told otherwise: lists as Kubernetes does, and watches in
//! which nothing happens.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use anyhow::Context as _;
use lb_tests::place::Place;
use serde_json::{Value, json};

#[derive(Default)]
struct State {
    /// Paths with queries, in the order of the requests.
    requests: Vec<String>,
    slices_released: bool,
}

struct Shared {
    state: Mutex<State>,
    released: Condvar,
    objects: Vec<Value>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lives as long as this process.
pub struct ApiServer {
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

impl ApiServer {
    /// Starts in the network namespace of a place, on its loopback.
    pub fn start(place: &Place, objects: &[Value]) -> anyhow::Result<Self> {
        let listener = place.netns.run(|| TcpListener::bind("127.0.0.1:0"))?.context("cannot listen")?;
        let shared =
            Arc::new(Shared { state: Mutex::default(), released: Condvar::new(), objects: objects.to_vec() });
        let server = Self { address: listener.local_addr()?, shared: shared.clone() };
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                // A client that goes away is no error here.
                thread::spawn(move || answer(&shared, stream).ok());
            }
        });
        Ok(server)
    }

    fn asked(&self, path: &str, query: &str) -> bool {
        self.shared.state().requests.iter().any(|r| r.starts_with(path) && r.contains(query))
    }

    /// Somebody has asked for EndpointSlices.
    pub fn slices_wanted(&self) -> bool {
        self.asked("/apis/discovery.k8s.io/v1/endpointslices", "")
    }

    /// Somebody has read all Services, and waits for changes of them.
    pub fn services_watched(&self) -> bool {
        self.asked("/api/v1/services", "watch=")
    }

    /// Answers requests for EndpointSlices from now on, those that wait included.
    pub fn release_slices(&self) {
        self.shared.state().slices_released = true;
        self.shared.released.notify_all();
    }
}

fn answer(shared: &Shared, stream: TcpStream) -> anyhow::Result<()> {
    let mut writer = stream.try_clone()?;
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next().context("no request")??;
    for header in lines.by_ref() {
        if header?.is_empty() {
            break;
        }
    }
    let target = request.split(' ').nth(1).context("no path")?.to_owned();
    shared.state().requests.push(target.clone());
    let path = target.split('?').next().unwrap_or_default();
    let (kind, api_version) = match path {
        "/api/v1/services" => ("Service", "v1"),
        "/api/v1/nodes" => ("Node", "v1"),
        "/apis/discovery.k8s.io/v1/endpointslices" => ("EndpointSlice", "discovery.k8s.io/v1"),
        _ => {
            write!(writer, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
            return Ok(());
        }
    };
    if target.contains("watch=") {
        write!(
            writer,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )?;
        // Until the client goes: nothing ever happens.
        lines.next();
        return Ok(());
    }
    if kind == "EndpointSlice" {
        let waiting = |state: &mut State| !state.slices_released;
        drop(shared.released.wait_while(shared.state(), waiting).unwrap_or_else(PoisonError::into_inner));
    }
    let items: Vec<_> = shared.objects.iter().filter(|o| o["kind"] == kind).collect();
    let list = json!({
        "kind": format!("{kind}List"), "apiVersion": api_version,
        "metadata": { "resourceVersion": "10" }, "items": items,
    })
    .to_string();
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length:";
    write!(writer, "{head} {}\r\n\r\n{list}", list.len())?;
    Ok(())
}

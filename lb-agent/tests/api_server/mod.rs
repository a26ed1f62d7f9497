//! A server that lists and watches as the Kubernetes API server does, as far as a client can see
//! (https://kubernetes.io/docs/reference/using-api/api-concepts/): resource versions, pages, chunked watches, bookmarks,
//! 410 Gone in both its forms, and every way to break off.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

pub const SERVICES: &str = "/api/v1/services";
pub const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
pub const NODES: &str = "/api/v1/nodes";
pub const SERVICE_CIDRS: &str = "/apis/networking.k8s.io/v1/servicecidrs";

/// A request as it came: path, and the query decoded.
#[derive(Clone, Debug)]
pub struct Request {
    pub path: String,
    pub query: HashMap<String, String>,
}

impl Request {
    pub fn is_watch(&self) -> bool {
        self.query.contains_key("watch")
    }
    pub fn get(&self, key: &str) -> &str {
        self.query.get(key).map_or("", String::as_str)
    }
}

/// What happens to the watches that stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// They go on.
    None,
    /// The connection ends within a line.
    MidLine,
    /// The server ends the response properly, as after `timeoutSeconds`.
    Clean,
}

#[derive(Default)]
struct State {
    version: u64,
    objects: BTreeMap<(String, String), Value>,
    /// (version, path, line of the watch).
    history: Vec<(u64, String, Value)>,
    /// Watches from before this version are too old.
    oldest: u64,
    gone_as_status: bool,
    page_size: usize,
    refused: HashMap<String, u16>,
    requests: Vec<Request>,
}

/// The server. Objects are changed through it, and every watch hears of that.
pub struct ApiServer {
    pub address: SocketAddr,
    state: Mutex<State>,
    changed: watch::Sender<u64>,
    cut: watch::Sender<(u64, Cut)>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl ApiServer {
    /// Starts on a free port of the loopback device. Lists come in pages of two.
    pub async fn start() -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Arc::new(Self {
            address: listener.local_addr().unwrap(),
            state: Mutex::new(State { version: 10, page_size: 2, ..State::default() }),
            changed: watch::channel(0).0,
            cut: watch::channel((0, Cut::None)).0,
            task: Mutex::new(None),
        });
        server.accept(listener);
        server
    }

    fn accept(self: &Arc<Self>, listener: TcpListener) {
        let server = self.clone();
        let task = tokio::spawn(async move {
            // Connections end with the task that accepted them.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let server = server.clone();
                connections.spawn(async move {
                    // A client that goes away is not an error here.
                    let _ = server.connection(stream).await;
                });
            }
        });
        *self.task.lock().unwrap() = Some(task);
    }

    /// Closes the port and all connections.
    pub async fn stop(&self) {
        let task = self.task.lock().unwrap().take().unwrap();
        task.abort();
        let _ = task.await;
    }

    /// Opens the same port again.
    pub async fn restart(self: &Arc<Self>) {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.address).unwrap();
        self.accept(socket.listen(64).unwrap());
    }

    /// Adds or changes an object.
    pub fn apply(&self, path: &str, name: &str, mut object: Value) {
        let mut state = self.state.lock().unwrap();
        state.version += 1;
        object["metadata"]["name"] = name.into();
        object["metadata"]["resourceVersion"] = state.version.to_string().into();
        if path != NODES && path != SERVICE_CIDRS {
            object["metadata"]["namespace"] = "ns".into();
        }
        let old = state.objects.insert((path.into(), name.into()), object.clone());
        let kind = if old.is_some() { "MODIFIED" } else { "ADDED" };
        let version = state.version;
        state.history.push((version, path.into(), json!({"type": kind, "object": object})));
        self.changed.send_replace(version);
    }

    pub fn delete(&self, path: &str, name: &str) {
        let mut state = self.state.lock().unwrap();
        state.version += 1;
        let version = state.version;
        let mut object = state.objects.remove(&(path.into(), name.into())).unwrap();
        object["metadata"]["resourceVersion"] = version.to_string().into();
        state.history.push((version, path.into(), json!({"type": "DELETED", "object": object})));
        self.changed.send_replace(version);
    }

    /// Tells all watches of a kind where the server is, without a change.
    pub fn bookmark(&self, path: &str, kind: &str, api_version: &str) -> u64 {
        let mut state = self.state.lock().unwrap();
        state.version += 100;
        let version = state.version;
        let meta = json!({"resourceVersion": version.to_string(), "creationTimestamp": null});
        let object = json!({"kind": kind, "apiVersion": api_version, "metadata": meta});
        state.history.push((version, path.into(), json!({"type": "BOOKMARK", "object": object})));
        self.changed.send_replace(version);
        version
    }

    /// Forgets all history: watches that want to resume get 410, as a status or as an event within a 200.
    pub fn compact(&self, gone_as_status: bool) {
        let mut state = self.state.lock().unwrap();
        state.version += 1;
        state.oldest = state.version;
        state.gone_as_status = gone_as_status;
        state.history.clear();
    }

    /// Breaks all standing watches off.
    pub fn cut(&self, how: Cut) {
        self.cut.send_modify(|(generation, cut)| (*generation, *cut) = (*generation + 1, how));
    }

    /// Answers requests for this path with a status, until `None`.
    pub fn refuse(&self, path: &str, code: Option<u16>) {
        let mut state = self.state.lock().unwrap();
        match code {
            Some(code) => state.refused.insert(path.into(), code),
            None => state.refused.remove(path),
        };
    }

    pub fn requests(&self) -> Vec<Request> {
        self.state.lock().unwrap().requests.clone()
    }

    async fn connection(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut stream = BufReader::new(stream);
        loop {
            let mut request_line = String::new();
            if stream.read_line(&mut request_line).await? == 0 {
                return Ok(());
            }
            let mut header = String::new();
            while stream.read_line(&mut header).await? > 2 {
                header.clear();
            }
            let request = parse(request_line.split(' ').nth(1).unwrap());
            self.state.lock().unwrap().requests.push(request.clone());
            let refused = self.state.lock().unwrap().refused.get(&request.path).copied();
            match refused {
                Some(code) => respond(&mut stream, code, &status(code)).await?,
                None if request.is_watch() => {
                    if !self.watch(&mut stream, &request).await? {
                        return Ok(());
                    }
                }
                None => {
                    let list = self.list(&request);
                    respond(&mut stream, 200, &list).await?;
                }
            }
        }
    }

    fn list(&self, request: &Request) -> Value {
        let state = self.state.lock().unwrap();
        let after = request.get("continue");
        let all = state.objects.iter().filter(|((path, _), _)| *path == request.path);
        let mut rest = all.filter(|((_, name), _)| after.is_empty() || name.as_str() > after);
        let limit = request.get("limit").parse().unwrap_or(usize::MAX).min(state.page_size);
        let page: Vec<_> = rest.by_ref().take(limit).collect();
        let mut metadata = json!({"resourceVersion": state.version.to_string()});
        if rest.next().is_some() {
            metadata["continue"] = page.last().unwrap().0.1.clone().into();
        }
        let items: Vec<_> = page.into_iter().map(|(_, object)| object.clone()).collect();
        json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items})
    }

    /// Serves a watch; true if the connection can be used again.
    async fn watch(&self, stream: &mut BufReader<TcpStream>, request: &Request) -> std::io::Result<bool> {
        let mut at: u64 = request.get("resourceVersion").parse().unwrap();
        let (mut changed, mut cut) = (self.changed.subscribe(), self.cut.subscribe());
        let (too_old, as_status) = {
            let state = self.state.lock().unwrap();
            (at < state.oldest, state.gone_as_status)
        };
        if too_old && as_status {
            respond(stream, 410, &status(410)).await?;
            return Ok(true);
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await?;
        if too_old {
            chunk(stream, &format!("{}\n", json!({"type": "ERROR", "object": status(410)}))).await?;
            stream.write_all(b"0\r\n\r\n").await?;
            return Ok(true);
        }
        loop {
            let lines: Vec<_> = {
                let state = self.state.lock().unwrap();
                let new = state.history.iter().filter(|(v, path, _)| *v > at && *path == request.path);
                new.cloned().collect()
            };
            for (version, _, line) in lines {
                at = version;
                // A line may be spread over chunks, and a chunk may hold parts of two lines.
                let line = format!("{line}\n");
                let (a, b) = line.split_at(line.len() / 2);
                chunk(stream, a).await?;
                chunk(stream, b).await?;
            }
            let how = tokio::select! {
                _ = changed.changed() => Cut::None,
                _ = cut.changed() => cut.borrow().1,
            };
            match how {
                Cut::None => {}
                Cut::Clean => {
                    stream.write_all(b"0\r\n\r\n").await?;
                    return Ok(true);
                }
                Cut::MidLine => {
                    chunk(stream, r#"{"type":"MODIFIED","object":{"kind":"#).await?;
                    return Ok(false);
                }
            }
        }
    }
}

fn parse(target: &str) -> Request {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let decode = |text: &str| {
        let mut bytes = Vec::new();
        let mut rest = text.bytes();
        while let Some(b) = rest.next() {
            match b {
                b'%' => {
                    let digits = [rest.next().unwrap(), rest.next().unwrap()];
                    bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap());
                }
                b'+' => bytes.push(b' '),
                b => bytes.push(b),
            }
        }
        String::from_utf8(bytes).unwrap()
    };
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let query = pairs.map(|(k, v)| (decode(k), decode(v))).collect();
    Request { path: path.into(), query }
}

/// `Status` objects as the API server sends them.
fn status(code: u16) -> Value {
    let (reason, message) = match code {
        410 => ("Expired", "too old resource version: 1 (2)"),
        404 => ("NotFound", "the server could not find the requested resource"),
        403 => ("Forbidden", "nodes is forbidden: User \"x\" cannot list resource \"nodes\""),
        _ => ("ServiceUnavailable", "not yet"),
    };
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {},
        "status": "Failure", "message": message, "reason": reason, "code": code,
    })
}

async fn respond(stream: &mut BufReader<TcpStream>, code: u16, body: &Value) -> std::io::Result<()> {
    let body = body.to_string();
    let head = format!(
        "HTTP/1.1 {code} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await
}

async fn chunk(stream: &mut BufReader<TcpStream>, text: &str) -> std::io::Result<()> {
    stream.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()).await?;
    stream.flush().await
}

//! Lists in pages and watches, as an API server serves them over plain HTTP; the lists are written out beforehand, so that
//! little but copying is in the times of whoever reads them.

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

pub const SERVICES: &str = "/api/v1/services";
pub const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
pub const NODES: &str = "/api/v1/nodes";

/// Of all lists; what happens later has higher versions.
pub const LIST_VERSION: u64 = 10;

/// Objects of each path, as text.
type Objects = HashMap<&'static str, Vec<String>>;

pub struct Server {
    pub address: SocketAddr,
    watches: Arc<Mutex<Watches>>,
}

/// Who watches, and what there was to see, by path.
#[derive(Default)]
struct Watches {
    streams: Vec<(String, TcpStream)>,
    lines: Vec<(String, String)>,
}

impl Watches {
    /// Who begins to watch gets what has happened since the version that it knows: clients end watches and begin new ones as
    /// they like.
    fn add(&mut self, path: &str, known: u64, mut stream: TcpStream) -> std::io::Result<()> {
        for (_, line) in self.lines.iter().filter(|(p, line)| p == path && version(line) > known) {
            stream.write_all(&chunk(line))?;
        }
        self.streams.push((path.to_owned(), stream));
        Ok(())
    }

    fn send(&mut self, path: &str, lines: &str) {
        self.lines.extend(lines.split_inclusive('\n').map(|line| (path.to_owned(), line.to_owned())));
        let chunk = chunk(lines);
        self.streams.retain_mut(|(p, stream)| p != path || stream.write_all(&chunk).is_ok());
    }
}

/// Of transfer coding "chunked" (RFC 9112 section 7.1).
fn chunk(lines: &str) -> Vec<u8> {
    format!("{:x}\r\n{lines}\r\n", lines.len()).into_bytes()
}

/// The version of the object in a line.
fn version(line: &str) -> u64 {
    let from = line.split("\"resourceVersion\":\"").nth(1).unwrap_or_default();
    from.split('"').next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

impl Server {
    /// Serves in the network namespace of the caller, until the process ends.
    pub fn start(objects: Objects) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen")?;
        let address = listener.local_addr()?;
        let watches = Arc::new(Mutex::new(Watches::default()));
        let (objects, of_server) = (Arc::new(objects), watches.clone());
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (objects, watches) = (objects.clone(), of_server.clone());
                // A client that goes away is no error here.
                thread::spawn(move || connection(stream, &objects, &watches));
            }
        });
        Ok(Self { address, watches })
    }

    fn watches(&self) -> MutexGuard<'_, Watches> {
        self.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_watched(&self, path: &str) -> bool {
        self.watches().streams.iter().any(|(p, _)| p == path)
    }

    /// Sends lines to all who watch the path, now or later.
    pub fn send(&self, path: &str, lines: &str) {
        self.watches().send(path, lines);
    }
}

/// A line of a watch.
pub fn modified(object: &Value, kind: &str, api_version: &str) -> String {
    let mut object = object.clone();
    (object["kind"], object["apiVersion"]) = (kind.into(), api_version.into());
    // The type first, as the API server writes it: what comes before it a reader has to put aside.
    format!("{{\"type\":\"MODIFIED\",\"object\":{object}}}\n")
}

fn connection(stream: TcpStream, objects: &Objects, watches: &Mutex<Watches>) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut out = stream.try_clone()?;
    let mut input = BufReader::new(stream);
    loop {
        let mut request = String::new();
        if input.read_line(&mut request)? == 0 {
            return Ok(());
        }
        let mut header = String::new();
        while input.read_line(&mut header)? > 2 {
            header.clear();
        }
        let target = request.split(' ').nth(1).unwrap_or_default();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let value = |key: &str| {
            query.split('&').filter_map(|pair| pair.split_once('=')).find(|(k, _)| *k == key).map(|(_, v)| v)
        };
        if value("watch").is_some() {
            out.write_all(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
            )?;
            let mut watches = watches.lock().unwrap_or_else(PoisonError::into_inner);
            let known = value("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(LIST_VERSION);
            watches.add(path, known, out.try_clone()?)?;
            continue;
        }
        let number = |key: &str| value(key).and_then(|v| v.parse::<usize>().ok());
        let (code, body) = match objects.get(path) {
            Some(all) => (200, list(all, number("continue").unwrap_or(0), number("limit"))),
            None => (404, r#"{"kind":"Status","apiVersion":"v1","status":"Failure","code":404}"#.to_owned()),
        };
        let head = format!(
            "HTTP/1.1 {code} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        out.write_all(head.as_bytes())?;
        out.write_all(body.as_bytes())?;
    }
}

/// A page from the `start`th object on.
fn list(all: &[String], start: usize, limit: Option<usize>) -> String {
    let rest = all.get(start..).unwrap_or_default();
    let page = &rest[..limit.unwrap_or(rest.len()).min(rest.len())];
    let next = start + page.len();
    let more = if next < all.len() { format!(r#","continue":"{next}""#) } else { String::new() };
    format!(
        r#"{{"kind":"List","apiVersion":"v1","metadata":{{"resourceVersion":"{LIST_VERSION}"{more}}},"items":[{}]}}"#,
        page.join(",")
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Everything up to the last line of a watch of slices from a version on.
    fn watch(server: &Server, known: u64, last: &str) -> String {
        let mut stream = TcpStream::connect(server.address).unwrap();
        write!(stream, "GET {SLICES}?watch=1&resourceVersion={known} HTTP/1.1\r\n\r\n").unwrap();
        let mut text = String::new();
        let mut lines = BufReader::new(stream);
        while !text.contains(last) && lines.read_line(&mut text).unwrap() > 0 {}
        text
    }

    #[test]
    fn a_watch_that_begins_again_misses_nothing() {
        let server = Server::start(HashMap::new()).unwrap();
        let line = |name: &str, version: u64| {
            let metadata = json!({"name": name, "resourceVersion": version.to_string()});
            modified(&json!({"metadata": metadata}), "EndpointSlice", "discovery.k8s.io/v1")
        };
        // Nobody watches yet.
        server.send(SLICES, &(line("a", 11) + &line("b", 12)));
        let text = watch(&server, 10, "\"b\"");
        assert!(text.contains("\"a\"") && text.contains("\"b\""), "{text}");
        // The first watch has ended.
        server.send(SLICES, &line("c", 13));
        let text = watch(&server, 11, "\"c\"");
        assert!(!text.contains("\"a\"") && text.contains("\"b\"") && text.contains("\"c\""), "{text}");
    }

    #[test]
    fn pages_follow_each_other_to_the_end() {
        let all: Vec<String> = (0..5).map(|n| n.to_string()).collect();
        let page = |start| serde_json::from_str::<Value>(&list(&all, start, Some(2))).unwrap();
        assert_eq!(page(0)["items"], json!([0, 1]));
        assert_eq!(page(0)["metadata"]["continue"], "2");
        assert_eq!((page(4)["items"].clone(), page(4)["metadata"].get("continue")), (json!([4]), None));
    }
}

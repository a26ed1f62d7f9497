//! Lists in pages and watches, as an API server serves them over plain HTTP; the lists are written out beforehand, so that
//! little but copying is in the times of whoever reads them.

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use anyhow::{Context as _, Result, ensure};
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
    /// The connections of the watches, by path.
    watches: Arc<Mutex<Vec<(String, TcpStream)>>>,
}

impl Server {
    /// Serves in the network namespace of the caller, until the process ends.
    pub fn start(objects: Objects) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen")?;
        let address = listener.local_addr()?;
        let watches = Arc::new(Mutex::new(Vec::new()));
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

    fn watches(&self) -> MutexGuard<'_, Vec<(String, TcpStream)>> {
        self.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_watched(&self, path: &str) -> bool {
        self.watches().iter().any(|(p, _)| p == path)
    }

    /// Sends lines to all who watch the path.
    pub fn send(&self, path: &str, lines: &str) -> Result<()> {
        let mut sent = 0;
        for (_, stream) in self.watches().iter_mut().filter(|(p, _)| p == path) {
            stream.write_all(format!("{:x}\r\n{lines}\r\n", lines.len()).as_bytes())?;
            sent += 1;
        }
        ensure!(sent > 0, "nobody watches {path}");
        Ok(())
    }
}

/// A line of a watch.
pub fn modified(object: &Value, kind: &str, api_version: &str) -> String {
    let mut object = object.clone();
    (object["kind"], object["apiVersion"]) = (kind.into(), api_version.into());
    // The type first, as the API server writes it: what comes before it a reader has to put aside.
    format!("{{\"type\":\"MODIFIED\",\"object\":{object}}}\n")
}

fn connection(
    stream: TcpStream,
    objects: &Objects,
    watches: &Mutex<Vec<(String, TcpStream)>>,
) -> std::io::Result<()> {
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
            watches.push((path.to_owned(), out.try_clone()?));
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

    #[test]
    fn pages_follow_each_other_to_the_end() {
        let all: Vec<String> = (0..5).map(|n| n.to_string()).collect();
        let page = |start| serde_json::from_str::<Value>(&list(&all, start, Some(2))).unwrap();
        assert_eq!(page(0)["items"], json!([0, 1]));
        assert_eq!(page(0)["metadata"]["continue"], "2");
        assert_eq!((page(4)["items"].clone(), page(4)["metadata"].get("continue")), (json!([4]), None));
    }
}

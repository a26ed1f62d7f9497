//! SCTP through Services. This needs no SCTP stack: raw sockets play both ends of an association (RFC 9260), with a CRC32c
//! of their own.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use lb_tests::{
    cluster::{Cluster, POD_PORT},
    manifests::Service,
    place::{Family, Place},
    raw::{IcmpError, Raw, never_fragment},
    shared::SOON,
    wait_for,
};
use serde_json::json;

use crate::bed::{CLUSTER, external_ips, service};

const SCTP: u8 = 132;

/// Chunk types.
const DATA: u8 = 0;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const SACK: u8 = 3;
const ABORT: u8 = 6;
const COOKIE_ECHO: u8 = 10;
const COOKIE_ACK: u8 = 11;

/// CRC32c, bit by bit (RFC 9260 appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

/// A packet with one chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    sport: u16,
    dport: u16,
    tag: u32,
    chunk: u8,
    body: Vec<u8>,
}

impl Packet {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = [
            &self.sport.to_be_bytes()[..],
            &self.dport.to_be_bytes(),
            &self.tag.to_be_bytes(),
            &[0; 4],
            &[self.chunk, 0],
            &((self.body.len() + 4) as u16).to_be_bytes(),
            &self.body,
        ]
        .concat();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        // The CRC goes out with its least significant byte first.
        let crc = crc32c(&bytes).to_le_bytes();
        bytes[8..12].copy_from_slice(&crc);
        bytes
    }

    /// `None` if the checksum is wrong.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let mut zeroed = bytes.to_vec();
        zeroed.get_mut(8..12)?.fill(0);
        if crc32c(&zeroed).to_le_bytes() != bytes[8..12] {
            return None;
        }
        let (ports, head) = (word(0)?, word(12)?);
        let length = (head & 0xffff) as usize;
        Some(Self {
            sport: (ports >> 16) as u16,
            dport: ports as u16,
            tag: word(4)?,
            chunk: (head >> 24) as u8,
            body: bytes.get(16..12 + length)?.to_vec(),
        })
    }

    fn answer(&self, tag: u32, chunk: u8, body: Vec<u8>) -> Self {
        Self { sport: self.dport, dport: self.sport, tag, chunk, body }
    }

    /// The Initiate Tag of an INIT or INIT ACK: what its sender wants to see in packets to it.
    fn initiate_tag(&self) -> u32 {
        self.body.get(..4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
    }
}

/// INIT and INIT ACK: tag, window, streams each way, first TSN.
fn init(tag: u32) -> Vec<u8> {
    [&tag.to_be_bytes()[..], &65_536u32.to_be_bytes(), &[0, 1, 0, 1], &7u32.to_be_bytes()].concat()
}

/// A pod's end: answers whoever asks at its port, and says who it is and whom it sees.
struct Listener {
    stop: Arc<AtomicBool>,
    aborted: Arc<Mutex<Vec<SocketAddr>>>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    fn start(pod: &Place, family: Family) -> Self {
        let raw = Raw::open(pod, family, SCTP).unwrap();
        let (stop, aborted) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (stopped, heard, name) = (stop.clone(), aborted.clone(), pod.name.clone());
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let received = raw.receive(Duration::from_millis(100), |from, bytes| {
                    Some((from, Packet::parse(bytes)?)).filter(|(_, p)| p.dport == POD_PORT)
                });
                let Ok(Some((from, packet))) = received else { continue };
                if packet.chunk == ABORT {
                    heard.lock().unwrap().push(SocketAddr::new(from, packet.sport));
                }
                for answer in Self::answers(&name, from, &packet) {
                    let _ = raw.send(from, &answer.bytes());
                }
            }
        });
        Self { stop, aborted, thread: Some(thread) }
    }

    /// The client's tag is in the cookie, so nothing needs to be remembered.
    fn answers(name: &str, from: IpAddr, packet: &Packet) -> Vec<Packet> {
        let own = |client: u32| client ^ 0x5555_5555;
        match packet.chunk {
            INIT if packet.tag == 0 => {
                let client = packet.initiate_tag();
                let cookie = [&[0, 7, 0, 8][..], &client.to_be_bytes()].concat();
                vec![packet.answer(client, INIT_ACK, [init(own(client)), cookie].concat())]
            }
            COOKIE_ECHO => vec![packet.answer(own(packet.tag), COOKIE_ACK, Vec::new())],
            DATA => {
                let client = own(packet.tag);
                let text = format!("{name} {}", SocketAddr::new(from, packet.sport));
                let tsn = packet.body[..4].to_vec();
                let sack = [&tsn[..], &65_536u32.to_be_bytes(), &[0; 4]].concat();
                vec![packet.answer(client, SACK, sack), packet.answer(client, DATA, data(7, text.as_bytes()))]
            }
            _ => Vec::new(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
    }
}

/// TSN, stream, sequence number and protocol identifier in front of the text.
fn data(tsn: u32, text: &[u8]) -> Vec<u8> {
    [&tsn.to_be_bytes()[..], &[0; 8], text].concat()
}

/// A client's end.
struct Association {
    raw: Raw,
    to: SocketAddr,
    sport: u16,
    tag: u32,
    peer_tag: u32,
}

impl Association {
    /// INIT to COOKIE ACK.
    fn open(from: &Place, to: SocketAddr, sport: u16) -> Result<Self, String> {
        let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
        let raw = Raw::open(from, family, SCTP).unwrap();
        // As SCTP stacks do: what is too big is cut into smaller chunks, never into IP fragments.
        never_fragment(&raw, family).unwrap();
        let tag = 0x1000_0000 + u32::from(sport);
        let mut association = Self { raw, to, sport, tag, peer_tag: 0 };
        let ack = association.ask(INIT, init(tag), INIT_ACK)?;
        association.peer_tag = ack.initiate_tag();
        let cookie = ack.body.get(20..).unwrap_or_default().to_vec();
        association.ask(COOKIE_ECHO, cookie, COOKIE_ACK)?;
        Ok(association)
    }

    fn send(&self, chunk: u8, body: Vec<u8>) {
        let packet = Packet { sport: self.sport, dport: self.to.port(), tag: self.peer_tag, chunk, body };
        self.raw.send(self.to.ip(), &packet.bytes()).unwrap();
    }

    /// Sends a chunk and waits for the answer: a valid packet from the Service's address and port.
    fn ask(&self, chunk: u8, body: Vec<u8>, answer: u8) -> Result<Packet, String> {
        self.send(chunk, body);
        let found = self.raw.receive(Duration::from_secs(1), |from, bytes| {
            let packet = Packet::parse(bytes)?;
            let ours = from == self.to.ip()
                && (packet.sport, packet.dport) == (self.to.port(), self.sport)
                && packet.tag == self.tag;
            (ours && packet.chunk == answer).then_some(packet)
        });
        found.unwrap().ok_or_else(|| format!("chunk {chunk} got no chunk {answer}"))
    }

    /// Sends DATA of this size; who answered, and the address that it saw.
    fn exchange(&self, bytes: usize) -> Result<(String, SocketAddr), String> {
        let text: Vec<u8> = (0..bytes).map(|i| (i * 7) as u8).collect();
        let answer = self.ask(DATA, data(7, &text), DATA)?;
        let text = String::from_utf8_lossy(answer.body.get(12..).unwrap_or_default()).into_owned();
        let (name, seen) = text.split_once(' ').ok_or("not an answer")?;
        Ok((name.to_owned(), seen.parse().map_err(|_| format!("not an address: {seen}"))?))
    }
}

fn write(cluster: &Cluster, service: &Service) {
    let mut documents = service.documents();
    documents[0]["spec"]["ports"] = json!([{
        "name": "sctp", "protocol": "SCTP", "port": service.port, "targetPort": POD_PORT, "nodePort": service.node_port,
    }]);
    for slice in &mut documents[1..] {
        slice["ports"] = json!([{ "name": "sctp", "protocol": "SCTP", "port": POD_PORT }]);
    }
    cluster.manifests.write(&service.name, &documents).unwrap();
}

/// Listeners in these pods, and the Service once it is served.
fn start(cluster: &Cluster, service: &Service, pods: &[&str]) -> Vec<Listener> {
    let listeners: Vec<_> =
        pods.iter().flat_map(|p| Family::BOTH.map(|f| Listener::start(cluster.pod(p), f))).collect();
    write(cluster, service);
    let mut port = 45_000;
    for node in &cluster.nodes {
        for family in Family::BOTH {
            wait_for("SCTP to be served", SOON, || {
                port += 1;
                Association::open(&node.pods[1], service.cluster_ip(family), port).is_ok()
            })
            .unwrap();
        }
    }
    listeners
}

fn targets(cluster: &Cluster, service: &Service, number: u8) -> Vec<(&'static str, SocketAddr)> {
    let external = Family::BOTH.map(|f| ("external IP", external_ips(number).socket(f, service.port)));
    service.frontends(cluster.node(1)).into_iter().chain(external).collect()
}

#[test]
fn sctp_associations_pass_through_every_kind_of_frontend() {
    let cluster = CLUSTER.lock();
    let service = service(&cluster, "sctp", 80, &["pod-1a", "pod-2a"]);
    let listeners = start(&cluster, &service, &["pod-1a", "pod-2a"]);
    let mut wrong = Vec::new();
    let mut port = 46_000;
    for from in [&cluster.client, cluster.pod("pod-1b"), cluster.pod("pod-1a")] {
        for (kind, to) in targets(&cluster, &service, 80) {
            let mut names = std::collections::BTreeSet::new();
            for _ in 0..24 {
                port += 1;
                match one(&cluster, from, to, port) {
                    Ok(name) => names.insert(name),
                    Err(e) => {
                        wrong.push(format!("{} -> {kind} {to}: {e}", from.name));
                        break;
                    }
                };
            }
            if names.len() != 2 {
                wrong.push(format!("{} -> {kind} {to}: answered by {names:?}", from.name));
            }
        }
    }
    drop(listeners);
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
}

/// One association from beginning to end; who served it.
fn one(cluster: &Cluster, from: &Place, to: SocketAddr, port: u16) -> Result<String, String> {
    let association = Association::open(from, to, port)?;
    // Lengths that fill a packet, and one that is padded.
    let (name, seen) = association.exchange(1)?;
    for bytes in [100, 1_200, 1_399] {
        let next = association.exchange(bytes)?;
        if next != (name.clone(), seen) {
            return Err(format!("{next:?} after {name} {seen}"));
        }
    }
    let own = |place: &Place| place.addrs.has(seen.ip());
    let expected = if from.name == name {
        seen.ip() == to.ip()
    } else if from.name == "client" && name == "pod-2a" {
        own(&cluster.node(1).place)
    } else {
        own(from) && seen.port() == port
    };
    association.send(ABORT, Vec::new());
    if expected { Ok(name) } else { Err(format!("{name} saw {seen}")) }
}

#[test]
fn sctp_aborts_arrive_and_the_port_may_be_used_again() {
    let cluster = CLUSTER.lock();
    let service = service(&cluster, "sctp-abort", 81, &["pod-2a"]);
    let listeners = start(&cluster, &service, &["pod-2a"]);
    for (kind, to) in targets(&cluster, &service, 81) {
        for _ in 0..3 {
            // From the same port each time.
            let association =
                Association::open(&cluster.client, to, 47_000).unwrap_or_else(|e| panic!("{kind} {to}: {e}"));
            let (_, seen) = association.exchange(50).unwrap_or_else(|e| panic!("{kind} {to}: {e}"));
            association.send(ABORT, Vec::new());
            wait_for("the ABORT to arrive", SOON, || {
                listeners.iter().any(|l| l.aborted.lock().unwrap().contains(&seen))
            })
            .unwrap();
        }
    }
}

#[test]
fn sctp_without_endpoints_is_refused() {
    let cluster = CLUSTER.lock();
    let service = service(&cluster, "sctp-none", 82, &[]);
    write(&cluster, &service);
    for from in [&cluster.client, cluster.pod("pod-1b")] {
        for (kind, to) in targets(&cluster, &service, 82) {
            let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
            let icmp = Raw::icmp(from, family).unwrap();
            let raw = Raw::open(from, family, SCTP).unwrap();
            let packet = Packet { sport: 47_100, dport: to.port(), tag: 0, chunk: INIT, body: init(9) };
            let mut error = None;
            wait_for(&format!("{} -> {kind} {to} to be refused", from.name), SOON, || {
                raw.send(to.ip(), &packet.bytes()).unwrap();
                let ours = |sender, bytes: &[u8]| {
                    IcmpError::parse(sender, bytes).filter(|e| e.quoted.dst == to && e.is_port_unreachable())
                };
                error = icmp.receive(Duration::from_millis(300), ours).unwrap();
                error.is_some()
            })
            .unwrap();
            let error = error.unwrap();
            assert_eq!((error.from, error.quoted.protocol), (to.ip(), SCTP), "{error:?}");
        }
    }
}

#[test]
fn the_reference_checksum_agrees_with_published_vectors() {
    // RFC 3720 appendix B.4.
    assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
}

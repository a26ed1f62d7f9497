//! Fragments of UDP datagrams, IPv4 and IPv6, in any order: all of one datagram reach one backend, and are answered.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::atomic::{AtomicU16, Ordering},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use lb_tests::{
    cluster::Cluster,
    manifests::{Endpoint, Service},
    place::{Family, Place},
    raw::{self, Raw, sum},
};

use crate::bed::{CLUSTER, external_ips, service};

/// Where pods echo datagrams of any size.
const PORT: u16 = 9000;

/// Payload of a fragment: Ethernet's 1500 bytes less IPv6 and fragment headers, a multiple of eight.
const PIECE: usize = 1448;

/// Echoes datagrams with the pod's name in front, for as long as it lives. The kernel has put them together and has checked
/// their checksums; answers are in fragments, too.
struct Echo {
    stop: UdpSocket,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    fn start(pod: &Place, family: Family) -> Self {
        let socket = raw::udp(pod, family, PORT).unwrap();
        let stop = socket.try_clone().unwrap();
        let name = pod.name.clone();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let thread = thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            loop {
                match socket.recv_from(&mut buffer) {
                    Ok((0, _)) => return,
                    Ok((length, from)) => {
                        let answer = [name.as_bytes(), &buffer[..length]].concat();
                        // The client may be gone.
                        let _ = socket.send_to(&answer, from);
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    // Errors of earlier answers (ICMP) surface here.
                    Err(_) => {}
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // An empty datagram from itself.
        let sent = self.stop.local_addr().and_then(|own| self.stop.send_to(&[], own));
        if let (Ok(_), Some(thread)) = (sent, self.thread.take()) {
            thread.join().ok();
        }
    }
}

/// A UDP datagram as IP fragments, headers and all.
struct Datagram {
    src: SocketAddr,
    dst: SocketAddr,
    id: u16,
    payload: Vec<u8>,
}

impl Datagram {
    fn new(src: SocketAddr, dst: SocketAddr, id: u16, bytes: usize) -> Self {
        // No two pieces are alike, so none can stand for another.
        let payload = (0..bytes).map(|i| (i.wrapping_mul(31) / 7 + usize::from(id)) as u8).collect();
        Self { src, dst, id, payload }
    }

    /// UDP header and payload, with a checksum over all of it (RFC 768, RFC 8200 section 8.1), computed from scratch.
    fn udp(&self) -> Vec<u8> {
        let length = (self.payload.len() + 8) as u16;
        let mut bytes = [
            &self.src.port().to_be_bytes()[..],
            &self.dst.port().to_be_bytes(),
            &length.to_be_bytes(),
            &[0, 0],
            &self.payload,
        ]
        .concat();
        let pseudo =
            [octets(self.src.ip()), octets(self.dst.ip()), [[0, 17], length.to_be_bytes()].concat()].concat();
        let checksum = match !sum(&[&pseudo[..], &bytes].concat()) {
            0 => 0xffff,
            checksum => checksum,
        };
        bytes[6..8].copy_from_slice(&checksum.to_be_bytes());
        bytes
    }

    fn fragments(&self) -> Vec<Vec<u8>> {
        let udp = self.udp();
        let last = (udp.len() - 1) / PIECE;
        let pieces = udp.chunks(PIECE).enumerate();
        pieces
            .map(|(i, piece)| [self.header(i * PIECE, i < last, piece.len()), piece.to_vec()].concat())
            .collect()
    }

    fn header(&self, offset: usize, more: bool, length: usize) -> Vec<u8> {
        let (src, dst) = (octets(self.src.ip()), octets(self.dst.ip()));
        if self.src.is_ipv4() {
            let field = (offset / 8) as u16 | u16::from(more) << 13;
            let mut header = [
                &[0x45, 0][..],
                &((length + 20) as u16).to_be_bytes(),
                &self.id.to_be_bytes(),
                &field.to_be_bytes(),
                &[64, 17, 0, 0],
                &src,
                &dst,
            ]
            .concat();
            let checksum = !sum(&header);
            header[10..12].copy_from_slice(&checksum.to_be_bytes());
            header
        } else {
            // The fragment header's offset is in the upper 13 bits, M is the lowest (RFC 8200 section 4.5).
            let field = offset as u16 | u16::from(more);
            [
                &[0x60, 0, 0, 0][..],
                &((length + 8) as u16).to_be_bytes(),
                &[44, 64],
                &src,
                &dst,
                &[17, 0],
                &field.to_be_bytes(),
                &u32::from(self.id).to_be_bytes(),
            ]
            .concat()
        }
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// Orders in which fragments arrive.
#[derive(Clone, Copy, Debug)]
enum Order {
    AsSent,
    Reversed,
    /// Even ones, then odd ones: the first one in the middle.
    Shuffled,
    /// Each twice.
    Doubled,
}

const ORDERS: [Order; 4] = [Order::AsSent, Order::Reversed, Order::Shuffled, Order::Doubled];

impl Order {
    fn of(self, fragments: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        match self {
            Self::AsSent => fragments,
            Self::Reversed => fragments.into_iter().rev().collect(),
            Self::Shuffled => {
                let (even, odd): (Vec<_>, Vec<_>) =
                    fragments.into_iter().enumerate().partition(|(i, _)| i % 2 == 0);
                odd.into_iter().chain(even).map(|(_, fragment)| fragment).collect()
            }
            Self::Doubled => {
                fragments.into_iter().flat_map(|fragment| [fragment.clone(), fragment]).collect()
            }
        }
    }
}

/// An identification that no datagram of this process had before: what is left of one (a doubled last fragment) waits
/// for 30 seconds at the backend, and would spoil the next of that name.
fn next_id() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(100);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Sends a datagram in fragments and gives the name in front of its echo.
fn exchange(from: &Place, to: SocketAddr, port: u16, bytes: usize, order: Order) -> Result<String, String> {
    let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
    let socket = raw::udp(from, family, port).unwrap();
    socket.connect(to).unwrap();
    let packets = Raw::packets(from, family).unwrap();
    let datagram = Datagram::new(from.addrs.socket(family, port), to, next_id(), bytes);
    for fragment in order.of(datagram.fragments()) {
        packets.send(to.ip(), &fragment).map_err(|e| format!("cannot send: {e}"))?;
    }
    let deadline = Instant::now() + Duration::from_secs(2);
    let mut buffer = vec![0; 65_536];
    while Instant::now() < deadline {
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let length = socket.recv(&mut buffer).map_err(|e| format!("no answer: {e}"))?;
        if let Some(name) = buffer[..length].strip_suffix(&datagram.payload[..]) {
            return Ok(String::from_utf8_lossy(name).into_owned());
        }
    }
    Err("only other answers".to_owned())
}

/// A Service on pods' echoes, and the echoes.
fn echoes(cluster: &Cluster, name: &str, number: u8, pods: &[&str]) -> (Service, Vec<Echo>) {
    let echoes = pods.iter().flat_map(|p| Family::BOTH.map(|f| Echo::start(cluster.pod(p), f))).collect();
    let mut service = service(cluster, name, number, pods);
    service.endpoints = pods
        .iter()
        .map(|name| {
            let pod = cluster.pod(name);
            Endpoint { port: PORT, ..Endpoint::pod(pod) }
        })
        .collect();
    cluster.manifests.write(name, &service.documents()).unwrap();
    (service, echoes)
}

fn served(cluster: &Cluster, service: &Service) {
    for node in &cluster.nodes {
        for family in Family::BOTH {
            let to = service.cluster_ip(family);
            let from = &node.pods[1];
            lb_tests::wait_for("the echoes to be served", lb_tests::shared::SOON, || {
                let socket = raw::udp(from, family, 0).unwrap();
                socket.connect(to).unwrap();
                socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
                socket.send(b"anybody?").is_ok() && socket.recv(&mut [0; 64]).is_ok()
            })
            .unwrap();
        }
    }
}

fn all_orders(cluster: &Cluster, number: u8, bytes: usize) {
    let name = format!("fragments-{bytes}");
    let (service, echoes) = echoes(cluster, &name, number, &["pod-1a", "pod-2a"]);
    served(cluster, &service);
    let mut wrong = Vec::new();
    let mut port = 43_000;
    for from in [&cluster.client, cluster.pod("pod-1b"), cluster.pod("pod-2b")] {
        let node = cluster.node(if from.name == "pod-2b" { 2 } else { 1 });
        for (kind, to) in service.frontends(node) {
            for order in ORDERS {
                if wrong.len() > 10 {
                    // Enough said: each waits for an answer.
                    break;
                }
                // Two datagrams of one flow: both go to one backend.
                port += 1;
                let mut names = Vec::new();
                for _ in 0..2 {
                    match exchange(from, to, port, bytes, order) {
                        Ok(name) => names.push(name),
                        Err(e) => wrong.push(format!("{} -> {kind} {to} {order:?}: {e}", from.name)),
                    }
                }
                names.dedup();
                if names.len() > 1 {
                    wrong.push(format!("{} -> {kind} {to} {order:?}: {names:?}", from.name));
                }
            }
        }
    }
    drop(echoes);
    cluster.manifests.remove(&name).unwrap();
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn fragments_of_4000_bytes_reach_one_backend_in_any_order() {
    all_orders(&CLUSTER.lock(), 70, 4_000);
}

#[test]
fn fragments_of_20000_bytes_reach_one_backend_in_any_order() {
    all_orders(&CLUSTER.lock(), 71, 20_000);
}

/// Of two datagrams whose fragments come mixed, each gets together again.
#[test]
fn fragments_of_two_datagrams_at_once_are_kept_apart() {
    let cluster = CLUSTER.lock();
    let (service, echoes) = echoes(&cluster, "fragments-two", 72, &["pod-1a", "pod-2a"]);
    served(&cluster, &service);
    for from in [&cluster.client, cluster.pod("pod-1b")] {
        for (kind, to) in service.frontends(cluster.node(1)) {
            let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
            let sockets = [44_001, 44_002].map(|port| raw::udp(from, family, port).unwrap());
            let both: [Datagram; 2] = std::array::from_fn(|i| {
                Datagram::new(sockets[i].local_addr().unwrap(), to, next_id(), 4_000)
            });
            let packets = Raw::packets(from, family).unwrap();
            let [a, b] = both.each_ref().map(|d| Order::Reversed.of(d.fragments()));
            for fragment in a.iter().zip(&b).flat_map(|(a, b)| [a, b]) {
                packets.send(to.ip(), fragment).unwrap();
            }
            for (socket, datagram) in sockets.iter().zip(&both) {
                socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
                let mut buffer = vec![0; 65_536];
                let length =
                    socket.recv(&mut buffer).unwrap_or_else(|e| panic!("{} -> {kind} {to}: {e}", from.name));
                assert!(buffer[..length].ends_with(&datagram.payload), "{} -> {kind} {to}", from.name);
            }
        }
    }
    drop(echoes);
}

/// The rest of a datagram whose first fragment never comes costs others nothing.
#[test]
fn fragments_without_a_first_one_are_forgotten() {
    let cluster = CLUSTER.lock();
    let (service, echoes) = echoes(&cluster, "fragments-rest", 73, &["pod-1a"]);
    served(&cluster, &service);
    let to = external_ips(73).socket(Family::V4, service.port);
    let from = &cluster.client;
    let packets = Raw::packets(from, Family::V4).unwrap();
    let src = from.addrs.socket(Family::V4, 44_100);
    // More than any bounded table is to hold.
    for _ in 0..3_000 {
        let fragments = Datagram::new(src, to, next_id(), 4_000).fragments();
        packets.send(to.ip(), &fragments[1]).unwrap();
    }
    for order in ORDERS {
        assert_eq!(exchange(from, to, 44_101, 4_000, order).as_deref(), Ok("pod-1a"), "{order:?}");
    }
    drop(echoes);
}

/// The test's own packets are right: without a Service on the way they are answered as well.
#[test]
fn fragments_straight_to_a_pod_are_answered() {
    let cluster = CLUSTER.lock();
    let pod = cluster.pod("pod-1a");
    for family in Family::BOTH {
        let echo = Echo::start(pod, family);
        for from in [&cluster.client, cluster.pod("pod-1b")] {
            let to = pod.addrs.socket(family, PORT);
            for order in ORDERS {
                let name = exchange(from, to, 44_200, 4_000, order);
                assert_eq!(name.as_deref(), Ok("pod-1a"), "{} {family:?} {order:?}", from.name);
            }
        }
        drop(echo);
    }
}

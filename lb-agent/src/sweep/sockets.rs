//! Sockets that the socket hooks connected to a backend that is no endpoint any more. They speak to it directly, so there
//! is no flow to remove: the socket itself has to go, and its owner connects anew.
//!
//! A connected UDP socket goes at once (SEMANTICS I1), a TCP socket once its peer does not answer (J2): its pod may live on.
//! Only sockets that `SOCKETS` knows by cookie are touched, and only if they are still connected to that backend: whoever
//! connected to it without a Service did not ask for another one. Unconnected UDP sockets choose with each datagram.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    path::Path,
    time::Instant,
};

use aya::maps::MapType;
use lb_common::{
    Be16, V4, V6,
    addr::{ToIp, v6},
    frontend::{FrontendKey, FrontendValue},
    maps::name,
    proto,
    socket::{SocketKey, SocketOrigin},
};

use super::{SweepError, gone::WATCH};
use crate::{
    maps::{MapError, Table},
    plan::{
        Retired,
        op::{Frontend, Protocol},
    },
    sockets::{self, Socket, Support, state},
};

/// Unanswered transmissions that tell that nobody is there: with the usual timers that takes more than a second (RFC 6298:
/// 0.2 s at least, doubled each time).
const UNANSWERED: u8 = 3;
/// States in which a TCP socket's owner may wait for its peer.
const WAITING: u32 =
    state::ESTABLISHED | state::SYN_SENT | state::FIN_WAIT1 | state::FIN_WAIT2 | state::CLOSE_WAIT;

/// A socket as `SOCKETS` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Connected {
    cookie: u64,
    backend: (IpAddr, u16),
    frontend: Frontend,
}

impl Connected {
    fn of(key: &SocketKey, origin: &SocketOrigin) -> Option<Self> {
        let protocol = Protocol::from_number(key.proto)?;
        let addr = plain(&origin.frontend);
        let frontend = Frontend { addr, port: origin.port.get(), protocol };
        Some(Self { cookie: key.cookie, backend: (plain(&key.backend), key.port.get()), frontend })
    }
}

/// An address in its own family.
fn plain(mapped: &V6) -> IpAddr {
    mapped.to_ip().to_canonical()
}

/// Judges sockets by frontend; the last word on a frontend counts.
struct Endpoints<'r>(HashMap<Frontend, &'r Retired>);

impl<'r> Endpoints<'r> {
    fn of(retired: &'r [Retired]) -> Self {
        Self(retired.iter().flat_map(|r| r.frontends.iter().map(move |f| (*f, r))).collect())
    }

    /// The record that retired this socket's backend.
    fn retired(&self, socket: &Connected) -> Option<&'r Retired> {
        let record = *self.0.get(&socket.frontend)?;
        record.serving.binary_search(&socket.backend).is_err().then_some(record)
    }
}

/// By cookie and backend.
type Stale<'r> = HashMap<(u64, (IpAddr, u16)), (Connected, &'r Retired)>;

/// Finds and destroys sockets with retired backends.
pub struct Sockets {
    table: Table<SocketKey, SocketOrigin>,
    frontends4: Table<FrontendKey<V4>, FrontendValue>,
    frontends6: Table<FrontendKey<V6>, FrontendValue>,
    /// TCP sockets that live while their backend answers, by cookie.
    watched: HashMap<u64, (Connected, Instant)>,
    reset_gone: bool,
    supported: bool,
}

impl Sockets {
    /// Opens the maps in `dir`. `reset_gone`: destroy TCP sockets too.
    pub fn open(dir: &Path, reset_gone: bool) -> Result<Self, MapError> {
        Ok(Self {
            table: Table::open(dir, name::SOCKETS, &[MapType::LruHash])?,
            frontends4: Table::open(dir, name::FRONTENDS4, &[MapType::Hash])?,
            frontends6: Table::open(dir, name::FRONTENDS6, &[MapType::Hash])?,
            watched: HashMap::new(),
            reset_gone,
            supported: true,
        })
    }

    /// Asks the kernel what it can do, and says once what it cannot.
    pub fn check_support(&mut self) {
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            let lacks = match sockets::support(protocol.number()) {
                Ok(Support::Full) => continue,
                Ok(Support::NoDestroy) => "CONFIG_INET_DIAG_DESTROY".to_owned(),
                Ok(Support::NoDiag) => "CONFIG_INET_DIAG or CONFIG_INET_UDP_DIAG".to_owned(),
                Err(e) => format!("an answer to sock_diag requests ({e})"),
            };
            self.supported = false;
            tracing::warn!(
                %protocol,
                "the kernel lacks {lacks}: processes of this node keep a connected socket to a backend that is gone until \
                 they close it themselves"
            );
            break;
        }
    }

    pub fn is_watching(&self) -> bool {
        !self.watched.is_empty()
    }

    /// Takes in what became of records' endpoints: destroys UDP sockets, begins to watch TCP sockets. Returns how many it
    /// destroyed.
    pub fn retire(&mut self, retired: &[Retired], now: Instant) -> Result<u64, SweepError> {
        let endpoints = Endpoints::of(retired);
        self.watched.retain(|_, (socket, _)| {
            endpoints
                .0
                .get(&socket.frontend)
                .is_none_or(|r| r.serving.binary_search(&socket.backend).is_err())
        });
        let concerns_us = |r: &Retired| match r.protocol {
            Protocol::Udp => true,
            Protocol::Tcp => self.reset_gone,
            Protocol::Sctp => false,
        };
        if !self.supported || !retired.iter().any(|r| r.lost && concerns_us(r)) {
            return Ok(0);
        }
        let mut stale = self.stale(&endpoints)?;
        stale.retain(|_, (_, record)| concerns_us(record));
        let mut destroyed = 0;
        for (protocol, states) in [(proto::UDP, state::ESTABLISHED), (proto::TCP, WAITING)] {
            let of_protocol =
                stale.values().map(|(s, _)| s).filter(|s| s.frontend.protocol.number() == protocol);
            let ports: BTreeSet<u16> = of_protocol.map(|s| s.backend.1).collect();
            for port in ports {
                for socket in sockets::connected(protocol, states, port).map_err(SweepError::Diag)? {
                    let Some((known, _)) = stale.get(&(socket.cookie, socket.peer)) else { continue };
                    if protocol == proto::UDP {
                        destroyed += u64::from(destroy(protocol, &socket)?);
                    } else {
                        self.watched.entry(socket.cookie).or_insert((*known, now + WATCH));
                    }
                }
            }
        }
        Ok(destroyed)
    }

    /// Entries whose backend was retired. One socket may have several: it need not be connected to any of them now.
    fn stale<'r>(&self, endpoints: &Endpoints<'r>) -> Result<Stale<'r>, SweepError> {
        let read = |source| MapError::Read { map: name::SOCKETS, source };
        let mut stale = HashMap::new();
        let mut walk = self.table.walk();
        while let Some((keys, origins)) = walk.next_chunk().map_err(read)? {
            for socket in keys.iter().zip(origins).filter_map(|(k, o)| Connected::of(k, o)) {
                if let Some(record) = endpoints.retired(&socket)
                    && self.owner(&socket.frontend)?.is_none_or(|owner| owner == record.service)
                {
                    stale.insert((socket.cookie, socket.backend), (socket, record));
                }
            }
        }
        Ok(stale)
    }

    /// The record that an address leads to: where several Services claim it, only one has it.
    fn owner(&self, frontend: &Frontend) -> Result<Option<u32>, MapError> {
        let (port, number) = (Be16::new(frontend.port), frontend.protocol.number());
        let (map, found) = match frontend.addr {
            IpAddr::V4(ip) => {
                (name::FRONTENDS4, self.frontends4.get(&FrontendKey::new(ip.into(), port, number)))
            }
            IpAddr::V6(ip) => {
                (name::FRONTENDS6, self.frontends6.get(&FrontendKey::new(v6(ip), port, number)))
            }
        };
        found.map(|v| v.map(|v| v.service)).map_err(|source| MapError::Read { map, source })
    }

    /// Looks at each watched socket once, destroys those whose peer does not answer, and forgets those that are closed.
    /// Returns how many it destroyed.
    pub fn look(&mut self, now: Instant) -> Result<u64, SweepError> {
        let ports: BTreeSet<u16> = self.watched.values().map(|(s, _)| s.backend.1).collect();
        let mut alive = HashMap::with_capacity(self.watched.len());
        let mut destroyed = 0;
        for port in ports {
            for socket in sockets::connected(proto::TCP, WAITING, port).map_err(SweepError::Diag)? {
                let Some(entry) = self.watched.get(&socket.cookie).filter(|(s, _)| s.backend == socket.peer)
                else {
                    continue;
                };
                if is_unanswered(&socket) {
                    destroyed += u64::from(destroy(proto::TCP, &socket)?);
                } else if entry.1 > now {
                    alive.insert(socket.cookie, *entry);
                }
            }
        }
        self.watched = alive;
        Ok(destroyed)
    }
}

/// A SYN that had to be repeated once was not answered for a second (RFC 6298 section 2).
fn is_unanswered(socket: &Socket) -> bool {
    let enough = if socket.state == state::SYN_SENT { 1 } else { UNANSWERED };
    socket.unanswered >= enough
}

fn destroy(protocol: u8, socket: &Socket) -> Result<bool, SweepError> {
    sockets::destroy(protocol, socket).map_err(SweepError::Destroy)
}

#[cfg(test)]
mod tests {
    use lb_common::{Be32, addr::v4_mapped};

    use super::*;
    use crate::plan::op::Family;

    const VIP: &str = "10.96.0.1";

    fn frontend(addr: &str) -> Frontend {
        Frontend { addr: addr.parse().unwrap(), port: 53, protocol: Protocol::Udp }
    }

    fn retired(service: u32, serving: &[&str]) -> Retired {
        Retired {
            service,
            family: Family::V4,
            protocol: Protocol::Udp,
            frontends: vec![frontend(VIP)],
            serving: serving.iter().map(|ip| (ip.parse().unwrap(), 5353)).collect(),
            lost: true,
        }
    }

    fn socket(origin: Be32, backend: Be32) -> Connected {
        let key = SocketKey {
            cookie: 7,
            backend: v4_mapped(backend),
            port: Be16::new(5353),
            proto: proto::UDP,
            ..Default::default()
        };
        let origin = SocketOrigin { frontend: v4_mapped(origin), port: Be16::new(53), ..Default::default() };
        Connected::of(&key, &origin).unwrap()
    }

    #[test]
    fn a_socket_is_stale_if_the_last_word_on_its_frontend_lacks_its_backend() {
        let (vip, other) = (Be32::new(0x0a60_0001), Be32::new(0x0a60_0002));
        let backend = Be32::new(0x0a01_0002);
        let gone = [retired(3, &["10.1.0.3"])];
        assert_eq!(Endpoints::of(&gone).retired(&socket(vip, backend)), Some(&gone[0]));
        assert_eq!(Endpoints::of(&gone).retired(&socket(other, backend)), None);
        // I10: the address moved on to a Service with the same backend.
        let moved = [retired(3, &[]), retired(4, &["10.1.0.2"])];
        assert_eq!(Endpoints::of(&moved).retired(&socket(vip, backend)), None);
    }

    #[test]
    fn a_quiet_socket_is_no_evidence() {
        let socket = |state, unanswered| {
            let mut message = vec![2, 0, 1, unanswered];
            message.resize(72, 0);
            message[1] = u32::trailing_zeros(state) as u8;
            sockets::parse(&message).unwrap()
        };
        assert!(!is_unanswered(&socket(state::ESTABLISHED, 0)));
        assert!(!is_unanswered(&socket(state::ESTABLISHED, 2)));
        assert!(is_unanswered(&socket(state::ESTABLISHED, 3)));
        assert!(!is_unanswered(&socket(state::SYN_SENT, 0)));
        assert!(is_unanswered(&socket(state::SYN_SENT, 1)));
    }
}

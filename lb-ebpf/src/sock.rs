//! Socket hooks: a process that connects or sends to a Service address gets a backend at once, so its packets need no
//! translation at all. What it asked for is remembered per socket, for `recvmsg` and `getpeername`.
//!
//! IPv4 addresses travel in their mapped form here, so that IPv6 sockets that speak IPv4 (`::ffff:a.b.c.d`) take the
//! same way.

use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock_addr,
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval},
    programs::SockAddrContext,
};
use lb_common::{
    Be16, Be32, V4, V6, addr,
    frontend::{FrontendKey, flags},
    proto,
    select::{self, Origin, Unlisted},
    socket::{SocketKey, SocketOrigin},
    verdict::Counter,
};

use crate::{
    conntrack as flows, globals, maps, metrics,
    net::{ANY, Net},
    service::{self, Refusal},
};

const ALLOW: i32 = 1;
const DENY: i32 = 0;
const ECONNREFUSED: i32 = 111;
/// What a caller gets where the packet path would drop in silence (policy Local without a local endpoint): the error
/// that waiting would end in, without the wait.
const ETIMEDOUT: i32 = 110;

/// The address that a socket call names.
#[derive(Clone, Copy)]
struct Peer {
    addr: V6,
    port: Be16,
}

/// `struct bpf_sock_addr` through the eyes of one hook.
#[derive(Clone, Copy)]
struct Call(*mut bpf_sock_addr);

impl Call {
    #[inline(always)]
    fn new(ctx: &SockAddrContext) -> Self {
        Self(ctx.as_ptr().cast())
    }

    #[inline(always)]
    fn proto(self) -> u8 {
        // SAFETY: the context of the running program.
        unsafe { (*self.0).protocol as u8 }
    }

    #[inline(always)]
    fn cookie(self) -> u64 {
        // SAFETY: the context of the running program.
        unsafe { bpf_get_socket_cookie(self.0.cast()) }
    }

    /// True for processes of the node itself.
    #[inline(always)]
    fn is_host(self) -> bool {
        self.netns() == globals::host_netns()
    }

    /// True if this process's sockets are to be served.
    #[inline(always)]
    fn is_served(self) -> bool {
        let wanted = globals::socket_netns();
        wanted == 0 || self.netns() == wanted
    }

    /// Cookie of the process's network namespace, counted up from 1 by the kernel.
    #[inline(always)]
    fn netns(self) -> u64 {
        // SAFETY: the context of the running program.
        unsafe { bpf_get_netns_cookie(self.0.cast()) }
    }

    #[inline(always)]
    fn peer4(self) -> Peer {
        // SAFETY: the context of the running program. The port is in the low half, in network order.
        unsafe {
            Peer {
                addr: addr::v4_mapped(Be32::from_raw((*self.0).user_ip4)),
                port: Be16::from_raw((*self.0).user_port as u16),
            }
        }
    }

    #[inline(always)]
    fn peer6(self) -> Peer {
        // SAFETY: as above.
        unsafe {
            Peer {
                addr: [
                    Be32::from_raw((*self.0).user_ip6[0]),
                    Be32::from_raw((*self.0).user_ip6[1]),
                    Be32::from_raw((*self.0).user_ip6[2]),
                    Be32::from_raw((*self.0).user_ip6[3]),
                ],
                port: Be16::from_raw((*self.0).user_port as u16),
            }
        }
    }

    #[inline(always)]
    fn set4(self, peer: &Peer) {
        // SAFETY: as above.
        unsafe {
            (*self.0).user_ip4 = peer.addr[3].raw();
            (*self.0).user_port = peer.port.raw() as u32;
        }
    }

    #[inline(always)]
    fn set6(self, peer: &Peer) {
        // SAFETY: as above.
        unsafe {
            (*self.0).user_ip6[0] = peer.addr[0].raw();
            (*self.0).user_ip6[1] = peer.addr[1].raw();
            (*self.0).user_ip6[2] = peer.addr[2].raw();
            (*self.0).user_ip6[3] = peer.addr[3].raw();
            (*self.0).user_port = peer.port.raw() as u32;
        }
    }

    #[inline(always)]
    fn key(self, peer: &Peer) -> SocketKey {
        SocketKey {
            cookie: self.cookie(),
            backend: peer.addr,
            port: peer.port,
            proto: self.proto(),
            _pad: 0,
            _pad2: 0,
        }
    }
}

/// The address of a family in its common form and back.
trait Mapped: Net {
    fn from_mapped(addr: &V6) -> Self;
    fn to_mapped(self) -> V6;
    /// Stands for all sockets of a network namespace where a client's address is asked for: a socket has none yet when
    /// it connects. No client has an address in 0.0.0.0/8 or ::/96 (RFC 1122, RFC 4291).
    fn from_netns(cookie: u64) -> Self;
}

impl Mapped for V4 {
    #[inline(always)]
    fn from_mapped(addr: &V6) -> Self {
        addr[3]
    }
    #[inline(always)]
    fn to_mapped(self) -> V6 {
        addr::v4_mapped(self)
    }
    #[inline(always)]
    fn from_netns(cookie: u64) -> Self {
        Be32::new(cookie as u32 & 0x00ff_ffff)
    }
}

impl Mapped for V6 {
    #[inline(always)]
    fn from_mapped(addr: &V6) -> Self {
        *addr
    }
    #[inline(always)]
    fn to_mapped(self) -> V6 {
        self
    }
    #[inline(always)]
    fn from_netns(cookie: u64) -> Self {
        [Be32::default(), Be32::default(), Be32::default(), Be32::new(cookie as u32)]
    }
}

/// What a process does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum What {
    Connect,
    Send,
}

/// What becomes of a call.
enum Outcome {
    /// The address is no frontend.
    Untouched,
    /// Speak to this backend instead.
    To(Peer),
    Refused(Refusal),
}

/// connect and sendmsg of IPv4 sockets.
#[inline(always)]
pub fn send4(ctx: &SockAddrContext, what: What) -> i32 {
    let call = Call::new(ctx);
    if !call.is_served() {
        return ALLOW;
    }
    let outcome = choose::<V4>(call, &call.peer4(), what);
    if let Outcome::To(backend) = &outcome {
        call.set4(backend);
    }
    answer(outcome)
}

/// connect and sendmsg of IPv6 sockets.
#[inline(always)]
pub fn send6(ctx: &SockAddrContext, what: What) -> i32 {
    let call = Call::new(ctx);
    if !call.is_served() {
        return ALLOW;
    }
    let peer = call.peer6();
    let outcome = if addr::unmap_v4(&peer.addr).is_some() {
        choose::<V4>(call, &peer, what)
    } else {
        choose::<V6>(call, &peer, what)
    };
    if let Outcome::To(backend) = &outcome {
        call.set6(backend);
    }
    answer(outcome)
}

/// recvmsg and getpeername of IPv4 sockets: the address that the process knows.
#[inline(always)]
pub fn receive4(ctx: &SockAddrContext) -> i32 {
    let call = Call::new(ctx);
    if let Some(origin) = origin(call, &call.peer4()) {
        call.set4(&origin);
    }
    ALLOW
}

/// recvmsg and getpeername of IPv6 sockets.
#[inline(always)]
pub fn receive6(ctx: &SockAddrContext) -> i32 {
    let call = Call::new(ctx);
    if let Some(origin) = origin(call, &call.peer6()) {
        call.set6(&origin);
    }
    ALLOW
}

#[inline(always)]
fn answer(outcome: Outcome) -> i32 {
    let errno = match outcome {
        Outcome::Untouched => return ALLOW,
        Outcome::To(_) => {
            metrics::count(Counter::SocketTranslated);
            return ALLOW;
        }
        Outcome::Refused(Refusal::Reject) => {
            metrics::count(Counter::SocketRejectNoEndpoints);
            ECONNREFUSED
        }
        Outcome::Refused(Refusal::RejectUnlisted) => {
            metrics::count(Counter::RejectUnlistedPort);
            ECONNREFUSED
        }
        Outcome::Refused(refusal) => {
            metrics::count(refusal.counter());
            ETIMEDOUT
        }
    };
    // SAFETY: a plain integer. Since Linux 5.18; without it the caller gets EPERM.
    unsafe { bpf_set_retval(-errno) };
    DENY
}

/// Picks a backend. One socket gets the same one for the same frontend as long as the set does not change, so that
/// datagrams of a conversation stay together.
#[inline(always)]
fn choose<A: Mapped>(call: Call, peer: &Peer, what: What) -> Outcome {
    let addr = A::from_mapped(&peer.addr);
    let Some(frontend) = A::frontend(&FrontendKey::new(addr, peer.port, call.proto())) else {
        return no_frontend(call, addr, what);
    };
    // A pod's loopback is its own.
    if frontend.flags & flags::LOOPBACK != 0 && !call.is_host() {
        return Outcome::Untouched;
    }
    if frontend.flags & flags::SOURCE_RANGES != 0 {
        if !call.is_host() {
            // Which address the socket will have, only its packets tell: the classifier decides.
            return Outcome::Untouched;
        }
        if frontend.flags & flags::NODE_IN_RANGES == 0 {
            return Outcome::Refused(Refusal::Drop(Counter::DropSourceRange));
        }
    }
    let cookie = call.cookie();
    let hash = select::finalize(select::mix(
        select::mix(select::mix(globals::hash_seed(), cookie as u32), (cookie >> 32) as u32),
        frontend.service,
    ));
    let client = A::from_netns(call.netns());
    let picked = match service::pick::<A>(frontend, Origin::Internal, client, hash, flows::now()) {
        Ok(picked) => picked,
        Err(refusal) => return Outcome::Refused(refusal),
    };
    let backend = Peer { addr: picked.backend.addr.to_mapped(), port: picked.backend.port };
    let origin = SocketOrigin { frontend: peer.addr, port: peer.port, _pad: 0, _pad2: 0 };
    if remember(call.key(&backend), &origin) {
        metrics::count_connection(frontend.service);
    }
    Outcome::To(backend)
}

/// Rule C7 for a process: what its first packet would get.
#[inline(always)]
fn no_frontend<A: Mapped>(call: Call, addr: A, what: What) -> Outcome {
    let range = addr.service_cidr();
    // getaddrinfo() connects UDP sockets to any port just to see which address it would speak from (RFC 6724): no packet is
    // sent, so nothing is refused.
    if range == 0 || what == What::Connect && call.proto() == proto::UDP {
        return Outcome::Untouched;
    }
    match select::unlisted(A::frontend(&FrontendKey::address(addr)), range) {
        Unlisted::Pass => Outcome::Untouched,
        Unlisted::Reject => Outcome::Refused(Refusal::RejectUnlisted),
        Unlisted::Drop => Outcome::Refused(Refusal::Drop(Counter::DropUnassignedAddress)),
    }
}

/// True if this is news: a conversation of datagrams finds its entry there already.
#[inline(always)]
fn remember(key: SocketKey, origin: &SocketOrigin) -> bool {
    // SAFETY: read at once.
    if unsafe { maps::SOCKETS.get(key) } == Some(origin) {
        return false;
    }
    // A full LRU evicts; failing altogether only costs the name that the process sees.
    let _ = maps::SOCKETS.insert(key, origin, ANY);
    true
}

#[inline(always)]
fn origin(call: Call, peer: &Peer) -> Option<Peer> {
    if !call.is_served() {
        return None;
    }
    // SAFETY: copied at once.
    let origin = unsafe { maps::SOCKETS.get(call.key(peer)) }?;
    Some(Peer { addr: origin.frontend, port: origin.port })
}

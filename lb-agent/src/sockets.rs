//! Sockets of this network namespace: lists and destroys them through inet_diag (sock_diag(7)).
//!
//! Listing needs no capability, destroying CAP_NET_ADMIN in the namespace's user namespace. A netlink socket sees the
//! network namespace of its maker only, so sockets in pods are out of reach.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::datapath::netlink::{self, NLM_F_DUMP, Payload};

const NETLINK_SOCK_DIAG: i32 = 4;
// Message types, include/uapi/linux/sock_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// `struct inet_diag_sockid`: both ports, both addresses of 16 bytes, the device, the cookie.
const ID_BYTES: usize = 48;
const FAMILIES: [i32; 2] = [libc::AF_INET, libc::AF_INET6];

/// States of connected sockets (include/net/tcp_states.h; UDP uses the first alone), as bits of a request.
pub mod state {
    pub const ESTABLISHED: u32 = 1 << 1;
    pub const SYN_SENT: u32 = 1 << 2;
    pub const FIN_WAIT1: u32 = 1 << 4;
    pub const FIN_WAIT2: u32 = 1 << 5;
    pub const CLOSE_WAIT: u32 = 1 << 8;
}

/// A connected socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    family: u8,
    /// As the kernel gave it, which is how it wants it back.
    id: [u8; ID_BYTES],
    /// What `bpf_get_socket_cookie` gives: both are the number that the kernel hands out to a socket on first demand, and
    /// never twice (`sock_gen_cookie`).
    pub cookie: u64,
    /// The other end, IPv4 in its own form.
    pub peer: (IpAddr, u16),
    /// A bit of [`state`].
    pub state: u32,
    /// Retransmissions, zero-window probes or keep-alive probes since the peer was last heard (TCP).
    pub unanswered: u8,
}

/// What the kernel can do here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    Full,
    /// Built without CONFIG_INET_DIAG_DESTROY.
    NoDestroy,
    /// Built without CONFIG_INET_DIAG or CONFIG_INET_UDP_DIAG, or their modules cannot be loaded.
    NoDiag,
}

/// Asks for a socket that cannot exist to be destroyed: what the kernel says first shows what it can do.
pub fn support(protocol: u8) -> io::Result<Support> {
    // No states: an empty list.
    match dump(protocol, libc::AF_INET, 0, 0) {
        Err(e) if is_unknown(&e) => return Ok(Support::NoDiag),
        listed => drop(listed?),
    }
    let nobody = request(libc::AF_INET as u8, protocol, 0, &[0; ID_BYTES]);
    match netlink::request(NETLINK_SOCK_DIAG, SOCK_DESTROY, 0, &nobody) {
        Ok(_) => Ok(Support::Full),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(Support::Full),
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(Support::NoDestroy),
        Err(e) => Err(e),
    }
}

/// ENOENT: nobody serves the protocol. EPROTONOSUPPORT: no sock_diag at all.
fn is_unknown(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EPROTONOSUPPORT | libc::EOPNOTSUPP))
}

/// Sockets in these states that are connected to port `to`, of both families.
pub fn connected(protocol: u8, states: u32, to: u16) -> io::Result<Vec<Socket>> {
    let mut sockets = Vec::new();
    for family in FAMILIES {
        sockets.extend(dump(protocol, family, states, to)?.iter().filter_map(|m| parse(m)));
    }
    Ok(sockets)
}

/// Has the kernel abort the socket: its owner gets ECONNABORTED, a TCP peer a reset. False if it is gone already.
pub fn destroy(protocol: u8, socket: &Socket) -> io::Result<bool> {
    let payload = request(socket.family, protocol, 0, &socket.id);
    match netlink::request(NETLINK_SOCK_DIAG, SOCK_DESTROY, 0, &payload) {
        Ok(_) => Ok(true),
        // The kernel compares the cookie, so a socket that took its place is safe (ESTALE).
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => Ok(false),
        Err(e) => Err(e),
    }
}

fn dump(protocol: u8, family: i32, states: u32, to: u16) -> io::Result<Vec<Vec<u8>>> {
    let mut id = [0; ID_BYTES];
    id[2..4].copy_from_slice(&to.to_be_bytes());
    let payload = request(family as u8, protocol, states, &id);
    netlink::request(NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &payload)
}

/// `struct inet_diag_req_v2`: family, protocol, extensions, padding, states, id.
fn request(family: u8, protocol: u8, states: u32, id: &[u8; ID_BYTES]) -> Payload {
    let mut header = vec![family, protocol, 0, 0];
    header.extend_from_slice(&states.to_ne_bytes());
    header.extend_from_slice(id);
    Payload::new(&header)
}

/// `struct inet_diag_msg`: family, state, timer, retransmissions, id, and what is of no interest here.
pub(crate) fn parse(message: &[u8]) -> Option<Socket> {
    let [family, state, _timer, unanswered, rest @ ..] = message else { return None };
    let id: [u8; ID_BYTES] = *rest.first_chunk()?;
    let port = u16::from_be_bytes([id[2], id[3]]);
    let ip = match i32::from(*family) {
        libc::AF_INET => IpAddr::from(Ipv4Addr::from(*id[20..].first_chunk::<4>()?)),
        _ => Ipv6Addr::from(*id[20..].first_chunk::<16>()?).to_canonical(),
    };
    // Two native words, the low one first (sock_diag_save_cookie).
    let word = |at: usize| id[at..].first_chunk().map(|w| u64::from(u32::from_ne_bytes(*w)));
    let cookie = word(40)? | word(44)? << 32;
    let state = 1_u32.checked_shl(u32::from(*state))?;
    Some(Socket { family: *family, id, cookie, peer: (ip, port), state, unanswered: *unanswered })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use lb_common::proto::{TCP, UDP};

    use super::*;

    /// SO_COOKIE: the cookie that programs see.
    fn cookie(socket: &impl std::os::fd::AsRawFd) -> u64 {
        let (mut cookie, mut length) = (0_u64, size_of::<u64>() as libc::socklen_t);
        // SAFETY: room for the eight bytes of the option, and their number.
        let rc = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_COOKIE,
                (&raw mut cookie).cast(),
                &mut length,
            )
        };
        assert_eq!(rc, 0, "{}", io::Error::last_os_error());
        cookie
    }

    #[test]
    fn sockets_are_listed_with_cookie_and_peer() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let tcp = TcpStream::connect(to).unwrap();
        let udp = UdpSocket::bind("[::]:0").unwrap();
        // IPv4 through an IPv6 socket.
        udp.connect(("::ffff:127.0.0.1", to.port())).unwrap();
        for (protocol, cookie) in [(TCP, cookie(&tcp)), (UDP, cookie(&udp))] {
            let found = connected(protocol, state::ESTABLISHED, to.port()).unwrap();
            let ours: Vec<_> = found.iter().filter(|s| s.cookie == cookie).collect();
            assert_eq!(ours.len(), 1, "{found:?}");
            assert_eq!(ours[0].peer, (to.ip(), to.port()));
            assert_eq!((ours[0].state, ours[0].unanswered), (state::ESTABLISHED, 0));
        }
        let elsewhere = connected(TCP, state::ESTABLISHED, 1).unwrap();
        assert!(elsewhere.iter().all(|s| s.peer.1 == 1), "{elsewhere:?}");
    }

    #[test]
    fn messages_that_are_cut_off_are_no_sockets() {
        assert_eq!(parse(&[2, 1, 0, 0, 1, 2, 3]), None);
        assert_eq!(parse(&[]), None);
    }
}

//! Flows: the memory of which backend a connection has, and how long to keep it.
//!
//! A flow is two entries in `FLOWS4` or `FLOWS6`: one under the tuple of the client's packets, one under the tuple of
//! the answers. Each holds the whole rewritten tuple, so a packet needs one lookup and nothing else, and each
//! direction writes only its own entry (flags seen, time), so the two never contend. Whoever judges a flow (the
//! agent's sweeper, a SYN on an old tuple) looks at both entries, and they are created and removed together.

use crate::{Addr, Be16, V4, V6, map_type, tuple::Tuple};

/// Value of `FLOWS4` and `FLOWS6`: what to make of a packet with the key's tuple.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow<A> {
    /// The tuple after rewriting. The other entry of the flow is at `rewritten().reversed()`.
    pub src: A,
    pub dst: A,
    pub sport: Be16,
    pub dport: Be16,
    /// [`flags`].
    pub flags: u16,
    /// TCP flags ever seen in this direction (the flags byte of the TCP header, RFC 9293 section 3.1).
    pub tcp_seen: u8,
    pub _pad: u8,
    /// Index into `SERVICES`.
    pub service: u32,
    /// Index into `BACKENDS4` or `BACKENDS6`.
    pub backend: u32,
    /// Kernel jiffies (low 32 bits) of the last packet in this direction, at most a second old.
    pub last_seen: u32,
    /// Kernel jiffies (low 32 bits) when the flow began.
    pub created: u32,
}

map_type!(Flow<V4>, size = 32);
map_type!(Flow<V6>, size = 56);

/// Bits of [`Flow::flags`].
pub mod flags {
    /// The key is the tuple of the answers.
    pub const REPLY: u16 = 1 << 0;
    /// Applied when the packet leaves the node, not when it comes in: the answers of a flow whose source address was
    /// kept. Rewriting them on the way in would give the stack packets with its own addresses as their source.
    pub const AT_EGRESS: u16 = 1 << 1;
    /// The packet leaves by a redirect and never sees the stack: traffic in transit to another node, and its answers.
    pub const TRANSIT: u16 = 1 << 2;
    /// A pod that reaches itself: the packet goes back out of the device that it came in by.
    pub const HAIRPIN: u16 = 1 << 3;
    /// Set by the agent on the client's entry: the backend is gone for good, so the next TCP packet of the client gets a
    /// reset (rule J2).
    pub const GONE: u16 = 1 << 4;
}

impl<A: Addr> Flow<A> {
    /// Both ports after rewriting, as a header starts with them.
    #[inline(always)]
    pub const fn ports(&self) -> u32 {
        let ([s0, s1], [d0, d1]) = (self.sport.raw().to_ne_bytes(), self.dport.raw().to_ne_bytes());
        u32::from_ne_bytes([s0, s1, d0, d1])
    }

    /// The tuple that a packet of this direction gets.
    #[inline(always)]
    pub const fn rewritten(&self, proto: u8) -> Tuple<A> {
        Tuple::new(self.src, self.sport, self.dst, self.dport, proto)
    }
}

/// TCP header flags.
pub mod tcp {
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const ACK: u8 = 0x10;
}

/// How far a flow has come, judged from both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The client spoke, nobody answered yet.
    Opening,
    /// Both have spoken (TCP: the handshake is done).
    Established,
    /// TCP: a FIN from either side, or a reset. A new SYN may take the tuple over.
    Closing,
}

/// The flags of a TCP header that an SCTP packet stands for, by the type of its first chunk (RFC 9260 section 3.2): the
/// two kinds of associations begin and end alike, so one judgement serves both.
#[inline(always)]
pub const fn sctp_flags(chunk: u8) -> u8 {
    match chunk {
        // INIT
        1 => tcp::SYN,
        // INIT ACK
        2 => tcp::SYN | tcp::ACK,
        // ABORT
        6 => tcp::RST,
        // SHUTDOWN, SHUTDOWN ACK, SHUTDOWN COMPLETE
        7 | 8 | 14 => tcp::FIN | tcp::ACK,
        _ => tcp::ACK,
    }
}

/// True for protocols with a beginning and an end.
#[inline(always)]
pub const fn is_stream(proto: u8) -> bool {
    matches!(proto, crate::proto::TCP | crate::proto::SCTP)
}

/// Judges a flow by the TCP flags that its directions have seen; for UDP by whether an answer came.
///
/// `answered` is true once the reply entry has seen a packet.
#[inline(always)]
pub const fn stage(proto: u8, forward_seen: u8, reply_seen: u8, answered: bool) -> Stage {
    if is_stream(proto) {
        let either = forward_seen | reply_seen;
        if either & (tcp::FIN | tcp::RST) != 0 {
            Stage::Closing
        } else if reply_seen & tcp::SYN != 0 && forward_seen & tcp::ACK != 0 {
            Stage::Established
        } else if forward_seen & tcp::SYN == 0 && reply_seen != 0 {
            // Picked up in the middle (the flow began before the agent did, or the entry was lost), and the backend
            // knows of it.
            Stage::Established
        } else {
            Stage::Opening
        }
    } else if answered {
        Stage::Established
    } else {
        Stage::Opening
    }
}

/// True once a TCP connection is over for both ends: each has sent its FIN, or one a reset. A connection that only one
/// end has closed still carries data the other way (RFC 9293 section 3.6).
#[inline(always)]
pub const fn has_ended(forward_seen: u8, reply_seen: u8) -> bool {
    (forward_seen | reply_seen) & tcp::RST != 0 || forward_seen & reply_seen & tcp::FIN != 0
}

/// How long a flow may be silent, in seconds. Defaults follow nf_conntrack (net.netfilter.nf_conntrack_*_timeout).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    pub tcp_opening_s: u32,
    pub tcp_established_s: u32,
    pub tcp_closing_s: u32,
    pub udp_opening_s: u32,
    pub udp_established_s: u32,
    /// SCTP has the times of TCP otherwise.
    pub sctp_established_s: u32,
}

impl Timeouts {
    pub const DEFAULT: Self = Self {
        // tcp_timeout_syn_recv
        tcp_opening_s: 60,
        // kube-proxy's conntrack.tcpEstablishedTimeout
        tcp_established_s: 86_400,
        // tcp_timeout_time_wait and _fin_wait
        tcp_closing_s: 120,
        // udp_timeout
        udp_opening_s: 30,
        // udp_timeout_stream
        udp_established_s: 120,
        // sctp_timeout_established: seven heartbeats of RFC 9260's 30 seconds
        sctp_established_s: 210,
    };

    /// The timeout of a flow in `stage`.
    pub const fn of(&self, proto: u8, stage: Stage) -> u32 {
        match (is_stream(proto), stage) {
            (true, Stage::Opening) => self.tcp_opening_s,
            (true, Stage::Established) if proto == crate::proto::SCTP => self.sctp_established_s,
            (true, Stage::Established) => self.tcp_established_s,
            (true, Stage::Closing) => self.tcp_closing_s,
            (false, Stage::Opening) => self.udp_opening_s,
            (false, _) => self.udp_established_s,
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// True if the flow has been silent for longer than its stage allows. `last_seen` is the younger of the two
/// directions'; times are low halves of jiffies, so a difference is right for 49 days at 1000 per second.
pub const fn is_expired(
    timeouts: &Timeouts,
    proto: u8,
    stage: Stage,
    last_seen: u32,
    now: u32,
    jiffies_per_s: u32,
) -> bool {
    let silent = now.wrapping_sub(last_seen);
    // A packet may have stamped the entry after `now` was read.
    if silent > u32::MAX / 2 {
        return false;
    }
    silent as u64 > timeouts.of(proto, stage) as u64 * jiffies_per_s as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{TCP, UDP};

    #[test]
    fn tcp_goes_through_its_stages() {
        assert_eq!(stage(TCP, tcp::SYN, 0, false), Stage::Opening);
        assert_eq!(stage(TCP, tcp::SYN, tcp::SYN | tcp::ACK, true), Stage::Opening);
        assert_eq!(stage(TCP, tcp::SYN | tcp::ACK, tcp::SYN | tcp::ACK, true), Stage::Established);
        assert_eq!(stage(TCP, tcp::SYN | tcp::ACK, tcp::SYN | tcp::ACK | tcp::FIN, true), Stage::Closing);
        assert_eq!(stage(TCP, tcp::SYN, tcp::RST | tcp::ACK, true), Stage::Closing);
        assert_eq!(stage(TCP, tcp::ACK, 0, false), Stage::Opening);
        assert_eq!(stage(TCP, tcp::ACK, tcp::ACK, true), Stage::Established);
    }

    #[test]
    fn a_half_closed_connection_has_not_ended() {
        assert!(!has_ended(tcp::SYN | tcp::ACK | tcp::FIN, tcp::SYN | tcp::ACK));
        assert!(!has_ended(tcp::SYN | tcp::ACK, tcp::SYN | tcp::ACK | tcp::FIN));
        assert!(has_ended(tcp::ACK | tcp::FIN, tcp::ACK | tcp::FIN));
        assert!(has_ended(tcp::ACK, tcp::RST));
    }

    #[test]
    fn sctp_goes_through_the_same_stages() {
        const SCTP: u8 = crate::proto::SCTP;
        let [init, init_ack, cookie_echo, cookie_ack] = [1, 2, 10, 11].map(sctp_flags);
        let [abort, shutdown, shutdown_ack] = [6, 7, 8].map(sctp_flags);
        assert_eq!(stage(SCTP, init, init_ack, true), Stage::Opening);
        let (forward, reply) = (init | cookie_echo, init_ack | cookie_ack);
        assert_eq!(stage(SCTP, forward, reply, true), Stage::Established);
        assert_eq!(Timeouts::DEFAULT.of(SCTP, Stage::Established), 210);
        assert_eq!(stage(SCTP, forward, reply | abort, true), Stage::Closing);
        assert!(!has_ended(forward | shutdown, reply));
        assert!(has_ended(forward | shutdown, reply | shutdown_ack));
    }

    #[test]
    fn udp_is_established_by_an_answer() {
        assert_eq!(stage(UDP, 0, 0, false), Stage::Opening);
        assert_eq!(stage(UDP, 0, 0, true), Stage::Established);
    }

    #[test]
    fn expiry_counts_from_the_last_packet_and_never_for_the_future() {
        let t = Timeouts::DEFAULT;
        assert!(!is_expired(&t, UDP, Stage::Opening, 0, 30 * 100, 100));
        assert!(is_expired(&t, UDP, Stage::Opening, 0, 30 * 100 + 1, 100));
        assert!(!is_expired(&t, UDP, Stage::Opening, 10, 5, 100));
        assert!(is_expired(&t, UDP, Stage::Opening, u32::MAX - 10, 30 * 100, 100));
    }
}

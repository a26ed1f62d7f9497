//! Which flows are over. Values in, values out.

use lb_common::{
    Addr,
    conntrack::{Flow, Stage, Timeouts, flags, is_expired, stage},
};

use super::Depth;
use crate::maps::reply_answered;

/// Entries are created one after the other; one whose other half is still missing after this long has lost it.
const ORPHAN_AGE_S: u32 = 5;

/// Timeout of flows without an answer, and of those that are ending, while a table is nearly full: what fills a table is
/// usually made of them.
const UNDER_PRESSURE_S: u32 = 10;

/// What flows are judged by.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub timeouts: Timeouts,
    pub jiffies_per_s: u32,
    /// Kernel jiffies, low 32 bits.
    pub now: u32,
}

/// What becomes of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Judgement {
    Keep,
    /// Delete both entries.
    Expired,
    /// Delete this entry; the other one does not exist.
    Orphan,
    /// Somebody else deleted it meanwhile.
    Gone,
}

/// The timeouts while a table is nearly full.
pub fn under_pressure(t: Timeouts) -> Timeouts {
    Timeouts {
        tcp_opening_s: t.tcp_opening_s.min(UNDER_PRESSURE_S),
        udp_opening_s: t.udp_opening_s.min(UNDER_PRESSURE_S),
        tcp_closing_s: t.tcp_closing_s.min(UNDER_PRESSURE_S),
        ..t
    }
}

impl Rules {
    /// True if no look at the other entry can change that this one stays. Most entries of a busy table are found alive
    /// this way, without a system call.
    pub fn is_clearly_alive<A: Addr>(&self, proto: u8, entry: &Flow<A>, depth: Depth) -> bool {
        if depth == Depth::Orphans {
            return !self.older_than(entry.created, ORPHAN_AGE_S);
        }
        if entry.flags & flags::REPLY != 0 {
            return true;
        }
        // The other direction can only be younger.
        [Stage::Opening, Stage::Established, Stage::Closing]
            .iter()
            .all(|s| !is_expired(&self.timeouts, proto, *s, entry.last_seen, self.now, self.jiffies_per_s))
    }

    fn older_than(&self, then: u32, seconds: u32) -> bool {
        let age = self.now.wrapping_sub(then);
        age <= u32::MAX / 2 && u64::from(age) > u64::from(seconds) * u64::from(self.jiffies_per_s)
    }
}

/// Judges an entry together with the one at `rewritten().reversed()`.
pub fn judge<A: Addr>(rules: &Rules, proto: u8, entry: &Flow<A>, partner: Option<&Flow<A>>) -> Judgement {
    let is_reply = |f: &Flow<A>| f.flags & flags::REPLY != 0;
    // Two entries of the same direction are halves of different flows.
    let Some(partner) = partner.filter(|p| is_reply(p) != is_reply(entry)) else {
        return if rules.older_than(entry.created, ORPHAN_AGE_S) {
            Judgement::Orphan
        } else {
            Judgement::Keep
        };
    };
    let (forward, reply) = if is_reply(entry) { (partner, entry) } else { (entry, partner) };
    let stage = if forward.flags & flags::GONE != 0 {
        // The client has its reset, or gets it with the next packet; and its retransmissions are less far apart than that.
        Stage::Closing
    } else {
        stage(proto, forward.tcp_seen, reply.tcp_seen, reply_answered(reply))
    };
    let last_seen = rules.younger(forward.last_seen, reply.last_seen);
    if is_expired(&rules.timeouts, proto, stage, last_seen, rules.now, rules.jiffies_per_s) {
        Judgement::Expired
    } else {
        Judgement::Keep
    }
}

impl Rules {
    /// The later of two time stamps: the one that is less long ago, with stamps after `now` latest of all.
    fn younger(&self, a: u32, b: u32) -> u32 {
        let behind = |t: u32| self.now.wrapping_sub(t) as i32;
        if behind(a) <= behind(b) { a } else { b }
    }
}

#[cfg(test)]
mod tests {
    use lb_common::{
        V4,
        conntrack::tcp,
        proto::{SCTP, TCP, UDP},
    };
    use proptest::prelude::*;

    use super::*;

    const NOW: u32 = 1_000_000;

    fn rules() -> Rules {
        Rules { timeouts: Timeouts::DEFAULT, jiffies_per_s: 100, now: NOW }
    }

    /// A flow that began 1000 s ago; the directions spoke so many seconds ago. With an answer.
    fn pair(forward_idle_s: u32, reply_idle_s: u32, seen: (u8, u8)) -> (Flow<V4>, Flow<V4>) {
        let created = NOW - 100_000;
        let forward =
            Flow { last_seen: NOW - forward_idle_s * 100, created, tcp_seen: seen.0, ..Flow::default() };
        let reply = Flow {
            last_seen: NOW - reply_idle_s * 100,
            created,
            tcp_seen: seen.1,
            flags: flags::REPLY,
            ..Flow::default()
        };
        (forward, reply)
    }

    #[test]
    fn the_younger_direction_keeps_both_alive() {
        let (forward, reply) = pair(900, 1, (0, 0));
        assert_eq!(judge(&rules(), UDP, &forward, Some(&reply)), Judgement::Keep);
        let (forward, reply) = pair(1, 900, (0, 0));
        assert_eq!(judge(&rules(), UDP, &forward, Some(&reply)), Judgement::Keep);
        // nf_conntrack_udp_timeout_stream: 120 s.
        let (forward, reply) = pair(200, 121, (0, 0));
        assert_eq!(judge(&rules(), UDP, &forward, Some(&reply)), Judgement::Expired);
    }

    #[test]
    fn udp_without_an_answer_has_the_short_timeout() {
        // The reply entry is stamped when it is created; equal stamps mean that no answer came.
        let (forward, mut reply) = pair(31, 0, (0, 0));
        reply.last_seen = reply.created;
        assert_eq!(judge(&rules(), UDP, &forward, Some(&reply)), Judgement::Expired);
        let (forward, _) = pair(29, 0, (0, 0));
        assert_eq!(judge(&rules(), UDP, &forward, Some(&reply)), Judgement::Keep);
    }

    #[test]
    fn tcp_timeouts_follow_the_stage() {
        let both = (tcp::SYN | tcp::ACK, tcp::SYN | tcp::ACK);
        let (f, r) = pair(900, 900, both);
        assert_eq!(judge(&rules(), TCP, &f, Some(&r)), Judgement::Keep);
        let (f, r) = pair(121, 121, (both.0 | tcp::FIN, both.1));
        assert_eq!(judge(&rules(), TCP, &f, Some(&r)), Judgement::Expired);
        let (f, r) = pair(61, 900, (tcp::SYN, 0));
        assert_eq!(judge(&rules(), TCP, &f, Some(&r)), Judgement::Expired);
    }

    #[test]
    fn sctp_has_stages_too_and_a_shorter_life() {
        // nf_conntrack_sctp_timeout_established: 210 s, where TCP has a day.
        let both = (tcp::SYN | tcp::ACK, tcp::SYN | tcp::ACK);
        let (f, r) = pair(900, 209, both);
        assert_eq!(judge(&rules(), SCTP, &f, Some(&r)), Judgement::Keep);
        let (f, r) = pair(211, 211, both);
        assert_eq!(judge(&rules(), SCTP, &f, Some(&r)), Judgement::Expired);
        assert_eq!(judge(&rules(), TCP, &f, Some(&r)), Judgement::Keep);
        // SHUTDOWN.
        let (f, r) = pair(121, 121, (both.0 | tcp::FIN, both.1));
        assert_eq!(judge(&rules(), SCTP, &f, Some(&r)), Judgement::Expired);
        // INIT without an answer.
        let (f, r) = pair(61, 900, (tcp::SYN, 0));
        assert_eq!(judge(&rules(), SCTP, &f, Some(&r)), Judgement::Expired);
    }

    #[test]
    fn j2_connections_to_nobody_do_not_stay_for_a_day() {
        let (f, r) = pair(121, 900, (tcp::SYN | tcp::ACK, tcp::SYN | tcp::ACK));
        assert_eq!(judge(&rules(), TCP, &f, Some(&r)), Judgement::Keep);
        let marked = Flow { flags: flags::GONE, ..f };
        assert_eq!(judge(&rules(), TCP, &marked, Some(&r)), Judgement::Expired);
        assert_eq!(judge(&rules(), TCP, &r, Some(&marked)), Judgement::Expired);
        let asking = Flow { last_seen: NOW - 11_900, ..marked };
        assert_eq!(judge(&rules(), TCP, &asking, Some(&r)), Judgement::Keep);
    }

    #[test]
    fn either_entry_leads_to_the_same_judgement() {
        let (f, r) = pair(200, 121, (0, 0));
        assert_eq!(judge(&rules(), UDP, &r, Some(&f)), Judgement::Expired);
    }

    #[test]
    fn an_orphan_gets_five_seconds() {
        let young = Flow::<V4> { created: NOW - 499, last_seen: NOW, ..Flow::default() };
        assert_eq!(judge(&rules(), TCP, &young, None), Judgement::Keep);
        let old = Flow::<V4> { created: NOW - 501, last_seen: NOW, ..Flow::default() };
        assert_eq!(judge(&rules(), TCP, &old, None), Judgement::Orphan);
        // Another flow's forward entry is no partner.
        assert_eq!(judge(&rules(), TCP, &old, Some(&young)), Judgement::Orphan);
    }

    #[test]
    fn pressure_shortens_only_flows_without_an_answer() {
        let t = under_pressure(Timeouts::DEFAULT);
        assert_eq!((t.tcp_opening_s, t.udp_opening_s), (10, 10));
        assert_eq!(t.tcp_established_s, Timeouts::DEFAULT.tcp_established_s);
        assert_eq!(t.udp_established_s, Timeouts::DEFAULT.udp_established_s);
        assert_eq!(t.sctp_established_s, Timeouts::DEFAULT.sctp_established_s);
    }

    proptest! {
        /// The shortcut never keeps what the full judgement would delete for being silent, wherever the clock stands.
        #[test]
        fn the_shortcut_agrees_with_the_judgement(
            now: u32, idle in 0u32..20_000_000, partner_idle in 0u32..20_000_000, seen: u8, partner_seen: u8,
            gone: bool,
            proto in prop_oneof![Just(TCP), Just(UDP), Just(SCTP)],
        ) {
            let rules = Rules { now, ..rules() };
            let created = now.wrapping_sub(30_000_000);
            let forward = Flow::<V4> {
                last_seen: now.wrapping_sub(idle), created, tcp_seen: seen,
                flags: if gone { flags::GONE } else { 0 }, ..Flow::default()
            };
            let reply = Flow {
                last_seen: now.wrapping_sub(partner_idle), created, tcp_seen: partner_seen, flags: flags::REPLY,
                ..Flow::default()
            };
            if rules.is_clearly_alive(proto, &forward, Depth::Expiry) {
                prop_assert_eq!(judge(&rules, proto, &forward, Some(&reply)), Judgement::Keep);
            }
        }
    }
}

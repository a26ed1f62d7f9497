//! Clients of TCP backends that are gone for good (SEMANTICS J2).
//!
//! A pod that stopped being an endpoint may live on and keep its connections (I4); the objects do not tell it from one that
//! is gone. Its silence does: a client that asks twice, at least a second apart, without any answer, talks to nobody. Its
//! entry gets [`flags::GONE`], and the data path answers its next packet with a reset.
//!
//! No new flows lead to a retired backend, so one walk through the table finds all connections to watch; later looks are
//! at those alone.

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    time::{Duration, Instant},
};

use bytemuck::Pod;
use lb_common::{
    Addr, Be16,
    addr::ToIp,
    conntrack::{Flow, flags, has_ended},
    tuple::Tuple,
};

use super::SweepError;
use crate::{
    maps::{FlowTable, read_error},
    plan::{
        Retired,
        op::{Family, Protocol},
    },
};

/// How long a connection to a retired backend is watched. A backend that dies later than this after it stopped being an
/// endpoint is like any peer that dies: TCP's own retransmission timeout is of the same length (tcp_retries2).
pub const WATCH: Duration = Duration::from_secs(15 * 60);
/// How much younger than the last answer the client's last packet must be. Stamps are up to a second old, so less would
/// take a conversation in progress for an unanswered one.
const UNANSWERED_S: u32 = 2;
/// Least distance of the two unanswered packets: as far apart as stamps of one direction are.
const INSIST_S: u32 = 1;
/// Most connections watched per family (8 MB of IPv6 ones). Clients of any further ones have TCP's own timeouts.
const CAPACITY: usize = 131_072;

/// Stamps of the two directions when the client was first seen without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Doubt {
    asked: u32,
    answered: u32,
}

/// A connection to a retired backend.
#[derive(Clone, Copy, Debug)]
struct Watched<A> {
    service: u32,
    backend: (A, Be16),
    created: u32,
    /// Kernel jiffies when it was known that the backend is retired. What the client said before counts for nothing.
    since: u32,
    until: Instant,
    doubt: Option<Doubt>,
}

/// What becomes of a watched connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Watch,
    /// Over, or somebody else's by now.
    Forget,
    Gone,
}

impl<A: Addr> Watched<A> {
    fn is(&self, flow: &Flow<A>) -> bool {
        (flow.service, (flow.dst, flow.dport), flow.created) == (self.service, self.backend, self.created)
    }

    /// Judges by both entries as they are now.
    fn judge(&mut self, forward: Option<&Flow<A>>, reply: Option<&Flow<A>>, jiffies_per_s: u32) -> Fate {
        let (Some(forward), Some(reply)) = (forward, reply) else { return Fate::Forget };
        let is_marked = forward.flags & flags::GONE != 0;
        if !self.is(forward) || is_marked || has_ended(forward.tcp_seen, reply.tcp_seen) {
            return Fate::Forget;
        }
        let after = |later: u32, earlier: u32| later.wrapping_sub(earlier) as i32;
        let (asked, answered) = (forward.last_seen, reply.last_seen);
        let unanswered = after(asked, answered) >= (UNANSWERED_S * jiffies_per_s) as i32;
        if !unanswered || after(asked, self.since) <= 0 {
            self.doubt = None;
            return Fate::Watch;
        }
        match self.doubt {
            // An answer that is on its way at the time of a look moves its stamp before the next one.
            Some(doubt) if doubt.answered == answered => {
                let insists = after(asked, doubt.asked) >= (INSIST_S * jiffies_per_s) as i32;
                if insists { Fate::Gone } else { Fate::Watch }
            }
            _ => {
                self.doubt = Some(Doubt { asked, answered });
                Fate::Watch
            }
        }
    }
}

/// The watched connections of one family.
#[derive(Debug)]
pub struct Connections<A> {
    watched: HashMap<Tuple<A>, Watched<A>>,
}

impl<A> Default for Connections<A> {
    fn default() -> Self {
        Self { watched: HashMap::new() }
    }
}

impl<A: Addr + ToIp + std::hash::Hash> Connections<A>
where
    Tuple<A>: Pod,
    Flow<A>: Pod,
{
    pub fn is_empty(&self) -> bool {
        self.watched.is_empty()
    }

    /// Watches a connection, whose client's entry this is. `since`: kernel jiffies.
    pub fn watch(&mut self, key: &Tuple<A>, flow: &Flow<A>, since: u32, now: Instant) {
        if self.watched.len() >= CAPACITY || flow.flags & flags::GONE != 0 {
            return;
        }
        let (service, backend, created) = (flow.service, (flow.dst, flow.dport), flow.created);
        let new = Watched { service, backend, created, since, until: now + WATCH, doubt: None };
        let watched = self.watched.entry(*key).or_insert(new);
        if !watched.is(flow) {
            *watched = new;
        }
    }

    /// Forgets connections to backends that are endpoints of their record again.
    pub fn endpoints(&mut self, family: Family, retired: &[Retired]) {
        let wanted = |r: &&Retired| r.protocol == Protocol::Tcp && r.family == family;
        let serving: HashMap<u32, &[(IpAddr, u16)]> =
            retired.iter().filter(wanted).map(|r| (r.service, &*r.serving)).collect();
        self.watched.retain(|_, w| {
            let at = (w.backend.0.to_ip(), w.backend.1.get());
            serving.get(&w.service).is_none_or(|serving| serving.binary_search(&at).is_err())
        });
    }

    /// Looks at each connection once, and marks those whose backend is gone. Returns how many.
    pub fn look(
        &mut self,
        table: &FlowTable<A>,
        jiffies_per_s: u32,
        now: Instant,
    ) -> Result<u64, SweepError> {
        let mut marked = 0;
        let mut failure = None;
        self.watched.retain(|key, watched| {
            let fate = look_at(table, key, watched, jiffies_per_s);
            marked += u64::from(matches!(fate, Ok(Fate::Gone)));
            match fate {
                Ok(Fate::Watch) => watched.until > now,
                Ok(Fate::Gone | Fate::Forget) => false,
                // The next look tries again.
                Err(e) => {
                    failure.get_or_insert(e);
                    watched.until > now
                }
            }
        });
        failure.map_or(Ok(marked), Err)
    }
}

fn look_at<A: Addr>(
    table: &FlowTable<A>,
    key: &Tuple<A>,
    watched: &mut Watched<A>,
    jiffies_per_s: u32,
) -> Result<Fate, SweepError>
where
    Tuple<A>: Pod,
    Flow<A>: Pod,
{
    let get = |key: &Tuple<A>| table.get(key).map_err(read_error::<A>);
    let forward = get(key)?;
    let reply = match &forward {
        Some(flow) => get(&flow.rewritten(key.proto).reversed())?,
        None => None,
    };
    let fate = watched.judge(forward.as_ref(), reply.as_ref(), jiffies_per_s);
    if let (Fate::Gone, Some(flow), Some(reply)) = (fate, forward, reply)
        && !mark(table, key, &flow, &reply).map_err(SweepError::Mark)?
    {
        return Ok(Fate::Forget);
    }
    Ok(fate)
}

/// Marks the client's entry; false if the flow was replaced meanwhile.
///
/// The whole value is written, while the data path may write its time and TCP flags; what is lost then is harmless:
/// * a time: at most a second's worth, and the client's next packet stamps again;
/// * a flag: FIN and RST decide how long the entry stays and who may have its port, and so does the mark: a marked
///   connection counts as closing, and gives way to the client's next SYN.
/// * the entry itself, if it is deleted meanwhile: `replace` does not bring it back.
///
/// What must not happen is that the value overwrites another flow which took the tuple over since it was read. A takeover
/// removes both entries: if the answers' entry is not what it was, the client's goes too, and its next packet starts anew.
fn mark<A: Addr>(table: &FlowTable<A>, key: &Tuple<A>, flow: &Flow<A>, reply: &Flow<A>) -> io::Result<bool>
where
    Tuple<A>: Pod,
    Flow<A>: Pod,
{
    let marked = Flow { flags: flow.flags | flags::GONE, ..*flow };
    if !table.replace(key, &marked)? {
        return Ok(false);
    }
    let reply_now = table.get(&flow.rewritten(key.proto).reversed())?;
    let is_same = reply_now.is_some_and(|now| now.created == reply.created);
    if !is_same {
        table.delete(key)?;
    }
    Ok(is_same)
}

#[cfg(test)]
mod tests {
    use lb_common::{Be32, V4, conntrack::tcp};

    use super::*;

    const HZ: u32 = 100;
    /// Near the end of the counter's range: every comparison has to wrap.
    const SINCE: u32 = u32::MAX - 150;

    fn at(seconds: u32) -> u32 {
        SINCE.wrapping_add(seconds * HZ)
    }

    fn watched() -> Watched<V4> {
        let backend = (Be32::new(0x0a01_0002), Be16::new(80));
        let until = Instant::now() + WATCH;
        Watched { service: 3, backend, created: at(0) - 1000, since: SINCE, until, doubt: None }
    }

    /// A connection whose directions were last stamped then.
    fn pair(asked: u32, answered: u32) -> (Flow<V4>, Flow<V4>) {
        let both = tcp::SYN | tcp::ACK;
        let w = watched();
        let forward = Flow {
            dst: w.backend.0,
            dport: w.backend.1,
            service: 3,
            created: w.created,
            last_seen: asked,
            tcp_seen: both,
            ..Flow::default()
        };
        let reply = Flow { flags: flags::REPLY, last_seen: answered, tcp_seen: both, ..Flow::default() };
        (forward, reply)
    }

    fn look(w: &mut Watched<V4>, asked: u32, answered: u32) -> Fate {
        let (forward, reply) = pair(asked, answered);
        w.judge(Some(&forward), Some(&reply), HZ)
    }

    #[test]
    fn a_client_that_asks_twice_without_an_answer_talks_to_nobody() {
        let mut w = watched();
        assert_eq!(look(&mut w, at(1), at(0)), Fate::Watch);
        assert_eq!(look(&mut w, at(2), at(0)), Fate::Watch, "the first one unanswered");
        assert_eq!(look(&mut w, at(2), at(0)), Fate::Watch, "still the same one");
        assert_eq!(look(&mut w, at(3), at(0)), Fate::Gone);
    }

    #[test]
    fn an_answer_that_was_on_its_way_ends_the_doubt() {
        let mut w = watched();
        // A quiet connection: the look falls between a question and its answer, every time.
        for second in [10, 20, 30] {
            assert_eq!(look(&mut w, at(second), at(second - 10)), Fate::Watch);
        }
        assert_eq!(look(&mut w, at(31), at(30)), Fate::Watch);
        assert_eq!(look(&mut w, at(40), at(30)), Fate::Watch, "doubts begin anew");
    }

    #[test]
    fn what_was_said_before_the_backend_was_retired_does_not_count() {
        let mut w = watched();
        let before = |s: u32| SINCE - s * HZ;
        assert_eq!(look(&mut w, before(3), before(9)), Fate::Watch);
        assert_eq!(look(&mut w, before(1), before(9)), Fate::Watch);
        assert_eq!(w.doubt, None);
    }

    #[test]
    fn a_silent_client_is_left_alone() {
        let mut w = watched();
        for _ in 0..5 {
            assert_eq!(look(&mut w, at(2), at(0)), Fate::Watch);
        }
    }

    #[test]
    fn other_flows_and_ended_ones_are_forgotten() {
        let mut w = watched();
        let (forward, reply) = pair(at(5), at(0));
        assert_eq!(w.judge(None, None, HZ), Fate::Forget);
        assert_eq!(w.judge(Some(&forward), None, HZ), Fate::Forget);
        let again = Flow { created: forward.created + 1, ..forward };
        assert_eq!(w.judge(Some(&again), Some(&reply), HZ), Fate::Forget);
        let marked = Flow { flags: flags::GONE, ..forward };
        assert_eq!(w.judge(Some(&marked), Some(&reply), HZ), Fate::Forget);
        let reset = Flow { tcp_seen: tcp::RST, ..reply };
        assert_eq!(w.judge(Some(&forward), Some(&reset), HZ), Fate::Forget);
    }

    #[test]
    fn a_backend_that_is_an_endpoint_again_is_not_watched() {
        let mut connections = Connections::<V4>::default();
        let (flow, _) = pair(at(1), at(0));
        let key = Tuple::new(Be32::new(1), Be16::new(2), Be32::new(3), Be16::new(4), 6);
        connections.watch(&key, &flow, SINCE, Instant::now());
        let told = |service, protocol, serving: &[&str]| Retired {
            service,
            family: Family::V4,
            protocol,
            frontends: Vec::new(),
            serving: serving.iter().map(|ip| (ip.parse().unwrap(), 80)).collect(),
            lost: false,
        };
        let others = [told(4, Protocol::Tcp, &["10.1.0.2"]), told(3, Protocol::Tcp, &["10.1.0.3"])];
        connections.endpoints(Family::V4, &others);
        assert!(!connections.is_empty());
        connections.endpoints(Family::V4, &[told(3, Protocol::Tcp, &["10.1.0.2"])]);
        assert!(connections.is_empty());
    }
}

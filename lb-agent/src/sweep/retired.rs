//! Flows to backends that are no endpoints any more.
//!
//! UDP flows go at once (SEMANTICS I1): a client that keeps its source port would be sent to a dead backend until the flow
//! falls silent, which it never does. TCP connections are handed to the [watch](super::gone).

use std::{collections::HashMap, net::IpAddr};

use bytemuck::Pod;
use lb_common::{
    Addr,
    addr::ToIp,
    conntrack::{Flow, flags},
    proto,
    tuple::Tuple,
};

use super::SweepError;
use crate::{
    maps::{FlowTable, read_error},
    plan::{Retired, op::Family},
};

/// What still serves, by record and protocol: an id may go from a record of one protocol to one of another.
pub struct Serving<'r> {
    by_record: HashMap<(u32, u8), Record<'r>>,
    /// Whether a record is in use, if that matters: UDP flows of one that is not were left by an agent that ended after it
    /// had cleared the record and before it came to the flows.
    in_use: Option<&'r dyn Fn(u32) -> bool>,
    /// Kernel jiffies, low 32 bits. Flows that began later were opened by what is in the maps now, not before the change:
    /// the walk through the tables takes a while, and the next change does not wait for it.
    until: u32,
}

#[derive(Debug)]
struct Record<'r> {
    serving: &'r [(IpAddr, u16)],
    lost: bool,
}

impl<'r> Serving<'r> {
    /// Those records of one family that lost an endpoint; the last word on a record's endpoints counts.
    pub fn of(
        family: Family,
        retired: impl IntoIterator<Item = &'r Retired>,
        in_use: Option<&'r dyn Fn(u32) -> bool>,
        until: u32,
    ) -> Self {
        let mut by_record: HashMap<_, Record<'_>> = HashMap::new();
        for r in retired.into_iter().filter(|r| r.family == family) {
            let key = (r.service, r.protocol.number());
            let lost = r.lost || by_record.get(&key).is_some_and(|before| before.lost);
            by_record.insert(key, Record { serving: &r.serving, lost });
        }
        by_record.retain(|_, record| record.lost);
        Self { by_record, in_use, until }
    }

    /// True if no record of the family is concerned.
    pub fn is_empty(&self) -> bool {
        self.by_record.is_empty() && self.in_use.is_none()
    }

    /// True if flows may have to be deleted, not only watched.
    pub fn has_udp(&self) -> bool {
        self.in_use.is_some() || self.by_record.keys().any(|(_, proto)| *proto == proto::UDP)
    }

    /// True for a client's entry of a flow whose backend is no endpoint of its record any more.
    pub fn is_stale<A: Addr + ToIp>(&self, key: &Tuple<A>, flow: &Flow<A>) -> bool {
        if flow.flags & flags::REPLY != 0 {
            return false;
        }
        let is_newer = (flow.created.wrapping_sub(self.until) as i32) > 0;
        if is_newer {
            return false;
        }
        match self.by_record.get(&(flow.service, key.proto)) {
            // `serving` is sorted.
            Some(record) => record.serving.binary_search(&(flow.dst.to_ip(), flow.dport.get())).is_err(),
            None => key.proto == proto::UDP && self.in_use.is_some_and(|in_use| !in_use(flow.service)),
        }
    }
}

/// Walks the table once: deletes stale UDP flows, both entries of each, and tells of stale TCP connections. Returns how
/// many it deleted.
pub fn purge<A: Addr + ToIp>(
    table: &FlowTable<A>,
    serving: &Serving<'_>,
    mut connection: impl FnMut(&Tuple<A>, &Flow<A>),
) -> Result<u64, SweepError>
where
    Tuple<A>: Pod,
    Flow<A>: Pod,
{
    let mut purged = 0;
    let mut walk = table.walk();
    while let Some((keys, flows)) = walk.next_chunk().map_err(read_error::<A>)? {
        for (key, flow) in keys.iter().zip(flows).filter(|(k, f)| serving.is_stale(k, f)) {
            match key.proto {
                proto::UDP => {
                    table.delete(key).map_err(SweepError::Delete)?;
                    table.delete(&flow.rewritten(key.proto).reversed()).map_err(SweepError::Delete)?;
                    purged += 1;
                }
                proto::TCP => connection(key, flow),
                // SCTP has heartbeats of its own (RFC 9260 section 8.3): its clients notice.
                _ => {}
            }
        }
    }
    Ok(purged)
}

#[cfg(test)]
mod tests {
    use lb_common::{Be16, Be32, V4};

    use super::*;
    use crate::plan::op::Protocol;

    fn retired(protocol: Protocol, serving: &[&str], lost: bool) -> Retired {
        let serving = serving.iter().map(|ip| (ip.parse().unwrap(), 53)).collect();
        Retired { service: 3, family: Family::V4, protocol, frontends: Vec::new(), serving, lost }
    }

    fn a(last: u32) -> Be32 {
        Be32::new(0x0a01_0000 + last)
    }

    fn key(proto: u8) -> Tuple<V4> {
        Tuple::new(a(9), Be16::new(4000), a(1), Be16::new(53), proto)
    }

    fn flow(dst: u32, port: u16, service: u32, flags: u16) -> Flow<V4> {
        Flow { dst: a(dst), dport: Be16::new(port), service, flags, created: 100, ..Flow::default() }
    }

    #[test]
    fn only_flows_of_the_record_to_other_backends_are_stale() {
        let udp = [retired(Protocol::Udp, &["10.1.0.2"], true)];
        let other = Retired { family: Family::V6, ..udp[0].clone() };
        let serving = Serving::of(Family::V4, udp.iter().chain([&other]), None, 100);
        assert!(serving.is_stale(&key(proto::UDP), &flow(3, 53, 3, 0)));
        assert!(serving.is_stale(&key(proto::UDP), &flow(2, 54, 3, 0)));
        assert!(!serving.is_stale(&key(proto::UDP), &flow(2, 53, 3, 0)));
        assert!(!serving.is_stale(&key(proto::UDP), &flow(3, 53, 4, 0)));
        assert!(!serving.is_stale(&key(proto::TCP), &flow(3, 53, 3, 0)), "a record has one protocol");
        assert!(!serving.is_stale(&key(proto::UDP), &flow(3, 53, 3, flags::REPLY)));
        let in_use = |service| service != 5;
        let recovered = Serving::of(Family::V4, &udp, Some(&in_use), 100);
        assert!(recovered.is_stale(&key(proto::UDP), &flow(3, 53, 5, 0)), "nobody's record any more");
        assert!(!recovered.is_stale(&key(proto::TCP), &flow(3, 53, 5, 0)));
        assert!(!recovered.is_stale(&key(proto::UDP), &flow(3, 53, 4, 0)));
        let newer = Flow { created: 101, ..flow(3, 53, 3, 0) };
        assert!(!serving.is_stale(&key(proto::UDP), &newer), "opened since, by what is in the maps now");
    }

    #[test]
    fn the_last_word_on_endpoints_counts_and_no_loss_is_forgotten() {
        let told = [retired(Protocol::Tcp, &[], true), retired(Protocol::Tcp, &["10.1.0.2"], false)];
        let serving = Serving::of(Family::V4, &told, None, 100);
        assert!(!serving.is_stale(&key(proto::TCP), &flow(2, 53, 3, 0)), "an endpoint again");
        assert!(serving.is_stale(&key(proto::TCP), &flow(3, 53, 3, 0)));
        assert!(
            Serving::of(Family::V4, &told[1..], None, 100).is_empty(),
            "endpoints only came: nothing to look for"
        );
    }
}

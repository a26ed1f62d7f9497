//! UDP flows to backends that no longer serve (SEMANTICS I1): a client that keeps its source port would be sent to a
//! dead backend until the flow falls silent, which it never does.

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

/// What still serves, by record.
pub struct Serving<'a> {
    /// Whether a record is in use. Flows of one that is not were left by an agent that ended after it had cleared the record
    /// and before it came to the flows.
    in_use: &'a dyn Fn(u32) -> bool,
    by_record: HashMap<u32, Vec<(IpAddr, u16)>>,
    /// Kernel jiffies, low 32 bits. Flows that began later were opened by what is in the maps now, not before the change:
    /// the walk through the tables takes a while, and the next change does not wait for it.
    until: u32,
}

impl<'a> Serving<'a> {
    /// Those of one family; the last word on a record counts.
    pub fn of(family: Family, retired: &[Retired], in_use: &'a dyn Fn(u32) -> bool, until: u32) -> Self {
        let of_family = retired.iter().filter(|r| r.family == family);
        Self { in_use, by_record: of_family.map(|r| (r.service, r.serving.clone())).collect(), until }
    }

    /// True if no record of the family is concerned.
    pub fn is_empty(&self) -> bool {
        self.by_record.is_empty()
    }

    /// True for a client's entry of a UDP flow whose backend is gone.
    pub fn is_stale<A: Addr + ToIp>(&self, key: &Tuple<A>, flow: &Flow<A>) -> bool {
        if key.proto != proto::UDP || flow.flags & flags::REPLY != 0 {
            return false;
        }
        let is_newer = (flow.created.wrapping_sub(self.until) as i32) > 0;
        if is_newer {
            return false;
        }
        match self.by_record.get(&flow.service) {
            // It is sorted.
            Some(serving) => serving.binary_search(&(flow.dst.to_ip(), flow.dport.get())).is_err(),
            None => !(self.in_use)(flow.service),
        }
    }
}

/// Deletes stale flows, both entries of each. Returns how many.
pub fn purge<A: Addr + ToIp>(table: &FlowTable<A>, serving: &Serving<'_>) -> Result<u64, SweepError>
where
    Tuple<A>: Pod,
    Flow<A>: Pod,
{
    let mut purged = 0;
    let mut walk = table.walk();
    while let Some((keys, flows)) = walk.next_chunk().map_err(read_error::<A>)? {
        for (key, flow) in keys.iter().zip(flows).filter(|(k, f)| serving.is_stale(k, f)) {
            table.delete(key).map_err(SweepError::Delete)?;
            table.delete(&flow.rewritten(key.proto).reversed()).map_err(SweepError::Delete)?;
            purged += 1;
        }
    }
    Ok(purged)
}

#[cfg(test)]
mod tests {
    use lb_common::{Be16, Be32, V4};

    use super::*;

    #[test]
    fn only_udp_flows_of_the_record_to_other_backends_are_stale() {
        let a = |last: u32| Be32::new(0x0a01_0000 + last);
        let retired =
            Retired { service: 3, family: Family::V4, serving: vec![("10.1.0.2".parse().unwrap(), 53)] };
        let other = Retired { family: Family::V6, ..retired.clone() };
        let in_use = |service| service != 5;
        let serving = Serving::of(Family::V4, &[retired, other], &in_use, 100);
        let key = |proto| Tuple::<V4>::new(a(9), Be16::new(4000), a(1), Be16::new(53), proto);
        let flow = |dst, port, service, flags| Flow {
            dst: a(dst),
            dport: Be16::new(port),
            service,
            flags,
            created: 100,
            ..Flow::default()
        };
        assert!(serving.is_stale(&key(proto::UDP), &flow(3, 53, 3, 0)));
        assert!(serving.is_stale(&key(proto::UDP), &flow(2, 54, 3, 0)));
        assert!(!serving.is_stale(&key(proto::UDP), &flow(2, 53, 3, 0)));
        assert!(!serving.is_stale(&key(proto::UDP), &flow(3, 53, 4, 0)));
        assert!(serving.is_stale(&key(proto::UDP), &flow(3, 53, 5, 0)), "nobody's record any more");
        assert!(!serving.is_stale(&key(proto::TCP), &flow(3, 53, 5, 0)));
        assert!(!serving.is_stale(&key(proto::TCP), &flow(3, 53, 3, 0)));
        assert!(!serving.is_stale(&key(proto::UDP), &flow(3, 53, 3, flags::REPLY)));
        let newer = Flow { created: 101, ..flow(3, 53, 3, 0) };
        assert!(!serving.is_stale(&key(proto::UDP), &newer), "opened since, by what is in the maps now");
    }
}

//! Brings into a new table what programs have written to the old one since it was copied.
//!
//! While both are in use, a flow that the old table knows is the old programs' to serve, so what the old one says is the
//! news; only where our programs have opened a younger flow on the same tuple, it is the old entry that goes. What was
//! copied before and is not there any more was purged meanwhile, and stays away.

use std::{io, os::fd::BorrowedFd};

use bytemuck::Pod;
use lb_common::{
    Addr,
    affinity::{AffinityKey, AffinityValue},
    conntrack::Flow,
    tuple::Tuple,
};

use super::{
    bpf::{BatchReader, CHUNK, EntrySize},
    elements::{self, Write},
};
use crate::maps::FlowEpochs;

/// The two tables, and what is carried over. Times are low halves of jiffies.
#[derive(Clone, Copy, Debug)]
pub struct Carry<'a> {
    pub from: BorrowedFd<'a>,
    pub to: BorrowedFd<'a>,
    /// What has begun since then.
    pub begun: u32,
    /// News of flows that had packets since then; without it, only new flows: a walk takes much less time.
    pub touched: Option<u32>,
}

/// What becomes of an entry of the new table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Judgement<A> {
    Keep,
    /// The same flow, of which there is news.
    Update(Flow<A>),
    /// The tuple belongs to another flow by now.
    Replace,
    /// The same in the old table.
    Forget,
}

impl Carry<'_> {
    pub fn flows<A: Addr>(&self, epochs: &FlowEpochs) -> io::Result<()>
    where
        Tuple<A>: Pod,
        Flow<A>: Pod,
    {
        self.for_each(|key: Tuple<A>, flow: Flow<A>| {
            let touched = self.touched.is_some_and(|since| !is_before(flow.last_seen, since));
            let news = touched || !is_before(flow.created, self.begun);
            if news { self.flow(&key, &flow, epochs) } else { Ok(()) }
        })
    }

    fn flow<A: Addr>(&self, key: &Tuple<A>, flow: &Flow<A>, epochs: &FlowEpochs) -> io::Result<()>
    where
        Tuple<A>: Pod,
        Flow<A>: Pod,
    {
        let Some(there) = read::<_, Flow<A>>(self.to, key)? else {
            if is_before(flow.created, self.begun) {
                // Purged.
                return Ok(());
            }
            self.write(key, flow, Write::New)?;
            epochs.renew_nothing(key);
            return Ok(());
        };
        match judge(&there, flow, key.proto) {
            Judgement::Keep => Ok(()),
            Judgement::Update(news) => self.write(key, &news, Write::Replace),
            Judgement::Replace => {
                self.write(key, flow, Write::Any)?;
                epochs.renew(key);
                remove_half(self.to, key, &there, Some(flow), epochs)
            }
            Judgement::Forget => {
                elements::delete(self.from, bytemuck::bytes_of(key))?;
                epochs.renew(key);
                remove_half(self.from, key, flow, None, epochs)
            }
        }
    }

    pub fn affinity<A: Addr>(&self) -> io::Result<()>
    where
        AffinityKey<A>: Pod,
    {
        self.for_each(|key: AffinityKey<A>, memory: AffinityValue| {
            if is_before(memory.last_used, self.begun) {
                return Ok(());
            }
            match read::<_, AffinityValue>(self.to, &key)? {
                Some(there) if !is_before(there.last_used, memory.last_used) => Ok(()),
                _ => self.write(&key, &memory, Write::Any),
            }
        })
    }

    fn for_each<K: Pod, V: Pod>(&self, mut visit: impl FnMut(K, V) -> io::Result<()>) -> io::Result<()> {
        let size = EntrySize { key: size_of::<K>(), value: size_of::<V>() };
        let mut reader = BatchReader::new(self.from, size);
        while let Some(batch) = reader.next(CHUNK)? {
            for (key, value) in batch.keys.chunks_exact(size.key).zip(batch.values.chunks_exact(size.value)) {
                visit(bytemuck::pod_read_unaligned(key), bytemuck::pod_read_unaligned(value))?;
            }
        }
        Ok(())
    }

    fn write<K: Pod, V: Pod>(&self, key: &K, value: &V, how: Write) -> io::Result<()> {
        match elements::update(self.to, bytemuck::bytes_of(key), bytemuck::bytes_of(value), how) {
            // Somebody was faster, or the table is full.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EEXIST | libc::ENOENT | libc::E2BIG)) => Ok(()),
            done => done,
        }
    }
}

fn read<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = V::zeroed();
    let found = elements::lookup(map, bytemuck::bytes_of(key), bytemuck::bytes_of_mut(&mut value))?;
    Ok(found.then_some(value))
}

/// Removes the other entry of the flow that had the tuple `key`, unless that is another flow's by now, or `heir`'s too.
fn remove_half<A: Addr>(
    map: BorrowedFd<'_>,
    key: &Tuple<A>,
    flow: &Flow<A>,
    heir: Option<&Flow<A>>,
    epochs: &FlowEpochs,
) -> io::Result<()>
where
    Tuple<A>: Pod,
    Flow<A>: Pod,
{
    let other_of = |flow: &Flow<A>| flow.rewritten(key.proto).reversed();
    let other = other_of(flow);
    let is_its = |half: Flow<A>| other_of(&half) == *key;
    if heir.map(other_of) != Some(other) && read(map, &other)?.is_some_and(is_its) {
        elements::delete(map, bytemuck::bytes_of(&other))?;
        epochs.renew(&other);
    }
    Ok(())
}

fn judge<A: Addr>(there: &Flow<A>, flow: &Flow<A>, proto: u8) -> Judgement<A> {
    let outdated = is_before(flow.created, there.created);
    if there.rewritten(proto) != flow.rewritten(proto) {
        return if outdated { Judgement::Forget } else { Judgement::Replace };
    }
    if outdated {
        return Judgement::Keep;
    }
    if there.created != flow.created {
        // Opened again, with the same translation: nothing of the one before counts.
        return Judgement::Update(*flow);
    }
    let stamped = if is_before(there.last_seen, flow.last_seen) { flow } else { there };
    let news = Flow {
        tcp_seen: there.tcp_seen | flow.tcp_seen,
        flags: there.flags | flow.flags,
        last_seen: stamped.last_seen,
        ..*there
    };
    if news == *there { Judgement::Keep } else { Judgement::Update(news) }
}

/// Of two times less than 2^31 ticks apart.
const fn is_before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

#[cfg(test)]
mod tests {
    use lb_common::{Be16, Be32, V4, conntrack::tcp, proto::TCP};

    use super::*;

    fn flow(port: u16, created: u32) -> Flow<V4> {
        Flow {
            dst: Be32::new(0x0a00_0001),
            sport: Be16::new(port),
            tcp_seen: tcp::SYN,
            last_seen: created,
            created,
            ..Default::default()
        }
    }

    #[test]
    fn news_of_the_same_flow_is_added() {
        let there = flow(1, 100);
        assert_eq!(judge(&there, &there, TCP), Judgement::Keep);
        let ended = Flow { tcp_seen: tcp::SYN | tcp::FIN, last_seen: 300, ..there };
        assert_eq!(judge(&there, &ended, TCP), Judgement::Update(ended));
        assert_eq!(judge(&ended, &there, TCP), Judgement::Keep);
    }

    #[test]
    fn the_younger_flow_has_the_tuple() {
        let (old, young) = (flow(1, u32::MAX - 5), flow(2, 5));
        assert_eq!(judge(&old, &young, TCP), Judgement::Replace);
        assert_eq!(judge(&young, &old, TCP), Judgement::Forget);
        // In the same tick: the old programs serve what they know.
        assert_eq!(judge(&flow(1, 5), &flow(2, 5), TCP), Judgement::Replace);
    }

    #[test]
    fn a_flow_that_was_opened_again_begins_anew() {
        let ended = Flow { tcp_seen: tcp::SYN | tcp::FIN, ..flow(1, 100) };
        let again = flow(1, 200);
        assert_eq!(judge(&ended, &again, TCP), Judgement::Update(again));
    }
}

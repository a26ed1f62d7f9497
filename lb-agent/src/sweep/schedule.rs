//! When to sweep. Values in, values out.

use std::time::{Duration, Instant};

/// How closely a pass looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// At flows that may be over.
    Expiry,
    /// Also at every entry's other half.
    Orphans,
}

/// A pass that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Due {
    pub depth: Depth,
    /// A table is nearly full.
    pub pressure: bool,
}

/// Normal distance between passes: a flow outlives its timeout by at most this.
const INTERVAL: Duration = Duration::from_secs(10);
/// Share of the time that passes may take, as a divisor; under pressure the second one.
pub(super) const REST: u32 = 9;
const REST_UNDER_PRESSURE: u32 = 2;
/// Every so many passes all entries are checked for their other half. Orphans are the rare result of a crash or a race.
const ORPHANS_EVERY: u32 = 6;

/// Decides from the number of entries at the last pass, and of flows created since then, what is due.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    capacity: u64,
    last: Option<Last>,
    passes: u32,
}

#[derive(Clone, Copy, Debug)]
struct Last {
    at: Instant,
    took: Duration,
    entries: u64,
    created: u64,
}

impl Schedule {
    /// How often [`Schedule::due`] should be asked.
    pub const TICK: Duration = Duration::from_secs(1);

    /// For tables with this many entries each.
    pub fn new(capacity: u32) -> Self {
        Self { capacity: u64::from(capacity), last: None, passes: 0 }
    }

    /// The pass that is due, if any. `created` is the data path's count of new flows.
    pub fn due(&self, now: Instant, created: u64) -> Option<Due> {
        let Some(last) = self.last else { return Some(Due { depth: Depth::Orphans, pressure: false }) };
        let new = created.wrapping_sub(last.created);
        if last.entries == 0 && new == 0 {
            return None;
        }
        // Over 80 %, should none of the new flows have ended and all be in one table.
        let pressure = last.entries.saturating_add(new.saturating_mul(2)) > self.capacity / 5 * 4;
        let wait = if pressure {
            Self::TICK.max(last.took * REST_UNDER_PRESSURE)
        } else {
            INTERVAL.max(last.took * REST)
        };
        let depth = if self.passes.is_multiple_of(ORPHANS_EVERY) { Depth::Orphans } else { Depth::Expiry };
        (now.saturating_duration_since(last.at) >= wait).then_some(Due { depth, pressure })
    }

    /// A pass ended: it `took` so long and left `entries` in the fuller table; `created` as when it began.
    pub fn done(&mut self, now: Instant, took: Duration, entries: u64, created: u64) {
        self.last = Some(Last { at: now, took, entries, created });
        self.passes = self.passes.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn after_a_pass(entries: u64, took: Duration) -> (Schedule, Instant) {
        let now = Instant::now();
        let mut s = Schedule::new(1000);
        s.done(now, took, entries, 0);
        (s, now)
    }

    #[test]
    fn the_first_pass_is_due_at_once_and_thorough() {
        let due = Schedule::new(1000).due(Instant::now(), 0);
        assert_eq!(due, Some(Due { depth: Depth::Orphans, pressure: false }));
    }

    #[test]
    fn empty_tables_are_left_alone_until_a_flow_is_created() {
        let (s, t) = after_a_pass(0, S / 1000);
        assert_eq!(s.due(t + 1000 * S, 0), None);
        assert!(s.due(t + 10 * S, 1).is_some());
    }

    #[test]
    fn passes_come_every_ten_seconds_and_faster_when_nearly_full() {
        let (s, t) = after_a_pass(800, S / 1000);
        assert_eq!(s.due(t + 9 * S, 0), None);
        assert_eq!(s.due(t + 10 * S, 0), Some(Due { depth: Depth::Expiry, pressure: false }));
        let (s, t) = after_a_pass(801, S / 1000);
        assert_eq!(s.due(t + S, 0), Some(Due { depth: Depth::Expiry, pressure: true }));
        // 300 entries and 251 new flows of two entries each.
        let (s, t) = after_a_pass(300, S / 1000);
        assert_eq!(s.due(t + S, 251), Some(Due { depth: Depth::Expiry, pressure: true }));
    }

    #[test]
    fn long_passes_are_rarer() {
        let (s, t) = after_a_pass(10, 2 * S);
        assert_eq!(s.due(t + 17 * S, 0), None);
        assert!(s.due(t + 18 * S, 0).is_some());
    }
}

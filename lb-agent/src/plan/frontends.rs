//! Who claims which frontend, who has it, and what the kernel has.

use std::collections::{BTreeMap, HashMap};

use lb_common::frontend::FrontendValue;

use super::{
    addresses::Addresses,
    draft::Draft,
    ids::sorted,
    op::{Family, Frontend, MapOp},
    rejection::{Rejection, Resource},
};
use crate::model::ServiceKey;

/// No record has this id.
const NOBODY: FrontendValue = FrontendValue { service: 0, flags: 0 };

#[derive(Clone, Copy, Debug)]
struct Entry {
    kernel: FrontendValue,
    claim: FrontendValue,
}

/// Between plans the claim of an entry is that of the Service whose frontend it is.
#[derive(Clone, Debug)]
pub(super) struct Frontends {
    entries: HashMap<Frontend, Entry>,
    /// The claims of those who did not get it, rare as they are.
    waiting: BTreeMap<Frontend, Vec<FrontendValue>>,
    /// Those whose claims may have changed since the last plan was finished.
    touched: Vec<Frontend>,
}

/// Elements of the kernel's two maps: those of frontends, and those of addresses as a whole.
#[derive(Clone, Debug)]
pub(super) struct Room {
    /// Per family.
    capacity: u32,
    used: PerFamily,
    /// What the plan in the making deletes, after its additions.
    freed: PerFamily,
}

#[derive(Clone, Debug, Default)]
struct PerFamily {
    v4: u32,
    v6: u32,
}

impl PerFamily {
    fn of(&mut self, family: Family) -> &mut u32 {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }
}

impl Room {
    pub(super) fn new(capacity: u32) -> Self {
        Self { capacity, used: PerFamily::default(), freed: PerFamily::default() }
    }

    /// The kernel has one more.
    pub(super) fn take_over(&mut self, family: Family) {
        *self.used.of(family) += 1;
    }

    /// Room for `n` more; false if there is none.
    pub(super) fn take(&mut self, family: Family, n: u32) -> bool {
        let used = self.used.of(family);
        let fits = self.capacity.saturating_sub(*used) >= n;
        *used += if fits { n } else { 0 };
        fits
    }

    pub(super) fn free_after_plan(&mut self, family: Family) {
        *self.freed.of(family) += 1;
    }

    /// Gives back what the plan deletes; true if there is any.
    pub(super) fn complete(&mut self) -> bool {
        let freed = std::mem::take(&mut self.freed);
        self.used.v4 -= freed.v4;
        self.used.v6 -= freed.v6;
        freed.v4 + freed.v6 > 0
    }

    #[cfg(test)]
    pub(super) fn used(&self) -> usize {
        (self.used.v4 + self.used.v6) as usize
    }
}

/// Orders claims on one frontend: the smallest has it.
pub(super) type Rank<'a> = (&'a ServiceKey, &'a str);

impl Frontends {
    /// What the kernel has, claimed by nobody yet.
    pub(super) fn recover(actual: BTreeMap<Frontend, FrontendValue>, room: &mut Room) -> Self {
        let entry = |(frontend, kernel): (Frontend, FrontendValue)| {
            room.take_over(Family::of(frontend.addr));
            (frontend, Entry { kernel, claim: NOBODY })
        };
        let entries = actual.into_iter().map(entry).collect();
        Self { entries, waiting: BTreeMap::new(), touched: Vec::new() }
    }

    /// What the kernel has, sorted.
    pub(super) fn in_kernel(&self) -> Vec<(Frontend, FrontendValue)> {
        let there = self.entries.iter().filter(|(_, e)| e.kernel != NOBODY);
        let mut all: Vec<_> = there.map(|(frontend, e)| (*frontend, e.kernel)).collect();
        all.sort_unstable_by_key(|(frontend, _)| *frontend);
        all
    }

    /// `value.service` wants `frontend` from now on; it must not have claimed it yet.
    pub(super) fn claim(&mut self, frontend: Frontend, value: FrontendValue) {
        let entry = self.entries.entry(frontend).or_insert(Entry { kernel: NOBODY, claim: NOBODY });
        if entry.claim == NOBODY {
            entry.claim = value;
        } else {
            self.waiting.entry(frontend).or_default().push(value);
        }
        self.touched.push(frontend);
    }

    /// `record` does not want `frontend` any more.
    pub(super) fn withdraw(&mut self, frontend: Frontend, record: u32) {
        let Some(entry) = self.entries.get_mut(&frontend) else { return };
        let mut waiting = self.waiting.remove(&frontend).unwrap_or_default();
        if entry.claim.service == record {
            entry.claim = waiting.pop().unwrap_or(NOBODY);
        } else {
            waiting.retain(|claim| claim.service != record);
        }
        if !waiting.is_empty() {
            self.waiting.insert(frontend, waiting);
        }
        self.touched.push(frontend);
    }

    /// Has [`Self::finish`] look at a frontend: it may not have fitted before.
    pub(super) fn touch(&mut self, frontend: Frontend) {
        self.touched.push(frontend);
    }

    /// Has [`Self::finish`] look at all of them: after a restart some are claimed by nobody.
    pub(super) fn touch_all(&mut self) {
        self.touched.extend(self.entries.keys());
    }

    /// Decides all frontends whose claims have changed since the last call.
    pub(super) fn finish<'a>(
        &mut self,
        rank: impl Fn(u32) -> Option<Rank<'a>>,
        addresses: &mut Addresses,
        room: &mut Room,
        draft: &mut Draft,
    ) {
        for frontend in sorted(&mut self.touched) {
            self.settle(frontend, &rank);
            draft.rejections.extend(self.losers(frontend, &rank));
            let Some(entry) = self.entries.get_mut(&frontend) else { continue };
            let family = Family::of(frontend.addr);
            if entry.claim == NOBODY {
                if entry.kernel != NOBODY {
                    draft.delete_frontends.push(MapOp::DeleteFrontend { frontend });
                    room.free_after_plan(family);
                }
                self.entries.remove(&frontend);
                continue;
            }
            if entry.kernel == entry.claim {
                continue;
            }
            if entry.kernel == NOBODY {
                // Frontends are in the order of their addresses: one is served whole before the next is begun.
                if !addresses.take_frontend(frontend.addr, room, draft) {
                    draft.rejections.extend(rank(entry.claim.service).map(|(service, record)| {
                        Rejection::Full {
                            service: service.clone(),
                            record: record.to_owned(),
                            resource: Resource::Frontends(family),
                            capacity: room.capacity,
                        }
                    }));
                    continue;
                }
            }
            entry.kernel = entry.claim;
            draft.put_frontends.push(MapOp::PutFrontend { frontend, value: entry.claim });
        }
    }

    /// Gives the frontend to the smallest of those who claim it.
    fn settle<'a>(&mut self, frontend: Frontend, rank: &impl Fn(u32) -> Option<Rank<'a>>) {
        let (Some(waiting), Some(entry)) = (self.waiting.get_mut(&frontend), self.entries.get_mut(&frontend))
        else {
            return;
        };
        waiting.push(entry.claim);
        waiting.sort_by_key(|claim| rank(claim.service));
        entry.claim = waiting.remove(0);
    }

    fn losers<'a>(
        &self,
        frontend: Frontend,
        rank: &impl Fn(u32) -> Option<Rank<'a>>,
    ) -> impl Iterator<Item = Rejection> {
        let owner = self.entries.get(&frontend).and_then(|e| rank(e.claim.service));
        self.waiting.get(&frontend).into_iter().flatten().filter_map(move |claim| {
            let (service, owner) = (rank(claim.service)?.0.clone(), owner?.0.clone());
            Some(Rejection::FrontendTaken { service, frontend, owner })
        })
    }

    /// All claims that lost.
    pub(super) fn rejections<'a>(
        &self,
        rank: impl Fn(u32) -> Option<Rank<'a>>,
    ) -> impl Iterator<Item = Rejection> {
        self.waiting.keys().flat_map(move |frontend| self.losers(*frontend, &rank).collect::<Vec<_>>())
    }

    #[cfg(test)]
    pub(super) fn used(&self) -> usize {
        self.entries.len() + self.waiting.len()
    }
}

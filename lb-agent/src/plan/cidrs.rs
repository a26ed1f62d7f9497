//! `SERVICE_CIDRS4/6`: where ClusterIPs come from (rule C7, [`lb_common::cidr`]).
//!
//! An element that counts is never changed: a range that goes is switched off at the beginning of a plan, and one that
//! comes is written to an element that no packet reads and switched on at the end, when all addresses in it are known.

use std::collections::BTreeMap;

use ipnet::IpNet;
use lb_common::cidr::{CAPACITY, flags};

use super::{
    actual::ActualCidr,
    draft::Draft,
    op::{Family, MapOp},
    rejection::{Anomaly, Rejection},
};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// A range and its flags.
type Range = (IpNet, u32);

/// What the elements of both arrays hold.
#[derive(Clone, Debug, Default)]
pub(super) struct Cidrs {
    /// Those that count.
    active: BTreeMap<(Family, u32), Range>,
    /// Those that no valid state has.
    strays: Vec<(Family, u32)>,
    /// What there is no element for.
    left_out: Vec<IpNet>,
    /// What the last plan was made of: what is known, and what is around the ClusterIPs of each family.
    planned: Option<(Vec<IpNet>, [Option<IpNet>; 2])>,
}

impl Cidrs {
    /// What the kernel has.
    pub(super) fn recover(actual: BTreeMap<(Family, u32), ActualCidr>, anomalies: &mut Vec<Anomaly>) -> Self {
        let mut cidrs = Self::default();
        for ((family, index), ActualCidr { net, flags: bits }) in actual {
            let known = bits == flags::ACTIVE || bits == flags::ACTIVE | flags::DROP_UNASSIGNED;
            match net.filter(|net| known && index < CAPACITY && Family::of_net(net) == family) {
                Some(net) => drop(cidrs.active.insert((family, index), (net, bits))),
                None => {
                    anomalies.push(Anomaly::CidrInvalid { family, index, flags: bits });
                    cidrs.strays.push((family, index));
                }
            }
        }
        cidrs
    }

    /// Has the kernel have `known` (what the cluster and the settings say), or `around` in a family without: the smallest
    /// prefix around its ClusterIPs.
    pub(super) fn plan<'a>(
        &mut self,
        known: impl IntoIterator<Item = &'a IpNet>,
        around: impl Fn(Family) -> Option<IpNet>,
        draft: &mut Draft,
    ) {
        let from = (known.into_iter().copied().collect(), FAMILIES.map(around));
        if self.strays.is_empty() && self.planned.as_ref() == Some(&from) {
            return;
        }
        let known = merged(&from.0);
        let off = |(family, index)| MapOp::SwitchCidr { family, index, flags: 0 };
        // What is beyond the end cannot be written.
        let strays = std::mem::take(&mut self.strays).into_iter().filter(|(_, index)| *index < CAPACITY);
        draft.close_cidrs.extend(strays.map(off));
        self.left_out.clear();
        for (family, around) in FAMILIES.into_iter().zip(from.1) {
            let mut wanted: Vec<Range> = known
                .iter()
                .filter(|net| Family::of_net(net) == family)
                .map(|net| (*net, flags::ACTIVE | flags::DROP_UNASSIGNED))
                .collect();
            if wanted.is_empty() {
                wanted.extend(around.map(|net| (net, flags::ACTIVE)));
            }
            let beyond = wanted.split_off(wanted.len().min(CAPACITY as usize));
            self.left_out.extend(beyond.into_iter().map(|(net, _)| net));
            self.replace(family, wanted, draft);
        }
        self.planned = Some(from);
    }

    fn replace(&mut self, family: Family, mut wanted: Vec<Range>, draft: &mut Draft) {
        let before: Vec<(u32, Range)> =
            self.active.range((family, 0)..=(family, CAPACITY)).map(|((_, i), r)| (*i, *r)).collect();
        for (index, range) in before {
            match wanted.iter().position(|w| *w == range) {
                Some(i) => drop(wanted.remove(i)),
                None => {
                    self.active.remove(&(family, index));
                    draft.close_cidrs.push(MapOp::SwitchCidr { family, index, flags: 0 });
                }
            }
        }
        // Also those just switched off: the plan's grace period comes in between.
        let mut free = (0..CAPACITY).filter(|i| !self.active.contains_key(&(family, *i)));
        let places: Vec<(u32, Range)> = free.by_ref().zip(wanted).collect();
        for (index, (net, bits)) in places {
            self.active.insert((family, index), (net, bits));
            // Also where an earlier plan, or an earlier agent, switched the element off.
            draft.grace = true;
            draft.open_cidrs.push(MapOp::WriteCidr { index, net });
            draft.open_cidrs.push(MapOp::SwitchCidr { family, index, flags: bits });
        }
    }

    /// What is left out at present.
    pub(super) fn rejections(&self) -> impl Iterator<Item = Rejection> {
        self.left_out.iter().map(|cidr| Rejection::TooManyCidrs { cidr: *cidr, capacity: CAPACITY })
    }

    #[cfg(test)]
    pub(super) fn used(&self) -> usize {
        self.active.len() + self.strays.len() + self.left_out.len()
    }
}

/// As few prefixes as possible with the same addresses, the largest ones first: where there are too many, those that
/// matter most are kept.
fn merged<'a>(nets: impl IntoIterator<Item = &'a IpNet>) -> Vec<IpNet> {
    let mut nets = IpNet::aggregate(&nets.into_iter().map(IpNet::trunc).collect());
    nets.sort_by_key(|net| (net.prefix_len(), net.addr()));
    nets
}

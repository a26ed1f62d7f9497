//! `spec.loadBalancerSourceRanges` (rules E1 to E4): which clients the LoadBalancer addresses of a record admit.

use ipnet::IpNet;
use lb_common::frontend::flags;

use super::{
    Planner,
    desired::NodeView,
    draft::Draft,
    op::{Family, MapOp},
    record::Record,
    rejection::{Rejection, Resource},
};
use crate::model::Service;

/// What the LoadBalancer addresses of a Service admit in one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Filter {
    /// Flags of their frontends: none if everybody is admitted.
    pub(super) flags: u32,
    /// Sorted, each once.
    pub(super) ranges: Vec<IpNet>,
}

/// The filter of a family; what is doubtful about it goes to `rejections`.
pub(super) fn filter(
    service: &Service,
    family: Family,
    node: &NodeView,
    rejections: &mut Vec<Rejection>,
) -> Filter {
    let lb_ips = || service.load_balancer_ips.iter().filter(|ip| Family::of(**ip) == family);
    let Some(all) = service.source_ranges.as_ref().filter(|_| lb_ips().next().is_some()) else {
        return Filter::default();
    };
    let mut ranges: Vec<IpNet> = all.iter().filter(|net| Family::of_net(net) == family).copied().collect();
    if ranges.is_empty() && !all.is_empty() {
        // E4, as kube-proxy has it: ranges of the other family say nothing about this one.
        rejections.push(Rejection::UnfilteredFamily { service: service.key.clone(), family });
        return Filter::default();
    }
    if ranges.iter().any(|net| net.prefix_len() == 0) {
        return Filter::default();
    }
    let mut bits = flags::SOURCE_RANGES;
    if node.own_addresses.iter().any(|ip| ranges.iter().any(|net| net.contains(ip))) {
        // E3: where a LoadBalancer address is also one of the node's devices, the node speaks to it from this address.
        ranges.extend(lb_ips().map(|ip| IpNet::from(*ip)));
        bits |= flags::NODE_IN_RANGES;
    }
    let mut ranges = IpNet::aggregate(&ranges);
    ranges.sort_unstable();
    Filter { flags: bits, ranges }
}

impl Planner {
    /// Has the record admit `wanted`, as far as there is room: whoever is in a range that does not fit is not admitted.
    pub(super) fn plan_ranges(&mut self, id: u32, record: &mut Record, wanted: &[IpNet], draft: &mut Draft) {
        if *record.ranges == *wanted {
            return;
        }
        let mut kept = Vec::with_capacity(wanted.len());
        let mut is_full = false;
        for net in wanted {
            if record.ranges.binary_search(net).is_err() {
                if !self.range_room.take(record.family, 1) {
                    is_full = true;
                    continue;
                }
                draft.put_ranges.push(MapOp::PutRange { service: id, net: *net });
            }
            kept.push(*net);
        }
        if is_full {
            let resource = Resource::SourceRanges(record.family);
            draft.rejections.push(record.full(resource, self.capacities.source_ranges));
        }
        for net in record.ranges.iter().filter(|net| wanted.binary_search(net).is_err()) {
            draft.delete_ranges.push(MapOp::DeleteRange { service: id, net: *net });
        }
        record.ranges = kept.into();
    }
}

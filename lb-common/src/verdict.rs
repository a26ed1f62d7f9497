//! What happened to a packet, and the counters of it.

/// What an entry point does with the packet, independent of the hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// Not ours: exactly as it came, to whoever is next.
    Pass,
    /// Translated; on to the stack (or, at egress, to the device).
    Translated,
    /// Translated and sent out by a redirect; the value is the hook's own return code.
    Redirected(i32),
}

/// Every reason to drop, refuse or knowingly not translate a packet, and every event worth counting. The value is the
/// index into the per-CPU array `COUNTERS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Counter {
    /// Translated towards a backend.
    Forward = 0,
    /// Translated back towards a client.
    Reply = 1,
    /// ICMP errors translated, either direction.
    IcmpTranslated = 2,
    /// Translated by XDP (also counted as forward or reply).
    Xdp = 3,
    /// New flows.
    FlowCreated = 4,
    /// Sockets connected and datagrams sent through the socket hooks.
    SocketTranslated = 5,
    /// Refused: the Service has no usable endpoint anywhere.
    RejectNoEndpoints = 6,
    /// Sockets refused by connect or sendmsg for the same reason.
    SocketRejectNoEndpoints = 7,
    /// Dropped: policy Local and no usable endpoint on this node.
    DropNoLocalEndpoints = 8,
    /// Dropped: no free source port.
    DropSnatExhausted = 9,
    /// Dropped: the flow table is full.
    DropFlowTableFull = 10,
    /// Dropped: transit traffic, and the device it leaves by has no address of the family.
    DropNoSnatAddress = 11,
    /// Dropped: transit traffic, and the kernel has no route.
    DropNoRoute = 12,
    /// Dropped: time to live ran out in transit (the sender is told).
    DropTtlExceeded = 13,
    /// Dropped: larger than the next link in transit (the sender is told).
    DropTooBig = 14,
    /// Dropped: a helper refused to change the packet, which would have left it half rewritten.
    DropRewriteFailed = 15,
    /// Dropped: a frontend or slot pointed at nothing. Never seen unless the maps were damaged.
    DropBadMap = 16,
    /// ICMP errors of our own that could not be built.
    DropIcmpBuildFailed = 17,
    /// Later fragments whose first fragment is unknown: passed untouched.
    PassFragmentUnknown = 18,
    /// IPv6 with extension headers that are not walked: passed untouched.
    PassExtensionHeader = 19,
    /// Dropped: the backend's neighbour could not be resolved.
    DropNoNeighbour = 20,
}

impl Counter {
    /// Number of counters.
    pub const COUNT: u32 = 21;

    /// All, in the order of their index, with the name that metrics and `--help` use.
    pub const ALL: [(Self, &'static str); Self::COUNT as usize] = [
        (Self::Forward, "forward"),
        (Self::Reply, "reply"),
        (Self::IcmpTranslated, "icmp_translated"),
        (Self::Xdp, "xdp"),
        (Self::FlowCreated, "flow_created"),
        (Self::SocketTranslated, "socket_translated"),
        (Self::RejectNoEndpoints, "reject_no_endpoints"),
        (Self::SocketRejectNoEndpoints, "socket_reject_no_endpoints"),
        (Self::DropNoLocalEndpoints, "drop_no_local_endpoints"),
        (Self::DropSnatExhausted, "drop_snat_exhausted"),
        (Self::DropFlowTableFull, "drop_flow_table_full"),
        (Self::DropNoSnatAddress, "drop_no_snat_address"),
        (Self::DropNoRoute, "drop_no_route"),
        (Self::DropTtlExceeded, "drop_ttl_exceeded"),
        (Self::DropTooBig, "drop_too_big"),
        (Self::DropRewriteFailed, "drop_rewrite_failed"),
        (Self::DropBadMap, "drop_bad_map"),
        (Self::DropIcmpBuildFailed, "drop_icmp_build_failed"),
        (Self::PassFragmentUnknown, "pass_fragment_unknown"),
        (Self::PassExtensionHeader, "pass_extension_header"),
        (Self::DropNoNeighbour, "drop_no_neighbour"),
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_is_listed_at_its_own_index() {
        for (i, (c, _)) in Counter::ALL.iter().enumerate() {
            assert_eq!(*c as usize, i);
        }
    }
}

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

/// Declares [`Counter`] with each counter's name and meaning in one place.
macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $variant:ident = $index:literal, $name:literal;)+) => {
        /// Every reason to drop, refuse or knowingly not translate a packet, and every event worth counting besides the
        /// packets of each Service (`SERVICE_STATS`). The value is the index into the per-CPU array `COUNTERS`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum Counter {
            $($(#[doc = $doc])+ $variant = $index,)+
        }

        impl Counter {
            /// All, in the order of their index, with the name that metrics use.
            pub const ALL: &'static [(Self, &'static str)] = &[$((Self::$variant, $name)),+];
            /// Number of counters.
            pub const COUNT: u32 = Self::ALL.len() as u32;

            /// The counter with this index.
            #[inline(always)]
            pub const fn from_index(index: u32) -> Option<Self> {
                if index < Self::COUNT {
                    // SAFETY: each number below `COUNT` is one of a counter (asserted beside the list). A table would be a
                    // map of the object.
                    Some(unsafe { core::mem::transmute::<u32, Self>(index) })
                } else {
                    None
                }
            }
        }
    };
}

counters! {
    /// New flows.
    FlowCreated = 0, "flow_created";
    /// ICMP errors translated, either direction.
    IcmpTranslated = 1, "icmp_translated";
    /// Sockets connected and datagrams sent through the socket hooks.
    SocketTranslated = 2, "socket_translated";
    /// Refused: the Service has no usable endpoint anywhere.
    RejectNoEndpoints = 3, "reject_no_endpoints";
    /// Refused at connect or sendmsg for the same reason.
    SocketRejectNoEndpoints = 4, "socket_reject_no_endpoints";
    /// Dropped: externalTrafficPolicy Local and no usable endpoint on this node.
    DropNoLocalEndpointsExternal = 5, "drop_no_local_endpoints_external";
    /// Dropped: no free source port.
    DropSnatExhausted = 6, "drop_snat_exhausted";
    /// Dropped: the flow table is full.
    DropFlowTableFull = 7, "drop_flow_table_full";
    /// Dropped: in transit, and neither the device that it would leave by nor the node has an address of the family.
    DropNoSnatAddress = 8, "drop_no_snat_address";
    /// Dropped: in transit, and the kernel has no route or does not forward.
    DropNoRoute = 9, "drop_no_route";
    /// Dropped: time to live ran out in transit (the sender is told).
    DropTtlExceeded = 10, "drop_ttl_exceeded";
    /// Dropped: larger than the next link in transit (the sender is told).
    DropTooBig = 11, "drop_too_big";
    /// Dropped: the kernel refused to change the packet, which would have left it half rewritten.
    DropRewriteFailed = 12, "drop_rewrite_failed";
    /// Dropped: a frontend or slot pointed at nothing. Never seen unless the maps were damaged.
    DropBadMap = 13, "drop_bad_map";
    /// Dropped: an ICMP error should have answered, but could not be built.
    DropIcmpBuildFailed = 14, "drop_icmp_build_failed";
    /// Later fragments whose first fragment was not translated here: passed untouched.
    PassFragmentUnknown = 15, "pass_fragment_unknown";
    /// IPv6 with an extension header that is not walked: passed untouched.
    PassExtensionHeader = 16, "pass_extension_header";
    /// Packets of a Service that XDP left to tc: a case it does not handle, or no neighbour entry yet.
    XdpLeftToTc = 17, "xdp_left_to_tc";
    /// Dropped: a TCP segment that ends something, for a frontend, of no known connection. It opens nothing.
    DropNoFlow = 18, "drop_no_flow";
    /// Dropped: an ICMP error would have answered, but too many have this second.
    DropIcmpRateLimited = 19, "drop_icmp_rate_limited";
    /// Dropped: internalTrafficPolicy Local and no usable endpoint on this node.
    DropNoLocalEndpointsInternal = 20, "drop_no_local_endpoints_internal";
    /// Refused: the ClusterIP has no such port.
    RejectUnlistedPort = 21, "reject_unlisted_port";
    /// Dropped: an address of a ServiceCIDR that no Service has.
    DropUnassignedAddress = 22, "drop_unassigned_address";
    /// Dropped: the client is not in the Service's loadBalancerSourceRanges.
    DropSourceRange = 23, "drop_source_range";
    /// Echo requests to a frontend's address answered (`--answer-ping`).
    EchoAnswered = 24, "echo_answered";
    /// TCP packets to a backend that is gone answered with a reset.
    ResetGoneBackend = 25, "reset_gone_backend";
    /// Later fragments held back until the first one of their datagram comes.
    FragmentHeld = 26, "fragment_held";
    /// Held fragments let go, behind the first one.
    FragmentReleased = 27, "fragment_released";
}

// What `Counter::from_index` relies on.
const _: () = {
    let mut i = 0;
    while i < Counter::ALL.len() {
        assert!(Counter::ALL[i].0 as usize == i, "counters are numbered from 0, in order");
        i += 1;
    }
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_their_index() {
        for (counter, _) in Counter::ALL {
            assert_eq!(Counter::from_index(*counter as u32), Some(*counter));
        }
        assert_eq!(Counter::from_index(Counter::COUNT), None);
        assert_eq!(Counter::from_index(u32::MAX), None);
    }
}

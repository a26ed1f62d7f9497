//! Names and default capacities of all maps, and names of the load-time constants.

/// Map names as in the kernel object and in the pin directory.
pub mod name {
    /// HASH, [`FrontendKey<V4>`](crate::frontend::FrontendKey) to [`FrontendValue`](crate::frontend::FrontendValue).
    pub const FRONTENDS4: &str = "FRONTENDS4";
    pub const FRONTENDS6: &str = "FRONTENDS6";
    /// ARRAY (mmap), service index to [`ServiceRecord`](crate::frontend::ServiceRecord).
    pub const SERVICES: &str = "SERVICES";
    /// ARRAY (mmap), slot index to backend id (u32).
    pub const SLOTS: &str = "SLOTS";
    /// ARRAY (mmap), backend id to [`Backend<V4>`](crate::backend::Backend). Id 0 is never used.
    pub const BACKENDS4: &str = "BACKENDS4";
    pub const BACKENDS6: &str = "BACKENDS6";
    /// HASH, [`Tuple<V4>`](crate::tuple::Tuple) to [`Flow<V4>`](crate::conntrack::Flow).
    pub const FLOWS4: &str = "FLOWS4";
    pub const FLOWS6: &str = "FLOWS6";
    /// LRU_HASH, [`AffinityKey`](crate::affinity::AffinityKey) to [`AffinityValue`](crate::affinity::AffinityValue).
    pub const AFFINITY4: &str = "AFFINITY4";
    pub const AFFINITY6: &str = "AFFINITY6";
    /// HASH, [`MemberKey`](crate::affinity::MemberKey) to u32 ([`member`](crate::affinity::member) bits).
    pub const AFFINITY_MEMBERS: &str = "AFFINITY_MEMBERS";
    /// HASH without preallocation, service index to [`ServiceName`](crate::frontend::ServiceName).
    pub const SERVICE_NAMES: &str = "SERVICE_NAMES";
    /// ARRAY (mmap) of [`ServiceStats`](crate::frontend::ServiceStats), by [`stats_index`](crate::frontend::stats_index).
    pub const SERVICE_STATS: &str = "SERVICE_STATS";
    /// PERCPU_ARRAY, [`Counter`](crate::verdict::Counter) to u64.
    pub const COUNTERS: &str = "COUNTERS";
    /// HASH, ifindex to [`Device`](crate::device::Device).
    pub const DEVICES: &str = "DEVICES";
    /// LRU_HASH, [`SocketKey`](crate::socket::SocketKey) to [`SocketOrigin`](crate::socket::SocketOrigin).
    pub const SOCKETS: &str = "SOCKETS";
    /// LRU_HASH, [`FragmentKey`](crate::fragment::FragmentKey) to [`FragmentPorts`](crate::fragment::FragmentPorts).
    pub const FRAGMENTS4: &str = "FRAGMENTS4";
    pub const FRAGMENTS6: &str = "FRAGMENTS6";
    /// LRU_HASH, [`HeldKey`](crate::fragment::HeldKey) to [`HeldFrame`](crate::fragment::HeldFrame).
    pub const HELD4: &str = "HELD4";
    pub const HELD6: &str = "HELD6";
    /// ARRAY (mmap) of one [`ServiceCidrs`](crate::cidr::ServiceCidrs).
    pub const SERVICE_CIDRS4: &str = "SERVICE_CIDRS4";
    pub const SERVICE_CIDRS6: &str = "SERVICE_CIDRS6";
    /// LPM_TRIE, [`SourceRange`](crate::source::SourceRange) to u32.
    pub const SOURCE_RANGES4: &str = "SOURCE_RANGES4";
    pub const SOURCE_RANGES6: &str = "SOURCE_RANGES6";
    /// ARRAY (mmap) of u64, by [`epoch_index`](crate::flow_cache::epoch_index).
    pub const FLOW_EPOCHS: &str = "FLOW_EPOCHS";
    /// ARRAY (mmap) of u64, by [`Bit::index`](crate::bystander::Bit::index).
    pub const BYSTANDERS: &str = "BYSTANDERS";
    /// ARRAY of [`Entry4`](crate::flow_cache::Entry4) or [`Entry6`](crate::flow_cache::Entry6), not pinned: it is worth a
    /// second, and belongs to one load of the programs.
    pub const FLOW_CACHE4: &str = "FLOW_CACHE4";
    pub const FLOW_CACHE6: &str = "FLOW_CACHE6";
    /// ARRAY of [`Tags`](crate::flow_cache::Tags), not pinned either.
    pub const FLOW_TAGS4: &str = "FLOW_TAGS4";
    pub const FLOW_TAGS6: &str = "FLOW_TAGS6";

    /// LRU_HASH, [`Neighbour`](crate::device::Neighbour) to u32, not pinned.
    pub const NEIGHBOURS: &str = "NEIGHBOURS";

    /// All of them: what a state directory must hold.
    pub const ALL: [&str; 27] = [
        FRONTENDS4,
        FRONTENDS6,
        SERVICES,
        SLOTS,
        BACKENDS4,
        BACKENDS6,
        FLOWS4,
        FLOWS6,
        AFFINITY4,
        AFFINITY6,
        AFFINITY_MEMBERS,
        SERVICE_NAMES,
        SERVICE_STATS,
        COUNTERS,
        DEVICES,
        SOCKETS,
        FRAGMENTS4,
        FRAGMENTS6,
        HELD4,
        HELD6,
        SERVICE_CIDRS4,
        SERVICE_CIDRS6,
        SOURCE_RANGES4,
        SOURCE_RANGES6,
        FLOW_EPOCHS,
        BYSTANDERS,
        CLOCK,
    ];
    /// ARRAY of one [`Clock`](crate::maps::Clock), written by the program `lb_clock`.
    pub const CLOCK: &str = "CLOCK";
}

/// Default capacities. Each is an option of the agent.
pub mod capacity {
    /// Frontends per family: 10,000 Services with a ClusterIP and NodePorts on a few addresses.
    pub const FRONTENDS: u32 = 131_072;
    /// Service ports, both families together.
    pub const SERVICES: u32 = 65_536;
    /// Backend slots, both families together: two sets (Cluster and Local) of 100,000 backends, and room to write a
    /// new set beside the old one.
    pub const SLOTS: u32 = 501_760;
    /// Backends per family.
    pub const BACKENDS: u32 = 131_072;
    /// Flows per family; each takes two entries. What nf_conntrack has by default where there is memory for it
    /// (nf_conntrack_init_start); the agent chooses by [`flows`].
    pub const FLOWS: u32 = 262_144;
    /// Flows per CPU: kube-proxy's conntrack.maxPerCore.
    pub const FLOWS_PER_CPU: u32 = 32_768;
    /// Bytes that both families' tables take for each flow that fits: two entries of 96 and of 144 bytes (a key, a value and
    /// 48 bytes of the kernel's), and twice two buckets of 16. All of it is allocated when the tables are made.
    pub const FLOW_BYTES: u64 = 2 * (96 + 144) + 4 * 16;
    /// The part of the memory that flow tables take by default: one in so many bytes.
    pub const FLOWS_OF_MEMORY: u64 = 64;

    /// Flows per family by default, on a node with so many CPUs and bytes of memory: a power of two, as the kernel's number
    /// of buckets is.
    pub const fn flows(cpus: u32, memory_bytes: u64) -> u32 {
        let affordable = memory_bytes / FLOWS_OF_MEMORY / FLOW_BYTES;
        let mut flows =
            if cpus > 64 { 64 * FLOWS_PER_CPU } else { (cpus * FLOWS_PER_CPU).next_power_of_two() };
        if flows < FLOWS {
            flows = FLOWS;
        }
        while flows as u64 > affordable && flows > FLOWS / 16 {
            flows /= 2;
        }
        flows
    }
    /// Slots of the flow cache for IPv4, all CPUs together: 32 MB. IPv6 has a quarter as many, of twice the size: 16 MB.
    pub const FLOW_CACHE: u32 = 524_288;
    /// Clients with session affinity, per family.
    pub const AFFINITY: u32 = 65_536;
    /// (Service port, backend) pairs of Services with affinity.
    pub const AFFINITY_MEMBERS: u32 = 131_072;
    /// Network devices with an entry.
    pub const DEVICES: u32 = 4_096;
    /// Neighbours that XDP sends to.
    pub const NEIGHBOURS: u32 = 4_096;
    /// UDP and TCP sockets remembered by the socket hooks.
    pub const SOCKETS: u32 = 65_536;
    /// Fragmented datagrams in flight, per family.
    pub const FRAGMENTS: u32 = 8_192;
    /// Fragments that wait for the first one of their datagram, per family: 0.8 MB each.
    pub const HELD: u32 = 512;
    /// loadBalancerSourceRanges, per family; memory follows their number.
    pub const SOURCE_RANGES: u32 = 65_536;
}

/// Load-time constants (read-only globals) of the kernel object.
pub mod global {
    /// u32: kernel ticks per second.
    pub const JIFFIES_PER_S: &str = "JIFFIES_PER_S";
    /// u16, host order: first and last source port for translated flows.
    pub const SNAT_PORT_FIRST: &str = "SNAT_PORT_FIRST";
    pub const SNAT_PORT_LAST: &str = "SNAT_PORT_LAST";
    /// u32: seed of the selection hash.
    pub const HASH_SEED: &str = "HASH_SEED";
    /// u8: level of aya-log's records; 0 is off, and the verifier removes them.
    pub const LOG_LEVEL: &str = "AYA_LOG_LEVEL";
    /// u64: cookie of the network namespace whose sockets are served; 0 serves all.
    pub const SOCKET_NETNS: &str = "SOCKET_NETNS";
    /// u64: cookie of the node's own network namespace.
    pub const HOST_NETNS: &str = "HOST_NETNS";
    /// u8: 1 answers echo requests to Service addresses.
    pub const ANSWER_PING: &str = "ANSWER_PING";
    /// u8: 1 gives all packets to ClusterIPs an address of this node (rule D2).
    pub const MASQUERADE_ALL: &str = "MASQUERADE_ALL";
    /// u32: length of `SERVICES`, and of each CPU's part of `SERVICE_STATS`.
    pub const SERVICE_RECORDS: &str = "SERVICE_RECORDS";
    /// u32: slots of the flow cache for IPv4 of each CPU, a power of two; IPv6 has a quarter as many; 0 switches it off.
    pub const FLOW_CACHE_SLOTS: &str = "FLOW_CACHE_SLOTS";
}

/// Element of `CLOCK`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    pub jiffies: u64,
    pub ktime_ns: u64,
}

crate::map_type!(Clock, size = 16);

/// Names of the programs in the kernel object.
pub mod program {
    pub const TC_INGRESS: &str = "lb_tc_ingress";
    pub const TC_EGRESS: &str = "lb_tc_egress";
    pub const XDP: &str = "lb_xdp";
    /// Writes `CLOCK`; run on demand by BPF_PROG_TEST_RUN.
    pub const CLOCK: &str = "lb_clock";
    pub const CONNECT4: &str = "lb_connect4";
    pub const CONNECT6: &str = "lb_connect6";
    pub const SENDMSG4: &str = "lb_sendmsg4";
    pub const SENDMSG6: &str = "lb_sendmsg6";
    pub const RECVMSG4: &str = "lb_recvmsg4";
    pub const RECVMSG6: &str = "lb_recvmsg6";
    pub const GETPEERNAME4: &str = "lb_getpeername4";
    pub const GETPEERNAME6: &str = "lb_getpeername6";
    /// The socket hooks.
    pub const SOCKET: [&str; 8] =
        [CONNECT4, CONNECT6, SENDMSG4, SENDMSG6, RECVMSG4, RECVMSG6, GETPEERNAME4, GETPEERNAME6];
}

#[cfg(test)]
mod tests {
    use super::capacity::flows;

    #[test]
    fn flow_tables_follow_the_node() {
        const GIB: u64 = 1 << 30;
        assert_eq!(flows(2, 24 * GIB), 262_144);
        assert_eq!(flows(2, 8 * GIB), 131_072);
        assert_eq!(flows(2, 2 * GIB), 32_768);
        assert_eq!(flows(1, GIB / 4), 16_384, "never less");
        assert_eq!(flows(12, 64 * GIB), 524_288);
        assert_eq!(flows(64, 256 * GIB), 2_097_152);
        assert_eq!(flows(64, 64 * GIB), 1_048_576);
        assert_eq!(flows(4096, 4096 * GIB), 2_097_152, "never more");
    }
}

//! Constants that the agent sets when it loads the object; the verifier removes what they switch off.

use aya_ebpf::Global;
use lb_common::nat::PortRange;

#[unsafe(no_mangle)]
static JIFFIES_PER_S: Global<u32> = Global::new(250);
#[unsafe(no_mangle)]
static SNAT_PORT_FIRST: Global<u16> = Global::new(PortRange::DEFAULT.first);
#[unsafe(no_mangle)]
static SNAT_PORT_LAST: Global<u16> = Global::new(PortRange::DEFAULT.last);
#[unsafe(no_mangle)]
static HASH_SEED: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static SOCKET_NETNS: Global<u64> = Global::new(0);
#[unsafe(no_mangle)]
static HOST_NETNS: Global<u64> = Global::new(0);
#[unsafe(no_mangle)]
static ANSWER_PING: Global<u8> = Global::new(0);
#[unsafe(no_mangle)]
static MASQUERADE_ALL: Global<u8> = Global::new(0);
#[unsafe(no_mangle)]
static SERVICE_RECORDS: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static FLOW_CACHE_SLOTS: Global<u32> = Global::new(0);

#[inline(always)]
pub fn jiffies_per_s() -> u32 {
    JIFFIES_PER_S.load()
}

#[inline(always)]
pub fn snat_ports() -> PortRange {
    PortRange { first: SNAT_PORT_FIRST.load(), last: SNAT_PORT_LAST.load() }
}

#[inline(always)]
pub fn hash_seed() -> u32 {
    HASH_SEED.load()
}

/// Cookie of the only network namespace whose sockets are served, or 0 for all.
#[inline(always)]
pub fn socket_netns() -> u64 {
    SOCKET_NETNS.load()
}

/// Cookie of the node's own network namespace.
#[inline(always)]
pub fn host_netns() -> u64 {
    HOST_NETNS.load()
}

/// Echo requests to Service addresses are answered.
#[inline(always)]
pub fn answer_ping() -> bool {
    ANSWER_PING.load() != 0
}

/// All packets to ClusterIPs get an address of this node.
#[inline(always)]
pub fn masquerade_all() -> bool {
    MASQUERADE_ALL.load() != 0
}

/// Slots of the flow cache for IPv4 of each CPU, a power of two, of which IPv6 has a quarter; 0: there is none.
#[inline(always)]
pub fn flow_cache_slots() -> u32 {
    FLOW_CACHE_SLOTS.load()
}

/// Length of `SERVICES`, and of each CPU's part of `SERVICE_STATS`.
#[inline(always)]
pub fn service_records() -> u32 {
    SERVICE_RECORDS.load()
}

//! Frontends: the addresses that clients speak to, and the Service record that they point at.
//!
//! `FRONTENDS4/6` maps (address, port, protocol) to a [`FrontendValue`], which names a [`ServiceRecord`] in the
//! array `SERVICES`. Beside them, each address has an entry of its own under port 0 and protocol 0
//! ([`FrontendKey::address`]). All frontends of one Service port and family (its ClusterIP, NodePort on every address,
//! LoadBalancer IPs, external IPs) share one record, so one 64-bit store moves all of them to a new backend set.

use crate::{Addr, Be16, V4, V6, map_type};

/// Key of `FRONTENDS4` and `FRONTENDS6`: exact match, no wildcard.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendKey<A> {
    pub addr: A,
    pub port: Be16,
    pub proto: u8,
    pub _pad: u8,
}

map_type!(FrontendKey<V4>, size = 8);
map_type!(FrontendKey<V6>, size = 20);

impl<A: Addr> FrontendKey<A> {
    #[inline(always)]
    pub const fn new(addr: A, port: Be16, proto: u8) -> Self {
        Self { addr, port, proto, _pad: 0 }
    }

    /// The entry about an address as a whole: what it is, whatever the port. No packet has protocol 0 to a port, so no
    /// frontend has this key.
    #[inline(always)]
    pub const fn address(addr: A) -> Self {
        Self::new(addr, Be16::new(0), 0)
    }
}

/// Value of `FRONTENDS4` and `FRONTENDS6`. Eight aligned bytes: read and written as one.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontendValue {
    /// Index into `SERVICES` and `SERVICE_STATS`. 0 in the entry about an address as a whole, which many may share.
    pub service: u32,
    /// [`flags`].
    pub flags: u32,
}

map_type!(FrontendValue, size = 8);

/// Bits of [`FrontendValue::flags`].
pub mod flags {
    /// Clients on this node (pods, the node itself) get the Local set: a ClusterIP with internalTrafficPolicy Local.
    pub const INTERNAL_LOCAL: u32 = 1 << 0;
    /// Clients from outside get the Local set: internalTrafficPolicy Local on a ClusterIP, externalTrafficPolicy
    /// Local on every other kind.
    pub const EXTERNAL_LOCAL: u32 = 1 << 1;
    /// The Service port has ClientIP affinity (`spec.sessionAffinity`).
    pub const AFFINITY: u32 = 1 << 2;
    /// A LoadBalancer address with `spec.loadBalancerSourceRanges`: clients must be in `SOURCE_RANGES4/6`.
    pub const SOURCE_RANGES: u32 = 1 << 3;
    /// With [`SOURCE_RANGES`]: an address of this node is in the ranges. A socket has no address yet when it connects.
    pub const NODE_IN_RANGES: u32 = 1 << 4;
    /// A NodePort on a loopback address: for sockets of the node itself, never for packets (CVE-2020-8558).
    pub const LOOPBACK: u32 = 1 << 5;

    /// What kind of address this is.
    pub const KIND_SHIFT: u32 = 28;
    pub const KIND_CLUSTER_IP: u32 = 1 << KIND_SHIFT;
    pub const KIND_NODE_PORT: u32 = 2 << KIND_SHIFT;
    pub const KIND_LOAD_BALANCER: u32 = 3 << KIND_SHIFT;
    pub const KIND_EXTERNAL_IP: u32 = 4 << KIND_SHIFT;
    /// Of the entry about an address as a whole only: a ClusterIP that another proxy serves
    /// (label `service.kubernetes.io/service-proxy-name`).
    pub const KIND_FOREIGN: u32 = 5 << KIND_SHIFT;
    pub const KIND_MASK: u32 = 0xf << KIND_SHIFT;
}

/// A run of entries in `SLOTS`: the low 32 bits are the first index, the high 32 bits the number of entries.
/// Kept in one integer so that a reader sees either the old run or the new one.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SlotRange(pub u64);

map_type!(SlotRange, size = 8);

impl SlotRange {
    pub const EMPTY: Self = Self(0);

    #[inline(always)]
    pub const fn new(base: u32, len: u32) -> Self {
        Self(base as u64 | (len as u64) << 32)
    }
    #[inline(always)]
    pub const fn base(self) -> u32 {
        self.0 as u32
    }
    #[inline(always)]
    pub const fn len(self) -> u32 {
        (self.0 >> 32) as u32
    }
    #[inline(always)]
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// Element of the array `SERVICES`: one Service port in one address family.
///
/// The number of slots is not the number of backends: weighted and Maglev tables repeat them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceRecord {
    /// Endpoints for traffic policy Cluster.
    pub cluster: SlotRange,
    /// Endpoints on this node, for traffic policy Local.
    pub local: SlotRange,
    /// `sessionAffinityConfig.clientIP.timeoutSeconds`.
    pub affinity_timeout_s: u32,
    /// 1 while a Service uses this record.
    pub in_use: u32,
    pub _reserved: u64,
}

map_type!(ServiceRecord, size = 32);

/// Value of `SERVICE_NAMES`: `namespace/name:port` as UTF-8, zero-padded. The kernel never reads it; it keeps the
/// identity of a record across agent restarts and gives `lb-agent services` its names.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceName {
    pub utf8: [u8; ServiceName::CAPACITY_BYTES],
}

impl ServiceName {
    /// 63 bytes each of namespace, name and port (RFC 1123 labels), two separators, `/tcp` and the family.
    pub const CAPACITY_BYTES: usize = 208;
}

map_type!(ServiceName, size = ServiceName::CAPACITY_BYTES);

/// Element of `SERVICE_STATS`: what one CPU has counted of a Service.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceStats {
    /// Packets translated, both directions.
    pub packets: u64,
    /// Bytes of those packets from the IP header on.
    pub bytes: u64,
    /// New flows, and sockets connected through the socket hooks.
    pub connections: u64,
    /// How many of the packets XDP translated.
    pub xdp_packets: u64,
}

map_type!(ServiceStats, size = 32);

/// Index into `SERVICE_STATS`: each CPU has a part of its own, of as many elements as there are `records`. Not a per-CPU array,
/// where each element is found by a pointer that has to be read first.
#[inline(always)]
pub const fn stats_index(cpu: u32, records: u32, service: u32) -> u32 {
    cpu * records + service
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_range_keeps_both_halves_at_their_extremes() {
        let r = SlotRange::new(u32::MAX, u32::MAX - 1);
        assert_eq!((r.base(), r.len()), (u32::MAX, u32::MAX - 1));
        assert!(SlotRange::new(7, 0).is_empty());
    }
}

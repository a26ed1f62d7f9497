//! ClientIP session affinity (`spec.sessionAffinity`).

use crate::{Addr, V4, V6, map_type};

/// Key of `AFFINITY4` and `AFFINITY6`: one memory per client and Service port, shared by all frontends of the port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AffinityKey<A> {
    pub client: A,
    /// Index into `SERVICES`.
    pub service: u32,
}

map_type!(AffinityKey<V4>, size = 8);
map_type!(AffinityKey<V6>, size = 20);

impl<A: Addr> AffinityKey<A> {
    #[inline(always)]
    pub const fn new(client: A, service: u32) -> Self {
        Self { client, service }
    }
}

/// Value of `AFFINITY4` and `AFFINITY6`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AffinityValue {
    pub backend: u32,
    /// Kernel jiffies (low 32 bits) of the last new connection.
    pub last_used: u32,
}

map_type!(AffinityValue, size = 8);

/// Key of `AFFINITY_MEMBERS`: tells in one lookup whether a remembered backend may still be used. Only Services
/// with affinity have entries.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberKey {
    pub service: u32,
    pub backend: u32,
}

map_type!(MemberKey, size = 8);

/// Bits of the value of `AFFINITY_MEMBERS`.
pub mod member {
    /// In the Cluster set.
    pub const CLUSTER: u32 = 1;
    /// In the Local set.
    pub const LOCAL: u32 = 2;
}

/// True while the memory holds: `timeout_s` seconds after the last new connection (Kubernetes API,
/// `sessionAffinityConfig.clientIP.timeoutSeconds`).
#[inline(always)]
pub const fn is_fresh(last_used: u32, now: u32, timeout_s: u32, jiffies_per_s: u32) -> bool {
    (now.wrapping_sub(last_used) as u64) < timeout_s as u64 * jiffies_per_s as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_lasts_to_the_second_and_survives_the_jiffies_wrap() {
        assert!(is_fresh(u32::MAX - 100, 898, 10, 100));
        assert!(!is_fresh(u32::MAX - 100, 899, 10, 100));
        assert!(is_fresh(0, 86_399 * 1000, 86_400, 1000));
    }
}

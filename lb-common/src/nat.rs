//! Source ports for flows that leave under an address of this node.

use crate::{Addr, select, tuple::Tuple};

/// How many source ports a new flow tries before it is dropped. Each try is one map insert; with a port range that is
/// 90 % full, 32 tries fail once in 29.
pub const PORT_TRIES: u32 = 32;

/// The inclusive range of source ports for translated flows, in host order. It must not meet the host's ephemeral
/// range: a socket of the host could else own the same tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    pub first: u16,
    pub last: u16,
}

impl PortRange {
    /// Below the NodePort range (30000-32767) and the ephemeral range (from 32768), above most services.
    pub const DEFAULT: Self = Self { first: 10_240, last: 29_999 };

    /// The port for try `attempt` of a flow with this `hash`: a walk through the range that begins where the hash
    /// says and takes odd steps of its own, so that flows do not queue behind each other.
    #[inline(always)]
    pub const fn candidate(&self, hash: u32, attempt: u32) -> u16 {
        let span = (self.last as u32).wrapping_sub(self.first as u32).wrapping_add(1);
        let spread = select::finalize(hash.wrapping_add(attempt.wrapping_mul(0x9e37_79b9)));
        (self.first as u32).wrapping_add(((spread as u64 * span as u64) >> 32) as u32) as u16
    }
}

/// True for a pod that reaches itself through a Service: its packet would come back with its own address as source.
#[inline(always)]
pub fn is_hairpin<A: Addr>(packet: &Tuple<A>, backend: &A) -> bool {
    packet.src == *backend
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn candidates_stay_in_range(first in 1u16..60_000, len in 0u16..5_000, hash: u32, attempt in 0u32..PORT_TRIES) {
            let r = PortRange { first, last: first.saturating_add(len) };
            let p = r.candidate(hash, attempt);
            prop_assert!(p >= r.first && p <= r.last);
        }
    }

    #[test]
    fn a_flow_tries_many_different_ports() {
        let mut seen: Vec<u16> = (0..PORT_TRIES).map(|i| PortRange::DEFAULT.candidate(7, i)).collect();
        seen.sort_unstable();
        seen.dedup();
        assert!(seen.len() > 30, "{} different ports", seen.len());
    }
}

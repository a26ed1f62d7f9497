//! Per-CPU counters.

use lb_common::verdict::Counter;

use crate::maps;

/// Counts one event.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(c) = maps::COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: an element of this CPU's own copy.
        unsafe { *c += 1 };
    }
}

/// Counts translated packets of a Service.
#[inline(always)]
pub fn count_service(service: u32, packets: u32, bytes: u32, by_xdp: bool) {
    if let Some(s) = maps::SERVICE_STATS.get_ptr_mut(service) {
        // SAFETY: an element of this CPU's own copy.
        unsafe {
            (*s).packets += packets as u64;
            (*s).bytes += bytes as u64;
            if by_xdp {
                (*s).xdp_packets += packets as u64;
            }
        }
    }
}

/// Counts a new flow or a connected socket of a Service.
#[inline(always)]
pub fn count_connection(service: u32) {
    if let Some(s) = maps::SERVICE_STATS.get_ptr_mut(service) {
        // SAFETY: an element of this CPU's own copy.
        unsafe { (*s).connections += 1 };
    }
}

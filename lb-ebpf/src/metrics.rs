//! Per-CPU counters.

use aya_ebpf::helpers::bpf_get_smp_processor_id;
use lb_common::{frontend::stats_index, verdict::Counter};

use crate::{globals, maps};

/// Counts one event.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(c) = maps::COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: an element of this CPU's own copy.
        unsafe { *c += 1 };
    }
}

/// Where this CPU counts what is of a Service: an index into `SERVICE_STATS`.
#[inline(always)]
pub fn place_of(service: u32) -> u32 {
    // SAFETY: no arguments, no effects.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    stats_index(cpu, globals::service_records(), service)
}

/// Begins to fetch the line where a Service's packets will be counted, while others that are as cold are waited for.
#[inline(always)]
pub fn expect_service(service: u32) {
    if let Some(s) = maps::SERVICE_STATS.get_ptr(place_of(service)) {
        // SAFETY: as in `count_service`; volatile, as nobody uses what is read.
        unsafe { core::ptr::read_volatile(&raw const (*s).packets) };
    }
}

/// Counts translated packets of a Service, by its [`place_of`].
#[inline(always)]
pub fn count_service(place: u32, packets: u32, bytes: u32, by_xdp: bool) {
    if let Some(s) = maps::SERVICE_STATS.get_ptr_mut(place) {
        // SAFETY: an element of this CPU's part.
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
    if let Some(s) = maps::SERVICE_STATS.get_ptr_mut(place_of(service)) {
        // SAFETY: an element of this CPU's part.
        unsafe { (*s).connections += 1 };
    }
}

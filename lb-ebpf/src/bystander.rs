//! Packets that are none of ours by their address or port alone ([`lb_common::bystander`]).

use lb_common::{Be16, bystander::Bit};

use crate::{maps, net::Net};

/// True for a destination of no flow that is translated where it comes in, of no frontend, and that rule C7 is not about.
#[inline(always)]
pub fn is_destination<A: Net>(addr: &A) -> bool {
    is_set(Bit::of_address(addr)) && addr.service_cidr() == 0
}

/// True for a source port that no backend serves at: what comes from it is no answer.
#[inline(always)]
pub fn is_source(port: Be16) -> bool {
    is_set(Bit::of_port(port))
}

#[inline(always)]
fn is_set(bit: Bit) -> bool {
    match maps::BYSTANDERS.get_ptr(bit.index()) {
        // SAFETY: an aligned integer; volatile keeps it one load, as the agent may write.
        Some(word) => (unsafe { core::ptr::read_volatile(word) }) & bit.mask() != 0,
        None => false,
    }
}

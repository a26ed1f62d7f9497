//! Optional log lines about what happens to new flows, read by the agent (`--trace-flows`). With the level off, which
//! is how the agent loads the object otherwise, the verifier removes all of this. Established flows are never logged.

use aya_log_ebpf::debug;
use lb_common::{V4, V6, verdict::Counter};

use crate::net::{Net, Scratch};

/// An address in the form that the log takes.
pub trait Printed: Net {
    type Form: aya_log_ebpf::macro_support::IpFormatter + aya_log_ebpf::macro_support::Argument;
    fn printed(&self) -> Self::Form;
}

impl Printed for V4 {
    type Form = u32;
    #[inline(always)]
    fn printed(&self) -> u32 {
        self.get()
    }
}

impl Printed for V6 {
    type Form = [u8; 16];
    #[inline(always)]
    fn printed(&self) -> [u8; 16] {
        bytemuck::cast(*self)
    }
}

/// The flow in the scratch memory was just opened. Not inlined, for the stack's sake, like the next.
#[inline(never)]
pub fn opened<A: Printed>() {
    let Some(Scratch { packet: p, opened: flow, .. }) = A::scratch() else { return };
    debug!(
        (),
        "new flow, protocol {}: {:i} port {} to {:i} port {}",
        p.tuple.proto,
        p.tuple.src.printed(),
        p.tuple.sport.get(),
        p.tuple.dst.printed(),
        p.tuple.dport.get()
    );
    debug!(
        (),
        "  goes to {:i} port {} as {:i} port {}",
        flow.dst.printed(),
        flow.dport.get(),
        flow.src.printed(),
        flow.sport.get()
    );
}

/// The packet in the scratch memory gets no backend. `reason` is the index of a [`Counter`].
#[inline(never)]
pub fn refused<A: Printed>(reason: Counter) {
    let Some(Scratch { packet: p, .. }) = A::scratch() else { return };
    debug!(
        (),
        "refused (counter {}), protocol {}: {:i} port {} to {:i} port {}",
        reason as u32,
        p.tuple.proto,
        p.tuple.src.printed(),
        p.tuple.sport.get(),
        p.tuple.dst.printed(),
        p.tuple.dport.get()
    );
}

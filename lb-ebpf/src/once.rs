//! Functions that the verifier walks once for each program.
//!
//! It walks other functions anew with every call and for every state that a caller may be in, and what a loop calls with every
//! turn. Those whose BTF says that they are global (exported, with the C ABI) it walks by themselves, and believes the
//! signature (kernel commit 51c39bb1d5d1, 5.6): the context of the program, and numbers. Pointers may point to types of known size,
//! and be null (e5069b9c23b3, 5.12), but before 6.2 nothing behind them can be the key of a map (d1673304097c). So what
//! such a function works on it finds in the scratch memory.

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use lb_common::{V4, V6, conntrack::Flow, verdict::Counter};

use crate::{
    conntrack, lookup,
    net::{Net, Scratch},
    service::Refusal,
    skb::Skb,
    tc,
};

/// These functions of a family.
pub trait Once: Net {
    /// [`lookup::open`] for the packet in the scratch memory, to a frontend ([`lb_common::frontend::FrontendValue`] as a
    /// number). Returns a [`Refusal::code`].
    fn open_at_xdp(ctx: *mut xdp_md, frontend: u64) -> u32;
    /// The same for the classifiers.
    fn open_at_tc(skb: *mut __sk_buff, frontend: u64) -> u32;
    /// [`conntrack::take_port`].
    fn take_port(port: u32) -> u32;
    /// [`tc::transit`] for the packet in the scratch memory.
    fn transit(skb: *mut __sk_buff, flow: *const Flow<Self>) -> i32;
}

macro_rules! once {
    ($family:ty, $open_at_xdp:ident, $open_at_tc:ident, $take_port:ident, $transit:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $open_at_xdp(ctx: *mut xdp_md, frontend: u64) -> u32 {
            let Some(Scratch { packet, .. }) = <$family>::scratch() else { return NO_SCRATCH };
            lookup::open(ctx.cast(), packet, bytemuck::cast(frontend))
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $open_at_tc(skb: *mut __sk_buff, frontend: u64) -> u32 {
            let Some(Scratch { packet, .. }) = <$family>::scratch() else { return NO_SCRATCH };
            lookup::open(skb.cast(), packet, bytemuck::cast(frontend))
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $take_port(port: u32) -> u32 {
            conntrack::take_port::<$family>(port)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $transit(skb: *mut __sk_buff, flow: *const Flow<$family>) -> i32 {
            let Some(Scratch { packet, .. }) = <$family>::scratch() else { return tc::NEXT };
            // SAFETY: null, or of this type: the verifier has compared it with the signature.
            let Some(flow) = (unsafe { flow.as_ref() }) else { return tc::NEXT };
            tc::transit(Skb(skb), packet, flow)
        }

        impl Once for $family {
            #[inline(always)]
            fn open_at_xdp(ctx: *mut xdp_md, frontend: u64) -> u32 {
                $open_at_xdp(ctx, frontend)
            }
            #[inline(always)]
            fn open_at_tc(skb: *mut __sk_buff, frontend: u64) -> u32 {
                $open_at_tc(skb, frontend)
            }
            #[inline(always)]
            fn take_port(port: u32) -> u32 {
                $take_port(port)
            }
            #[inline(always)]
            fn transit(skb: *mut __sk_buff, flow: *const Flow<Self>) -> i32 {
                $transit(skb, flow)
            }
        }
    };
}

once!(V4, open_at_xdp4, open_at_tc4, take_port4, transit4);
once!(V6, open_at_xdp6, open_at_tc6, take_port6, transit6);

/// A per-CPU array always has its one element; the verifier does not know.
const NO_SCRATCH: u32 = Refusal::Drop(Counter::DropBadMap).code();

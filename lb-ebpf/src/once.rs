//! Functions that the verifier walks once for each program: what a loop calls, and what is called from several states.
//!
//! It walks other functions anew with every call, for every state that a caller may be in, and with every turn of a loop. Those
//! whose BTF says that they are global (exported, with the C ABI) it walks by themselves, and believes the signature (kernel
//! commit 51c39bb1d5d1, 5.6): the context of the program, and numbers; the result may be any number, hence codes. Pointers may
//! point to types of known size, and be null (e5069b9c23b3, 5.12), but before 6.2 nothing behind them can be the key of a map
//! (d1673304097c). So what such a function works on it finds in the scratch memory.

use core::ffi::c_void;

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
    /// number). SYNs and other packets come here from two places. Also for the processor's sake: packets of established flows
    /// have no use for this code in its cache.
    fn open_by_xdp(ctx: *mut xdp_md, frontend: u64) -> u32;
    /// The same for the classifiers.
    fn open_by_tc(skb: *mut __sk_buff, frontend: u64) -> u32;
    /// [`conntrack::take_port`], which a loop calls.
    fn take_port(port: u32) -> u32;
    /// [`tc::transit`] for the packet in the scratch memory: large, and behind all that finds or opens a flow.
    fn transit(skb: *mut __sk_buff, flow: *const Flow<Self>) -> i32;
}

macro_rules! once {
    ($family:ty, $open_by_xdp:ident, $open_by_tc:ident, $take_port:ident, $transit:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $open_by_xdp(ctx: *mut xdp_md, frontend: u64) -> u32 {
            open::<$family>(ctx.cast(), frontend)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $open_by_tc(skb: *mut __sk_buff, frontend: u64) -> u32 {
            open::<$family>(skb.cast(), frontend)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $take_port(port: u32) -> u32 {
            conntrack::take_port::<$family>(port)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $transit(skb: *mut __sk_buff, flow: *const Flow<$family>) -> i32 {
            // SAFETY: null, or that many bytes of memory: the verifier has compared it with the signature.
            match (<$family>::scratch(), unsafe { flow.as_ref() }) {
                (Some(Scratch { packet, .. }), Some(flow)) => tc::transit(Skb(skb), packet, flow),
                _ => tc::action(Err(Counter::DropBadMap)),
            }
        }

        impl Once for $family {
            #[inline(always)]
            fn open_by_xdp(ctx: *mut xdp_md, frontend: u64) -> u32 {
                $open_by_xdp(ctx, frontend)
            }
            #[inline(always)]
            fn open_by_tc(skb: *mut __sk_buff, frontend: u64) -> u32 {
                $open_by_tc(skb, frontend)
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

once!(V4, open_by_xdp4, open_by_tc4, take_port4, transit4);
once!(V6, open_by_xdp6, open_by_tc6, take_port6, transit6);

#[inline(always)]
fn open<A: Once>(ctx: *mut c_void, frontend: u64) -> u32 {
    match A::scratch() {
        Some(Scratch { packet, .. }) => lookup::open(ctx, packet, bytemuck::cast(frontend)),
        None => Refusal::Drop(Counter::DropBadMap).code(),
    }
}

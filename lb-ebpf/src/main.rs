//! The kernel programs. Each entry point calls one function of its module and returns.
#![no_std]
#![no_main]

mod bystander;
mod cache;
mod conntrack;
mod echo;
mod forward;
mod fragments;
mod frame;
mod globals;
mod icmp;
mod lookup;
mod maps;
mod metrics;
mod net;
mod once;
mod parse;
mod reset;
mod rewrite;
mod service;
mod skb;
mod sock;
mod tc;
mod trace;
mod xdp;

use aya_ebpf::{
    bindings::xdp_action,
    helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns},
    macros::{cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, TcContext, XdpContext},
};

/// Packets that come in by a device, on their way to the stack.
#[classifier]
pub fn lb_tc_ingress(ctx: TcContext) -> i32 {
    tc::ingress(skb::Skb::new(&ctx))
}

/// Packets that leave by a device.
#[classifier]
pub fn lb_tc_egress(ctx: TcContext) -> i32 {
    tc::egress(skb::Skb::new(&ctx))
}

/// Frames from the wire, before there is an skb.
#[xdp]
pub fn lb_xdp(ctx: XdpContext) -> u32 {
    xdp::run(&ctx)
}

/// connect() of IPv4 sockets.
#[cgroup_sock_addr(connect4)]
pub fn lb_connect4(ctx: SockAddrContext) -> i32 {
    sock::send4(&ctx, sock::What::Connect)
}

/// connect() of IPv6 sockets.
#[cgroup_sock_addr(connect6)]
pub fn lb_connect6(ctx: SockAddrContext) -> i32 {
    sock::send6(&ctx, sock::What::Connect)
}

/// sendmsg() of unconnected IPv4 UDP sockets.
#[cgroup_sock_addr(sendmsg4)]
pub fn lb_sendmsg4(ctx: SockAddrContext) -> i32 {
    sock::send4(&ctx, sock::What::Send)
}

/// sendmsg() of unconnected IPv6 UDP sockets.
#[cgroup_sock_addr(sendmsg6)]
pub fn lb_sendmsg6(ctx: SockAddrContext) -> i32 {
    sock::send6(&ctx, sock::What::Send)
}

/// recvmsg() of IPv4 UDP sockets.
#[cgroup_sock_addr(recvmsg4)]
pub fn lb_recvmsg4(ctx: SockAddrContext) -> i32 {
    sock::receive4(&ctx)
}

/// recvmsg() of IPv6 UDP sockets.
#[cgroup_sock_addr(recvmsg6)]
pub fn lb_recvmsg6(ctx: SockAddrContext) -> i32 {
    sock::receive6(&ctx)
}

/// getpeername() of IPv4 sockets.
#[cgroup_sock_addr(getpeername4)]
pub fn lb_getpeername4(ctx: SockAddrContext) -> i32 {
    sock::receive4(&ctx)
}

/// getpeername() of IPv6 sockets.
#[cgroup_sock_addr(getpeername6)]
pub fn lb_getpeername6(ctx: SockAddrContext) -> i32 {
    sock::receive6(&ctx)
}

/// Writes the kernel's clocks to `CLOCK`, for whoever reads time stamps. Never attached: run by BPF_PROG_TEST_RUN.
#[xdp]
pub fn lb_clock(_ctx: XdpContext) -> u32 {
    if let Some(clock) = maps::CLOCK.get_ptr_mut(0) {
        // SAFETY: an array element, aligned; there is one reader at a time.
        unsafe {
            (*clock).jiffies = bpf_jiffies64();
            (*clock).ktime_ns = bpf_ktime_get_ns();
        }
    }
    xdp_action::XDP_PASS
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
pub static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

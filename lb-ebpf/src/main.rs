#![no_std]
#![no_main]

mod maps;

use aya_ebpf::{
    bindings::xdp_action,
    helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns},
    macros::xdp,
    programs::XdpContext,
};

/// Writes the kernel's clocks to `CLOCK`, for whoever reads time stamps. Never attached: run by BPF_PROG_TEST_RUN.
#[xdp]
pub fn lb_clock(_ctx: XdpContext) -> u32 {
    if let Some(clock) = maps::CLOCK.get_ptr_mut(0) {
        // SAFETY: an array element, aligned; torn reads do no harm, there is one reader at a time.
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

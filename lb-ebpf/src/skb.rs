//! Checked loads and stores on an skb. Every helper here that changes the packet may move it: nothing keeps a
//! [`crate::frame::Frame`] of an skb over such a call (the verifier would refuse it).

use core::{ffi::c_void, mem::MaybeUninit};

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{bpf_csum_update, bpf_l4_csum_replace, bpf_skb_load_bytes, bpf_skb_store_bytes},
    programs::TcContext,
};
use lb_common::checksum::Sum;

use crate::globals;

/// `bpf_l4_csum_replace`: the difference belongs to the pseudo-header, so it counts even while the checksum is left
/// to the device.
const PSEUDO_HDR: u64 = 0x10;
/// `bpf_l4_csum_replace`: UDP, where 0 means no checksum.
const MARK_MANGLED_0: u64 = 0x20;

/// First word of the note that a packet is redirected; the second is the agent's seed. An odd multiplier of the golden ratio.
const SENT: u32 = 0x9e37_79b1;

/// A packet in a tc program.
#[derive(Clone, Copy)]
pub struct Skb(pub *mut __sk_buff);

/// A helper refused.
pub struct Failed;

impl Skb {
    #[inline(always)]
    pub fn new(ctx: &TcContext) -> Self {
        Self(ctx.skb.skb)
    }

    #[inline(always)]
    pub fn ctx(self) -> *mut c_void {
        self.0.cast()
    }

    /// Bytes from the Ethernet header on.
    #[inline(always)]
    pub fn len(self) -> u32 {
        // SAFETY: the context of the running program.
        unsafe { (*self.0).len }
    }

    #[inline(always)]
    pub fn ifindex(self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).ifindex }
    }

    /// `skb->pkt_type`: whom the frame is addressed to.
    #[inline(always)]
    pub fn packet_type(self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).pkt_type }
    }

    /// Notes in the packet's scratch bytes (`cb`) that it is redirected: this hook and the one where it leaves have them to
    /// themselves. The IP stack, bridges and tunnels begin with clearing them.
    #[inline(always)]
    pub fn mark_sent(self) {
        // SAFETY: the context of the running program.
        unsafe {
            (*self.0).cb[0] = SENT;
            (*self.0).cb[1] = globals::hash_seed();
        }
    }

    /// True after [`Self::mark_sent`]. What others leave there has no reason to look like it.
    #[inline(always)]
    pub fn is_sent(self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0).cb[0] == SENT && (*self.0).cb[1] == globals::hash_seed() }
    }

    /// For packets that come in: they may have left this node, and be others by now.
    #[inline(always)]
    pub fn clear_sent(self) {
        // SAFETY: as above.
        unsafe {
            if (*self.0).cb[0] == SENT {
                (*self.0).cb[0] = 0;
            }
        }
    }

    /// EtherType, network order.
    #[inline(always)]
    pub fn protocol(self) -> u16 {
        // SAFETY: as above.
        unsafe { (*self.0).protocol as u16 }
    }

    /// The frame carries a VLAN tag that is kept beside the data.
    #[inline(always)]
    pub fn has_vlan(self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0).vlan_present != 0 }
    }

    /// Payload bytes of each segment of a GSO packet, 0 for others.
    #[inline(always)]
    pub fn gso_size(self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).gso_size }
    }

    /// Number of packets that this one stands for.
    #[inline(always)]
    pub fn packets(self) -> u32 {
        // SAFETY: as above.
        match unsafe { (*self.0).gso_segs } {
            0 => 1,
            n => n,
        }
    }

    /// Loads a plain value at `offset`, wherever in the skb it is.
    #[inline(always)]
    pub fn load<T: bytemuck::Pod>(self, offset: u32) -> Option<T> {
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: the buffer has the size given.
        let code = unsafe {
            bpf_skb_load_bytes(self.0.cast(), offset, value.as_mut_ptr().cast(), size_of::<T>() as u32)
        };
        // SAFETY: the helper has filled it; Pod takes any bytes.
        if code == 0 { Some(unsafe { value.assume_init() }) } else { None }
    }

    /// Loads a plain value at `offset` to where it is needed. False if the packet ends before.
    #[inline(always)]
    pub fn load_into<T: bytemuck::Pod>(self, offset: u32, to: &mut T) -> bool {
        // SAFETY: the buffer has the size given; Pod takes any bytes.
        unsafe {
            bpf_skb_load_bytes(self.0.cast(), offset, (to as *mut T).cast(), size_of::<T>() as u32) == 0
        }
    }

    /// Stores a plain value; leaves every checksum as it is.
    #[inline(always)]
    pub fn store<T: bytemuck::Pod>(self, offset: u32, value: &T) -> Result<(), Failed> {
        // SAFETY: the buffer has the size given.
        let code = unsafe {
            bpf_skb_store_bytes(self.0, offset, (value as *const T).cast(), size_of::<T>() as u32, 0)
        };
        if code == 0 { Ok(()) } else { Err(Failed) }
    }

    /// After writes to the data itself: a checksum that the device summed over the whole packet (CHECKSUM_COMPLETE) follows
    /// them. `growth` is what the sum of all bytes from the IP header on has grown by.
    #[inline(always)]
    pub fn sum_has_grown(self, growth: Sum) {
        // SAFETY: plain integers. Fails where there is no such sum, which is fine.
        unsafe { bpf_csum_update(self.0, growth.fold32()) };
    }

    /// Applies a change of the addresses to the layer 4 checksum at `offset`, finished or left to the device.
    ///
    /// On IPv6 nothing in the network header makes up for the change, which the helper assumes for a checksum that
    /// the device summed over the whole packet (CHECKSUM_COMPLETE; kernel commit ead7f9b8de65 adds a flag for it in
    /// 6.16): the second call undoes that, on every kernel.
    #[inline(always)]
    pub fn csum_addresses(self, offset: u32, delta: Sum, is_udp: bool, is_v6: bool) -> Result<(), Failed> {
        self.csum_pseudo_header(offset, delta, is_udp)?;
        if is_v6 {
            self.sum_has_grown(delta);
        }
        Ok(())
    }

    /// [`Self::csum_addresses`] with the helper's assumption.
    #[inline(always)]
    pub fn csum_pseudo_header(self, offset: u32, delta: Sum, is_udp: bool) -> Result<(), Failed> {
        let flags = PSEUDO_HDR | if is_udp { MARK_MANGLED_0 } else { 0 };
        // SAFETY: plain integers.
        let code = unsafe { bpf_l4_csum_replace(self.0, offset, 0, delta.fold32() as u64, flags) };
        if code == 0 { Ok(()) } else { Err(Failed) }
    }

    /// Applies a change of the ports to the layer 4 checksum at `offset`.
    #[inline(always)]
    pub fn csum_ports(self, offset: u32, delta: Sum, is_udp: bool) -> Result<(), Failed> {
        let flags = if is_udp { MARK_MANGLED_0 } else { 0 };
        // SAFETY: plain integers.
        let code = unsafe { bpf_l4_csum_replace(self.0, offset, 0, delta.fold32() as u64, flags) };
        if code == 0 { Ok(()) } else { Err(Failed) }
    }
}

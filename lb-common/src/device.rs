//! What the data path must know about a network device.

use crate::{V4, V6, map_type};

/// Value of `DEVICES`, keyed by ifindex. A device without an entry counts as a pod-side device.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// [`flags`].
    pub flags: u32,
    /// Source address for flows that leave by this device under the node's name; 0 if it has none.
    pub snat4: V4,
    pub snat6: V6,
    /// The device's own MAC address; what XDP takes for itself.
    pub mac: [u8; 6],
    pub _pad: u16,
}

map_type!(Device, size = 32);

/// Key of `NEIGHBOURS`, whose value is when (kernel jiffies, low 32 bits) the stack last sent it a packet for us.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Neighbour {
    pub ifindex: u32,
    pub mac: [u8; 6],
    pub _pad: u16,
}

map_type!(Neighbour, size = 12);

/// Key of the entry for devices without an address of their own: has the node's. No device has this index.
pub const ANY: u32 = 0;

/// Bits of [`Device::flags`].
pub mod flags {
    /// Packets that come in by this device come from outside the node.
    pub const EXTERNAL: u32 = 1 << 0;
    /// The device runs an XDP program, so its driver takes frames that XDP sends it from another device. Without that a
    /// redirect would lose them after the program has run.
    pub const XDP_TARGET: u32 = 1 << 1;
}

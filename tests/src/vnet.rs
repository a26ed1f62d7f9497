//! Packet sockets that say in what state a frame's checksum is, and whether it will be cut into segments: PACKET_VNET_HDR of
//! packet(7). What leaves by them is to the kernel what a virtual machine or a local stack has sent.

use std::{
    io, mem,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use bytemuck::{Pod, Zeroable};

/// struct virtio_net_hdr (VIRTIO 1.2 section 5.1.6), in the byte order of this machine.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Header {
    /// [`Header::NEEDS_CSUM`] and others.
    pub flags: u8,
    pub gso_type: u8,
    /// What the kernel is to keep in one piece.
    pub header_bytes: u16,
    pub gso_size: u16,
    /// Where the sum begins, and the field's distance from there.
    pub csum_start: u16,
    pub csum_offset: u16,
}

impl Header {
    /// The checksum is to be finished by a device (CHECKSUM_PARTIAL).
    pub const NEEDS_CSUM: u8 = 1;
    pub const GSO_TCPV4: u8 = 1;
    pub const GSO_TCPV6: u8 = 4;

    pub const fn is_unfinished(&self) -> bool {
        self.flags & Self::NEEDS_CSUM != 0
    }
}

/// Sends and receives whole frames on a device.
pub struct Port(OwnedFd);

impl Port {
    /// On a device of the calling thread's network namespace.
    pub fn open(ifindex: u32) -> Result<Self> {
        let all = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: plain integers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, all.into()) };
        if fd < 0 {
            return Err(io::Error::last_os_error()).context("no packet socket");
        }
        // SAFETY: just made, and nobody else's.
        let port = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        let on: libc::c_int = 1;
        // SAFETY: the option is an int of the size given.
        let code = unsafe {
            let on = (&raw const on).cast();
            libc::setsockopt(fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, on, size_of::<libc::c_int>() as u32)
        };
        if code != 0 {
            return Err(io::Error::last_os_error()).context("PACKET_VNET_HDR");
        }
        // SAFETY: all zeroes are an address, and it has the size given.
        let code = unsafe {
            let mut to: libc::sockaddr_ll = mem::zeroed();
            to.sll_family = libc::AF_PACKET as u16;
            to.sll_protocol = all;
            to.sll_ifindex = ifindex as i32;
            libc::bind(fd, (&raw const to).cast(), size_of::<libc::sockaddr_ll>() as u32)
        };
        if code != 0 {
            return Err(io::Error::last_os_error()).context("cannot bind a packet socket");
        }
        Ok(port)
    }

    pub fn send(&self, header: Header, frame: &[u8]) -> Result<()> {
        let bytes = [bytemuck::bytes_of(&header), frame].concat();
        // SAFETY: the buffer has the size given.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        if sent != bytes.len() as isize {
            return Err(io::Error::last_os_error()).with_context(|| format!("{sent} bytes sent"));
        }
        Ok(())
    }

    /// The next frame that `pick` takes out of what arrives.
    pub fn receive(
        &self,
        limit: Duration,
        pick: impl Fn(&[u8]) -> bool,
    ) -> Result<Option<(Header, Vec<u8>)>> {
        const HEADER: usize = size_of::<Header>();
        let deadline = Instant::now() + limit;
        let mut buffer = vec![0u8; HEADER + 65_536];
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            let mut ready = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one struct, as said.
            if unsafe { libc::poll(&mut ready, 1, left.as_millis() as i32 + 1) } < 0 {
                return Err(io::Error::last_os_error()).context("poll");
            }
            // SAFETY: the buffer has the size given.
            let got =
                unsafe { libc::recv(ready.fd, buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT) };
            match usize::try_from(got) {
                Ok(got) if got >= HEADER && pick(&buffer[HEADER..got]) => {
                    let header = bytemuck::pod_read_unaligned(&buffer[..HEADER]);
                    return Ok(Some((header, buffer[HEADER..got].to_vec())));
                }
                Ok(_) => {}
                Err(_) => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::WouldBlock => {}
                    e => bail!("recv: {e}"),
                },
            }
        }
        Ok(None)
    }
}

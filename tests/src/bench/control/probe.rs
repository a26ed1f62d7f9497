//! Real packets through the data path that the agent has attached: clients beyond the external device open connections to
//! ClusterIPs, and what the node sends on shows where each went.

use std::{
    io,
    mem::MaybeUninit,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use crate::{
    frame::{Frame, L4},
    lab::ip,
};

const SYN: u8 = 2;
/// Beyond the external device.
const CLIENT: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// Routes to the client and to all pods lead there.
const ROUTER: &str = "192.0.2.254";
const ROUTER_MAC: &str = "02:00:00:00:00:0c";
/// New connections at a time: with ten endpoints, two of three such rounds meet any one of them.
const EACH: u16 = 10;
/// Time for a round to come out at the other side before the next one.
const LOOK_FOR: Duration = Duration::from_micros(500);

/// The far end of the external device.
pub struct Prober {
    socket: Socket,
    node_mac: [u8; 6],
    port: u16,
}

impl Prober {
    /// In the namespace of the calling thread, whose external device is `ext0` with the far end `ext0p`.
    pub fn open() -> Result<Self> {
        ip(&format!("neigh replace {ROUTER} lladdr {ROUTER_MAC} dev ext0 nud permanent"))?;
        ip(&format!("route replace 10.128.0.0/9 via {ROUTER}"))?;
        ip(&format!("route replace 203.0.113.0/24 via {ROUTER}"))?;
        let all = i32::from((libc::ETH_P_ALL as u16).to_be());
        let socket =
            Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(all))).context("no packet socket")?;
        socket.bind(&far_end()?).context("cannot bind to ext0p")?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, node_mac: mac("ext0")?, port: 1024 })
    }

    /// Opens connections to a Service until one goes to `backend`, for at most `limit`. Returns how many it took.
    pub fn reach(&mut self, service: Ipv4Addr, backend: Ipv4Addr, limit: Duration) -> Result<u32> {
        self.drain()?;
        let (begun, mut opened) = (Instant::now(), 0);
        while begun.elapsed() < limit {
            for _ in 0..EACH {
                // Each a flow of its own.
                self.port = if self.port == u16::MAX { 1024 } else { self.port + 1 };
                let syn = Frame::new(L4::Tcp(SYN), (IpAddr::V4(CLIENT), self.port), (service.into(), 80));
                let syn = syn.with(|f| {
                    f.dst_mac = self.node_mac;
                    f.payload = Vec::new();
                });
                self.socket.send(&syn.bytes()).context("cannot send to ext0p")?;
                opened += 1;
            }
            let round = Instant::now();
            while round.elapsed() < LOOK_FOR {
                match self.next()? {
                    Some(to) if to == (backend, 8080) => return Ok(opened),
                    Some(_) => {}
                    None => std::thread::yield_now(),
                }
            }
        }
        bail!("none of {opened} connections to {service} went to {backend}")
    }

    fn drain(&self) -> Result<()> {
        while self.next()?.is_some() {}
        Ok(())
    }

    /// Where the next packet goes that came out of the node; nowhere for what is no TCP over IPv4.
    fn next(&self) -> Result<Option<(Ipv4Addr, u16)>> {
        let mut buffer = [MaybeUninit::<u8>::uninit(); 256];
        let length = match self.socket.recv(&mut buffer) {
            Ok(length) => length,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e).context("cannot receive from ext0p"),
        };
        // SAFETY: the kernel has written so many bytes, which it cuts to the buffer.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), length.min(256)) };
        Ok(Some(destination(bytes).unwrap_or((Ipv4Addr::UNSPECIFIED, 0))))
    }
}

/// Of a frame with TCP over IPv4 without options.
fn destination(frame: &[u8]) -> Option<(Ipv4Addr, u16)> {
    let is_tcp = frame.get(12..15)? == [0x08, 0x00, 0x45] && *frame.get(23)? == 6;
    let addr: [u8; 4] = frame.get(30..34)?.try_into().ok()?;
    let port: [u8; 2] = frame.get(36..38)?.try_into().ok()?;
    is_tcp.then_some((addr.into(), u16::from_be_bytes(port)))
}

fn far_end() -> Result<SockAddr> {
    // SAFETY: the string ends with a NUL.
    let index = unsafe { libc::if_nametoindex(c"ext0p".as_ptr()) };
    ensure!(index != 0, "there is no ext0p");
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: sockaddr_ll is one of the addresses that the storage is made for.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = i32::try_from(index)?;
    // SAFETY: the family and so many bytes were just written.
    Ok(unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t) })
}

/// /sys shows the devices of the namespace that mounted it, which may be another one: the kernel is asked instead.
fn mac(device: &str) -> Result<[u8; 6]> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    // SAFETY: all zeros is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: SIOCGIFHWADDR reads the name and writes the address of an ifreq.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &mut request) };
    ensure!(done == 0, "no address of {device}: {}", io::Error::last_os_error());
    // SAFETY: what the call has just written.
    let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
    Ok(std::array::from_fn(|i| data[i] as u8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_destination_of_a_frame_is_read() {
        let to = (Ipv4Addr::new(10, 192, 0, 7), 8080);
        let frame = Frame::new(L4::Tcp(SYN), (IpAddr::V4(CLIENT), 1024), (to.0.into(), to.1));
        assert_eq!(destination(&frame.bytes()), Some(to));
        let other = Frame::new(L4::Udp, (IpAddr::V4(CLIENT), 1024), (to.0.into(), to.1));
        assert_eq!(destination(&other.bytes()), None);
        assert_eq!(destination(&frame.bytes()[..20]), None);
    }
}

//! The generator alone, on a device of this host: for `--device` on another one.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    cast,
    stream::{Generator, Shape},
};

/// What to send, and where.
#[derive(Clone, Debug)]
pub struct Generate {
    pub device: String,
    pub to: SocketAddr,
    /// Of the next hop.
    pub mac: [u8; 6],
    pub from: std::net::IpAddr,
    pub seconds: u32,
}

const FLOWS: u32 = 1 << 10;
const AT_ONCE: u32 = 1 << 20;

/// Sends until the time is over; gives the number of packets and the time that it took.
pub fn run(what: &Generate) -> Result<(u64, Duration)> {
    ensure!(what.to.is_ipv4() == what.from.is_ipv4(), "addresses of two families");
    let name = std::ffi::CString::new(what.device.as_str())?;
    // SAFETY: a valid C string.
    let ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) };
    ensure!(ifindex > 0, "no device {}", what.device);
    let shape = Shape { is_v6: what.to.is_ipv6(), is_tcp: false };
    let stream = cast::from_one_client(shape, FLOWS, (mac_of(&what.device)?, what.mac), what.from, what.to);
    let generator = Generator::new(&[&stream], ifindex)?;
    let (start, mut sent) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_secs(what.seconds.into()) {
        generator.send(AT_ONCE)?;
        sent += u64::from(AT_ONCE);
    }
    Ok((sent, start.elapsed()))
}

fn mac_of(device: &str) -> Result<[u8; 6]> {
    let path = format!("/sys/class/net/{device}/address");
    parse_mac(&std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?)
}

/// `02:00:00:00:00:0a`.
pub fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let bytes: Result<Vec<u8>, _> = text.trim().split(':').map(|b| u8::from_str_radix(b, 16)).collect();
    let bytes = bytes.with_context(|| format!("{text:?} is no hardware address"))?;
    bytes.try_into().map_err(|_| anyhow::anyhow!("{text:?} is no hardware address"))
}

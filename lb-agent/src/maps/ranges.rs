//! Keys of `SOURCE_RANGES4/6`: a prefix length, as longest-prefix-match tries begin their keys, and a
//! [`SourceRange`](lb_common::source::SourceRange).

use std::net::IpAddr;

use ipnet::IpNet;
use lb_common::{Be32, V4, V6, addr::ToIp as _, source::SourceRange};

/// Prefix length and record in the machine's byte order, then the address in the network's.
pub(super) type RangeKey4 = [u32; 3];
pub(super) type RangeKey6 = [u32; 6];

/// Bits of the part of the key that is always matched in full.
const SERVICE_BITS: u32 = SourceRange::<V4>::prefix_bits(0);

pub(super) enum RangeKey {
    V4(RangeKey4),
    V6(RangeKey6),
}

pub(super) fn key(service: u32, net: &IpNet) -> RangeKey {
    let bits = SERVICE_BITS + u32::from(net.prefix_len());
    match net.addr() {
        IpAddr::V4(a) => RangeKey::V4([bits, service, V4::from(a).raw()]),
        IpAddr::V6(a) => {
            let [a, b, c, d] = lb_common::addr::v6(a).map(Be32::raw);
            RangeKey::V6([bits, service, a, b, c, d])
        }
    }
}

/// The reverse of [`key`]. `None` for a key that does not match its record in full: nobody made that.
pub(super) fn from_key4([bits, service, addr]: RangeKey4) -> Option<(u32, IpNet)> {
    Some((service, prefix(V4::from_raw(addr).to_ip(), bits)?))
}

/// As [`from_key4`].
pub(super) fn from_key6([bits, service, addr @ ..]: RangeKey6) -> Option<(u32, IpNet)> {
    let addr: V6 = addr.map(Be32::from_raw);
    Some((service, prefix(addr.to_ip(), bits)?))
}

fn prefix(addr: IpAddr, bits: u32) -> Option<IpNet> {
    let bits = u8::try_from(bits.checked_sub(SERVICE_BITS)?).ok()?;
    Some(IpNet::new(addr, bits).ok()?.trunc())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_as_the_programs_look_them_up_and_read_back() {
        let net: IpNet = "10.1.2.0/23".parse().unwrap();
        let RangeKey::V4(key4) = key(7, &net) else { panic!("an IPv4 key") };
        assert_eq!(key4, [55, 7, u32::from_ne_bytes([10, 1, 2, 0])]);
        assert_eq!(from_key4(key4), Some((7, net)));
        let net: IpNet = "2001:db8::/33".parse().unwrap();
        let RangeKey::V6(key6) = key(7, &net) else { panic!("an IPv6 key") };
        assert_eq!(key6, [65, 7, u32::from_ne_bytes([0x20, 1, 0xd, 0xb8]), 0, 0, 0]);
        assert_eq!(from_key6(key6), Some((7, net)));
        assert_eq!(from_key4([31, 7, 0]), None);
        assert_eq!(from_key4([65, 7, 0]), None);
    }
}

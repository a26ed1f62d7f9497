//! Segments that belong to a connection by their addresses and ports, and to no window of it; and what comes back.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, bail};
use etherparse::TcpHeader;
use lb_tests::place::Place;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Sends a segment with data from a pod's own address, with sequence numbers out of nowhere.
pub fn out_of_window(place: &Place, from: SocketAddr, to: SocketAddr) -> anyhow::Result<()> {
    let payload = b"stray";
    let mut header = TcpHeader::new(from.port(), to.port(), 0x1234_5678, 512);
    (header.ack, header.psh, header.acknowledgment_number) = (true, true, 0x9abc_def0);
    header.checksum = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            header.calc_checksum_ipv4_raw(from.octets(), to.octets(), payload)?
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            header.calc_checksum_ipv6_raw(from.octets(), to.octets(), payload)?
        }
        _ => bail!("{from} and {to} are not of one family"),
    };
    let mut segment = header.to_bytes().to_vec();
    segment.extend(payload);
    place.netns.run(|| {
        let socket = Socket::new(Domain::for_address(to), Type::RAW, Some(Protocol::TCP))?;
        socket.bind(&SockAddr::from(SocketAddr::new(from.ip(), 0)))?;
        socket.send_to(&segment, &SockAddr::from(SocketAddr::new(to.ip(), 0)))
    })??;
    Ok(())
}

/// How many resets have come to a pod since this was first asked.
pub fn resets_received(place: &Place) -> anyhow::Result<u64> {
    let netns = &place.netns;
    if netns.exec("nft list table inet stray").is_err() {
        for line in [
            "nft add table inet stray",
            "nft add chain inet stray input { type filter hook input priority 0 ; }",
            "nft add counter inet stray resets",
            "nft add rule inet stray input tcp flags & rst == rst counter name resets",
        ] {
            netns.exec(line)?;
        }
    }
    let text = netns.exec("nft list counter inet stray resets")?;
    let mut words = text.split_whitespace().skip_while(|word| *word != "packets");
    words.nth(1).and_then(|n| n.parse().ok()).with_context(|| format!("no number of packets in {text:?}"))
}

//! Link layer addresses of neighbours, as far as events tell: only one that changes is news for packets on their way.

use std::collections::HashMap;

use super::netlink::{Message, attribute};

// include/uapi/linux/rtnetlink.h and neighbour.h.
pub const RTM_NEWNEIGH: u16 = 28;
pub const RTM_DELNEIGH: u16 = 29;
/// struct ndmsg.
const HEADER: usize = 12;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
/// More neighbours than that are forgotten, and count as changed when they are heard of again.
const MAX: usize = 65_536;

/// What is known: the address by device and network layer address.
#[derive(Debug, Default)]
pub struct Neighbours(HashMap<(u32, Vec<u8>), Vec<u8>>);

impl Neighbours {
    /// Notes an event. True if a neighbour whose link layer address was known, or could be in use, has another one or none.
    pub fn note(&mut self, message: &Message<'_>) -> bool {
        let Some((family, header)) =
            message.payload.split_first().filter(|(_, rest)| rest.len() >= HEADER - 1)
        else {
            return false;
        };
        // Entries of bridges come by here too.
        if !matches!(i32::from(*family), libc::AF_INET | libc::AF_INET6) {
            return false;
        }
        let Some(ifindex) = header[3..].first_chunk().map(|b| u32::from_ne_bytes(*b)) else { return false };
        let attributes = &header[HEADER - 1..];
        let Some(address) = attribute(attributes, NDA_DST) else { return false };
        let key = (ifindex, address.to_vec());
        match (message.kind, attribute(attributes, NDA_LLADDR)) {
            (RTM_NEWNEIGH, Some(mac)) => {
                if self.0.len() >= MAX && !self.0.contains_key(&key) {
                    self.0.clear();
                }
                // Another state of the same neighbour is no news, nor is one that nothing was sent to before.
                self.0.insert(key, mac.to_vec()).is_some_and(|before| before != mac)
            }
            // A failed or deleted one: its next entry will be a new one.
            _ => self.0.remove(&key).is_some(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::netlink, *};

    fn event(kind: u16, ifindex: u32, ip: [u8; 4], mac: Option<[u8; 6]>) -> Vec<u8> {
        let mut payload = vec![2, 0, 0, 0];
        payload.extend_from_slice(&ifindex.to_ne_bytes());
        payload.extend_from_slice(&[2, 0, 0, 1]);
        let mut payload = netlink::Payload::new(&payload).attribute(NDA_DST, &ip);
        if let Some(mac) = mac {
            payload = payload.attribute(NDA_LLADDR, &mac);
        }
        payload.message(kind)
    }

    #[test]
    fn only_a_neighbour_that_moves_or_goes_is_news() {
        let mut neighbours = Neighbours::default();
        let mut note = |bytes: &[u8]| netlink::messages(bytes).any(|m| neighbours.note(&m));
        let (gateway, a, b) = ([192, 0, 2, 254], [2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        assert!(!note(&event(RTM_NEWNEIGH, 3, gateway, Some(a))));
        assert!(!note(&event(RTM_NEWNEIGH, 3, gateway, Some(a))), "stale, probed, reachable again");
        assert!(!note(&event(RTM_NEWNEIGH, 4, gateway, Some(b))), "another device");
        assert!(note(&event(RTM_NEWNEIGH, 3, gateway, Some(b))), "another MAC address");
        assert!(note(&event(RTM_NEWNEIGH, 3, gateway, None)), "failed");
        assert!(!note(&event(RTM_DELNEIGH, 3, gateway, None)));
        assert!(!note(&event(RTM_NEWNEIGH, 3, gateway, Some(a))));
        assert!(note(&event(RTM_DELNEIGH, 3, gateway, Some(a))));
        assert!(!note(&[28, 0, 0, 0, 28, 0, 0, 0]), "cut off");
    }
}

//! Addresses as a whole: what each one is, whatever the port (rule C7, echo requests). Every address that has a frontend
//! has one entry beside them, in the same maps, and so has every ClusterIP without one: of a Service that has no ports,
//! whose ports do not fit, or that another proxy serves.
//!
//! An address that the node has itself is the node's, whatever Services say: its own stack answers echo requests and refuses
//! what nobody listens at (NodeLocal DNSCache has the ClusterIP of kube-dns, some load balancers the node's address).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use lb_common::frontend::{FrontendValue, flags};

use super::{
    draft::Draft,
    frontends::Room,
    ids::sorted,
    op::{Family, MapOp},
};

/// What an address is, where several Services say something about it: the first of these.
const PRECEDENCE: [u32; 5] = [
    flags::KIND_CLUSTER_IP,
    flags::KIND_LOAD_BALANCER,
    flags::KIND_EXTERNAL_IP,
    flags::KIND_NODE_PORT,
    flags::KIND_FOREIGN,
];

#[derive(Clone, Debug, Default)]
struct Entry {
    kernel: Option<FrontendValue>,
    /// How many Services say which kind it is, as in [`PRECEDENCE`].
    claims: [u32; PRECEDENCE.len()],
}

impl Entry {
    fn kind(&self, is_own: bool) -> Option<u32> {
        let first = PRECEDENCE.into_iter().zip(self.claims).find(|(_, claims)| *claims > 0);
        first.map(|(kind, _)| if is_own { flags::KIND_NODE_PORT } else { kind })
    }

    fn put(&mut self, addr: IpAddr, kind: u32, draft: &mut Draft) {
        self.kernel = Some(value(kind));
        draft.put_addresses.push(MapOp::PutAddress { addr, kind });
    }
}

/// Many records may share an address, so it names none.
const fn value(kind: u32) -> FrontendValue {
    FrontendValue { service: 0, flags: kind }
}

/// Who says what about which address, and what the kernel has.
#[derive(Clone, Debug, Default)]
pub(super) struct Addresses {
    entries: BTreeMap<IpAddr, Entry>,
    /// Those whose claims may have changed since the last plan was finished.
    touched: Vec<IpAddr>,
    /// The node's own.
    own: BTreeSet<IpAddr>,
    /// Those of them that are claimed for the node: they could be taken for unassigned ones.
    claimed_for_node: BTreeSet<IpAddr>,
    /// Those that are ClusterIPs here: their smallest and largest ones span the prefix around all of them.
    cluster_ips: BTreeSet<IpAddr>,
}

impl Addresses {
    /// What the kernel has, claimed by nobody yet.
    pub(super) fn recover(actual: BTreeMap<IpAddr, FrontendValue>, room: &mut Room) -> Self {
        let mut addresses = Self::default();
        for (addr, value) in actual {
            room.take_over(Family::of(addr));
            addresses.entries.insert(addr, Entry { kernel: Some(value), ..Entry::default() });
        }
        addresses
    }

    /// One more Service says that `addr` is of this kind.
    pub(super) fn claim(&mut self, addr: IpAddr, kind: u32) {
        let entry = self.entries.entry(addr).or_default();
        for claims in claims_of(&mut entry.claims, kind) {
            *claims += 1;
        }
        if kind == flags::KIND_CLUSTER_IP {
            self.cluster_ips.insert(addr);
        }
        self.touched.push(addr);
    }

    /// One Service less says so.
    pub(super) fn withdraw(&mut self, addr: IpAddr, kind: u32) {
        let Some(entry) = self.entries.get_mut(&addr) else { return };
        for claims in claims_of(&mut entry.claims, kind) {
            *claims = claims.saturating_sub(1);
        }
        if kind == flags::KIND_CLUSTER_IP && entry.kind(false) != Some(kind) {
            self.cluster_ips.remove(&addr);
        }
        self.touched.push(addr);
    }

    /// The node has these addresses now; `in_cidr`: they lie in a known ServiceCIDR.
    pub(super) fn set_own(&mut self, own: &BTreeSet<IpAddr>, in_cidr: impl Fn(&IpAddr) -> bool) {
        let claimed: BTreeSet<IpAddr> = own.iter().copied().filter(in_cidr).collect();
        for addr in claimed.difference(&self.claimed_for_node.clone()) {
            self.claim(*addr, flags::KIND_NODE_PORT);
        }
        for addr in self.claimed_for_node.clone().difference(&claimed) {
            self.withdraw(*addr, flags::KIND_NODE_PORT);
        }
        self.claimed_for_node = claimed;
        if self.own != *own {
            let changed = self.own.symmetric_difference(own);
            self.touched.extend(changed.filter(|addr| self.entries.contains_key(addr)));
            self.own.clone_from(own);
        }
    }

    /// Has [`Self::finish`] look at an address: it may not have fitted before.
    pub(super) fn touch(&mut self, addr: IpAddr) {
        self.touched.push(addr);
    }

    /// Has [`Self::finish`] look at all of them: after a restart some are claimed by nobody.
    pub(super) fn touch_all(&mut self) {
        self.touched.extend(self.entries.keys());
    }

    /// True if the kernel has the address. Loopback ones need no entry.
    pub(super) fn is_known(&self, addr: IpAddr) -> bool {
        addr.is_loopback() || self.entries.get(&addr).is_some_and(|e| e.kernel.is_some())
    }

    /// Room for a new frontend, and for its address before it, or for neither.
    pub(super) fn take_frontend(&mut self, addr: IpAddr, room: &mut Room, draft: &mut Draft) -> bool {
        let family = Family::of(addr);
        if self.is_known(addr) {
            return room.take(family, 1);
        }
        let is_own = self.own.contains(&addr);
        let Some(entry) = self.entries.get_mut(&addr) else { return false };
        let Some(kind) = entry.kind(is_own).filter(|_| room.take(family, 2)) else { return false };
        entry.put(addr, kind, draft);
        true
    }

    /// Decides all addresses whose claims have changed since the last call, after the frontends ([`Self::take_frontend`]).
    /// With `keep`, what nobody claims stays: whose it is cannot be said yet. False if there is no room for one of them.
    pub(super) fn finish(&mut self, room: &mut Room, keep: bool, draft: &mut Draft) -> bool {
        let mut fits = true;
        for addr in sorted(&mut self.touched) {
            let Some(entry) = self.entries.get_mut(&addr) else { continue };
            let family = Family::of(addr);
            match (entry.kind(self.own.contains(&addr)), entry.kernel) {
                (Some(kind), Some(kernel)) if kernel == value(kind) => {}
                (Some(kind), Some(_)) => entry.put(addr, kind, draft),
                (Some(kind), None) if room.take(family, 1) => entry.put(addr, kind, draft),
                (Some(_), None) => fits = false,
                (None, Some(_)) if keep => {}
                (None, kernel) => {
                    if kernel.is_some() {
                        draft.delete_addresses.push(MapOp::DeleteAddress { addr });
                        room.free_after_plan(family);
                    }
                    self.entries.remove(&addr);
                }
            }
        }
        fits
    }

    /// The smallest prefix around all ClusterIPs of a family.
    pub(super) fn around_cluster_ips(&self, family: Family) -> Option<IpNet> {
        // IPv4 addresses sort before IPv6 ones.
        let border = IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED);
        let (first, last) = match family {
            Family::V4 => {
                let mut ips = self.cluster_ips.range(..border);
                let first = *ips.next()?;
                (first, ips.next_back().copied().unwrap_or(first))
            }
            Family::V6 => {
                let mut ips = self.cluster_ips.range(border..);
                let first = *ips.next()?;
                (first, ips.next_back().copied().unwrap_or(first))
            }
        };
        Some(around(first, last))
    }

    #[cfg(test)]
    pub(super) fn used(&self) -> usize {
        self.entries.len() + self.cluster_ips.len()
    }
}

/// The counter of a kind, or none for a kind that addresses do not have.
fn claims_of(claims: &mut [u32; PRECEDENCE.len()], kind: u32) -> impl Iterator<Item = &mut u32> {
    PRECEDENCE.into_iter().zip(claims).filter(move |(k, _)| *k == kind).map(|(_, claims)| claims)
}

/// The smallest prefix with both addresses, which are of one family.
fn around(a: IpAddr, b: IpAddr) -> IpNet {
    let bits = match (a, b) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (u32::from(a) ^ u32::from(b)).leading_zeros(),
        (IpAddr::V6(a), IpAddr::V6(b)) => (u128::from(a) ^ u128::from(b)).leading_zeros(),
        _ => 0,
    };
    // At most the width of the family, so this never falls back.
    IpNet::new(a, bits as u8).map_or_else(|_| a.into(), |net| net.trunc())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster_ips(list: &[&str]) -> Addresses {
        let mut addresses = Addresses::default();
        for ip in list {
            addresses.claim(ip.parse().unwrap(), flags::KIND_CLUSTER_IP);
        }
        addresses
    }

    #[test]
    fn the_prefix_around_cluster_ips_is_the_smallest() {
        let four = |list: &[&str]| cluster_ips(list).around_cluster_ips(Family::V4).map(|n| n.to_string());
        assert_eq!(four(&[]), None);
        assert_eq!(four(&["2001:db8::1"]), None);
        assert_eq!(four(&["10.96.0.1"]).as_deref(), Some("10.96.0.1/32"));
        assert_eq!(four(&["10.96.0.2", "10.96.0.1", "::1"]).as_deref(), Some("10.96.0.0/30"));
        assert_eq!(four(&["10.96.0.1", "10.96.15.255", "10.96.7.1"]).as_deref(), Some("10.96.0.0/20"));
        assert_eq!(four(&["1.0.0.0", "255.0.0.0"]).as_deref(), Some("0.0.0.0/0"));
        let six = cluster_ips(&["10.96.0.1", "2001:db8::1", "2001:db8::8000"]);
        assert_eq!(six.around_cluster_ips(Family::V6).unwrap().to_string(), "2001:db8::/112");
    }

    #[test]
    fn c7_what_the_node_has_itself_is_the_nodes() {
        let [dns, free, uplink]: [IpAddr; 3] =
            ["10.96.0.10", "10.96.0.11", "192.0.2.1"].map(|ip| ip.parse().unwrap());
        let mut addresses = cluster_ips(&["10.96.0.10"]);
        let mut room = Room::new(10);
        let mut plan = |addresses: &mut Addresses| {
            let mut draft = Draft::default();
            addresses.finish(&mut room, false, &mut draft);
            draft.into_ops()
        };
        let put = |addr, kind| MapOp::PutAddress { addr, kind };
        assert_eq!(plan(&mut addresses), [put(dns, flags::KIND_CLUSTER_IP)]);
        let in_cidr = |ip: &IpAddr| ip.to_string().starts_with("10.96.");
        addresses.set_own(&[dns, free, uplink].into(), in_cidr);
        let node = flags::KIND_NODE_PORT;
        assert_eq!(plan(&mut addresses), [put(dns, node), put(free, node)]);
        assert_eq!(addresses.around_cluster_ips(Family::V4).unwrap().to_string(), "10.96.0.10/32");
        addresses.claim(uplink, flags::KIND_LOAD_BALANCER);
        assert_eq!(plan(&mut addresses), [put(uplink, node)]);
        addresses.set_own(&BTreeSet::new(), in_cidr);
        let ops = plan(&mut addresses);
        assert_eq!(
            ops,
            [
                put(dns, flags::KIND_CLUSTER_IP),
                put(uplink, flags::KIND_LOAD_BALANCER),
                MapOp::DeleteAddress { addr: free }
            ]
        );
    }

    #[test]
    fn the_first_kind_counts_until_its_last_claim_goes() {
        let ip: IpAddr = "10.96.0.1".parse().unwrap();
        let mut addresses = Addresses::default();
        for kind in [flags::KIND_NODE_PORT, flags::KIND_CLUSTER_IP, flags::KIND_EXTERNAL_IP] {
            addresses.claim(ip, kind);
            addresses.claim(ip, kind);
        }
        let mut room = Room::new(10);
        let mut seen = Vec::new();
        for kind in [flags::KIND_CLUSTER_IP, flags::KIND_EXTERNAL_IP, flags::KIND_NODE_PORT] {
            for _ in 0..2 {
                let mut draft = Draft::default();
                addresses.finish(&mut room, false, &mut draft);
                seen.extend(draft.into_ops());
                addresses.withdraw(ip, kind);
            }
        }
        let put = |kind| MapOp::PutAddress { addr: ip, kind };
        assert_eq!(seen, [flags::KIND_CLUSTER_IP, flags::KIND_EXTERNAL_IP, flags::KIND_NODE_PORT].map(put));
        let mut draft = Draft::default();
        addresses.finish(&mut room, false, &mut draft);
        assert_eq!(draft.into_ops(), [MapOp::DeleteAddress { addr: ip }]);
        assert_eq!(addresses.used(), 0);
    }
}

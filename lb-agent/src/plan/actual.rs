//! What the kernel maps hold, as plain data: the reader in `maps.rs` makes it at start, [`Planner::recover`]
//! takes it over.
//!
//! [`Planner::recover`]: super::Planner::recover

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use lb_common::{
    affinity::MemberKey,
    frontend::{FrontendValue, ServiceRecord},
};

use super::op::{Backend, Family, Frontend};

/// Everything in the kernel that a plan can change. Nothing in it is trusted: it may come from a crash halfway
/// through a plan, or from somebody else's hands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ActualState {
    /// `FRONTENDS4` and `FRONTENDS6`, without the entries about addresses as a whole.
    pub frontends: BTreeMap<Frontend, FrontendValue>,
    /// The entries of `FRONTENDS4` and `FRONTENDS6` about addresses as a whole.
    pub addresses: BTreeMap<IpAddr, FrontendValue>,
    /// Elements of `SERVICES` that are not all zero, and those that `SERVICE_NAMES` has a name for.
    pub services: BTreeMap<u32, ActualService>,
    /// `SLOTS` from index 0 on, at least as far as any range of `services` reaches (the whole array will do).
    pub slots: Vec<u32>,
    /// Elements of `BACKENDS4` with `IN_USE`, by id.
    pub backends4: BTreeMap<u32, Backend>,
    /// Elements of `BACKENDS6` with `IN_USE`, by id.
    pub backends6: BTreeMap<u32, Backend>,
    /// `AFFINITY_MEMBERS`.
    pub members: BTreeMap<MemberKey, u32>,
    /// `SOURCE_RANGES4` and `SOURCE_RANGES6`: record and prefix.
    pub ranges: BTreeSet<(u32, IpNet)>,
    /// Elements of `SERVICE_CIDRS4` and `SERVICE_CIDRS6` with any flag, by index.
    pub cidrs: BTreeMap<(Family, u32), ActualCidr>,
}

/// An element of `SERVICE_CIDRS4` or `SERVICE_CIDRS6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActualCidr {
    /// `None` if the element's mask is that of no prefix.
    pub net: Option<IpNet>,
    pub flags: u32,
}

/// An element of `SERVICES` with its entry of `SERVICE_NAMES`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ActualService {
    pub record: ServiceRecord,
    pub name: Option<String>,
}

//! What one Service needs in the kernel.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use ipnet::IpNet;

/// What planning knows of the node it runs on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    /// As in `endpoint.nodeName`.
    pub name: Arc<str>,
    pub zone: Option<Arc<str>>,
    /// Addresses that serve NodePorts: see [`nodeport_addresses`](super::nodeport::nodeport_addresses).
    pub nodeport_addresses: BTreeSet<IpAddr>,
    /// externalIPs outside of these are not served.
    pub allow_external_ips: Vec<IpNet>,
}

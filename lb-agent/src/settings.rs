//! Validated settings. `config.rs` makes them from flags, environment and file; later code never sees raw text.

use std::{net::SocketAddr, path::PathBuf};

use ipnet::IpNet;
use lb_common::{conntrack::Timeouts, maps::capacity, nat::PortRange};

/// Everything that `lb-agent run` was told.
#[derive(Clone, Debug)]
pub struct Settings {
    pub source: SourceSettings,
    /// This node's name, as in `Node` objects and `endpoint.nodeName`.
    pub node_name: String,
    /// Globs of devices towards the outside; empty: detect.
    pub external_devices: Vec<glob::Pattern>,
    /// Globs of devices towards pods; empty: detect.
    pub pod_devices: Vec<glob::Pattern>,
    pub xdp: XdpSetting,
    pub socket_lb: SocketLb,
    /// cgroup v2 directory that the socket hooks are attached to; `None`: not given, and none is mounted.
    pub cgroup_root: Option<PathBuf>,
    /// bpffs directory of the pins.
    pub state_dir: PathBuf,
    pub nodeport_addresses: NodePortAddresses,
    /// externalIPs outside of these are ignored (CVE-2020-8554).
    pub allow_external_ips: Vec<IpNet>,
    /// NodePorts also serve 127.0.0.1 and ::1, for sockets of the node itself.
    pub localhost_nodeports: bool,
    /// Where ClusterIPs come from, beside the ServiceCIDR objects.
    pub service_cidrs: Vec<IpNet>,
    /// All packets to ClusterIPs get an address of this node (rule D2).
    pub masquerade_all: bool,
    /// Echo requests to Service addresses are answered.
    pub answer_ping: bool,
    /// Clients of backends that are gone for good get a reset (rule J2).
    pub reset_gone_backends: bool,
    /// `None`: off.
    pub healthz_bind_address: Option<SocketAddr>,
    /// `None`: off.
    pub metrics_bind_address: Option<SocketAddr>,
    pub snat_ports: PortRange,
    /// Log every new flow and every refusal, as the kernel programs see them.
    pub trace_flows: bool,
    pub capacities: Capacities,
    pub timeouts: Timeouts,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceSettings {
    /// `master` overrides the server address of the kubeconfig or of the pod's own environment.
    Kube {
        kubeconfig: Option<PathBuf>,
        master: Option<String>,
    },
    Manifests(PathBuf),
}

/// Where XDP runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpSetting {
    /// Native, on external devices whose frames come from a wire (not veth and other software devices).
    Auto,
    /// Native on every external device.
    Native,
    /// Generic on every external device.
    Generic,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketLb {
    Off,
    /// Only processes in the node's own network namespace.
    Host,
    /// Also pods.
    All,
}

/// Which of the node's addresses serve NodePorts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// All addresses of this network namespace except loopback and link-local ones.
    All,
    /// The addresses of the Node object.
    Primary,
    /// Those in one of these; a family without an entry serves all its addresses (kube-proxy rule).
    Cidrs(Vec<IpNet>),
}

/// Sizes of the maps, in entries (flows: in flows, each of which takes two entries). See `lb_common::maps::capacity`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacities {
    pub frontends: u32,
    pub services: u32,
    pub slots: u32,
    pub backends: u32,
    pub flows: u32,
    /// Flow tables that are larger already stay as they are: nobody asked for another size.
    pub keep_flows: bool,
    /// All CPUs together; 0 for none.
    pub flow_cache: u32,
    pub affinity: u32,
    pub sockets: u32,
    /// Per family.
    pub source_ranges: u32,
}

impl Default for Capacities {
    fn default() -> Self {
        Self {
            frontends: capacity::FRONTENDS,
            services: capacity::SERVICES,
            slots: capacity::SLOTS,
            backends: capacity::BACKENDS,
            flows: capacity::FLOWS,
            keep_flows: false,
            flow_cache: capacity::FLOW_CACHE,
            affinity: capacity::AFFINITY,
            sockets: capacity::SOCKETS,
            source_ranges: capacity::SOURCE_RANGES,
        }
    }
}

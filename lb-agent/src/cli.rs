//! The command line. A flag's doc line is its help text; what values mean is decided in `config.rs`.

use std::path::PathBuf;

use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueEnum};
use serde::Deserialize;

use crate::config::list_or_string;

/// Where pins live unless `--state-dir` says otherwise.
pub const DEFAULT_STATE_DIR: &str = "/sys/fs/bpf/lb";

/// Load-balances Kubernetes Services in the kernel.
#[derive(Debug, Parser)]
#[command(name = "lb-agent", version)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// The command line. Unlike `Cli::command()`, its help keeps the values of environment variables to itself.
pub fn command() -> clap::Command {
    Cli::command().mut_subcommands(|command| command.mut_args(|arg| arg.hide_env_values(true)))
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent of this node.
    #[command(after_help = RUN_HELP)]
    Run(Box<RunArgs>),
    /// Remove everything that the agent ever put on this node: programs, maps, pins. Services stop working.
    Cleanup(StateArgs),
    /// Print the Services in the kernel's maps, also when no agent runs.
    Services(InspectArgs),
    /// Print the backends in the kernel's maps, also when no agent runs.
    Backends(InspectArgs),
    /// Print the flows in the kernel's maps, also when no agent runs.
    Flows(InspectArgs),
}

const RUN_HELP: &str = "\
Every option can also be given as an environment variable, and in the file named by --config under its name in camel \
case (--tcp-established-timeout: tcpEstablishedTimeout; --nodeport-addresses: nodePortAddresses). A flag wins over the \
environment, the environment over the file. Lists are separated by commas; in the file they are YAML lists.";

#[derive(Debug, Args)]
pub struct StateArgs {
    /// Directory in a bpffs where the agent keeps its maps and links
    #[arg(long, env = "LB_STATE_DIR", value_name = "DIR", default_value = DEFAULT_STATE_DIR)]
    pub state_dir: PathBuf,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    #[command(flatten)]
    pub state: StateArgs,
    /// How to print
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t)]
    pub output: Output,
}

/// How `services`, `backends` and `flows` print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Columns for people
    #[default]
    Table,
    /// One JSON array
    Json,
}

/// Options of `run` as text, from the command line and the environment or from the file. `config.rs` gives them meaning,
/// so that a wrong value is reported alike wherever it comes from.
#[derive(Debug, Default, Args, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct RunArgs {
    /// File with options, in YAML: the agent's own, or a KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1) as it is.
    /// docs/configuration.md says what each field of the latter does
    #[arg(long, env = "LB_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,

    /// Where Services, EndpointSlices and Nodes come from: `kube` (the API server), or `manifests:DIR` (YAML and JSON
    /// files in DIR, watched) [default: kube]
    #[arg(long, env = "LB_SOURCE", value_name = "SOURCE", help_heading = "Objects")]
    pub source: Option<String>,
    /// Kubeconfig file; without it, the pod's service account, then $KUBECONFIG and ~/.kube/config
    #[arg(long, env = "LB_KUBECONFIG", value_name = "FILE", help_heading = "Objects")]
    pub kubeconfig: Option<String>,
    /// Address of the API server (URL or HOST:PORT); overrides every other source of it. In a pod it must be given: the
    /// address that pods get is a ClusterIP, which does not work before this agent has programmed it
    #[arg(long, env = "LB_MASTER", value_name = "URL", help_heading = "Objects")]
    pub master: Option<String>,
    /// Name of this node's Node object [default: the host name in lower case]
    #[arg(long, env = "LB_HOSTNAME_OVERRIDE", value_name = "NAME", help_heading = "Objects")]
    pub hostname_override: Option<String>,

    /// Devices towards the outside, as globs; repeatable [default: devices with a default route or an address of the
    /// node]
    #[arg(
        long,
        env = "LB_EXTERNAL_DEVICE",
        value_name = "GLOB",
        value_delimiter = ',',
        help_heading = "Data path"
    )]
    #[serde(deserialize_with = "list_or_string")]
    pub external_device: Vec<String>,
    /// Devices towards pods, as globs; repeatable [default: veth devices with a peer in another network namespace, without a
    /// default route or an address of a subnet]
    #[arg(
        long,
        env = "LB_POD_DEVICE",
        value_name = "GLOB",
        value_delimiter = ',',
        help_heading = "Data path"
    )]
    #[serde(deserialize_with = "list_or_string")]
    pub pod_device: Vec<String>,
    /// XDP on external devices: `auto` (native, where frames come from a wire and no VLAN device sits on top), `native` (not on
    /// bonds and teams), `generic` or `off` [default: auto]
    #[arg(long, env = "LB_XDP", value_name = "MODE", help_heading = "Data path")]
    pub xdp: Option<String>,
    /// Whose connect() is translated: `off`, `host` (processes in the node's network namespace) or `all` (pods too)
    /// [default: host]
    #[arg(long, env = "LB_SOCKET_LB", value_name = "SCOPE", help_heading = "Data path")]
    pub socket_lb: Option<String>,
    /// cgroup v2 directory that the socket hooks are attached to [default: where cgroup2 is mounted]
    #[arg(long, env = "LB_CGROUP_ROOT", value_name = "DIR", help_heading = "Data path")]
    pub cgroup_root: Option<String>,
    /// Directory in a bpffs for maps and links; a bpffs is mounted there if there is none [default: /sys/fs/bpf/lb]
    #[arg(long, env = "LB_STATE_DIR", value_name = "DIR", help_heading = "Data path")]
    pub state_dir: Option<String>,
    /// Source ports for connections that leave under an address of this node; must not meet the host's
    /// ip_local_port_range [default: 10240-29999]
    #[arg(long, env = "LB_SNAT_PORTS", value_name = "FIRST-LAST", help_heading = "Data path")]
    pub snat_ports: Option<String>,
    /// Log every new flow and every refusal from inside the kernel: `on` or `off`. For finding out what happens to some
    /// connection; costs nothing when off, and established flows nothing when on [default: off]
    #[arg(long, env = "LB_TRACE_FLOWS", value_name = "ON|OFF", help_heading = "Data path")]
    pub trace_flows: Option<String>,

    /// Addresses that serve NodePorts: CIDRs, or `primary` (those of the Node object); repeatable. A family without a CIDR
    /// serves all its addresses [default: all except loopback and link-local]
    #[arg(
        long,
        env = "LB_NODEPORT_ADDRESSES",
        value_name = "CIDR",
        value_delimiter = ',',
        help_heading = "Services"
    )]
    #[serde(rename = "nodePortAddresses", deserialize_with = "list_or_string")]
    pub nodeport_addresses: Vec<String>,
    /// CIDRs that externalIPs of Services may be in, others are ignored (CVE-2020-8554); repeatable [default: none]
    #[arg(
        long,
        env = "LB_ALLOW_EXTERNAL_IPS",
        value_name = "CIDR",
        value_delimiter = ',',
        help_heading = "Services"
    )]
    #[serde(rename = "allowExternalIPs", deserialize_with = "list_or_string")]
    pub allow_external_ips: Vec<String>,

    /// NodePorts also at 127.0.0.1 and ::1, for processes of the node (through the socket hooks): `on` or `off`
    /// [default: on]
    #[arg(long, env = "LB_LOCALHOST_NODEPORTS", value_name = "ON|OFF", help_heading = "Services")]
    #[serde(rename = "localhostNodePorts")]
    pub localhost_nodeports: Option<String>,
    /// CIDRs that ClusterIPs come from, where the API server has no ServiceCIDR objects: packets to addresses of theirs
    /// that no Service has are dropped; repeatable [default: none]
    #[arg(
        long,
        env = "LB_SERVICE_CIDR",
        value_name = "CIDR",
        value_delimiter = ',',
        help_heading = "Services"
    )]
    #[serde(deserialize_with = "list_or_string")]
    pub service_cidr: Vec<String>,
    /// Give every connection to a ClusterIP an address of this node: `on` or `off`. For networks whose answers would not
    /// come back through this node [default: off]
    #[arg(long, env = "LB_MASQUERADE_ALL", value_name = "ON|OFF", help_heading = "Services")]
    pub masquerade_all: Option<String>,
    /// Answer echo requests (ping) to the addresses of Services: `on` or `off` [default: off]
    #[arg(long, env = "LB_ANSWER_PING", value_name = "ON|OFF", help_heading = "Services")]
    pub answer_ping: Option<String>,
    /// Reset the TCP connections of clients whose backend is gone and answers no more: `on` or `off` [default: on]
    #[arg(long, env = "LB_RESET_GONE_BACKENDS", value_name = "ON|OFF", help_heading = "Services")]
    pub reset_gone_backends: Option<String>,

    /// Address of /healthz, /livez and /readyz; empty: off [default: 0.0.0.0:10256]
    #[arg(long, env = "LB_HEALTHZ_BIND_ADDRESS", value_name = "IP:PORT", help_heading = "Monitoring")]
    pub healthz_bind_address: Option<String>,
    /// Address of /metrics (and the above); empty: off [default: 127.0.0.1:10249]
    #[arg(long, env = "LB_METRICS_BIND_ADDRESS", value_name = "IP:PORT", help_heading = "Monitoring")]
    pub metrics_bind_address: Option<String>,
    /// Log lines as `text` or `json` [default: text]
    #[arg(long, env = "LB_LOG_FORMAT", value_name = "FORMAT", help_heading = "Monitoring")]
    pub log_format: Option<String>,
    /// `error`, `warn`, `info`, `debug` or `trace`; also per module: `info,lb_agent::source=debug` [default: info]
    #[arg(long, env = "LB_LOG_LEVEL", value_name = "LEVEL", help_heading = "Monitoring")]
    pub log_level: Option<String>,

    /// Frontends (address, port, protocol) that fit, per family [default: 131072]
    #[arg(long, env = "LB_MAX_FRONTENDS", value_name = "N", help_heading = "Sizes of maps")]
    pub max_frontends: Option<String>,
    /// Service ports that fit, both families together [default: 65536]
    #[arg(long, env = "LB_MAX_SERVICES", value_name = "N", help_heading = "Sizes of maps")]
    pub max_services: Option<String>,
    /// Backend slots that fit, both families together; each endpoint takes one or two, and a change needs room beside
    /// the old set [default: 501760]
    #[arg(long, env = "LB_MAX_SLOTS", value_name = "N", help_heading = "Sizes of maps")]
    pub max_slots: Option<String>,
    /// Backends that fit, per family [default: 131072]
    #[arg(long, env = "LB_MAX_BACKENDS", value_name = "N", help_heading = "Sizes of maps")]
    pub max_backends: Option<String>,
    /// Flows that fit, per family: 544 bytes each, both families together, from the start [default: 262144, or 32768 per CPU
    /// where that is more, as a power of two; less if it were more than a 64th of the memory]
    #[arg(long, env = "LB_MAX_FLOWS", value_name = "N", help_heading = "Sizes of maps")]
    pub max_flows: Option<String>,
    /// Slots of the caches that XDP and tc have of flows, all CPUs together; 64 bytes each for IPv4, and a quarter as many of 128 for
    /// IPv6; 0 for none [default: 524288]
    #[arg(long, env = "LB_FLOW_CACHE", value_name = "N", help_heading = "Sizes of maps")]
    pub flow_cache: Option<String>,
    /// Clients with session affinity that fit, per family [default: 65536]
    #[arg(long, env = "LB_MAX_AFFINITY", value_name = "N", help_heading = "Sizes of maps")]
    pub max_affinity: Option<String>,
    /// Sockets that the socket hooks remember [default: 65536]
    #[arg(long, env = "LB_MAX_SOCKETS", value_name = "N", help_heading = "Sizes of maps")]
    pub max_sockets: Option<String>,
    /// loadBalancerSourceRanges that fit, per family [default: 65536]
    #[arg(long, env = "LB_MAX_SOURCE_RANGES", value_name = "N", help_heading = "Sizes of maps")]
    pub max_source_ranges: Option<String>,

    /// How long a TCP flow may be silent that never got an answer, such as 90s, 15m or 24h [default: 60s]
    #[arg(long, env = "LB_TCP_OPENING_TIMEOUT", value_name = "TIME", help_heading = "Timeouts of flows")]
    pub tcp_opening_timeout: Option<String>,
    /// How long an established TCP flow may be silent [default: 24h]
    #[arg(long, env = "LB_TCP_ESTABLISHED_TIMEOUT", value_name = "TIME", help_heading = "Timeouts of flows")]
    pub tcp_established_timeout: Option<String>,
    /// How long a TCP flow may be silent after a FIN or RST [default: 2m]
    #[arg(long, env = "LB_TCP_CLOSING_TIMEOUT", value_name = "TIME", help_heading = "Timeouts of flows")]
    pub tcp_closing_timeout: Option<String>,
    /// How long a UDP flow may be silent that never got an answer [default: 30s]
    #[arg(long, env = "LB_UDP_OPENING_TIMEOUT", value_name = "TIME", help_heading = "Timeouts of flows")]
    pub udp_opening_timeout: Option<String>,
    /// How long a UDP flow may be silent that got one [default: 2m]
    #[arg(long, env = "LB_UDP_ESTABLISHED_TIMEOUT", value_name = "TIME", help_heading = "Timeouts of flows")]
    pub udp_established_timeout: Option<String>,
    /// How long an established SCTP association may be silent; the other times are those of TCP [default: 210s]
    #[arg(
        long,
        env = "LB_SCTP_ESTABLISHED_TIMEOUT",
        value_name = "TIME",
        help_heading = "Timeouts of flows"
    )]
    pub sctp_established_timeout: Option<String>,
}

//! What /configz shows: the settings in effect.
//!
//! Under kube-proxy's key are those that it has, too, under the names by which its own /configz shows them: those of the Go
//! fields (pkg/proxy/apis/config/types.go has no JSON tags), not those of configuration files. Under a key of our own are the
//! others, named as in the file of `--config`. Nothing secret is in either: no address of the API server, which may hold
//! credentials.

use lb_common::conntrack::Timeouts;
use serde_json::{Value, json};

use crate::{
    http::PROXY_MODE,
    settings::{NodePortAddresses, Settings, SocketLb, SourceSettings, XdpSetting},
};

/// All settings, as a JSON object with one member per component.
pub fn configz(settings: &Settings) -> Value {
    json!({ "kubeproxy.config.k8s.io": kube_proxy(settings), "lb-agent": own(settings) })
}

fn kube_proxy(settings: &Settings) -> Value {
    let address = |a: &Option<std::net::SocketAddr>| a.map_or_else(String::new, |a| a.to_string());
    let kubeconfig = match &settings.source {
        SourceSettings::Kube { kubeconfig: Some(path), .. } => path.display().to_string(),
        SourceSettings::Kube { kubeconfig: None, .. } | SourceSettings::Manifests(_) => String::new(),
    };
    let Timeouts { tcp_established_s, udp_opening_s, udp_established_s, .. } = settings.timeouts;
    json!({
        "kind": "KubeProxyConfiguration",
        "Mode": PROXY_MODE,
        "HostnameOverride": settings.node_name,
        "ClientConnection": { "Kubeconfig": kubeconfig },
        "HealthzBindAddress": address(&settings.healthz_bind_address),
        "MetricsBindAddress": address(&settings.metrics_bind_address),
        "NodePortAddresses": nodeport_addresses(&settings.nodeport_addresses),
        "Linux": {
            "MasqueradeAll": settings.masquerade_all,
            "Conntrack": {
                "TCPEstablishedTimeout": go_duration(tcp_established_s),
                "UDPTimeout": go_duration(udp_opening_s),
                "UDPStreamTimeout": go_duration(udp_established_s),
            },
        },
    })
}

fn own(settings: &Settings) -> Value {
    let strings =
        |list: &[glob::Pattern]| -> Vec<String> { list.iter().map(|g| g.as_str().into()).collect() };
    let source = match &settings.source {
        SourceSettings::Kube { .. } => "kube".to_owned(),
        SourceSettings::Manifests(dir) => format!("manifests:{}", dir.display()),
    };
    let (sizes, times) = (&settings.capacities, &settings.timeouts);
    json!({
        "source": source,
        "externalDevice": strings(&settings.external_devices),
        "podDevice": strings(&settings.pod_devices),
        "xdp": match settings.xdp {
            XdpSetting::Auto => "auto",
            XdpSetting::Native => "native",
            XdpSetting::Generic => "generic",
            XdpSetting::Off => "off",
        },
        "socketLb": match settings.socket_lb {
            SocketLb::Off => "off",
            SocketLb::Host => "host",
            SocketLb::All => "all",
        },
        "cgroupRoot": settings.cgroup_root,
        "stateDir": settings.state_dir,
        "allowExternalIPs": settings.allow_external_ips,
        "snatPorts": format!("{}-{}", settings.snat_ports.first, settings.snat_ports.last),
        "traceFlows": on_off(settings.trace_flows),
        "localhostNodePorts": on_off(settings.localhost_nodeports),
        "serviceCidr": settings.service_cidrs,
        "answerPing": on_off(settings.answer_ping),
        "resetGoneBackends": on_off(settings.reset_gone_backends),
        "maxFrontends": sizes.frontends,
        "maxServices": sizes.services,
        "maxSlots": sizes.slots,
        "maxBackends": sizes.backends,
        "maxFlows": sizes.flows,
        "flowCache": sizes.flow_cache,
        "maxAffinity": sizes.affinity,
        "maxSockets": sizes.sockets,
        "maxSourceRanges": sizes.source_ranges,
        "tcpOpeningTimeout": seconds(times.tcp_opening_s),
        "tcpEstablishedTimeout": seconds(times.tcp_established_s),
        "tcpClosingTimeout": seconds(times.tcp_closing_s),
        "udpOpeningTimeout": seconds(times.udp_opening_s),
        "udpEstablishedTimeout": seconds(times.udp_established_s),
        "sctpEstablishedTimeout": seconds(times.sctp_established_s),
    })
}

/// As the flag takes it; kube-proxy shows "all addresses" as no list.
fn nodeport_addresses(setting: &NodePortAddresses) -> Value {
    match setting {
        NodePortAddresses::All => Value::Null,
        NodePortAddresses::Primary => json!(["primary"]),
        NodePortAddresses::Cidrs(cidrs) => json!(cidrs),
    }
}

/// As the flags take it.
fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// As the flags take them.
fn seconds(seconds: u32) -> String {
    format!("{seconds}s")
}

/// As Go's `time.Duration` prints itself, and so as Kubernetes writes `metav1.Duration`: `1m30s`, `24h0m0s`.
fn go_duration(seconds: u32) -> String {
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{rest}s"),
        (0, _) => format!("{minutes}m{rest}s"),
        _ => format!("{hours}h{minutes}m{rest}s"),
    }
}

#[cfg(test)]
#[path = "configz_tests.rs"]
mod tests;

//! What the fields do here: values for the agent's options.

use std::net::IpAddr;

use super::{
    Reading,
    decode::Document,
    rules::{self, Mode},
};
use crate::cli::RunArgs;

const HEALTHZ_PORT: u16 = 10_256;
const METRICS_PORT: u16 = 10_249;
/// kube-proxy's default for connections in CLOSE_WAIT, in nanoseconds: one hour.
const CLOSE_WAIT_NS: i128 = 3_600_000_000_000;

/// An option: its id, and where its value goes.
type Slot<T> = (&'static str, for<'a> fn(&'a mut RunArgs) -> &'a mut T);

/// The effects of a document that has passed the rules.
pub fn of(document: Document) -> Reading {
    let reading = Reading { ignored: document.ignored(), ..Reading::default() };
    let mut effects = Effects { mode: Mode::of(&document), document: &document, reading };
    effects.objects();
    effects.addresses();
    effects.services();
    effects.pod_devices();
    effects.timeouts();
    effects.log();
    let mut reading = effects.reading;
    reading.ignored.sort_unstable();
    reading.unknown = document.unknown;
    reading
}

struct Effects<'a> {
    document: &'a Document,
    mode: Mode,
    reading: Reading,
}

impl Effects<'_> {
    fn give(&mut self, (id, slot): Slot<Option<String>>, path: impl Into<String>, value: impl Into<String>) {
        *slot(&mut self.reading.args) = Some(value.into());
        self.reading.keys.insert(id, path.into());
    }

    fn give_list(&mut self, (id, slot): Slot<Vec<String>>, path: impl Into<String>, values: Vec<String>) {
        *slot(&mut self.reading.args) = values;
        self.reading.keys.insert(id, path.into());
    }

    fn ignore(&mut self, path: impl Into<String>) {
        self.reading.ignored.push(path.into());
    }

    fn objects(&mut self) {
        let kubeconfig = self.document.text("clientConnection.kubeconfig");
        if !kubeconfig.is_empty() {
            self.give(("kubeconfig", |a| &mut a.kubeconfig), "clientConnection.kubeconfig", kubeconfig);
        }
        // As in pkg/util/node: what is given is a host name, and nodes have those in lower case.
        let name = self.document.text("hostnameOverride");
        if !name.is_empty() {
            let name = name.trim().to_lowercase();
            self.give(("hostname_override", |a| &mut a.hostname_override), "hostnameOverride", name);
        }
    }

    /// Empty is not off here: an empty address in the file means the default, of the family of `bindAddress`.
    fn addresses(&mut self) {
        let bind = rules::ip(self.document.text("bindAddress"));
        let (any, loopback) = match bind {
            Some(IpAddr::V6(ip)) if ip.to_ipv4_mapped().is_none() => ("::", "::1"),
            _ => ("0.0.0.0", "127.0.0.1"),
        };
        self.address(
            ("healthz_bind_address", |a| &mut a.healthz_bind_address),
            "healthzBindAddress",
            any,
            HEALTHZ_PORT,
        );
        self.address(
            ("metrics_bind_address", |a| &mut a.metrics_bind_address),
            "metricsBindAddress",
            loopback,
            METRICS_PORT,
        );
        // The address of the node comes from its Node object alone.
        if bind.is_some_and(|ip| !ip.is_unspecified()) {
            self.ignore("bindAddress");
        }
    }

    fn address(&mut self, option: Slot<Option<String>>, path: &'static str, default: &str, port: u16) {
        let text = self.document.text(path);
        let (path, host, port) = match rules::split_host_port(text) {
            _ if text.is_empty() => ("bindAddress", default, port.to_string()),
            Some((host, port)) => (path, host, port.to_owned()),
            None => (path, text, port.to_string()),
        };
        let address = match rules::ip(host) {
            Some(IpAddr::V6(ip)) => format!("[{ip}]:{port}"),
            Some(IpAddr::V4(ip)) => format!("{ip}:{port}"),
            // The rules have refused it; the option's own check would too.
            None => text.to_owned(),
        };
        self.give(option, path, address);
    }

    fn services(&mut self) {
        self.nodeport_addresses();
        let own = if self.mode == Mode::Nftables { "nftables" } else { "iptables" };
        for section in ["iptables", "nftables"] {
            let path = format!("{section}.masqueradeAll");
            match self.document.bool(&path) {
                Some(on) if section == own => {
                    let value = if on { "on" } else { "off" };
                    self.give(("masquerade_all", |a| &mut a.masquerade_all), path, value);
                }
                Some(true) => self.ignore(path),
                _ => {}
            }
        }
        let localhost: Slot<_> = ("localhost_nodeports", |a| &mut a.localhost_nodeports);
        let path = "iptables.localhostNodePorts";
        match (self.mode, self.document.bool(path)) {
            (Mode::Iptables, None) => {}
            (Mode::Iptables, Some(on)) => self.give(localhost, path, if on { "on" } else { "off" }),
            // The other modes never have them.
            (Mode::Ipvs | Mode::Nftables, _) => self.give(localhost, "mode", "off"),
        }
    }

    fn nodeport_addresses(&mut self) {
        let option: Slot<_> = ("nodeport_addresses", |a| &mut a.nodeport_addresses);
        let list = self.document.texts("nodePortAddresses");
        if !list.is_empty() {
            let plain = |text: &String| rules::cidr(text).map_or_else(|| text.clone(), |net| net.to_string());
            self.give_list(option, "nodePortAddresses", list.iter().map(plain).collect());
        } else if self.mode == Mode::Nftables {
            // F1: the default of this mode alone.
            self.give_list(option, "mode", vec!["primary".to_owned()]);
        }
    }

    /// Pods are told by their devices here, so a prefix of device names can be taken over, and ports of bridges are found
    /// anyway. CIDRs say nothing about devices.
    fn pod_devices(&mut self) {
        let (prefix, mode) = ("detectLocal.interfaceNamePrefix", self.document.text("detectLocalMode"));
        match mode {
            "InterfaceNamePrefix" => {
                let glob = glob::Pattern::escape(self.document.text(prefix)) + "*";
                self.give_list(("pod_device", |a| &mut a.pod_device), prefix, vec![glob]);
                return;
            }
            "NodeCIDR" | "BridgeInterface" => self.ignore("detectLocalMode"),
            _ => {}
        }
        if !self.document.text(prefix).is_empty() {
            self.ignore(prefix);
        }
    }

    fn timeouts(&mut self) {
        self.timeout(
            ("tcp_established_timeout", |a| &mut a.tcp_established_timeout),
            "conntrack.tcpEstablishedTimeout",
        );
        self.timeout(("udp_opening_timeout", |a| &mut a.udp_opening_timeout), "conntrack.udpTimeout");
        self.timeout(
            ("udp_established_timeout", |a| &mut a.udp_established_timeout),
            "conntrack.udpStreamTimeout",
        );
        // One time serves here for connections that one end has closed and for those that are over. kube-proxy's own
        // default, which files of all defaults spell out, is made for the former and would fill the table with the latter.
        let path = "conntrack.tcpCloseWaitTimeout";
        if self.document.duration(path).is_none_or(|(ns, _)| ns != CLOSE_WAIT_NS) {
            self.timeout(("tcp_closing_timeout", |a| &mut a.tcp_closing_timeout), path);
        }
    }

    /// 0 leaves the time as it is. kube-proxy cuts off fractions of seconds.
    fn timeout(&mut self, option: Slot<Option<String>>, path: &'static str) {
        match self.document.duration(path) {
            None | Some((..=0, _)) => {}
            Some((ns, _)) => self.give(option, path, format!("{}s", (ns / 1_000_000_000).max(1))),
        }
    }

    fn log(&mut self) {
        let format = self.document.text("logging.format");
        if !format.is_empty() {
            self.give(("log_format", |a| &mut a.log_format), "logging.format", format);
        }
        // klog's conventions: 4 is for debugging, 6 shows what goes over the wire.
        let level = match self.document.int("logging.verbosity") {
            Some(4..=5) => "debug",
            Some(6..) => "trace",
            _ => return,
        };
        self.give(("log_level", |a| &mut a.log_level), "logging.verbosity", level);
    }
}

//! Which value each option has, and what settings that makes.

use std::path::PathBuf;

use clap::{ArgMatches, parser::ValueSource};
use lb_common::conntrack::Timeouts;

use super::{
    Config, Error, FileOptions, HOSTNAME, LogFormat, LogSettings, Origin, cgroup2_mount, values as parse,
};
use crate::{
    cli::{DEFAULT_STATE_DIR, RunArgs},
    machine,
    settings::{Capacities, Settings, SocketLb, XdpSetting},
};

/// A value and where it came from.
pub(super) struct Given {
    pub value: String,
    pub origin: Origin,
}

/// The three places where options come from, in order of precedence: flags and environment are in `args`.
pub(super) struct Options<'a> {
    pub args: &'a RunArgs,
    pub matches: &'a ArgMatches,
    pub file: Option<FileOptions>,
}

impl Options<'_> {
    pub fn config(self) -> Result<Config, Error> {
        let (settings, log) = (self.settings()?, self.log()?);
        Ok(Config { settings, log, notes: self.file.and_then(|file| file.notes) })
    }

    fn settings(&self) -> Result<Settings, Error> {
        Ok(Settings {
            source: self.source()?,
            node_name: self.node_name()?,
            external_devices: self.each("external_device", |a| &a.external_device, parse::glob)?,
            pod_devices: self.each("pod_device", |a| &a.pod_device, parse::glob)?,
            xdp: self.or("xdp", |a| &a.xdp, XdpSetting::Auto, parse::xdp)?,
            socket_lb: self.or("socket_lb", |a| &a.socket_lb, SocketLb::Host, parse::socket_lb)?,
            cgroup_root: self.cgroup_root()?,
            state_dir: self.or("state_dir", |a| &a.state_dir, DEFAULT_STATE_DIR.into(), parse::directory)?,
            nodeport_addresses: parse::nodeport_addresses(
                self.list("nodeport_addresses", |a| &a.nodeport_addresses),
            )?,
            allow_external_ips: self.each("allow_external_ips", |a| &a.allow_external_ips, parse::cidr)?,
            localhost_nodeports: self.or(
                "localhost_nodeports",
                |a| &a.localhost_nodeports,
                true,
                parse::on_off,
            )?,
            service_cidrs: self.each("service_cidr", |a| &a.service_cidr, parse::cidr)?,
            masquerade_all: self.or("masquerade_all", |a| &a.masquerade_all, false, parse::on_off)?,
            answer_ping: self.or("answer_ping", |a| &a.answer_ping, false, parse::on_off)?,
            reset_gone_backends: self.or(
                "reset_gone_backends",
                |a| &a.reset_gone_backends,
                true,
                parse::on_off,
            )?,
            // kube-proxy's ports: clusters have them open for load balancers and in their firewalls.
            healthz_bind_address: self.or(
                "healthz_bind_address",
                |a| &a.healthz_bind_address,
                Some(([0, 0, 0, 0], 10_256).into()),
                parse::bind_address,
            )?,
            metrics_bind_address: self.or(
                "metrics_bind_address",
                |a| &a.metrics_bind_address,
                Some(([127, 0, 0, 1], 10_249).into()),
                parse::bind_address,
            )?,
            snat_ports: self.or(
                "snat_ports",
                |a| &a.snat_ports,
                lb_common::nat::PortRange::DEFAULT,
                parse::ports,
            )?,
            trace_flows: self.or("trace_flows", |a| &a.trace_flows, false, parse::on_off)?,
            capacities: self.capacities()?,
            timeouts: self.timeouts()?,
        })
    }

    fn log(&self) -> Result<LogSettings, Error> {
        Ok(LogSettings {
            format: self.or("log_format", |a| &a.log_format, LogFormat::Text, parse::log_format)?,
            filter: self.or("log_level", |a| &a.log_level, "info".into(), parse::log_filter)?,
        })
    }

    fn source(&self) -> Result<crate::settings::SourceSettings, Error> {
        let kubeconfig = self.one("kubeconfig", |a| &a.kubeconfig).map(|v| PathBuf::from(v.value));
        let master = self.one("master", |a| &a.master).as_ref().map(parse::master).transpose()?;
        match self.one("source", |a| &a.source) {
            Some(given) => parse::source(&given, kubeconfig, master),
            None => Ok(crate::settings::SourceSettings::Kube { kubeconfig, master }),
        }
    }

    /// The kubelet names a node by its host name in lower case (pkg/util/node.GetHostname).
    fn node_name(&self) -> Result<String, Error> {
        if let Some(given) = self.one("hostname_override", |a| &a.hostname_override) {
            return parse::node_name(&given);
        }
        let name = std::fs::read_to_string(HOSTNAME).map_err(Error::Hostname)?;
        let value = name.trim().to_lowercase();
        parse::node_name(&Given {
            value,
            origin: Origin::Default("this host's name (override it with --hostname-override)"),
        })
    }

    fn cgroup_root(&self) -> Result<Option<PathBuf>, Error> {
        if let Some(given) = self.one("cgroup_root", |a| &a.cgroup_root) {
            return parse::directory(&given).map(Some);
        }
        // Unreadable only where there is no /proc; then whoever attaches the socket hooks reports that there is none.
        Ok(std::fs::read_to_string("/proc/self/mounts").ok().and_then(|mounts| cgroup2_mount(&mounts)))
    }

    fn capacities(&self) -> Result<Capacities, Error> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let flows = machine::flows(cgroup2_mount(&mounts).as_deref());
        let default = Capacities { flows, ..Capacities::default() };
        let size = parse::size;
        Ok(Capacities {
            frontends: self.or("max_frontends", |a| &a.max_frontends, default.frontends, size)?,
            services: self.or("max_services", |a| &a.max_services, default.services, size)?,
            slots: self.or("max_slots", |a| &a.max_slots, default.slots, size)?,
            backends: self.or("max_backends", |a| &a.max_backends, default.backends, size)?,
            flows: self.or("max_flows", |a| &a.max_flows, default.flows, size)?,
            keep_flows: self.one("max_flows", |a| &a.max_flows).is_none(),
            flow_cache: self.or("flow_cache", |a| &a.flow_cache, default.flow_cache, parse::size_or_none)?,
            affinity: self.or("max_affinity", |a| &a.max_affinity, default.affinity, size)?,
            sockets: self.or("max_sockets", |a| &a.max_sockets, default.sockets, size)?,
            source_ranges: self.or(
                "max_source_ranges",
                |a| &a.max_source_ranges,
                default.source_ranges,
                size,
            )?,
        })
    }

    fn timeouts(&self) -> Result<Timeouts, Error> {
        let default = Timeouts::DEFAULT;
        let time = parse::seconds;
        Ok(Timeouts {
            tcp_opening_s: self.or(
                "tcp_opening_timeout",
                |a| &a.tcp_opening_timeout,
                default.tcp_opening_s,
                time,
            )?,
            tcp_established_s: self.or(
                "tcp_established_timeout",
                |a| &a.tcp_established_timeout,
                default.tcp_established_s,
                time,
            )?,
            tcp_closing_s: self.or(
                "tcp_closing_timeout",
                |a| &a.tcp_closing_timeout,
                default.tcp_closing_s,
                time,
            )?,
            udp_opening_s: self.or(
                "udp_opening_timeout",
                |a| &a.udp_opening_timeout,
                default.udp_opening_s,
                time,
            )?,
            udp_established_s: self.or(
                "udp_established_timeout",
                |a| &a.udp_established_timeout,
                default.udp_established_s,
                time,
            )?,
            sctp_established_s: self.or(
                "sctp_established_timeout",
                |a| &a.sctp_established_timeout,
                default.sctp_established_s,
                time,
            )?,
        })
    }

    /// The option `id`, parsed, or `default` if nobody gave it.
    fn or<T>(
        &self,
        id: &str,
        field: impl Fn(&RunArgs) -> &Option<String>,
        default: T,
        parse: impl Fn(&Given) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.one(id, field).map_or(Ok(default), |given| parse(&given))
    }

    /// Each value of the repeatable option `id`, parsed.
    fn each<T>(
        &self,
        id: &str,
        field: impl Fn(&RunArgs) -> &Vec<String>,
        parse: impl Fn(&Given) -> Result<T, Error>,
    ) -> Result<Vec<T>, Error> {
        self.list(id, field).iter().map(parse).collect()
    }

    fn one(&self, id: &str, field: impl Fn(&RunArgs) -> &Option<String>) -> Option<Given> {
        if let Some(value) = field(self.args) {
            return Some(Given { value: value.clone(), origin: self.origin(id) });
        }
        let file = self.file.as_ref()?;
        let value = field(&file.args).clone()?;
        Some(Given { value, origin: file.origin(id) })
    }

    fn list(&self, id: &str, field: impl Fn(&RunArgs) -> &Vec<String>) -> Vec<Given> {
        // A list that is given as empty on the command line still wins over the file.
        let given = matches!(
            self.matches.value_source(id),
            Some(ValueSource::CommandLine | ValueSource::EnvVariable)
        );
        let (values, origin) = match &self.file {
            Some(file) if !given => (field(&file.args), file.origin(id)),
            _ => (field(self.args), self.origin(id)),
        };
        let values = values.iter().map(|v| v.trim()).filter(|v| !v.is_empty());
        values.map(|v| Given { value: v.to_owned(), origin: origin.clone() }).collect()
    }

    fn origin(&self, id: &str) -> Origin {
        match self.matches.value_source(id) {
            Some(ValueSource::EnvVariable) => Origin::Env(format!("LB_{}", id.to_uppercase())),
            _ => Origin::Flag(id.replace('_', "-")),
        }
    }
}

impl FileOptions {
    fn origin(&self, id: &str) -> Origin {
        Origin::File(self.path.clone(), self.keys.get(id).cloned().unwrap_or_else(|| key(id)))
    }
}

/// The name of an option in the file: kube-proxy's where it has one, else the flag's in camel case.
pub(super) fn key(id: &str) -> String {
    match id {
        "nodeport_addresses" => return "nodePortAddresses".into(),
        "allow_external_ips" => return "allowExternalIPs".into(),
        "localhost_nodeports" => return "localhostNodePorts".into(),
        _ => {}
    }
    let mut words = id.split('_');
    let mut key = words.next().unwrap_or_default().to_owned();
    for word in words {
        let mut letters = word.chars();
        key.extend(letters.next().map(|c| c.to_ascii_uppercase()));
        key.push_str(letters.as_str());
    }
    key
}

use clap::FromArgMatches as _;

use super::*;
use crate::{
    cli::{Cli, Command, command},
    settings::{Capacities, NodePortAddresses, SocketLb, SourceSettings, XdpSetting},
};

/// What `lb-agent run` with these arguments means. The environment is the test's own: no variable is set here.
pub(super) fn run(args: &[&str]) -> Result<Config, Error> {
    let args = ["lb-agent", "run"].iter().chain(args);
    let matches = command().try_get_matches_from(args).unwrap();
    let Command::Run(run) = Cli::from_arg_matches(&matches).unwrap().command else { panic!() };
    load(&run, matches.subcommand_matches("run").unwrap())
}

pub(super) fn with_file(text: &str, args: &[&str]) -> Result<Config, Error> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    let path = file.path().to_str().unwrap();
    run(&[&["--config", path], args].concat())
}

fn settings(args: &[&str]) -> Settings {
    run(args).unwrap().settings
}

#[test]
fn defaults_are_those_of_the_documentation() {
    let config = run(&[]).unwrap();
    let s = config.settings;
    assert_eq!(s.source, SourceSettings::Kube { kubeconfig: None, master: None });
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(s.node_name, host.trim().to_lowercase());
    assert!(s.external_devices.is_empty() && s.pod_devices.is_empty() && s.allow_external_ips.is_empty());
    assert_eq!((s.xdp, s.socket_lb), (XdpSetting::Auto, SocketLb::Host));
    assert_eq!(s.state_dir, Path::new("/sys/fs/bpf/lb"));
    assert_eq!(s.nodeport_addresses, NodePortAddresses::All);
    assert_eq!(s.healthz_bind_address, Some("0.0.0.0:10256".parse().unwrap()));
    assert_eq!(s.metrics_bind_address, Some("127.0.0.1:10249".parse().unwrap()));
    assert_eq!((s.snat_ports.first, s.snat_ports.last), (10_240, 29_999));
    // Flow tables follow the machine, and stay as large as they are.
    let flows = s.capacities.flows;
    assert_eq!(s.capacities, Capacities { flows, keep_flows: true, ..Capacities::default() });
    assert!(flows.is_power_of_two());
    assert_eq!(s.timeouts.tcp_established_s, 86_400);
    assert_eq!(config.log, LogSettings { format: LogFormat::Text, filter: "info".into() });
}

/// The defaults in the help text, given as flags, change nothing.
#[test]
fn help_tells_the_true_defaults() {
    let command = command();
    let run_command = command.find_subcommand("run").unwrap();
    let mut checked = 0;
    for arg in run_command.get_arguments() {
        let (Some(flag), Some(help)) = (arg.get_long(), arg.get_help()) else { continue };
        let help = help.to_string();
        if flag == "config" || flag == "kubeconfig" || flag == "master" {
            continue;
        }
        let default = help.split("[default: ").nth(1).and_then(|d| d.strip_suffix(']'));
        let default = default.unwrap_or_else(|| panic!("--{flag} does not tell its default: {help}"));
        // A default that is told in words is checked elsewhere.
        if default.contains(' ') || default == "none" {
            continue;
        }
        let given = run(&[&format!("--{flag}={default}")]).unwrap();
        assert_eq!(format!("{given:?}"), format!("{:?}", run(&[]).unwrap()), "--{flag}");
        checked += 1;
    }
    assert!(checked > 20, "{checked}");
}

/// Each option has its flag, its environment variable and its key, by rule.
#[test]
fn names_follow_one_rule() {
    let command = command();
    for arg in command.find_subcommand("run").unwrap().get_arguments() {
        let id = arg.get_id().as_str();
        assert_eq!(arg.get_long().unwrap(), id.replace('_', "-"));
        assert_eq!(arg.get_env().unwrap().to_str().unwrap(), format!("LB_{}", id.to_uppercase()));
        if id == "config" {
            continue;
        }
        // The file knows the key: a wrong type is not an unknown key.
        let error = with_file(&format!("{}: {{a: 1}}\n", options::key(id)), &[]).unwrap_err().to_string();
        assert!(!error.contains("unknown"), "{id}: {error}");
    }
}

#[test]
fn flags_win_over_the_file() {
    let file = "\
xdp: off
socketLb: all
hostnameOverride: from-file
nodePortAddresses: [10.0.0.0/8, 2001:db8::/32]
allowExternalIPs: 192.0.2.0/24
externalDevice: [eth*, en*]
maxFlows: 5000
snatPorts: 1024-2047
tcpEstablishedTimeout: 1h30m
healthzBindAddress: ''
metricsBindAddress: '[::1]:1'
logLevel: debug
logFormat: json
";
    let config = with_file(file, &["--xdp", "native", "--external-device", "bond0"]).unwrap();
    let s = config.settings;
    assert_eq!((s.xdp, s.socket_lb), (XdpSetting::Native, SocketLb::All));
    assert_eq!(s.node_name, "from-file");
    let nets = ["10.0.0.0/8", "2001:db8::/32"].map(|n| n.parse().unwrap());
    assert_eq!(s.nodeport_addresses, NodePortAddresses::Cidrs(nets.into()));
    assert_eq!(s.allow_external_ips, ["192.0.2.0/24".parse().unwrap()]);
    assert_eq!(s.external_devices, [glob::Pattern::new("bond0").unwrap()]);
    assert_eq!(s.capacities.flows, 5000);
    assert_eq!((s.snat_ports.first, s.snat_ports.last), (1024, 2047));
    assert_eq!(s.timeouts.tcp_established_s, 5400);
    assert_eq!((s.healthz_bind_address, s.metrics_bind_address), (None, Some("[::1]:1".parse().unwrap())));
    assert_eq!(config.log, LogSettings { format: LogFormat::Json, filter: "debug".into() });
    // An empty list on the command line is a value too.
    let s = with_file(file, &["--nodeport-addresses="]).unwrap().settings;
    assert_eq!(s.nodeport_addresses, NodePortAddresses::All);
}

#[test]
fn values_mean_what_the_help_says() {
    let s = settings(&["--source", "manifests:/etc/lb", "--master", "ignored:1"]);
    assert_eq!(s.source, SourceSettings::Manifests("/etc/lb".into()));
    let s = settings(&["--master", "192.0.2.7:6443", "--kubeconfig", "k"]);
    let kube =
        SourceSettings::Kube { kubeconfig: Some("k".into()), master: Some("https://192.0.2.7:6443".into()) };
    assert_eq!(s.source, kube);
    assert_eq!(settings(&["--nodeport-addresses", "primary"]).nodeport_addresses, NodePortAddresses::Primary);
    let s = settings(&["--pod-device", "veth*,cali*", "--pod-device", "lxc[0-9]"]);
    assert_eq!(
        s.pod_devices.iter().map(glob::Pattern::as_str).collect::<Vec<_>>(),
        ["veth*", "cali*", "lxc[0-9]"]
    );
    // Host bits do not matter.
    assert_eq!(
        settings(&["--allow-external-ips", "192.0.2.9/24"]).allow_external_ips,
        ["192.0.2.0/24".parse().unwrap()]
    );
    for (text, seconds) in [("24h", 86_400), ("24h0m0s", 86_400), ("1h30m", 5400), ("90s", 90), ("15m", 900)]
    {
        assert_eq!(settings(&["--udp-opening-timeout", text]).timeouts.udp_opening_s, seconds, "{text}");
    }
    assert_eq!(
        run(&["--log-level", "warn,lb_agent::source=trace"]).unwrap().log.filter,
        "warn,lb_agent::source=trace"
    );
}

#[test]
fn wrong_values_are_named_with_place_reason_and_remedy() {
    for (flag, value, reason, allowed) in [
        ("source", "etcd", "unknown", "kube, manifests:DIR"),
        ("source", "manifests:", "unknown", "kube, manifests:DIR"),
        ("master", "ftp://x", "not an HTTP URL", "HOST:PORT"),
        ("hostname-override", "Node_1", "not the name of a node", "lower-case"),
        ("hostname-override", "", "not the name of a node", "lower-case"),
        ("external-device", "eth[", "invalid range", "names of devices"),
        ("xdp", "on", "unknown", "auto, native, generic, off"),
        ("socket-lb", "pods", "unknown", "off, host, all"),
        ("cgroup-root", "cg", "not an absolute path", "/PATH"),
        ("state-dir", "lb", "not an absolute path", "/PATH"),
        ("nodeport-addresses", "192.0.2.1", "not a CIDR", "primary"),
        ("nodeport-addresses", "192.0.2.0/24,primary", "cannot be combined", "primary alone"),
        ("allow-external-ips", "192.0.2.0/33", "invalid", "ADDRESS/LENGTH"),
        ("healthz-bind-address", "10256", "invalid socket address", "IP:PORT"),
        ("snat-ports", "2000-1000", "empty", "FIRST-LAST"),
        ("snat-ports", "0-9", "0 is not a port", "FIRST-LAST"),
        ("snat-ports", "10240", "not a range", "FIRST-LAST"),
        ("snat-ports", "1-65536", "too large", "65535"),
        ("flow-cache", "16777217", "too large", "0 to 16777216"),
        ("max-flows", "0", "nothing would fit", "1 to"),
        ("max-flows", "4000000000", "too large", "2147483647"),
        ("max-slots", "many", "invalid digit", "1 to"),
        ("tcp-closing-timeout", "0s", "never live", "1s"),
        ("tcp-closing-timeout", "1500ms", "not whole seconds", "1s"),
        ("tcp-closing-timeout", "-5s", "out of range", "1s"),
        ("tcp-closing-timeout", "soon", "not a duration", "24h"),
        ("log-format", "xml", "unknown", "text, json"),
        ("log-level", "loud", "is no level", "debug"),
    ] {
        let error = run(&[&format!("--{flag}={value}")]).unwrap_err();
        let Error::Invalid { origin, value: named, reason: why, allowed: remedy } = &error else {
            panic!("{error}")
        };
        assert_eq!(origin, &Origin::Flag(flag.into()), "{error}");
        assert!(
            value.contains(named.as_str()) && why.contains(reason) && remedy.contains(allowed),
            "{error}"
        );
    }
}

#[test]
fn a_wrong_file_is_named_with_key_and_line() {
    let file_error = |text: &str| with_file(text, &[]).unwrap_err().to_string();
    let error = file_error("xdp: maybe\n");
    assert!(error.ends_with(": xdp: \"maybe\": unknown; allowed: auto, native, generic, off"), "{error}");
    let error = file_error("xdp: off\nxpd: off\n");
    assert!(error.contains("xpd") && error.contains("line 2") && error.contains("socketLb"), "{error}");
    let error = file_error("externalDevice: 5\n");
    assert!(error.contains("a string or a list of strings"), "{error}");
    let error = file_error("xdp: off\nxdp: native\n");
    assert!(error.contains("duplicate") && error.contains("xdp"), "{error}");
    assert!(file_error("- xdp\n").contains("line 1"));
    let error = run(&["--config", "/nowhere/lb.yaml"]).unwrap_err().to_string();
    assert!(error.contains("/nowhere/lb.yaml") && error.contains("No such file"), "{error}");
}

#[test]
fn a_file_without_options_is_fine() {
    for text in ["", "# nothing\n", "---\n", "\n\n", "{}\n"] {
        with_file(text, &[]).unwrap_or_else(|error| panic!("{text:?}: {error}"));
    }
}

#[test]
fn finds_the_cgroup_mount() {
    let hybrid = "\
sysfs /sys sysfs rw 0 0
cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,nosuid 0 0
";
    assert_eq!(cgroup2_mount(hybrid), Some("/sys/fs/cgroup/unified".into()));
    let two = "none /run/my\\040cgroup cgroup2 rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
    assert_eq!(cgroup2_mount(two), Some("/sys/fs/cgroup".into()));
    assert_eq!(cgroup2_mount("none /run/my\\040cgroup cgroup2 rw 0 0\n"), Some("/run/my cgroup".into()));
    assert_eq!(cgroup2_mount("proc /proc proc rw 0 0\n"), None);
}

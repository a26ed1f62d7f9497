use std::{net::SocketAddr, path::Path};

use super::*;
use crate::{
    config::{
        Config, Error, LogFormat, LogSettings,
        tests::{run, with_file},
    },
    settings::{NodePortAddresses, Settings, SourceSettings},
};

const KUBEADM: &str = include_str!("testdata/kubeadm.yaml");
const KIND_ROOTLESS_IPV6: &str = include_str!("testdata/kind-rootless-ipv6.yaml");
const DEFAULTS: &str = include_str!("testdata/defaults.yaml");
const EVERY_FIELD: &str = include_str!("testdata/every-field.yaml");

/// Lines of a file with its type in front.
fn typed(lines: &str) -> String {
    format!("apiVersion: {API_VERSION}\nkind: {KIND}\n{lines}\n")
}

fn config(text: &str) -> Config {
    with_file(text, &[]).unwrap()
}

fn settings(lines: &str) -> Settings {
    config(&typed(lines)).settings
}

/// What is ignored, and what is unknown.
fn notes(text: &str) -> (Vec<String>, Vec<String>) {
    let notes = config(text).notes.unwrap();
    (notes.ignored, notes.unknown)
}

fn socket(text: &str) -> Option<SocketAddr> {
    Some(text.parse().unwrap())
}

/// The message of a file that is refused, without the directory of the file.
fn refusal(text: &str) -> String {
    let error = with_file(text, &[]).unwrap_err();
    match &error {
        Error::KubeProxy { path, .. } => error.to_string().replace(path.to_str().unwrap(), "config.yaml"),
        other => other.to_string(),
    }
}

/// Debug output of settings, but for what a file may change.
fn same_but_kubeconfig(settings: &Settings) -> String {
    let mut settings = settings.clone();
    settings.source = SourceSettings::Kube { kubeconfig: None, master: None };
    format!("{settings:?}")
}

#[test]
fn the_file_of_a_kubeadm_cluster_changes_nothing_but_the_kubeconfig() {
    let (config, default) = (config(KUBEADM), run(&[]).unwrap());
    assert_eq!(same_but_kubeconfig(&config.settings), same_but_kubeconfig(&default.settings));
    let kubeconfig = Some("/var/lib/kube-proxy/kubeconfig.conf".into());
    assert_eq!(config.settings.source, SourceSettings::Kube { kubeconfig, master: None });
    assert_eq!(config.log, default.log);
    assert_eq!(notes(KUBEADM), (vec!["clusterCIDR".to_owned()], vec![]));
}

#[test]
fn all_defaults_spelled_out_change_nothing() {
    let (config, default) = (config(DEFAULTS), run(&[]).unwrap());
    assert_eq!(format!("{:?}", config.settings), format!("{:?}", default.settings));
    assert_eq!(config.log, default.log);
    assert_eq!(notes(DEFAULTS), (vec![], vec![]));
}

#[test]
fn the_file_of_a_rootless_ipv6_kind_cluster() {
    let s = config(KIND_ROOTLESS_IPV6).settings;
    assert_eq!(
        (s.healthz_bind_address, s.metrics_bind_address),
        (socket("[::]:10256"), socket("[::1]:10249"))
    );
    // The defaults of mode nftables.
    assert_eq!(s.nodeport_addresses, NodePortAddresses::Primary);
    assert!(!s.localhost_nodeports && !s.masquerade_all);
    assert_eq!(s.timeouts, lb_common::conntrack::Timeouts::DEFAULT);
    let ignored = vec!["clusterCIDR".to_owned(), "featureGates.KubeletInUserNamespace".to_owned()];
    assert_eq!(notes(KIND_ROOTLESS_IPV6), (ignored, vec![]));
}

#[test]
fn every_field_takes_effect_or_is_named() {
    let config = config(EVERY_FIELD);
    let s = config.settings;
    let kubeconfig = Some("/etc/kubernetes/proxy.conf".into());
    assert_eq!(s.source, SourceSettings::Kube { kubeconfig, master: None });
    assert_eq!(s.node_name, "node-7.example.com");
    assert_eq!(s.healthz_bind_address, socket("192.0.2.7:10256"));
    assert_eq!(s.metrics_bind_address, socket("[2001:db8::7]:9249"));
    assert!(s.masquerade_all && !s.localhost_nodeports);
    let nets = ["10.0.0.0/8", "2001:db8::/32"].map(|n| n.parse().unwrap());
    assert_eq!(s.nodeport_addresses, NodePortAddresses::Cidrs(nets.into()));
    assert_eq!(s.pod_devices, [glob::Pattern::new("cali[[]*").unwrap()]);
    let t = s.timeouts;
    assert_eq!((t.tcp_established_s, t.tcp_closing_s), (9000, 90));
    assert_eq!((t.udp_opening_s, t.udp_established_s), (45, 180));
    assert_eq!(config.log, LogSettings { format: LogFormat::Json, filter: "debug".into() });
    let (ignored, unknown) = notes(EVERY_FIELD);
    let expected = "\
bindAddress bindAddressHardFail clientConnection.acceptContentTypes clientConnection.burst clientConnection.contentType \
clientConnection.qps clusterCIDR configSyncPeriod conntrack.maxPerCore conntrack.min detectLocal.bridgeInterface \
enableProfiling featureGates.NFTablesProxyMode featureGates.TopologyAwareHints iptables.masqueradeBit \
iptables.minSyncPeriod iptables.snatNodeInternalIP iptables.syncPeriod ipvs.excludeCIDRs ipvs.minSyncPeriod \
ipvs.scheduler ipvs.strictARP ipvs.syncPeriod ipvs.tcpFinTimeout ipvs.tcpTimeout ipvs.udpTimeout \
logging.flushFrequency logging.options.json.infoBufferSize logging.options.json.splitStream \
logging.options.text.infoBufferSize logging.options.text.splitStream logging.vmodule nftables.masqueradeAll \
nftables.masqueradeBit nftables.minSyncPeriod nftables.syncPeriod oomScoreAdj portRange showHiddenMetricsForVersion \
windowsRunAsService winkernel.enableDSR winkernel.forwardHealthCheckVip winkernel.networkName \
winkernel.rootHnsEndpointName winkernel.sourceVip";
    assert_eq!(ignored, expected.split(' ').collect::<Vec<_>>());
    assert!(unknown.is_empty(), "{unknown:?}");
    // The file is what its first line says.
    let root = serde_saphyr::from_str(EVERY_FIELD).unwrap();
    let document = Document::decode(&root).unwrap();
    let missing: Vec<_> = fields::FIELDS.iter().filter(|f| document.get(f.path).is_none()).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn addresses_follow_the_family_of_bind_address_and_get_their_default_ports() {
    for (lines, healthz, metrics) in [
        ("", "0.0.0.0:10256", "127.0.0.1:10249"),
        ("bindAddress: 0.0.0.0", "0.0.0.0:10256", "127.0.0.1:10249"),
        ("bindAddress: 192.0.2.7", "0.0.0.0:10256", "127.0.0.1:10249"),
        ("bindAddress: \"::\"", "[::]:10256", "[::1]:10249"),
        ("bindAddress: \"2001:db8::1\"", "[::]:10256", "[::1]:10249"),
        ("healthzBindAddress: 192.0.2.7", "192.0.2.7:10256", "127.0.0.1:10249"),
        ("metricsBindAddress: 0.0.0.0", "0.0.0.0:10256", "0.0.0.0:10249"),
        ("metricsBindAddress: \"::\"", "0.0.0.0:10256", "[::]:10249"),
        ("metricsBindAddress: \"[::]:1\"", "0.0.0.0:10256", "[::]:1"),
        ("metricsBindAddress: 127.0.0.01:9000", "0.0.0.0:10256", "127.0.0.1:9000"),
        ("{healthzBindAddress: \"\", metricsBindAddress: null}", "0.0.0.0:10256", "127.0.0.1:10249"),
    ] {
        let flow = format!("{{apiVersion: {API_VERSION}, kind: {KIND}, {}", lines.trim_start_matches('{'));
        let text = if lines.starts_with('{') { flow } else { typed(lines) };
        let s = config(&text).settings;
        assert_eq!(
            (s.healthz_bind_address, s.metrics_bind_address),
            (socket(healthz), socket(metrics)),
            "{lines}"
        );
    }
}

#[test]
fn the_mode_decides_which_section_counts() {
    for (lines, masquerade, localhost, primary) in [
        ("iptables: {masqueradeAll: true}", true, true, false),
        ("mode: iptables\nnftables: {masqueradeAll: true}", false, true, false),
        ("mode: ipvs\niptables: {masqueradeAll: true}", true, false, false),
        ("mode: nftables\nnftables: {masqueradeAll: true}", true, false, true),
        ("mode: nftables\niptables: {masqueradeAll: true, localhostNodePorts: true}", false, false, true),
        ("iptables: {localhostNodePorts: false}", false, false, false),
        ("nodePortAddresses: [primary]", false, true, true),
    ] {
        let s = settings(lines);
        let is_primary = s.nodeport_addresses == NodePortAddresses::Primary;
        assert_eq!(
            (s.masquerade_all, s.localhost_nodeports, is_primary),
            (masquerade, localhost, primary),
            "{lines}"
        );
    }
    assert_eq!(
        notes(&typed("mode: nftables\niptables: {masqueradeAll: true}")).0,
        ["iptables.masqueradeAll"]
    );
    assert_eq!(notes(&typed("conntrack: {maxPerCore: 0}\noomScoreAdj: -999")).0, [""; 0]);
}

#[test]
fn flags_win_over_the_file() {
    let args = ["--tcp-established-timeout", "1h", "--metrics-bind-address=", "--nodeport-addresses="];
    let s = with_file(EVERY_FIELD, &args).unwrap().settings;
    assert_eq!((s.timeouts.tcp_established_s, s.metrics_bind_address), (3600, None));
    assert_eq!((s.nodeport_addresses, s.timeouts.udp_opening_s), (NodePortAddresses::All, 45));
}

#[test]
fn verbosity_is_a_level() {
    for (verbosity, level) in
        [(0, "info"), (3, "info"), (4, "debug"), (5, "debug"), (6, "trace"), (10, "trace")]
    {
        let log = config(&typed(&format!("logging: {{verbosity: {verbosity}}}"))).log;
        assert_eq!(log.filter, level, "{verbosity}");
    }
}

/// kube-proxy falls back to lenient decoding of unknown and doubled fields.
#[test]
fn unknown_and_doubled_fields_are_named_and_ignored() {
    let text = typed(
        "metadata: {name: config}\nudpIdleTimeout: 250ms\nipvs: {ipSet: {hashSize: 1}, strictArp: true}",
    );
    assert_eq!(
        notes(&text),
        (vec![], ["ipvs.ipSet", "ipvs.strictArp", "metadata", "udpIdleTimeout"].map(String::from).into())
    );
    let twice = config(&typed("conntrack: {udpTimeout: 10s}\nconntrack: {udpTimeout: 20s}"));
    assert_eq!(twice.settings.timeouts.udp_opening_s, 20);
    let reason = twice.notes.unwrap().duplicate.unwrap();
    assert!(reason.contains("duplicate") && reason.contains("conntrack"), "{reason}");
    assert!(config(&typed("")).notes.unwrap().duplicate.is_none());
}

#[test]
fn a_wrong_field_stops_the_start_with_path_value_and_reason() {
    for (lines, message) in [
        ("conntrack: {udpTimeout: -3s}", r#"conntrack.udpTimeout: "-3s": must not be negative"#),
        ("conntrack: {udpStreamTimeout: -1h}", r#"conntrack.udpStreamTimeout: "-1h": must not be negative"#),
        (
            "conntrack: {tcpEstablishedTimeout: -1m30s}",
            r#"conntrack.tcpEstablishedTimeout: "-1m30s": must not be negative"#,
        ),
        (
            "conntrack: {tcpCloseWaitTimeout: -1ns}",
            r#"conntrack.tcpCloseWaitTimeout: "-1ns": must not be negative"#,
        ),
        ("conntrack: {maxPerCore: -1}", "conntrack.maxPerCore: -1: must not be negative"),
        ("conntrack: {min: -1}", "conntrack.min: -1: must not be negative"),
        (
            "conntrack: {min: many}",
            r#"conntrack.min: "many": must be an integer from -2147483648 to 2147483647"#,
        ),
        (
            "conntrack: {udpTimeout: 30}",
            r#"conntrack.udpTimeout: 30: must be a duration in quotes, such as "30s" or "1h0m0s""#,
        ),
        (
            "conntrack: {udpTimeout: 1 day}",
            r#"conntrack.udpTimeout: "1 day": must be a duration in quotes, such as "30s" or "1h0m0s""#,
        ),
        ("conntrack: 5", "conntrack: 5: must be a mapping"),
        ("configSyncPeriod: -1s", r#"configSyncPeriod: "-1s": must be greater than 0"#),
        ("iptables: {syncPeriod: -1s}", r#"iptables.syncPeriod: "-1s": must be greater than 0"#),
        ("iptables: {minSyncPeriod: -1s}", r#"iptables.minSyncPeriod: "-1s": must not be negative"#),
        (
            "iptables: {syncPeriod: 500ms}",
            r#"iptables.syncPeriod: "500ms": must be greater than or equal to iptables.minSyncPeriod"#,
        ),
        (
            "mode: nftables\nnftables: {syncPeriod: 1s, minSyncPeriod: 2s}",
            r#"nftables.syncPeriod: "1s": must be greater than or equal to nftables.minSyncPeriod"#,
        ),
        ("iptables: {masqueradeBit: 32}", "iptables.masqueradeBit: 32: must be within the range [0, 31]"),
        (
            "mode: nftables\nnftables: {masqueradeBit: -1}",
            "nftables.masqueradeBit: -1: must be within the range [0, 31]",
        ),
        (
            "mode: ipvs\nipvs: {excludeCIDRs: [192.0.2.0/24, x]}",
            r#"ipvs.excludeCIDRs[1]: "x": must be a valid CIDR"#,
        ),
        ("mode: ipvs\nipvs: {tcpTimeout: -1s}", r#"ipvs.tcpTimeout: "-1s": must not be negative"#),
        ("oomScoreAdj: 1001", "oomScoreAdj: 1001: must be within the range [-1000, 1000]"),
        ("clientConnection: {burst: -1}", "clientConnection.burst: -1: must not be negative"),
        ("clientConnection: {qps: fast}", r#"clientConnection.qps: "fast": must be a number"#),
        (
            "bindAddress: 10.10.12.11:2000",
            r#"bindAddress: "10.10.12.11:2000": not a valid textual representation of an IP address"#,
        ),
        ("healthzBindAddress: localhost", r#"healthzBindAddress: "localhost": must be IP:port"#),
        ("healthzBindAddress: localhost:1", r#"healthzBindAddress: "localhost": must be a valid IP"#),
        ("metricsBindAddress: 127.0.0.1:0", r#"metricsBindAddress: "0": must be a valid port"#),
        ("metricsBindAddress: '[::1]:99999'", r#"metricsBindAddress: "99999": must be a valid port"#),
        ("mode: userspace", r#"mode: "userspace": must be iptables, ipvs, nftables or blank"#),
        (
            "nodePortAddresses: [primary, 10.0.0.0/8]",
            r#"nodePortAddresses[0]: "primary": can't use both 'primary' and CIDRs"#,
        ),
        (
            "nodePortAddresses: [10.0.0.0/8, 10.0.0.1]",
            r#"nodePortAddresses[1]: "10.0.0.1": must be a valid CIDR"#,
        ),
        ("nodePortAddresses: 10.0.0.0/8", r#"nodePortAddresses: "10.0.0.0/8": must be a list of strings"#),
        ("nodePortAddresses: [[]]", "nodePortAddresses[0]: []: must be a string"),
        (
            "detectLocalMode: Pods",
            r#"detectLocalMode: "Pods": must be ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix or blank"#,
        ),
        ("detectLocalMode: BridgeInterface", r#"detectLocal.bridgeInterface: "": must not be empty"#),
        ("detectLocalMode: InterfaceNamePrefix", r#"detectLocal.interfaceNamePrefix: "": must not be empty"#),
        (
            "detectLocalMode: ClusterCIDR\nclusterCIDR: 10.0.0.0",
            r#"clusterCIDR: "10.0.0.0": must be a valid CIDR"#,
        ),
        (
            "detectLocalMode: ClusterCIDR\nclusterCIDR: 10.0.0.0/8,10.0.0.0/16",
            r#"clusterCIDR: "10.0.0.0/8,10.0.0.0/16": must be a single CIDR or a dual-stack pair of CIDRs"#,
        ),
        ("logging: {format: xml}", r#"logging.format: "xml": must be text, json or blank"#),
        ("logging: {verbosity: -1}", "logging.verbosity: -1: must be an integer from 0 to 4294967295"),
        ("featureGates: {A: 1}", "featureGates.A: 1: must be true or false"),
        ("enableProfiling: 1", "enableProfiling: 1: must be true or false"),
        ("hostnameOverride: 7", "hostnameOverride: 7: must be a string"),
        (
            "showHiddenMetricsForVersion: new",
            r#"showHiddenMetricsForVersion: "new": must be MAJOR.MINOR or blank"#,
        ),
    ] {
        assert_eq!(refusal(&typed(lines)), format!("config.yaml: {message}"), "{lines}");
    }
}

/// kube-proxy's validation does not look at them either.
#[test]
fn sections_of_other_modes_are_not_held_to_rules() {
    settings("ipvs: {tcpTimeout: -1s, excludeCIDRs: [x]}\nnftables: {masqueradeBit: 99, syncPeriod: -1s}");
    settings("mode: ipvs\nipvs: {minSyncPeriod: 0s, syncPeriod: 500ms}\niptables: {syncPeriod: -1s}");
    settings("clusterCIDR: nonsense\ndetectLocalMode: NodeCIDR");
}

/// What passes kube-proxy's rules and not the option's own is reported with the field's name.
#[test]
fn the_options_own_checks_name_the_field() {
    let error = with_file(&typed("hostnameOverride: node_1"), &[]).unwrap_err().to_string();
    assert!(error.contains("hostnameOverride: \"node_1\": not the name of a node"), "{error}");
    let error =
        with_file(&typed("conntrack: {tcpEstablishedTimeout: 2000000h}"), &[]).unwrap_err().to_string();
    assert!(error.contains("conntrack.tcpEstablishedTimeout: \"7200000000s\": out of range"), "{error}");
}

#[test]
fn other_types_are_refused_and_files_without_a_type_are_the_agents_own() {
    let wanted = "must be kubeproxy.config.k8s.io/v1alpha1 (kubeproxy.config.k8s.io/v1alpha1 KubeProxyConfiguration is the \
                  only type that can be read; a file of the agent's own options has neither apiVersion nor kind)";
    let newer = typed("").replace("v1alpha1", "v1alpha2");
    assert_eq!(
        refusal(&newer),
        format!("config.yaml: apiVersion: \"kubeproxy.config.k8s.io/v1alpha2\": {wanted}")
    );
    assert_eq!(refusal("kind: KubeProxyConfiguration\n"), format!("config.yaml: apiVersion: null: {wanted}"));
    let map = refusal("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: ConfigMap\n");
    assert!(map.starts_with("config.yaml: kind: \"ConfigMap\": must be KubeProxyConfiguration ("), "{map}");
    assert_eq!(with_file("hostnameOverride: n\n", &[]).unwrap().notes, None);
    // JSON is YAML.
    let json = format!(r#"{{"apiVersion":"{API_VERSION}","kind":"{KIND}","hostnameOverride":"n"}}"#);
    assert_eq!(config(&json).settings.node_name, "n");
}

/// docs/configuration.md has a row for every field, and calls those ignored that are.
#[test]
fn the_documentation_has_a_row_for_every_field() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    let text = std::fs::read_to_string(path).unwrap();
    for field in fields::FIELDS {
        let start = format!("| `{}` | ", field.path);
        let rows: Vec<_> = text.lines().filter_map(|line| line.strip_prefix(&start)).collect();
        assert_eq!(rows.len(), 1, "rows of {}: {rows:?}", field.path);
        let says_ignored = rows[0].starts_with("ignored");
        assert_eq!(says_ignored, field.usage != fields::Use::Used, "{}: {}", field.path, rows[0]);
    }
}

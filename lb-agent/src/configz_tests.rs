use clap::FromArgMatches as _;

use super::*;
use crate::{
    cli::{self, Cli, Command},
    config,
};

/// /configz of an agent that was started with these arguments.
fn shown(arguments: &[&str]) -> Value {
    let matches = cli::command().try_get_matches_from(["lb-agent", "run"].iter().chain(arguments)).unwrap();
    let Command::Run(args) = Cli::from_arg_matches(&matches).unwrap().command else { panic!("run") };
    configz(&config::load(&args, matches.subcommand_matches("run").unwrap()).unwrap().settings)
}

#[test]
fn h7_configz_has_the_names_of_kube_proxy() {
    let shown = shown(&[
        "--hostname-override=node1",
        "--kubeconfig=/etc/lb/kubeconfig",
        "--master=https://user:secret@192.0.2.9:6443",
        "--nodeport-addresses=192.0.2.0/24,2001:db8::/64",
        "--tcp-established-timeout=90m",
        "--metrics-bind-address=",
    ]);
    // Names: pkg/proxy/apis/config/types.go. Durations: Go's time.Duration.String.
    assert_eq!(
        shown["kubeproxy.config.k8s.io"],
        json!({
            "kind": "KubeProxyConfiguration",
            "Mode": "ebpf",
            "HostnameOverride": "node1",
            "ClientConnection": {"Kubeconfig": "/etc/lb/kubeconfig"},
            "HealthzBindAddress": "0.0.0.0:10256",
            "MetricsBindAddress": "",
            "NodePortAddresses": ["192.0.2.0/24", "2001:db8::/64"],
            "Linux": {"MasqueradeAll": false, "Conntrack": {
                "TCPEstablishedTimeout": "1h30m0s",
                "UDPTimeout": "30s",
                "UDPStreamTimeout": "2m0s",
            }},
        })
    );
    assert!(!shown.to_string().contains("secret"), "{shown}");
}

#[test]
fn h7_configz_shows_every_option() {
    let shown =
        shown(&["--hostname-override=node1", "--source=manifests:/m", "--nodeport-addresses=primary"]);
    assert_eq!(shown["kubeproxy.config.k8s.io"]["NodePortAddresses"], json!(["primary"]));
    let own = shown["lb-agent"].as_object().unwrap();
    assert_eq!(
        (&own["source"], &own["socketLb"], &own["xdp"]),
        (&"manifests:/m".into(), &"host".into(), &"auto".into())
    );
    assert_eq!((&own["snatPorts"], &own["tcpClosingTimeout"]), (&"10240-29999".into(), &"120s".into()));
    // Options that kube-proxy has, that hold credentials or paths to them, and those of the log.
    let elsewhere = [
        "config",
        "kubeconfig",
        "master",
        "hostname-override",
        "nodeport-addresses",
        "masquerade-all",
        "healthz-bind-address",
        "metrics-bind-address",
        "log-format",
        "log-level",
        "help",
    ];
    let command = cli::command();
    let run = command.find_subcommand("run").unwrap();
    for option in run.get_arguments().filter_map(|a| a.get_long()).filter(|o| !elsewhere.contains(o)) {
        let mut key: String = String::new();
        for (i, word) in option.split('-').enumerate() {
            let (first, rest) = word.split_at(1);
            key += &if i == 0 { word.to_owned() } else { first.to_uppercase() + rest };
        }
        let key = key.replace("Ips", "IPs").replace("Nodeports", "NodePorts");
        assert!(own.contains_key(&key), "--{option} is not shown as {key}");
    }
}

#[test]
fn h7_durations_are_written_as_go_does() {
    for (seconds, text) in [(0, "0s"), (59, "59s"), (60, "1m0s"), (86_400, "24h0m0s"), (3_661, "1h1m1s")] {
        assert_eq!(go_duration(seconds), text);
    }
}

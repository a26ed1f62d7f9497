//! The command line from outside: exit codes, and what is said on which stream.

use std::process::{Command, Output};

/// The binary with an environment that says nothing.
fn lb_agent(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lb-agent"));
    command.args(args).env_clear().envs(env.iter().copied());
    command.output().unwrap()
}

/// Code 2, one line on standard error, nothing on standard output.
fn refused(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    text.trim_end().to_owned()
}

#[test]
fn a_wrong_value_is_named_with_where_it_was_given() {
    let flag = lb_agent(&["run", "--xdp", "on"], &[("LB_XDP", "native")]);
    assert_eq!(refused(&flag), "error: flag --xdp: \"on\": unknown; allowed: auto, native, generic, off");
    let env = lb_agent(&["run"], &[("LB_XDP", "on")]);
    assert_eq!(
        refused(&env),
        "error: environment variable LB_XDP: \"on\": unknown; allowed: auto, native, generic, off"
    );
    let list = lb_agent(&["run"], &[("LB_NODEPORT_ADDRESSES", "192.0.2.0/24,x")]);
    assert!(
        refused(&list).starts_with("error: environment variable LB_NODEPORT_ADDRESSES: \"x\": not a CIDR")
    );

    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "maxFlows: none\n").unwrap();
    let path = file.path().to_str().unwrap();
    let from_file = lb_agent(&["run"], &[("LB_CONFIG", path)]);
    assert!(refused(&from_file).starts_with(&format!("error: {path}: maxFlows: \"none\": ")));
    // The environment wins over the file, and is wrong too.
    let both = lb_agent(&["run", "--config", path], &[("LB_MAX_FLOWS", "0")]);
    assert!(refused(&both).starts_with("error: environment variable LB_MAX_FLOWS: \"0\": nothing would fit"));
    std::fs::write(file.path(), "maxFlow: 1\n").unwrap();
    let unknown = refused(&lb_agent(&["run", "--config", path], &[]));
    assert!(
        unknown.contains(path) && unknown.contains("maxFlow") && unknown.contains("maxFlows"),
        "{unknown}"
    );
}

#[test]
fn unknown_flags_and_commands_are_refused() {
    for args in [&["run", "--no-such-flag"][..], &["walk"], &["services", "-o", "xml"], &[]] {
        let output = lb_agent(args, &[]);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}: {output:?}");
    }
}

#[test]
fn help_goes_to_standard_output_and_names_every_way() {
    let output = lb_agent(&["run", "--help"], &[]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    for part in
        ["--tcp-established-timeout", "LB_TCP_ESTABLISHED_TIMEOUT", "[default: 24h]", "nodePortAddresses"]
    {
        assert!(text.contains(part), "{part} not in\n{text}");
    }
    // Help must not show what the environment holds.
    let output = lb_agent(&["run", "--help"], &[("LB_MASTER", "https://user:secret@host")]);
    assert!(!String::from_utf8(output.stdout).unwrap().contains("secret"));
    let version = lb_agent(&["--version"], &[]);
    assert_eq!(
        String::from_utf8(version.stdout).unwrap(),
        format!("lb-agent {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn a_kube_proxy_configuration_is_read_and_its_fields_are_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    std::fs::write(file.path(), format!("{head}conntrack:\n  udpTimeout: -3s\n")).unwrap();
    let wrong = refused(&lb_agent(&["run", "--config", path], &[]));
    assert_eq!(wrong, format!("error: {path}: conntrack.udpTimeout: \"-3s\": must not be negative"));

    // A directory that cannot be a bpffs ends the agent after it has said what it thinks of the file.
    let text = format!("{head}mode: ipvs\nipvs: {{scheduler: lc}}\noomScoreAdj: -5\nudpIdleTimeout: 1s\n");
    std::fs::write(file.path(), text).unwrap();
    let output = lb_agent(&["run", "--config", path, "--state-dir", "/proc/lb", "--log-format", "json"], &[]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let log = String::from_utf8(output.stderr).unwrap();
    let fields = |message: &str| -> Vec<serde_json::Value> {
        let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        lines
            .filter(|l| l["message"].as_str().is_some_and(|m| m.contains(message)))
            .map(|l| l["fields"].clone())
            .collect()
    };
    assert_eq!(fields("mean nothing here"), ["ipvs.scheduler, oomScoreAdj"], "{log}");
    assert_eq!(fields("has no such fields"), ["udpIdleTimeout"], "{log}");
}

//! What is in `deploy/`, as far as it can be checked without a cluster: every document is of a kind and shape that the
//! Kubernetes API knows, the agent takes the options it is given, and the role covers what the sources ask for.

use std::{collections::BTreeSet, fs, path::Path};

use clap::CommandFactory as _;
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{ConfigMap, Container, EnvVar, PodSpec, ServiceAccount},
    rbac::v1::{ClusterRole, ClusterRoleBinding},
};
use lb_agent::cli::Cli;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

fn read(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(file);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn documents() -> Vec<Value> {
    let documents: Vec<Option<Value>> = serde_saphyr::from_multiple(&read("kubernetes.yaml")).unwrap();
    documents.into_iter().flatten().collect()
}

/// The document as `T`. Fields that `T` does not know would be dropped in silence: they are found by writing it again.
fn strict<T: DeserializeOwned + Serialize>(document: &Value) -> T {
    let object: T = serde_json::from_value(document.clone()).unwrap();
    let known = serde_json::to_value(&object).unwrap();
    assert_known(document, &known, document["kind"].as_str().unwrap_or("?"));
    object
}

fn assert_known(given: &Value, known: &Value, path: &str) {
    match given {
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = format!("{path}.{name}");
                let known = known.get(name).unwrap_or_else(|| panic!("the API has no field {path}"));
                assert_known(value, known, &path);
            }
        }
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                assert_known(item, &known[i], &format!("{path}[{i}]"));
            }
        }
        scalar => assert_eq!(scalar, known, "{path}"),
    }
}

/// The only document of a kind.
fn the<T: DeserializeOwned + Serialize>(kind: &str) -> T {
    let mut found = documents().into_iter().filter(|d| d["kind"] == kind);
    let document = found.next().unwrap_or_else(|| panic!("no {kind}"));
    assert!(found.next().is_none(), "more than one {kind}");
    strict(&document)
}

fn pod() -> PodSpec {
    the::<DaemonSet>("DaemonSet").spec.unwrap().template.spec.unwrap()
}

fn agent(pod: &PodSpec) -> &Container {
    pod.containers.iter().find(|c| c.name == "lb-agent").unwrap()
}

fn env(container: &Container) -> &[EnvVar] {
    container.env.as_deref().unwrap_or_default()
}

#[test]
fn every_document_is_one_that_the_api_knows() {
    let kinds: Vec<String> =
        documents().iter().map(|d| format!("{}/{}", d["apiVersion"], d["kind"]).replace('"', "")).collect();
    let rbac = "rbac.authorization.k8s.io/v1";
    let expected = [
        "v1/ConfigMap".to_owned(),
        "v1/ServiceAccount".to_owned(),
        format!("{rbac}/ClusterRole"),
        format!("{rbac}/ClusterRoleBinding"),
        "apps/v1/DaemonSet".to_owned(),
    ];
    assert_eq!(kinds, expected);
    the::<ConfigMap>("ConfigMap");
    the::<ServiceAccount>("ServiceAccount");
    the::<DaemonSet>("DaemonSet");
}

#[test]
fn names_that_refer_to_each_other_agree() {
    let account: ServiceAccount = the("ServiceAccount");
    let role: ClusterRole = the("ClusterRole");
    let binding: ClusterRoleBinding = the("ClusterRoleBinding");
    let daemon_set: DaemonSet = the("DaemonSet");
    assert_eq!(binding.role_ref.name, role.metadata.name.clone().unwrap());
    let [subject] = &binding.subjects.unwrap()[..] else { panic!("one subject") };
    assert_eq!(Some(&subject.name), account.metadata.name.as_ref());
    assert_eq!(subject.namespace, account.metadata.namespace);
    assert_eq!(daemon_set.metadata.namespace, account.metadata.namespace);

    let spec = daemon_set.spec.unwrap();
    let selected = spec.selector.match_labels.unwrap();
    let labels = spec.template.metadata.unwrap().labels.unwrap();
    assert!(selected.iter().all(|(key, value)| labels.get(key) == Some(value)), "{selected:?}, {labels:?}");
    let pod = spec.template.spec.unwrap();
    assert_eq!(pod.service_account_name, account.metadata.name);
    let volumes: BTreeSet<&String> = pod.volumes.iter().flatten().map(|v| &v.name).collect();
    let containers = pod.containers.iter().chain(pod.init_containers.iter().flatten());
    for mount in containers.flat_map(|c| c.volume_mounts.iter().flatten()) {
        assert!(volumes.contains(&mount.name), "no volume {}", mount.name);
    }
    let config: ConfigMap = the("ConfigMap");
    let from = agent(&pod).env_from.as_deref().unwrap_or_default();
    assert!(from.iter().any(|f| f.config_map_ref.as_ref().map(|r| &r.name) == config.metadata.name.as_ref()));
}

#[test]
fn the_agent_takes_its_arguments_and_variables() {
    let pod = pod();
    let container = agent(&pod);
    let args = container.args.clone().unwrap().into_iter().map(|a| a.replace("$(NODE_NAME)", "worker-1"));
    let given = Cli::command().try_get_matches_from(["lb-agent".to_owned()].into_iter().chain(args)).unwrap();
    assert_eq!(given.subcommand_name(), Some("run"));

    let run = Cli::command();
    let run = run.find_subcommand("run").unwrap();
    let variables: BTreeSet<&str> =
        run.get_arguments().filter_map(|a| a.get_env()).filter_map(|e| e.to_str()).collect();
    let config: ConfigMap = the("ConfigMap");
    let config = config.data.unwrap();
    assert!(config.contains_key("LB_MASTER"), "no ClusterIP works before the agent does");
    let named = env(container).iter().map(|v| v.name.as_str()).chain(config.keys().map(String::as_str));
    for name in named.filter(|name| *name != "NODE_NAME") {
        assert!(variables.contains(name), "no option is called {name}");
    }
}

#[test]
fn probes_ask_what_the_agent_serves() {
    let pod = pod();
    let container = agent(&pod);
    let port =
        container.ports.as_ref().unwrap().iter().find(|p| p.name.as_deref() == Some("healthz")).unwrap();
    // The default of --healthz-bind-address, which is kube-proxy's.
    assert_eq!(port.container_port, 10256);
    let path = |probe: &Option<k8s_openapi::api::core::v1::Probe>| {
        probe.clone().unwrap().http_get.unwrap().path.unwrap()
    };
    assert_eq!(path(&container.liveness_probe), "/livez");
    assert_eq!(path(&container.readiness_probe), "/readyz");
}

/// The sources list and watch four kinds (`source/kube.rs`), `healthcheck/events.rs` writes Events; nothing else is asked for.
#[test]
fn the_role_allows_what_the_agent_asks_for_and_no_more() {
    let role: ClusterRole = the("ClusterRole");
    let mut allowed = BTreeSet::new();
    for rule in role.rules.unwrap() {
        for group in rule.api_groups.iter().flatten() {
            for resource in rule.resources.iter().flatten() {
                for verb in &rule.verbs {
                    allowed.insert(format!("{verb} {resource}.{group}"));
                }
            }
        }
    }
    let mut needed = BTreeSet::new();
    for resource in
        ["services.", "nodes.", "endpointslices.discovery.k8s.io", "servicecidrs.networking.k8s.io"]
    {
        for verb in ["list", "watch"] {
            needed.insert(format!("{verb} {resource}"));
        }
    }
    needed.extend(["create events.events.k8s.io".to_owned(), "patch events.events.k8s.io".to_owned()]);
    assert_eq!(allowed, needed);
}

/// The three capabilities that the agent was seen to need (deploy/README.md).
#[test]
fn the_agent_is_not_privileged() {
    let pod = pod();
    let context = agent(&pod).security_context.clone().unwrap();
    assert!(!context.privileged.unwrap_or(false));
    assert_eq!(context.allow_privilege_escalation, Some(false));
    assert_eq!(context.read_only_root_filesystem, Some(true));
    let capabilities = context.capabilities.unwrap();
    assert_eq!(capabilities.drop.unwrap(), ["ALL"]);
    assert_eq!(capabilities.add.unwrap(), ["BPF", "NET_ADMIN", "PERFMON"]);
    assert_eq!(pod.host_network, Some(true));
    assert!(!pod.host_pid.unwrap_or(false));
}

#[test]
fn kind_has_no_proxy_of_its_own() {
    let kind: Value = serde_saphyr::from_str(&read("kind.yaml")).unwrap();
    assert_eq!(kind["kind"], "Cluster");
    assert_eq!(kind["apiVersion"], "kind.x-k8s.io/v1alpha4");
    assert_eq!(kind["networking"]["kubeProxyMode"], "none");
    assert_eq!(kind["nodes"].as_array().map(Vec::len), Some(3));
}

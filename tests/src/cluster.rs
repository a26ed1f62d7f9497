//! A small cluster: a client outside, a router, two nodes, two pods on each; IPv4 and IPv6.
//!
//! ```text
//!   client ── router ─┬─ node1 ─┬─ pod-1a
//!                     │         └─ pod-1b
//!                     └─ node2 ─┬─ pod-2a
//!                               └─ pod-2b
//! ```
//!
//! What a cluster has set up before any proxy starts is set up here: forwarding, routes from node to node, strict
//! reverse-path filters. The router sends LoadBalancer addresses, external IPs and (so that it can be tried from
//! outside) the ClusterIP range to node1.

mod layout;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::Context as _;

use crate::{
    agent::Agent,
    janitor::{Janitor, Thing},
    manifests::Manifests,
    netns::Netns,
    place::{Family, Pair, Place, cgroup_mount, sibling},
    traffic::Server,
};

/// The port that pods serve, TCP and UDP.
pub const POD_PORT: u16 = 8080;

/// How pods are connected to their node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// A routed veth for each pod, as kindnet does.
    PointToPoint,
    /// All pods on a bridge `cni0`, as the bridge plugin and flannel do.
    Bridge,
}

/// What kind of cluster to build.
#[derive(Clone, Debug)]
pub struct Options {
    pub layout: Layout,
    /// Checksum and segmentation offloads of all devices.
    pub offloads: bool,
    /// Added to the command line of every agent.
    pub agent_flags: Vec<String>,
    /// The agent; without it, the one that was built along with this program.
    pub agent: Option<PathBuf>,
}

impl Options {
    pub const fn new(layout: Layout) -> Self {
        Self { layout, offloads: true, agent_flags: Vec::new(), agent: None }
    }

    /// Adds a flag to the command line of every agent.
    #[must_use]
    pub fn flag(mut self, flag: &str) -> Self {
        self.agent_flags.push(flag.to_owned());
        self
    }

    /// Whether the sockets of pods are connected to backends directly.
    pub fn hooks_in_pods(&self) -> bool {
        self.agent_flags.iter().any(|f| f == "--socket-lb=all")
    }
}

/// A node with its pods.
pub struct Node {
    pub place: Place,
    pub pods: Vec<Place>,
    /// 1 or 2.
    pub number: u8,
    dir: PathBuf,
}

impl Node {
    /// Where the agent pins its maps and links.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("bpf")
    }

    /// The node's own addresses on its devices towards pods.
    pub fn gateway(&self) -> Pair {
        Pair::new(&format!("10.244.{}.1", self.number), &format!("fd00:10:244:{}::1", self.number))
    }

    /// The name of the device towards a pod.
    pub fn pod_device(pod: &Place) -> String {
        pod.name.replace("pod-", "veth")
    }
}

/// The whole cluster; taken down when dropped, or when this process ends in any other way.
pub struct Cluster {
    pub options: Options,
    pub client: Place,
    pub router: Netns,
    pub nodes: Vec<Node>,
    pub manifests: Manifests,
    /// Agents by node name.
    pub agents: BTreeMap<String, Agent>,
    servers: Vec<Server>,
    janitor: Janitor,
}

impl Cluster {
    /// Builds the cluster and starts a server in every pod. No agent runs yet.
    pub fn new(options: Options) -> anyhow::Result<Self> {
        let mut builder = Builder::new()?;
        let client = builder.place("client", "c", Pair::new("203.0.113.2", "2001:db8:203::2"), None)?;
        let router = builder.netns("r")?;
        let nodes = [1, 2].into_iter().map(|n| builder.node(n)).collect::<anyhow::Result<Vec<_>>>()?;
        let manifests = Manifests::create(&builder.dir.join("manifests"))?;
        let mut cluster = Self {
            options,
            client,
            router,
            nodes,
            manifests,
            agents: BTreeMap::new(),
            servers: Vec::new(),
            janitor: builder.janitor,
        };
        layout::connect(&cluster).context("cannot connect the cluster")?;
        cluster.start_servers()?;
        Ok(cluster)
    }

    fn start_servers(&mut self) -> anyhow::Result<()> {
        for pod in self.nodes.iter().flat_map(|n| &n.pods) {
            let addrs = Family::BOTH.map(|family| pod.addrs.socket(family, POD_PORT));
            self.servers.push(Server::start(pod, &pod.name, &addrs)?);
        }
        Ok(())
    }

    /// All pods, those of node1 first.
    pub fn pods(&self) -> impl Iterator<Item = &Place> {
        self.nodes.iter().flat_map(|n| &n.pods)
    }

    /// Everything that traffic can come from.
    pub fn places(&self) -> impl Iterator<Item = &Place> {
        self.pods().chain(self.nodes.iter().map(|n| &n.place)).chain([&self.client])
    }

    pub fn node(&self, number: u8) -> &Node {
        &self.nodes[usize::from(number) - 1]
    }

    /// A pod by its name, such as `pod-1a`.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn pod(&self, name: &str) -> &Place {
        self.pods().find(|p| p.name == name).expect("a pod of this cluster")
    }

    /// Starts the agent of a node and waits until it is ready.
    pub fn start_agent(&mut self, number: u8) -> anyhow::Result<()> {
        self.restart_agent(number, &[])
    }

    /// Ends the agent of a node, if there is one, starts another one with these flags beside those of the cluster, and
    /// waits until it is ready.
    pub fn restart_agent(&mut self, number: u8, flags: &[&str]) -> anyhow::Result<()> {
        self.launch_agent(number, flags)?;
        self.agent(number).wait_ready()
    }

    /// The same without waiting.
    pub fn launch_agent(&mut self, number: u8, flags: &[&str]) -> anyhow::Result<()> {
        let name = self.node(number).place.name.clone();
        drop(self.agents.remove(&name));
        let all: Vec<String> =
            self.options.agent_flags.iter().cloned().chain(flags.iter().map(|f| (*f).to_owned())).collect();
        let program = self.options.agent.clone().map_or_else(|| sibling("lb-agent"), Ok)?;
        let node = self.node(number);
        let agent = Agent::start_build(&program, node, &node.dir.join("agent.log"), &self.manifests, &all)?;
        self.agents.insert(name, agent);
        Ok(())
    }

    /// Starts an agent on every node.
    pub fn start_agents(&mut self) -> anyhow::Result<()> {
        (1..=self.nodes.len() as u8).try_for_each(|n| self.start_agent(n))
    }

    pub fn agent(&mut self, number: u8) -> &mut Agent {
        let name = format!("node{number}");
        self.agents.get_mut(&name).expect("the agent of this node was started")
    }

    /// What the agents logged.
    pub fn logs(&self) -> String {
        self.agents
            .iter()
            .map(|(node, agent)| format!("--- agent on {node}\n{}\n", agent.log_tail()))
            .collect()
    }

    /// Takes everything down and tells whether that worked.
    pub fn finish(mut self) -> anyhow::Result<()> {
        self.agents.clear();
        self.servers.clear();
        self.janitor.finish()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.agents.clear();
        self.servers.clear();
        if let Err(e) = self.janitor.finish() {
            eprintln!("{e:#}");
        }
    }
}

/// Makes namespaces, cgroups and directories, each after the janitor knows of it.
struct Builder {
    /// First part of every name: unique among the processes of this machine.
    prefix: String,
    dir: PathBuf,
    cgroup: PathBuf,
    janitor: Janitor,
}

impl Builder {
    fn new() -> anyhow::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("lbe{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let (dir, cgroup) = (std::env::temp_dir().join(&prefix), cgroup_mount()?.join(&prefix));
        let mut janitor = Janitor::start()?;
        janitor.will_remove(&Thing::Cgroup(cgroup.clone()))?;
        janitor.will_remove(&Thing::Dir(dir.clone()))?;
        make_dir(&dir)?;
        make_dir(&cgroup)?;
        Ok(Self { prefix, dir, cgroup, janitor })
    }

    fn netns(&mut self, short: &str) -> anyhow::Result<Netns> {
        let name = format!("{}-{short}", self.prefix);
        self.janitor.will_remove(&Thing::Netns(name.clone()))?;
        Netns::create(&name)
    }

    fn place(
        &mut self,
        name: &str,
        short: &str,
        addrs: Pair,
        inside: Option<&Path>,
    ) -> anyhow::Result<Place> {
        let cgroup = inside.unwrap_or(&self.cgroup).join(name);
        make_dir(&cgroup)?;
        Ok(Place { name: name.to_owned(), netns: self.netns(short)?, cgroup, addrs })
    }

    fn node(&mut self, number: u8) -> anyhow::Result<Node> {
        let name = format!("node{number}");
        let addrs = Pair::new(&format!("172.18.0.1{number}"), &format!("fd00:18::1{number}"));
        let place = self.place(&name, &format!("n{number}"), addrs, None)?;
        let mut pods = Vec::new();
        for (letter, host) in [("a", 10), ("b", 11)] {
            let addrs =
                Pair::new(&format!("10.244.{number}.{host}"), &format!("fd00:10:244:{number}::{host}"));
            let id = format!("{number}{letter}");
            pods.push(self.place(&format!("pod-{id}"), &format!("p{id}"), addrs, Some(&place.cgroup))?);
        }
        let dir = self.dir.join(name);
        make_dir(&dir)?;
        Ok(Node { place, pods, number, dir })
    }
}

fn make_dir(dir: &Path) -> anyhow::Result<()> {
    fs::create_dir(dir).with_context(|| format!("cannot make {}", dir.display()))
}

//! A node under test in which only the kernel works.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd as _, OwnedFd},
    path::Path as FilePath,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::real::KubeProxy;
use crate::{
    bench::{
        forward::{
            Node,
            cast::{ACK, BACKEND_PORT, Flows, SERVICE_PORT, backend_address, service_address},
            chain::{BACKENDS4, BACKENDS6, Chain, End, node_address4, node_address6},
            hot::UDP4,
            objects::ENDPOINTS,
            run::{Exit, Path},
            sink::Expect,
            stream,
        },
        kube_proxy::{self, Cluster, Mode, Proto, Rules, Service},
        sys::{self, ProgType},
    },
    place::Family,
};

/// Where the Services' addresses are.
const SERVICES4: &str = "10.96.0.0/12";
const SERVICES6: &str = "fd00:96::/108";

/// nft's rules for IPv6 are for no more Services than these: its cost per packet does not depend on their number, the
/// time to load them does.
pub const SERVICES_V6: u32 = 1_000;

/// Has connections tracked, and does nothing else.
const CONNTRACK: &str = "table inet tracked {
    chain forward { type filter hook forward priority 0; ct state established,related accept; }
}";

/// What the kernel does with packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Plain,
    Conntrack,
    Rules(Mode),
}

pub struct Kernel {
    pub way: Way,
    pub node: Node<Vec<OwnedFd>>,
    /// How long its rules took to load.
    pub loaded_in: Duration,
    _kube_proxy: Option<KubeProxy>,
}

impl Kernel {
    /// Without Services.
    pub fn forwarding(way: Way) -> Result<Self> {
        Self::new(way, |chain| match way {
            Way::Conntrack => chain.node.command(&["nft", "-f", "-"], CONNTRACK).map(|_| ()),
            _ => Ok(()),
        })
    }

    /// With rules as kube-proxy lays them out.
    pub fn serving(mode: Mode, services: u32) -> Result<Self> {
        Self::new(Way::Rules(mode), |chain| {
            load(chain, mode, Family::V4, services)?;
            match mode {
                Mode::Nftables => load(chain, mode, Family::V6, services.min(SERVICES_V6)),
                Mode::Iptables => Ok(()),
            }
        })
    }

    fn new(way: Way, set_up: impl FnOnce(&Chain) -> Result<()>) -> Result<Self> {
        let started = Instant::now();
        let node = Node::new(1, |chain| {
            // Services are routed, as on nodes with a default route: what is not translated goes on.
            chain.route_to(0, End::Server, SERVICES4, SERVICES6)?;
            set_up(chain)?;
            passing(chain)
        })?;
        Ok(Self { way, node, loaded_in: started.elapsed(), _kube_proxy: None })
    }

    /// With kube-proxy itself.
    pub fn kube_proxy(program: &FilePath, services: u32) -> Result<Self> {
        let mut kernel = Self::new(Way::Rules(Mode::Nftables), |_| Ok(()))?;
        let started = Instant::now();
        let running = KubeProxy::start(program, &kernel.node.chain, services)?;
        let asking = Flows { first_client: ASKING, recorded: true, ..Flows::flood(UDP4, services) };
        running.serves(&kernel.requests(&asking)?)?;
        (kernel.loaded_in, kernel._kube_proxy) = (started.elapsed(), Some(running));
        Ok(kernel)
    }

    /// Requests, ready to be timed; what the sink looks at is the same as behind the agent, where addresses are
    /// translated.
    pub fn requests(&self, flows: &Flows) -> Result<Path<'_>> {
        let stream = flows.requests(&self.node.chain, 0, ACK);
        let expect = match self.way {
            Way::Plain | Way::Conntrack => one_hop_further(flows.untouched()),
            // Flows without number are too many to have a record.
            Way::Rules(_) if flows.count > RECORDED => flows.translated(0, None),
            Way::Rules(_) => flows.translated(0, Some(&stream::table(flows.count)?)),
        };
        self.node.path(0, End::Client, &[&stream], Exit::Outside(End::Server), &expect)
    }

    /// Opens the flows of a path, and has each answered once: the kernel has its short cut for flows with answers.
    pub fn open(&self, path: &Path, flows: &Flows) -> Result<()> {
        path.deliver(flows.count, true)?;
        match self.way {
            Way::Plain => return Ok(()),
            Way::Conntrack => {
                let answers = flows.turned_round(&self.node.chain, 0, ACK);
                let out = Exit::Outside(End::Client);
                let back = self.node.path(0, End::Server, &[&answers], out, &flows.answered())?;
                back.deliver(flows.count, true).context("answers")?;
            }
            Way::Rules(_) => answer(&self.node, path, flows)?,
        }
        path.deliver(flows.count, true)?;
        let (tracked, unanswered) = self.tracked()?;
        let given_up = if self._kube_proxy.is_some() { tracked } else { 0 };
        ensure!(
            tracked >= flows.count && unanswered <= given_up,
            "{tracked} flows are tracked, {unanswered} of them without an answer; {} should be",
            flows.count
        );
        Ok(())
    }

    /// Flows that the kernel tracks, and those of them without an answer.
    fn tracked(&self) -> Result<(u32, u32)> {
        let text = self.node.chain.node.run(|| Ok(fs::read_to_string("/proc/thread-self/net/nf_conntrack")?));
        let text = text.context("/proc/net/nf_conntrack")?;
        let unanswered = text.lines().filter(|l| l.contains("[UNREPLIED]")).count();
        Ok((text.lines().count() as u32, unanswered as u32))
    }

    /// How many flows the kernel tracks, and how many it may.
    pub fn tracks(&self) -> Result<[u32; 2]> {
        let read = |name: &str| -> Result<u32> {
            let path = format!("/proc/sys/net/netfilter/{name}");
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
            Ok(text.trim().parse()?)
        };
        self.node.chain.node.run(|| Ok([read("nf_conntrack_count")?, read("nf_conntrack_max")?]))
    }
}

/// A node where a program without anything to do sends frames on once they are in the stack (Linux 6.6).
pub fn empty_tc() -> Result<Node<Vec<OwnedFd>>> {
    Node::new(1, |chain| {
        let lane = &chain.lanes[0];
        let mut links = passing(chain)?;
        let program = sys::load(ProgType::SchedCls, &stream::redirect(lane.server.node))?;
        links.push(chain.node.run(|| sys::attach_tcx(program.as_fd(), lane.client.node))?);
        Ok(links)
    })
}

/// Lets frames into the stack of a node.
fn passing(chain: &Chain) -> Result<Vec<OwnedFd>> {
    let (pass, lane) = (stream::verdict(stream::XDP_PASS)?, &chain.lanes[0]);
    [lane.client.node, lane.server.node].map(|d| chain.attach(d, pass.as_fd())).into_iter().collect()
}

/// The client that asks whether kube-proxy is ready: of those that no flood has.
const ASKING: u32 = 3 << 10;
/// More flows have no record at the sink.
const RECORDED: u32 = 1 << 20;

/// The backends' answers, once for each flow of a path that has been sent.
pub fn answer<T>(node: &Node<T>, path: &Path, flows: &Flows) -> Result<()> {
    let table = path.table.as_ref().context("a path without a record")?;
    let answers = flows.replies(&node.chain, 0, ACK, table);
    let back = node.path(0, End::Server, &[&answers], Exit::Outside(End::Client), &flows.answered())?;
    back.deliver(flows.count, true).context("answers").map(|_| ())
}

fn load(chain: &Chain, mode: Mode, family: Family, services: u32) -> Result<()> {
    let rules = rules(mode, family, services);
    chain.node.run(|| kube_proxy::load(&rules))
}

/// For the Services that the agent is told of.
pub fn rules(mode: Mode, family: Family, services: u32) -> Rules {
    let is_v6 = family == Family::V6;
    let service = |s| Service {
        name: format!("bench/svc-{s}"),
        cluster_ip: service_address(s, is_v6),
        port: SERVICE_PORT,
        proto: Proto::Udp,
        node_port: None,
        load_balancer: None,
        endpoints: (0..ENDPOINTS)
            .map(|i| SocketAddr::new(backend_address(s, i, is_v6), BACKEND_PORT))
            .collect(),
    };
    let node_ip: IpAddr = match family {
        Family::V4 => node_address4(0, End::Client).into(),
        Family::V6 => node_address6(0, End::Client).into(),
    };
    let (pods, range) = if is_v6 { (BACKENDS6, SERVICES6) } else { (BACKENDS4, SERVICES4) };
    let cluster = Cluster {
        family,
        pods: Some(pods.into()),
        service_range: Some(range.into()),
        node_ips: vec![node_ip],
    };
    let services: Vec<_> = (0..services).map(service).collect();
    kube_proxy::rules(mode, &cluster, &services)
}

/// The same, forwarded.
fn one_hop_further(mut expect: Expect) -> Expect {
    let shape = expect.shape;
    // The hop limit is the upper byte beside IPv4's protocol, the lower one beside IPv6's.
    let (offset, hop) = if shape.is_v6 { (20, 1) } else { (22, 0x100) };
    for same in expect.same.iter_mut().filter(|s| s.offset == offset) {
        same.value -= hop;
    }
    expect
}

//! A node for one test: a thread with its own network and mount namespaces, a state directory, and other namespaces to put
//! the far ends of veths in. All of it goes with the threads.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{HashMap, Map, MapData};
use lb_agent::{
    datapath::{Datapath, DeviceSink, DeviceSinkError, Error, TcSetting, map_pin},
    settings::{Capacities, NodePortAddresses, Settings, SocketLb, SourceSettings, XdpSetting},
};
use lb_common::{LAYOUT_VERSION, conntrack::Timeouts, device::Device, maps::name, nat::PortRange};
use tokio::{runtime::Runtime, sync::watch};

/// Far more than anything here takes, also while the machine builds something.
const DEADLINE: Duration = Duration::from_secs(60);

/// Runs a test on a node of its own.
pub fn on_a_node(test: impl FnOnce(&Node) -> Result<()> + Send + 'static) {
    let thread = thread::spawn(move || -> Result<()> {
        unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS)?;
        run("mount --make-rprivate /")?;
        run("ip link set lo up")?;
        let dir = tempfile::Builder::new().prefix("lbd-").tempdir()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let result = test(&Node { dir: dir.path().to_owned(), runtime });
        unmount_below(dir.path())?;
        result
    });
    match thread.join() {
        Ok(result) => result.expect("the test's steps work"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// So that the directory can be removed.
fn unmount_below(dir: &Path) -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/thread-self/mounts")?;
    for mount in mounts.lines().filter_map(|line| line.split(' ').nth(1)) {
        if Path::new(mount).starts_with(dir) {
            run(&format!("umount -l {mount}"))?;
        }
    }
    Ok(())
}

fn unshare(flags: i32) -> Result<()> {
    // SAFETY: affects this thread only, which has no open descriptors that depend on it.
    let done = unsafe { libc::unshare(flags) };
    ensure!(done == 0, "unshare: {} (these tests need root)", std::io::Error::last_os_error());
    Ok(())
}

/// Runs a command line in this thread's namespaces and returns what it prints.
pub fn run(line: &str) -> Result<String> {
    let mut words = line.split_whitespace();
    let program = words.next().context("empty command")?;
    let output = Command::new(program).args(words).output().with_context(|| format!("running {program}"))?;
    if !output.status.success() {
        bail!("{line}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Another network namespace, kept by a thread.
pub struct Elsewhere {
    tid: libc::pid_t,
    _stop: mpsc::Sender<()>,
}

impl Elsewhere {
    pub fn new() -> Result<Self> {
        let (stop, stopped) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            let ready = unshare(libc::CLONE_NEWNET);
            // SAFETY: has no arguments and cannot fail.
            let tid = unsafe { libc::gettid() };
            let _ = tell.send(ready.map(|()| tid));
            // Until the other end is dropped.
            let _ = stopped.recv();
        });
        Ok(Self { tid: told.recv()??, _stop: stop })
    }

    /// A veth whose far end is in there.
    pub fn veth(&self, name: &str) -> Result<u32> {
        run(&format!("ip link add {name} type veth peer name {name}p netns {}", self.tid))?;
        run(&format!("ip link set {name} up"))?;
        ifindex(name)
    }

    /// Moves a device of this namespace there.
    pub fn adopt(&self, device: &str) -> Result<()> {
        run(&format!("ip link set {device} netns {}", self.tid)).map(drop)
    }
}

pub fn ifindex(device: &str) -> Result<u32> {
    let shown = run(&format!("ip -o link show dev {device}"))?;
    Ok(shown.split(':').next().unwrap_or_default().trim().parse()?)
}

pub struct Node {
    pub dir: PathBuf,
    runtime: Runtime,
}

impl Node {
    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    pub fn link_pin(&self, name: &str) -> PathBuf {
        self.state_dir().join(format!("v{LAYOUT_VERSION}/links")).join(name)
    }

    /// Without socket hooks and XDP, with small maps.
    pub fn settings(&self) -> Settings {
        Settings {
            source: SourceSettings::Manifests(self.dir.clone()),
            node_name: "node".into(),
            external_devices: vec![],
            pod_devices: vec![],
            xdp: XdpSetting::Off,
            socket_lb: SocketLb::Off,
            cgroup_root: None,
            state_dir: self.state_dir(),
            nodeport_addresses: NodePortAddresses::All,
            allow_external_ips: vec![],
            localhost_nodeports: true,
            service_cidrs: Vec::new(),
            masquerade_all: false,
            answer_ping: false,
            reset_gone_backends: true,
            healthz_bind_address: None,
            metrics_bind_address: None,
            snat_ports: PortRange::DEFAULT,
            trace_flows: false,
            capacities: Capacities {
                frontends: 1024,
                services: 1024,
                slots: 4096,
                backends: 1024,
                flows: 4096,
                keep_flows: false,
                flow_cache: 1024,
                affinity: 1024,
                sockets: 1024,
                source_ranges: 64,
            },
            timeouts: Timeouts::DEFAULT,
        }
    }

    /// Starts an agent's data path, and waits until the devices that are there have been dealt with.
    pub fn start(&self, settings: &Settings, tc: TcSetting) -> Result<Agent<'_>> {
        self.follow(free(|| Datapath::start_with(settings, tc))?, settings)
    }

    /// The second half of that.
    pub fn follow(&self, datapath: Datapath, settings: &Settings) -> Result<Agent<'_>> {
        let datapath = Arc::new(datapath);
        let sink = Arc::new(Sink::open(&settings.state_dir)?);
        let (tell, addresses) = watch::channel(BTreeSet::new());
        let follow = datapath.follow_devices(Arc::clone(&sink) as Arc<dyn DeviceSink>, tell);
        let mut first = addresses.clone();
        let task = self.runtime.block_on(async {
            let task = tokio::spawn(follow);
            let told = tokio::time::timeout(DEADLINE, first.changed()).await;
            told.context("the devices are not dealt with")?.context("following devices ended")?;
            anyhow::Ok(task)
        })?;
        Ok(Agent { datapath, sink, addresses, task, node: self })
    }
}

/// Repeats what finds the state directory locked: a command that another test is just starting holds copies of all
/// descriptors for a moment, until it executes.
pub fn free<T>(mut take: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
    let started = Instant::now();
    loop {
        match take() {
            Err(Error::StateDirInUse(_)) if started.elapsed() < DEADLINE => thread::yield_now(),
            other => return other,
        }
    }
}

/// A running data path.
pub struct Agent<'a> {
    pub datapath: Arc<Datapath>,
    pub sink: Arc<Sink>,
    pub addresses: watch::Receiver<BTreeSet<IpAddr>>,
    task: tokio::task::JoinHandle<Result<std::convert::Infallible, Error>>,
    node: &'a Node,
}

impl Agent<'_> {
    /// Lets the agent run until `done` says so.
    pub fn until(&self, what: &str, mut done: impl FnMut(&Self) -> bool) -> Result<()> {
        let started = Instant::now();
        while !done(self) {
            ensure!(
                started.elapsed() < DEADLINE,
                "not in time: {what}; attached {:?}",
                self.datapath.attached()
            );
            self.node.runtime.block_on(async { tokio::time::sleep(Duration::from_millis(2)).await });
        }
        Ok(())
    }

    /// Ends as a killed process does: nothing is taken down.
    pub fn stop(self) -> Result<()> {
        self.task.abort();
        self.node.runtime.block_on(async {
            let _ = self.task.await;
        });
        ensure!(Arc::strong_count(&self.datapath) == 1, "somebody still holds the data path");
        Ok(())
    }
}

/// `DEVICES` by its pin.
pub struct Sink(Mutex<HashMap<MapData, u32, Device>>);

impl Sink {
    fn open(state_dir: &Path) -> Result<Self> {
        let map = Map::HashMap(MapData::from_pin(map_pin(state_dir, name::DEVICES))?);
        Ok(Self(Mutex::new(HashMap::try_from(map)?)))
    }

    pub fn get(&self, ifindex: u32) -> Option<Device> {
        self.0.lock().ok()?.get(&ifindex, 0).ok()
    }
}

impl DeviceSink for Sink {
    fn put_device(&self, ifindex: u32, device: Device) -> Result<(), DeviceSinkError> {
        let mut map = self.0.lock().map_err(|e| e.to_string())?;
        Ok(map.insert(ifindex, device, 0)?)
    }

    fn delete_device(&self, ifindex: u32) -> Result<(), DeviceSinkError> {
        let mut map = self.0.lock().map_err(|e| e.to_string())?;
        // One that is not there is fine.
        let _ = map.remove(&ifindex);
        Ok(())
    }

    fn next_hops_changed(&self) {}
}

//! The one place that loads, pins and attaches the kernel programs, and that follows the node's devices.
//!
//! [`Datapath::start`] takes the state directory (and its lock), loads the programs with their pinned maps and attaches the
//! socket hooks. [`Datapath::follow_devices`] then keeps every device of this network namespace in `DEVICES` and under the
//! right programs until it is dropped. Nothing is detached when the agent ends: the pins keep everything in place,
//! and the next start puts its own programs behind the same links. [`cleanup`] is what removes it all.

mod attach;
mod bpf;
mod carry;
mod catch_up;
mod cgroup;
mod cleanup;
mod clsact;
mod definition;
mod devices;
mod elements;
mod error;
mod follow;
mod gates;
mod hurry;
mod load;
mod migrate;
mod neighbours;
pub(crate) mod netlink;
mod state_dir;
mod statistics;
mod trace;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use lb_common::device::Device;
use tokio::sync::watch::Sender;
use tracing::{info, warn};

pub use cleanup::{Removed, cleanup};
pub use devices::{Context, LinkFacts, Role, Rules, classify};
pub use error::Error;
pub use load::uninterrupted;
pub use state_dir::{map_pin, program_pin};

use crate::maps;
use crate::settings::{Settings, SocketLb, XdpSetting};
use load::Programs;
use migrate::Migration;
use state_dir::StateDir;

/// The kernel object (see build.rs).
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-ebpf"));

/// Who writes `DEVICES`.
pub trait DeviceSink: Send + Sync {
    fn put_device(&self, ifindex: u32, device: Device) -> Result<(), DeviceSinkError>;
    fn delete_device(&self, ifindex: u32) -> Result<(), DeviceSinkError>;
    /// A route, a device or a neighbour's address has changed: what is cached about ways out of the node is not true.
    fn next_hops_changed(&self);
}

/// Why an entry of `DEVICES` could not be written.
pub type DeviceSinkError = Box<dyn std::error::Error + Send + Sync>;

/// Which tc hook carries the programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TcSetting {
    /// tcx where the kernel has it (6.6), else clsact.
    #[default]
    Auto,
    Clsact,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tc {
    Tcx,
    Clsact,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Xdp {
    Native,
    Generic,
    None,
}

/// A device with programs on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    pub ifindex: u32,
    pub device: String,
    pub role: Role,
    pub tc: Tc,
    pub xdp: Xdp,
    /// XDP was asked for, and this is why it is not there.
    pub xdp_refused: Option<String>,
}

/// The loaded data path. Dropping it gives up the state directory's lock and leaves everything else in place.
#[derive(Debug)]
pub struct Datapath {
    state: StateDir,
    programs: Programs,
    attacher: attach::Attacher,
    rules: Rules,
    xdp: XdpSetting,
    socket_hooks: Option<PathBuf>,
    /// Maps whose old copies go once every hook runs our programs.
    migration: Mutex<Option<Migration>>,
    devices: Mutex<BTreeMap<u32, Followed>>,
    changes: Sender<()>,
}

/// What is known about a device with a role.
#[derive(Clone, Debug)]
struct Followed {
    /// As last looked at.
    facts: LinkFacts,
    role: Role,
    /// As last written to `DEVICES`.
    entry: Option<Device>,
    attached: Option<Attached>,
    /// Why it has no programs.
    failure: Option<String>,
}

impl Datapath {
    /// Takes the state directory, loads the programs with their maps and attaches the socket hooks. Devices follow with
    /// [`follow_devices`](Self::follow_devices), which must come soon: until then they run the programs of the last run.
    pub fn start(settings: &Settings) -> Result<Self, Error> {
        Self::start_with(settings, TcSetting::Auto)
    }

    /// The same with a choice of the tc hook.
    pub fn start_with(settings: &Settings, tc: TcSetting) -> Result<Self, Error> {
        load::check_kernel()?;
        let state = StateDir::prepare(&settings.state_dir)?;
        let object = load::parse()?;
        let capacities = migrate::with_room_for_flows(&state, settings.capacities);
        let settings = &Settings { capacities, ..settings.clone() };
        let mut migration = Migration::prepare(&object, &state, &settings.capacities)?;
        let programs = load::load(&object, &state, settings)?;
        migration.copy(&state)?;
        maps::survey(&state.maps(), migration.has_all())?;
        let socket_hooks = socket_hooks(settings, &programs, &state)?;
        migration.sockets_taken_over(&state)?;
        info!(
            state_dir = %settings.state_dir.display(),
            socket_hooks = ?socket_hooks,
            "kernel programs are loaded"
        );
        Ok(Self {
            state,
            programs,
            attacher: attach::Attacher::new(tc),
            rules: Rules::of(settings),
            xdp: settings.xdp,
            socket_hooks,
            migration: Mutex::new(Some(migration)),
            devices: Mutex::default(),
            changes: Sender::new(()),
        })
    }

    /// Keeps all devices of this network namespace in `DEVICES` and under our programs, and tells the namespace's own
    /// addresses. Runs until dropped; an error means that devices cannot be watched any more, and calling again starts anew.
    /// `addresses` is sent first after all devices of the start have been dealt with.
    pub fn follow_devices(
        self: &Arc<Self>,
        sink: Arc<dyn DeviceSink>,
        addresses: Sender<BTreeSet<IpAddr>>,
    ) -> impl Future<Output = Result<Infallible, Error>> + Send + 'static {
        follow::follow(Arc::clone(self), sink, addresses)
    }

    /// What is attached where.
    pub fn attached(&self) -> Vec<Attached> {
        self.followed().values().filter_map(|d| d.attached.clone()).collect()
    }

    /// Devices that should have programs and have not: name and reason. Tried again with every change and every 30 seconds.
    pub fn failed(&self) -> Vec<(String, String)> {
        let devices = self.followed();
        devices.values().filter_map(|d| Some((d.facts.name.clone(), d.failure.clone()?))).collect()
    }

    /// Tells when [`attached`](Self::attached) or [`failed`](Self::failed) has changed.
    pub fn changes(&self) -> tokio::sync::watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// The cgroup directory with the socket hooks; `None` if they are off or could not be attached.
    pub fn socket_hooks(&self) -> Option<&std::path::Path> {
        self.socket_hooks.as_deref()
    }

    fn followed(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, Followed>> {
        // Each change is one assignment: what a panicking thread left is whole.
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Without a cgroup v2 mount, and without an order to use a certain one, the rest goes on without socket hooks.
fn socket_hooks(
    settings: &Settings,
    programs: &Programs,
    state: &StateDir,
) -> Result<Option<PathBuf>, Error> {
    if settings.socket_lb == SocketLb::Off {
        cgroup::detach(state)?;
        return Ok(None);
    }
    match cgroup::attach(settings.cgroup_root.as_deref(), programs, state) {
        Ok(root) => Ok(Some(root)),
        Err(error) if settings.cgroup_root.is_none() => {
            warn!(%error, "no socket hooks: processes of the node itself do not reach ClusterIPs");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

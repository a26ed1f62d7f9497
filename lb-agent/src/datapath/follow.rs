//! Follows the devices: every change in the kernel's list becomes entries in `DEVICES` and programs on hooks.
//!
//! A device gets its entry before its programs, and loses its programs before its entry: a device without an entry counts as
//! a pod's.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    io,
    net::IpAddr,
    path::Path,
    sync::{Arc, PoisonError},
    time::Duration,
};

use lb_common::{
    device::{self, Device},
    maps::name,
};
use tokio::{
    sync::watch::Sender,
    time::{MissedTickBehavior, interval, sleep},
};
use tracing::{debug, info, warn};

use super::{
    Attached, Datapath, DeviceSink, Error, Followed, Role, Xdp, attach,
    devices::{self, LinkFacts, classify},
    migrate::Migration,
    state_dir,
    watch::{self, Change, Events},
};
use crate::maps::wait_in_place;

/// How often hooks are looked at without an event: somebody may have taken our programs off.
const RESYNC: Duration = Duration::from_secs(30);
/// How long to wait when the kernel's list cannot be read.
const RETRY: Duration = Duration::from_secs(1);

type Links = BTreeMap<u32, LinkFacts>;

/// See [`Datapath::follow_devices`].
pub async fn follow(
    datapath: Arc<Datapath>,
    sink: Arc<dyn DeviceSink>,
    addresses: Sender<BTreeSet<IpAddr>>,
) -> Result<Infallible, Error> {
    // First listen, then look: what happens in between is seen twice.
    let mut events = Events::open()?;
    let (connection, handle, _) = rtnetlink::new_connection()
        .map_err(|source| Error::Netlink { what: "opening a socket for device lists", source })?;
    let connection = AbortOnDrop(tokio::spawn(connection));
    let mut resync = interval(RESYNC);
    resync.set_missed_tick_behavior(MissedTickBehavior::Delay);
    resync.tick().await;
    let (unhandled, routes) = Default::default();
    let mut follower =
        Follower { datapath, sink, addresses, handle, unhandled, routes, settled: false, node: None };
    let (mut change, mut verify) = (Change::ALL, true);
    loop {
        if let Err(error) = follower.round(change, verify).await {
            if connection.0.is_finished() {
                return Err(error);
            }
            warn!(%error, "the device list cannot be read; trying again");
            sleep(RETRY).await;
            (change, verify) = (Change::ALL, true);
            continue;
        }
        (change, verify) = tokio::select! {
            change = next_change(&mut events, follower.sink.as_ref()) => (change?, false),
            _ = resync.tick() => (Change::ALL, true),
        };
    }
}

/// Waits for something to look at. Ways that have changed need no look.
async fn next_change(events: &mut Events, sink: &dyn DeviceSink) -> Result<Change, Error> {
    loop {
        let change = events.changed().await?;
        if change.next_hops {
            sink.next_hops_changed();
        }
        if change.devices || change.default_route {
            return Ok(change);
        }
    }
}

struct Follower {
    datapath: Arc<Datapath>,
    sink: Arc<dyn DeviceSink>,
    addresses: Sender<BTreeSet<IpAddr>>,
    handle: rtnetlink::Handle,
    /// Devices that a warning has been written about.
    unhandled: BTreeSet<u32>,
    /// Devices with a default route.
    routes: BTreeSet<u32>,
    /// The first round is done.
    settled: bool,
    /// As last written to `DEVICES`.
    node: Option<Device>,
}

impl Follower {
    /// Looks at the devices, acts, and tells the addresses.
    async fn round(&mut self, change: Change, verify: bool) -> Result<(), Error> {
        if change.default_route {
            self.routes = watch::default_routes(&self.handle).await?;
        }
        let links = watch::links(&self.handle).await?;
        let context = devices::Context { default_route: self.routes.clone(), ..watch::kinds(&links) };
        let roles = roles(&self.datapath, &links, &context);
        report_unhandled(&links, &mut self.unhandled);
        self.put_node(&links, &roles, &context);
        // Each hook takes the kernel's lock on devices, and a grace period.
        wait_in_place(|| self.datapath.apply(&links, &roles, verify, self.sink.as_ref()));
        let first = !std::mem::replace(&mut self.settled, true);
        if first {
            self.datapath.settle(&links, &roles, self.sink.as_ref()).await;
        }
        let current = devices::local_addresses(links.values());
        self.addresses.send_if_modified(|known| {
            // Also a node without addresses says so once.
            let tell = first || *known != current;
            *known = current;
            tell
        });
        Ok(())
    }
}

impl Follower {
    /// Keeps the entry for devices without an address of their own.
    fn put_node(&mut self, links: &Links, roles: &BTreeMap<u32, Role>, context: &devices::Context) {
        let external = links.values().filter(|link| roles.get(&link.ifindex) == Some(&Role::External));
        let entry = devices::node_entry(external, context);
        if self.node == Some(entry) {
            return;
        }
        match self.sink.put_device(device::ANY, entry) {
            Ok(()) => self.node = Some(entry),
            // The next round tries again.
            Err(error) => warn!(error, "the node's own addresses cannot be written to DEVICES"),
        }
    }
}

/// Ends the netlink connection's task together with its user.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn roles(datapath: &Datapath, links: &Links, context: &devices::Context) -> BTreeMap<u32, Role> {
    links
        .iter()
        .filter_map(|(ifindex, link)| Some((*ifindex, classify(link, &datapath.rules, context)?)))
        .collect()
}

/// Once per device: traffic that passes us by should not be a surprise.
fn report_unhandled(links: &Links, known: &mut BTreeSet<u32>) {
    known.retain(|ifindex| links.contains_key(ifindex));
    for link in links.values() {
        let matters = !link.ethernet && !link.loopback && link.up && !link.addresses.is_empty();
        if matters && known.insert(link.ifindex) {
            warn!(
                device = link.name,
                kind = link.kind,
                "not an Ethernet device: Services are not served on it (NodePorts and external IPs will not answer there)"
            );
        }
    }
}

impl Followed {
    fn new(link: &LinkFacts, role: Role) -> Self {
        Self { facts: link.clone(), role, entry: None, attached: None, failure: None }
    }

    fn is_settled(&self, link: &LinkFacts, role: Role) -> bool {
        self.facts == *link && self.role == role && self.failure.is_none() && self.attached.is_some()
    }
}

impl Datapath {
    /// Brings all devices to what they should be; looks at those that have not changed only to `verify` them.
    fn apply(&self, links: &Links, roles: &BTreeMap<u32, Role>, verify: bool, sink: &dyn DeviceSink) {
        let gone: Vec<u32> = self.followed().keys().copied().filter(|i| !roles.contains_key(i)).collect();
        let mut changed = !gone.is_empty();
        for ifindex in gone {
            self.forget(ifindex, sink);
        }
        for (ifindex, role) in roles {
            let Some(link) = links.get(ifindex) else { continue };
            let known = self.followed().get(ifindex).cloned();
            if known.as_ref().is_some_and(|d| !verify && d.is_settled(link, *role)) {
                continue;
            }
            let mut device = known.unwrap_or_else(|| Followed::new(link, *role));
            let before = (device.attached.clone(), device.failure.clone());
            device.facts.clone_from(link);
            device.role = *role;
            match self.ensure(link, &mut device, sink) {
                Ok(()) => device.failure = None,
                Err(error) => {
                    let reason = error.to_string();
                    // A device may go while we look; its event is on the way.
                    if is_gone(&error) {
                        debug!(device = link.name, reason, "device is gone");
                    } else if device.failure.as_ref() != Some(&reason) {
                        warn!(device = link.name, reason, "no programs on this device");
                    }
                    device.failure = Some(reason);
                }
            }
            changed |= before != (device.attached.clone(), device.failure.clone());
            self.followed().insert(*ifindex, device);
        }
        if changed {
            self.changes.send_replace(());
        }
    }

    fn ensure(&self, link: &LinkFacts, device: &mut Followed, sink: &dyn DeviceSink) -> Result<(), Error> {
        put_entry(link, device, sink)?;
        let pins = self.state.links();
        if self.has_flows_to_move() {
            return self.attacher.beside(link, &self.programs, &pins);
        }
        let tc = self.attacher.tc(link, &self.programs, &pins)?;
        let wanted = devices::wanted_xdp(link, device.role, self.xdp);
        let (xdp, xdp_refused) = match &device.attached {
            // A refusal stands until the agent starts again: each attempt may reset the device's queues.
            Some(before) if before.xdp_refused.is_some() && wanted != Xdp::None => {
                (Xdp::None, before.xdp_refused.clone())
            }
            // The list may be older than what we attached since; absent means that somebody took it off.
            Some(before) if before.xdp == wanted && (wanted == Xdp::None || link.xdp_program.is_some()) => {
                (wanted, None)
            }
            _ => self.attacher.xdp(link, wanted, &self.programs, &pins)?,
        };
        let attached = Attached {
            ifindex: link.ifindex,
            device: link.name.clone(),
            role: device.role,
            tc,
            xdp,
            xdp_refused,
        };
        if device.attached.as_ref() != Some(&attached) {
            info!(device = link.name, role = ?device.role, ?tc, ?xdp, "programs are attached");
        }
        device.attached = Some(attached);
        // The kernel sends no event about XDP links: that others may send frames here now, nobody else says.
        put_entry(link, device, sink)
    }

    /// A device that is gone, or has no role any more.
    fn forget(&self, ifindex: u32, sink: &dyn DeviceSink) {
        let name = self.followed().remove(&ifindex).map_or_else(String::new, |d| d.facts.name);
        if let Err(error) = attach::release(ifindex, &self.state.links()) {
            warn!(device = name, ifindex, %error, "programs cannot be taken off");
        }
        if let Err(error) = sink.delete_device(ifindex) {
            warn!(device = name, ifindex, error, "DEVICES entry cannot be deleted");
        }
        info!(device = name, ifindex, "device is gone or not ours any more");
    }

    /// After the first round: every hook runs our programs, so what earlier runs left can go.
    async fn settle(self: &Arc<Self>, links: &Links, roles: &BTreeMap<u32, Role>, sink: &dyn DeviceSink) {
        if self.has_flows_to_move() {
            if let Some(Err(error)) = self.blocking(Self::switch_flows).await {
                warn!(%error, "flows cannot be moved to the new table: new ones of the last moment may break");
            }
            wait_in_place(|| self.apply(links, roles, true, sink));
        }
        if let Some(Err(error)) = self.blocking(Self::finish_migration).await {
            warn!(%error, "the rest of an old map cannot be copied: new flows of the last moment may break");
        }
        wait_in_place(|| {
            if let Err(error) = self.supersede_other_versions() {
                warn!(%error, "what another version of the agent left cannot be removed; run lb-agent cleanup once");
            }
            self.forget_strangers(sink, links);
        });
    }

    /// Copying millions of flows takes seconds.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Option<T> {
        let datapath = Arc::clone(self);
        tokio::task::spawn_blocking(move || work(&datapath)).await.ok()
    }

    /// True while our programs stand beside those of the last run.
    fn has_flows_to_move(&self) -> bool {
        self.migration().as_ref().is_some_and(Migration::is_pending)
    }

    fn switch_flows(&self) -> Result<(), Error> {
        // A hook with the old programs alone would serve nobody without frontends.
        let everywhere = self.failed().is_empty();
        self.migration().as_mut().map_or(Ok(()), |migration| migration.switch(&self.state, everywhere))
    }

    fn finish_migration(&self) -> Result<(), Error> {
        let migration = self.migration().take();
        migration.map_or(Ok(()), |migration| migration.finish(&self.state))
    }

    fn migration(&self) -> std::sync::MutexGuard<'_, Option<Migration>> {
        self.migration.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Directories of other layouts: their links have done their work. Notes about clsact stay true and become ours.
    fn supersede_other_versions(&self) -> io::Result<()> {
        for version in self.state.other_versions()? {
            attach::adopt_notes(&version.join("links"), &self.state.links())?;
            state_dir::remove_tree(&version)?;
            info!(directory = %version.display(), "programs and maps of another layout version are removed");
        }
        Ok(())
    }

    /// Pins and entries of devices that went while no agent ran, or that have no role now.
    fn forget_strangers(&self, sink: &dyn DeviceSink, links: &Links) {
        let mut known = attach::known_devices(&self.state.links()).unwrap_or_default();
        known.extend(device_entries(&self.state.maps().join(name::DEVICES)));
        let followed: BTreeSet<u32> = self.followed().keys().copied().collect();
        let strangers: BTreeSet<u32> = known.into_iter().filter(|i| !followed.contains(i)).collect();
        for ifindex in strangers {
            debug!(ifindex, here = links.contains_key(&ifindex), "left by an earlier run");
            self.forget(ifindex, sink);
        }
    }
}

/// Tells the programs about a device, if there is news.
fn put_entry(link: &LinkFacts, device: &mut Followed, sink: &dyn DeviceSink) -> Result<(), Error> {
    let mut entry = devices::entry(link, device.role);
    if device.attached.as_ref().is_some_and(|a| a.xdp == Xdp::Native) {
        entry.flags |= device::flags::XDP_TARGET;
    }
    if device.entry != Some(entry) {
        sink.put_device(link.ifindex, entry)
            .map_err(|source| Error::Sink { device: link.name.clone(), source })?;
        device.entry = Some(entry);
    }
    Ok(())
}

fn is_gone(error: &Error) -> bool {
    matches!(error, Error::Attach { source, .. } if source.raw_os_error() == Some(libc::ENODEV))
}

/// Keys of `DEVICES`.
fn device_entries(pin: &Path) -> Vec<u32> {
    let Ok(map) = aya::maps::MapData::from_pin(pin) else { return Vec::new() };
    let Ok(map) = aya::maps::HashMap::<_, u32, Device>::try_from(aya::maps::Map::HashMap(map)) else {
        return Vec::new();
    };
    map.keys().filter_map(Result::ok).filter(|ifindex| *ifindex != device::ANY).collect()
}

//! The kernel object in a network namespace of its own, its maps filled by hand, its programs run on single packets by
//! BPF_PROG_TEST_RUN.

use std::{
    cell::Cell,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd as _, OwnedFd},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{
        Array, HashMap, Map, MapData, PerCpuArray,
        lpm_trie::{Key, LpmTrie},
    },
    programs::{SchedClassifier, TestRun, TestRunOptions, Xdp},
    util::nr_cpus,
};
use lb_agent::datapath::uninterrupted;
use lb_common::{
    Addr, Be16, Be32, V4, V6,
    addr::v6,
    affinity::MemberKey,
    backend::{self, Backend},
    bystander::{self, Bit},
    cidr::{ServiceCidr, ServiceCidrs},
    conntrack::{self, Flow},
    device::{self, Device, Neighbour},
    flow_cache,
    frontend::{FrontendKey, FrontendValue, ServiceRecord, ServiceStats, SlotRange},
    maps::{capacity, global, name, program},
    source::{self, SourceRange},
    tuple::Tuple,
    verdict::Counter,
};

/// Some ticks of the kernel: a flow is cached from the tick after its first packet on.
pub const TICKS: Duration = Duration::from_millis(40);

/// Which program to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Ingress,
    Egress,
    Xdp,
}

/// What a program returned, by the names of its hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// TCX_NEXT, XDP_PASS.
    Pass,
    /// TC_ACT_SHOT, XDP_DROP.
    Drop,
    /// TC_ACT_REDIRECT, XDP_REDIRECT.
    Redirect,
    /// XDP_TX.
    Tx,
}

/// A device of the lab's namespace.
#[derive(Clone, Copy, Debug)]
pub struct Dev {
    pub ifindex: u32,
}

/// See the module.
pub struct Lab {
    ebpf: Ebpf,
    /// Loopback, as a pod-side device.
    pub pod: Dev,
    next_slot: u32,
    next_service: u32,
    next_backend: u32,
    /// Length of `SERVICES`.
    records: u32,
    /// Packets may have been noted as nobody's business since the epochs were renewed.
    has_run: Cell<bool>,
}

/// Constants to load the object with.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub snat_ports: (u16, u16),
    pub flow_entries: u32,
    pub service_entries: u32,
    pub answer_ping: bool,
    pub masquerade_all: bool,
    /// Slots of the flow cache, all CPUs together.
    pub flow_cache: u32,
    /// Ticks that the programs take for a second.
    pub jiffies_per_s: u32,
    /// All maps as large as the agent makes them by default.
    pub default_sizes: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            snat_ports: (10_240, 29_999),
            flow_entries: 4096,
            service_entries: 64,
            answer_ping: false,
            masquerade_all: false,
            flow_cache: 1024,
            jiffies_per_s: 250,
            default_sizes: false,
        }
    }
}

impl Lab {
    /// Moves the calling thread into a new network namespace and loads the object.
    pub fn new() -> Result<Self> {
        Self::with(Options::default())
    }

    pub fn with(options: Options) -> Result<Self> {
        // SAFETY: changes the calling thread only.
        let code = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        ensure!(code == 0, "unshare(CLONE_NEWNET): {} (needs root)", std::io::Error::last_os_error());
        ip("link set lo up")?;
        let (answer_ping, masquerade_all) = (u8::from(options.answer_ping), u8::from(options.masquerade_all));
        let cpus = nr_cpus().map_err(|(_, e)| e)? as u32;
        let cache_slots = flow_cache::slots_per_cpu(options.flow_cache, cpus);
        ensure!((cache_slots == 0) == (options.flow_cache == 0), "no slots for each of {cpus} CPUs");
        let records = if options.default_sizes { capacity::SERVICES } else { options.service_entries };
        let mut loader = EbpfLoader::new();
        loader
            .override_global(global::JIFFIES_PER_S, &options.jiffies_per_s, true)
            .override_global(global::SERVICE_RECORDS, &records, true)
            .map_max_entries(name::SERVICE_STATS, records * cpus)
            .override_global(global::FLOW_CACHE_SLOTS, &cache_slots, true)
            .override_global(global::LOG_LEVEL, &0u8, true)
            .override_global(global::SNAT_PORT_FIRST, &options.snat_ports.0, true)
            .override_global(global::SNAT_PORT_LAST, &options.snat_ports.1, true)
            .override_global(global::ANSWER_PING, &answer_ping, true)
            .override_global(global::MASQUERADE_ALL, &masquerade_all, true)
            .map_max_entries(name::FLOWS4, options.flow_entries)
            .map_max_entries(name::FLOWS6, options.flow_entries);
        for (map, entries) in flow_cache::lengths(cache_slots, cpus) {
            loader.map_max_entries(map, entries);
        }
        for (map, entries) in [
            (name::FRONTENDS4, 1024),
            (name::FRONTENDS6, 1024),
            (name::SERVICES, options.service_entries),
            (name::SERVICE_NAMES, 64),
            (name::SLOTS, 4096),
            (name::BACKENDS4, 256),
            (name::BACKENDS6, 256),
            (name::AFFINITY4, 256),
            (name::AFFINITY6, 256),
            (name::AFFINITY_MEMBERS, 256),
            (name::SOCKETS, 256),
            (name::FRAGMENTS4, 256),
            (name::FRAGMENTS6, 256),
            (name::HELD4, 64),
            (name::HELD6, 64),
        ] {
            if !options.default_sizes {
                loader.map_max_entries(map, entries);
            }
        }
        let mut ebpf = loader.load(lb_agent::datapath::OBJECT)?;
        for name in [program::TC_INGRESS, program::TC_EGRESS] {
            let p: &mut SchedClassifier = ebpf.program_mut(name).context("no such program")?.try_into()?;
            uninterrupted(|| p.load()).with_context(|| format!("load {name}"))?;
        }
        let p: &mut Xdp = ebpf.program_mut(program::XDP).context("no such program")?.try_into()?;
        uninterrupted(|| p.load()).with_context(|| format!("load {}", program::XDP))?;
        let mut lab = Self {
            ebpf,
            pod: Dev { ifindex: 1 },
            next_slot: 0,
            next_service: 1,
            next_backend: 1,
            records,
            has_run: Cell::new(false),
        };
        // As the agent does on a node where nothing is known yet.
        let mut bystanders = lab.array::<u64>(name::BYSTANDERS);
        (0..bystander::WORDS).try_for_each(|i| bystanders.set(i, u64::MAX, 0))?;
        Ok(lab)
    }

    /// Packets to this address are no bystanders.
    pub fn know_address(&mut self, addr: IpAddr) -> Result<()> {
        self.know(match addr {
            IpAddr::V4(a) => Bit::of_address::<V4>(&a.into()),
            IpAddr::V6(a) => Bit::of_address(&v6(a)),
        })
    }

    /// Whatever has this address or port is no bystander.
    fn know(&mut self, bit: Bit) -> Result<()> {
        let word = self.array::<u64>(name::BYSTANDERS).get(&bit.index(), 0)?;
        self.set_bystanders(bit.index(), word & !bit.mask())
    }

    /// Writes a word of `BYSTANDERS`.
    pub fn set_bystanders(&mut self, index: u32, word: u64) -> Result<()> {
        Ok(self.array(name::BYSTANDERS).set(index, word, 0)?)
    }

    fn hash<K: Pod, V: Pod>(&mut self, name: &str) -> HashMap<&mut MapData, K, V> {
        HashMap::try_from(self.ebpf.map_mut(name).unwrap_or_else(|| panic!("no map {name}"))).unwrap()
    }

    fn array<V: Pod>(&mut self, name: &str) -> Array<&mut MapData, V> {
        Array::try_from(self.ebpf.map_mut(name).unwrap_or_else(|| panic!("no map {name}"))).unwrap()
    }

    /// A new veth device towards the outside, with addresses, a peer that is up and a neighbour behind it.
    pub fn external(&mut self, name: &str, addrs: &[&str]) -> Result<Dev> {
        ip(&format!("link add {name} type veth peer name {name}p"))?;
        ip(&format!("link set {name} address 02:00:00:00:00:0a"))?;
        for dev in [name.to_string(), format!("{name}p")] {
            std::fs::write(format!("/proc/sys/net/ipv6/conf/{dev}/accept_dad"), "0").ok();
            ip(&format!("link set {dev} up"))?;
        }
        for a in addrs {
            let nodad = if a.contains(':') { "nodad" } else { "" };
            ip(&format!("addr add {a} dev {name} {nodad}"))?;
        }
        let dev = Dev { ifindex: ifindex(name)? };
        let first =
            |v6: bool| addrs.iter().map(|a| a.split('/').next().unwrap()).find(|a| a.contains(':') == v6);
        let value = Device {
            flags: device::flags::EXTERNAL,
            snat4: first(false).map(|a| a.parse::<Ipv4Addr>().unwrap().into()).unwrap_or_default(),
            snat6: first(true).map(|a| v6(a.parse::<Ipv6Addr>().unwrap())).unwrap_or_default(),
            mac: crate::frame::NODE_MAC,
            _pad: 0,
        };
        self.set_device(dev, value)?;
        Ok(dev)
    }

    /// Overrides what the data path knows about a device.
    pub fn set_device(&mut self, dev: Dev, device: Device) -> Result<()> {
        self.know(Bit::of_address(&device.snat4))?;
        self.know(Bit::of_address(&device.snat6))?;
        Ok(self.hash::<u32, Device>(name::DEVICES).insert(dev.ifindex, device, 0)?)
    }

    /// A new backend; returns its id.
    pub fn backend(&mut self, addr: (IpAddr, u16), local: bool) -> Result<u32> {
        let id = self.next_backend;
        self.next_backend += 1;
        let flags = backend::flags::IN_USE | if local { backend::flags::LOCAL } else { 0 };
        let port = Be16::new(addr.1);
        self.know(Bit::of_port(port))?;
        match addr.0 {
            IpAddr::V4(a) => {
                self.array(name::BACKENDS4).set(id, Backend::<V4>::new(a.into(), port, flags), 0)?
            }
            IpAddr::V6(a) => {
                self.array(name::BACKENDS6).set(id, Backend::<V6>::new(v6(a), port, flags), 0)?
            }
        }
        Ok(id)
    }

    fn slots(&mut self, ids: &[u32]) -> Result<SlotRange> {
        let base = self.next_slot;
        for id in ids {
            let slot = self.next_slot;
            self.array::<u32>(name::SLOTS).set(slot, *id, 0)?;
            self.next_slot += 1;
        }
        Ok(SlotRange::new(base, u32::try_from(ids.len())?))
    }

    /// A new Service record with these Cluster and Local backends.
    pub fn service(&mut self, cluster: &[u32], local: &[u32]) -> Result<u32> {
        let id = self.next_service;
        self.next_service += 1;
        self.set_service(id, cluster, local)?;
        Ok(id)
    }

    /// Gives a record new sets.
    pub fn set_service(&mut self, id: u32, cluster: &[u32], local: &[u32]) -> Result<()> {
        let record = ServiceRecord {
            cluster: self.slots(cluster)?,
            local: self.slots(local)?,
            affinity_timeout_s: 10_800,
            in_use: 1,
            _reserved: 0,
        };
        Ok(self.array(name::SERVICES).set(id, record, 0)?)
    }

    /// A frontend that names a record.
    pub fn frontend(&mut self, addr: (IpAddr, u16), proto: u8, service: u32, flags: u32) -> Result<()> {
        self.silent_frontend(addr, proto, service, flags)?;
        if self.has_run.take() { self.renew_epochs() } else { Ok(()) }
    }

    /// The same behind the back of the programs' caches.
    pub fn silent_frontend(
        &mut self,
        addr: (IpAddr, u16),
        proto: u8,
        service: u32,
        flags: u32,
    ) -> Result<()> {
        let value = FrontendValue { service, flags };
        let port = Be16::new(addr.1);
        self.know_address(addr.0)?;
        match addr.0 {
            IpAddr::V4(a) => self.hash::<FrontendKey<V4>, FrontendValue>(name::FRONTENDS4).insert(
                FrontendKey::new(a.into(), port, proto),
                value,
                0,
            )?,
            IpAddr::V6(a) => self.hash::<FrontendKey<V6>, FrontendValue>(name::FRONTENDS6).insert(
                FrontendKey::new(v6(a), port, proto),
                value,
                0,
            )?,
        }
        Ok(())
    }

    /// The entry about an address as a whole; `flags` has its kind.
    pub fn address(&mut self, addr: IpAddr, flags: u32) -> Result<()> {
        self.frontend((addr, 0), 0, 0, flags)
    }

    /// A range of ClusterIPs.
    pub fn service_cidr(&mut self, index: usize, net: IpAddr, bits: u32, flags: u32) -> Result<()> {
        match net {
            IpAddr::V4(net) => {
                let mask = Be32::new(u32::MAX << (32 - bits));
                let cidr = ServiceCidr::<V4> { net: net.into(), mask, flags, _pad: 0 };
                self.put_cidr(name::SERVICE_CIDRS4, index, cidr)
            }
            IpAddr::V6(net) => {
                let mask = v6(Ipv6Addr::from(u128::MAX << (128 - bits)));
                let cidr = ServiceCidr::<V6> { net: v6(net), mask, flags, _pad: 0 };
                self.put_cidr(name::SERVICE_CIDRS6, index, cidr)
            }
        }
    }

    fn put_cidr<A: Addr>(&mut self, map: &str, index: usize, cidr: ServiceCidr<A>) -> Result<()>
    where
        ServiceCidrs<A>: Pod,
    {
        let mut map = self.array::<ServiceCidrs<A>>(map);
        let mut all = map.get(&0, 0)?;
        all.ranges[index] = cidr;
        map.set(0, all, 0)?;
        if self.has_run.take() { self.renew_epochs() } else { Ok(()) }
    }

    /// A source range of a Service.
    pub fn source_range(&mut self, service: u32, net: IpAddr, bits: u32) -> Result<()> {
        fn admit<A: Addr>(lab: &mut Lab, map: &str, service: u32, addr: A, bits: u32) -> Result<()>
        where
            SourceRange<A>: Pod,
        {
            let map = lab.ebpf.map_mut(map).context("no such map")?;
            let mut trie = LpmTrie::<_, SourceRange<A>, u32>::try_from(map)?;
            let key = Key::new(SourceRange::<A>::prefix_bits(bits), SourceRange { service, addr });
            Ok(trie.insert(&key, source::ADMITTED, 0)?)
        }
        match net {
            IpAddr::V4(a) => admit(self, name::SOURCE_RANGES4, service, V4::from(a), bits),
            IpAddr::V6(a) => admit(self, name::SOURCE_RANGES6, service, v6(a), bits),
        }
    }

    /// Sets flags on every client's entry of the flow tables, as the agent does: caches do not believe what they noted before.
    pub fn flag_flows(&mut self, flags: u16) -> Result<()> {
        fn flag<A: Addr>(lab: &mut Lab, map: &str, flags: u16) -> Result<()>
        where
            Tuple<A>: Pod,
            Flow<A>: Pod,
        {
            let mut map = lab.hash::<Tuple<A>, Flow<A>>(map);
            let entries: Vec<_> = map.iter().collect::<Result<_, _>>()?;
            for (key, flow) in entries.into_iter().filter(|(_, f)| f.flags & conntrack::flags::REPLY == 0) {
                map.insert(key, Flow { flags: flow.flags | flags, ..flow }, 0)?;
            }
            Ok(())
        }
        flag::<V4>(self, name::FLOWS4, flags)?;
        flag::<V6>(self, name::FLOWS6, flags)?;
        self.renew_epochs()
    }

    pub fn member(&mut self, service: u32, backend: u32, bits: u32) -> Result<()> {
        Ok(self.hash::<MemberKey, u32>(name::AFFINITY_MEMBERS).insert(
            MemberKey { service, backend },
            bits,
            0,
        )?)
    }

    pub fn remove_member(&mut self, service: u32, backend: u32) -> Result<()> {
        Ok(self.hash::<MemberKey, u32>(name::AFFINITY_MEMBERS).remove(&MemberKey { service, backend })?)
    }

    /// Runs a program on a frame that came in by `dev`; returns what it did and the frame after.
    pub fn run(&self, hook: Hook, dev: Dev, frame: &[u8]) -> Result<(Action, Vec<u8>)> {
        self.has_run.set(true);
        let mut out = vec![0u8; frame.len() + 256];
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut out);
        let result = match hook {
            Hook::Xdp => {
                // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
                let len = u32::try_from(frame.len())?;
                let context: Vec<u8> =
                    [0, len, 0, dev.ifindex, 0, 0].iter().flat_map(|w| w.to_ne_bytes()).collect();
                options.ctx_in = Some(&context);
                let p: &Xdp = self.ebpf.program(program::XDP).context("no such program")?.try_into()?;
                p.test_run(options)?
            }
            Hook::Ingress | Hook::Egress => {
                let mut context = [0u8; 192];
                // struct __sk_buff: ifindex is the eleventh word.
                context[40..44].copy_from_slice(&dev.ifindex.to_ne_bytes());
                options.ctx_in = Some(&context);
                let name = if hook == Hook::Ingress { program::TC_INGRESS } else { program::TC_EGRESS };
                let p: &SchedClassifier = self.ebpf.program(name).context("no such program")?.try_into()?;
                p.test_run(options)?
            }
        };
        let action = match (hook, result.return_value as i32) {
            (Hook::Xdp, 2) | (Hook::Ingress | Hook::Egress, -1) => Action::Pass,
            (Hook::Xdp, 1) | (Hook::Ingress | Hook::Egress, 2) => Action::Drop,
            (Hook::Xdp, 4) | (Hook::Ingress | Hook::Egress, 7) => Action::Redirect,
            (Hook::Xdp, 3) => Action::Tx,
            (hook, code) => anyhow::bail!("{hook:?} returned {code}"),
        };
        out.truncate(result.data_size_out as usize);
        Ok((action, out))
    }

    /// A descriptor of the program at a hook, for what runs it in another way.
    pub fn program_fd(&self, hook: Hook) -> Result<OwnedFd> {
        self.has_run.set(true);
        let name = match hook {
            Hook::Ingress => program::TC_INGRESS,
            Hook::Egress => program::TC_EGRESS,
            Hook::Xdp => program::XDP,
        };
        let fd = self.ebpf.program(name).context("no such program")?.fd()?;
        Ok(fd.as_fd().try_clone_to_owned()?)
    }

    /// A descriptor of each map, for programs that are loaded in another way.
    pub fn map_fds(&self) -> Result<Vec<(String, OwnedFd)>> {
        let fd_of = |(name, map): (&str, &Map)| {
            let (Map::Array(data)
            | Map::HashMap(data)
            | Map::LruHashMap(data)
            | Map::LpmTrie(data)
            | Map::PerCpuArray(data)
            | Map::PerfEventArray(data)
            | Map::RingBuf(data)) = map
            else {
                anyhow::bail!("{name} is of no kind known here")
            };
            Ok((name.to_owned(), data.fd().as_fd().try_clone_to_owned()?))
        };
        self.ebpf.maps().map(fd_of).collect()
    }

    /// What the data path knows about a device.
    pub fn device(&mut self, dev: Dev) -> Result<Device> {
        Ok(self.hash::<u32, Device>(name::DEVICES).get(&dev.ifindex, 0)?)
    }

    /// All counters that are not zero.
    pub fn counters(&self) -> Result<Vec<(&'static str, u64)>> {
        let map: PerCpuArray<_, u64> =
            PerCpuArray::try_from(self.ebpf.map(name::COUNTERS).context("no map")?)?;
        let mut all = Vec::new();
        for (counter, label) in Counter::ALL {
            let sum: u64 = map.get(&(*counter as u32), 0)?.iter().sum();
            if sum > 0 {
                all.push((*label, sum));
            }
        }
        Ok(all)
    }

    /// Counters of a Service, over all CPUs.
    pub fn stats(&self, service: u32) -> Result<ServiceStats> {
        let map: Array<_, ServiceStats> =
            Array::try_from(self.ebpf.map(name::SERVICE_STATS).context("no map")?)?;
        let mut sum = ServiceStats::default();
        for cpu in 0..map.len() / self.records {
            let of_cpu = map.get(&(cpu * self.records + service), 0)?;
            sum.packets += of_cpu.packets;
            sum.bytes += of_cpu.bytes;
            sum.connections += of_cpu.connections;
            sum.xdp_packets += of_cpu.xdp_packets;
        }
        Ok(sum)
    }

    /// Empties the flow tables behind the programs' back.
    pub fn forget_flows(&mut self) -> Result<()> {
        fn clear<A: Addr>(lab: &mut Lab, map: &str) -> Result<()>
        where
            Tuple<A>: Pod,
            Flow<A>: Pod,
        {
            let mut map = lab.hash::<Tuple<A>, Flow<A>>(map);
            let keys: Vec<_> = map.keys().collect::<Result<_, _>>()?;
            keys.iter().try_for_each(|key| Ok(map.remove(key)?))
        }
        clear::<V4>(self, name::FLOWS4)?;
        clear::<V6>(self, name::FLOWS6)
    }

    /// Takes the tags of the flow cache away, and leaves its entries.
    pub fn clear_flow_tags(&mut self) -> Result<()> {
        for map in [name::FLOW_TAGS4, name::FLOW_TAGS6] {
            let mut tags = self.array::<flow_cache::Tags>(map);
            for i in 0..tags.len() {
                tags.set(i, flow_cache::Tags::default(), 0)?;
            }
        }
        Ok(())
    }

    /// Makes the last packet of the stack to every neighbour one of long ago.
    pub fn age_neighbours(&mut self) -> Result<()> {
        let mut map = self.hash::<Neighbour, u32>(name::NEIGHBOURS);
        let entries: Vec<_> = map.iter().collect::<Result<_, _>>()?;
        entries.into_iter().try_for_each(|(key, sent)| Ok(map.insert(key, sent.wrapping_sub(1 << 30), 0)?))
    }

    /// All epochs, to be put back by [`Self::set_epochs`]: then nobody has been told of what happened in between.
    pub fn epochs(&mut self) -> Result<Vec<u64>> {
        Ok(self.array::<u64>(name::FLOW_EPOCHS).iter().collect::<Result<_, _>>()?)
    }

    pub fn set_epochs(&mut self, epochs: &[u64]) -> Result<()> {
        let mut map = self.array::<u64>(name::FLOW_EPOCHS);
        (0..).zip(epochs).try_for_each(|(i, epoch)| Ok(map.set(i, *epoch, 0)?))
    }

    /// What the agent does when a flow or a way out has changed.
    pub fn renew_epochs(&mut self) -> Result<()> {
        let mut epochs = self.array::<u64>(name::FLOW_EPOCHS);
        (0..flow_cache::ALL_EPOCHS).try_for_each(|i| {
            let next = epochs.get(&i, 0)? + 1;
            Ok(epochs.set(i, next, 0)?)
        })
    }

    /// Number of flow entries of both families.
    pub fn flow_entries(&mut self) -> usize {
        self.hash::<Tuple<V4>, Flow<V4>>(name::FLOWS4).keys().count()
            + self.hash::<Tuple<V6>, Flow<V6>>(name::FLOWS6).keys().count()
    }

    /// Verified instructions of a program, the measure of its complexity.
    pub fn verified_instructions(&self, name: &str) -> Result<u32> {
        self.ebpf
            .program(name)
            .context("no such program")?
            .info()?
            .verified_instruction_count()
            .context("the kernel does not tell")
    }
}

/// Keeps the calling thread on the CPU that it runs on, until this is dropped: each CPU has a flow cache of its own.
pub struct OneCpu(libc::cpu_set_t);

impl OneCpu {
    pub fn here() -> Self {
        // SAFETY: sets of the size given, for the calling thread alone; all zeroes are an empty set.
        unsafe {
            let (mut before, mut here): (libc::cpu_set_t, libc::cpu_set_t) = std::mem::zeroed();
            libc::sched_getaffinity(0, size_of_val(&before), &mut before);
            libc::CPU_SET(libc::sched_getcpu() as usize, &mut here);
            libc::sched_setaffinity(0, size_of_val(&here), &here);
            Self(before)
        }
    }
}

impl Drop for OneCpu {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { libc::sched_setaffinity(0, size_of_val(&self.0), &self.0) };
    }
}

/// Runs `ip` in the calling thread's namespace.
pub fn ip(args: &str) -> Result<()> {
    let output = Command::new("ip").args(args.split_whitespace()).output().context("ip")?;
    ensure!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Of a device in the calling thread's namespace.
pub fn ifindex(name: &str) -> Result<u32> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: a valid C string.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(std::io::Error::last_os_error()).context("if_nametoindex"),
        i => Ok(i),
    }
}

/// The zero address of a family, for devices without one.
pub const NO_V4: V4 = Be32::new(0);

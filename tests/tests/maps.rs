//! The interpreter of map operations, the sweeper and the printing commands on real kernel maps. Needs root.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    EbpfLoader,
    maps::{
        Array, Map, MapData, MapType, PerCpuArray,
        lpm_trie::{Key, LpmTrie},
    },
    programs::Xdp,
};
use ipnet::IpNet;
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use lb_agent::{
    cli::Output,
    datapath::{self, DeviceSink as _},
    inspect,
    maps::{Counters, Devices, FlowTables, KernelClock, MapError, Maps, ServiceCounters, Table, survey},
    metrics::Metrics,
    plan::{
        ActualCidr, ActualService, ActualState, Departures, Retired,
        op::{Backend, Family, Frontend, MapOp, Protocol},
    },
    reconcile::{Core, NodeRules},
    settings::NodePortAddresses,
    source::{Kind, Object, ObjectRef},
    sweep::{Depth, FlowEntries, Pass, Sweeper},
};
use lb_common::{
    Be16, Be32, LAYOUT_VERSION, V4, V6, addr,
    affinity::MemberKey,
    bystander::{self, Bit},
    cidr::{self, ServiceCidr, ServiceCidrs},
    conntrack::{Flow, Timeouts, flags as flow_flags, tcp},
    device::{self, Device},
    flow_cache,
    frontend::{FrontendValue, ServiceRecord, ServiceStats, SlotRange, flags},
    maps::{name, program},
    proto,
    source::SourceRange,
    tuple::Tuple,
    verdict::Counter,
};
use serde_json::json;

/// A bpffs of its own with all maps pinned as the agent pins them. Everything goes when it is dropped.
struct State {
    dir: tempfile::TempDir,
}

impl State {
    fn new(capacities: &[(&'static str, u32)]) -> Result<Self> {
        let state = Self { dir: tempfile::Builder::new().prefix("lbc-").tempdir()? };
        let target = state.mount_point()?;
        // SAFETY: NUL-terminated strings that outlive the call.
        let rc =
            unsafe { libc::mount(c"bpf".as_ptr(), target.as_ptr(), c"bpf".as_ptr(), 0, std::ptr::null()) };
        anyhow::ensure!(rc == 0, "mount bpffs: {} (these tests need root)", std::io::Error::last_os_error());
        std::fs::create_dir_all(state.maps())?;
        std::fs::create_dir_all(state.version().join("programs"))?;
        let mut loader = EbpfLoader::new();
        for name in name::ALL {
            loader.map_pin_path(name, state.maps().join(name));
        }
        for (name, capacity) in capacities {
            loader.map_max_entries(name, *capacity);
        }
        let mut object = loader.load(datapath::OBJECT)?;
        let clock: &mut Xdp = object.program_mut(program::CLOCK).context("no lb_clock")?.try_into()?;
        clock.load()?;
        clock.pin(state.version().join("programs").join(program::CLOCK))?;
        Ok(state)
    }

    fn mount_point(&self) -> Result<std::ffi::CString> {
        Ok(std::ffi::CString::new(self.dir.path().as_os_str().as_encoded_bytes())?)
    }

    fn version(&self) -> PathBuf {
        self.dir.path().join(format!("v{LAYOUT_VERSION}"))
    }

    fn maps(&self) -> PathBuf {
        self.version().join("maps")
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if let Ok(target) = self.mount_point() {
            // SAFETY: a NUL-terminated string that outlives the call.
            unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        }
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn backend(addr: &str, port: u16, local: bool) -> Backend {
    Backend { addr: addr.parse().unwrap(), port, protocol: Protocol::Tcp, local }
}

fn frontend(addr: &str, port: u16) -> Frontend {
    Frontend { addr: addr.parse().unwrap(), port, protocol: Protocol::Tcp }
}

fn record(cluster: SlotRange, local: SlotRange) -> ServiceRecord {
    ServiceRecord { cluster, local, affinity_timeout_s: 10_800, in_use: 1, _reserved: 0 }
}

/// A Service with two IPv4 backends and one with one IPv6 backend.
fn two_services() -> Vec<MapOp> {
    let v4 = FrontendValue { service: 1, flags: flags::KIND_CLUSTER_IP | flags::AFFINITY };
    let node_port_flags = flags::KIND_NODE_PORT | flags::EXTERNAL_LOCAL | flags::AFFINITY;
    let node_port = FrontendValue { service: 1, flags: node_port_flags };
    let v6 = FrontendValue { service: 2, flags: flags::KIND_LOAD_BALANCER };
    vec![
        MapOp::NameService { service: 1, name: "default/web:http".into() },
        MapOp::NameService { service: 2, name: "default/web6:http".into() },
        MapOp::WriteBackend { id: 1, backend: backend("10.1.0.2", 8080, true) },
        MapOp::WriteBackend { id: 2, backend: backend("10.1.1.2", 8080, false) },
        MapOp::WriteBackend { id: 7, backend: backend("fd00::2", 8080, false) },
        MapOp::WriteSlots { base: 0, backends: vec![1, 2, 1] },
        MapOp::WriteSlots { base: 3, backends: vec![1] },
        MapOp::WriteSlots { base: 4, backends: vec![7] },
        MapOp::PutMember { key: MemberKey { service: 1, backend: 1 }, bits: 3 },
        MapOp::PutMember { key: MemberKey { service: 1, backend: 2 }, bits: 1 },
        MapOp::WriteService { service: 1, record: record(SlotRange::new(0, 3), SlotRange::new(3, 1)) },
        MapOp::WriteService { service: 2, record: record(SlotRange::new(4, 1), SlotRange::EMPTY) },
        MapOp::PutRange { service: 2, net: net("fd00:aa::/33") },
        MapOp::PutRange { service: 1, net: net("10.9.0.0/17") },
        MapOp::PutAddress { addr: ip("10.96.0.1"), kind: flags::KIND_CLUSTER_IP },
        MapOp::PutAddress { addr: ip("fd00:96::1"), kind: flags::KIND_LOAD_BALANCER },
        MapOp::PutFrontend { frontend: frontend("10.96.0.1", 80), value: v4 },
        MapOp::PutFrontend { frontend: frontend("fd00:96::1", 80), value: v6 },
        MapOp::PutFrontend { frontend: frontend("192.168.7.2", 30080), value: node_port },
        MapOp::Grace,
        MapOp::WriteCidr { index: 3, net: net("10.96.0.0/12") },
        MapOp::SwitchCidr { family: Family::V4, index: 3, flags: 3 },
        MapOp::WriteCidr { index: 0, net: net("fd00:96::/108") },
        MapOp::SwitchCidr { family: Family::V6, index: 0, flags: 1 },
    ]
}

fn state_of_two_services() -> ActualState {
    let service = |record, name: &str| ActualService { record, name: Some(name.into()) };
    let mut frontends = BTreeMap::new();
    for op in two_services() {
        if let MapOp::PutFrontend { frontend, value } = op {
            frontends.insert(frontend, value);
        }
    }
    ActualState {
        frontends,
        services: BTreeMap::from([
            (1, service(record(SlotRange::new(0, 3), SlotRange::new(3, 1)), "default/web:http")),
            (2, service(record(SlotRange::new(4, 1), SlotRange::EMPTY), "default/web6:http")),
        ]),
        slots: vec![1, 2, 1, 1, 7],
        backends4: BTreeMap::from([
            (1, backend("10.1.0.2", 8080, true)),
            (2, backend("10.1.1.2", 8080, false)),
        ]),
        backends6: BTreeMap::from([(7, backend("fd00::2", 8080, false))]),
        members: BTreeMap::from([
            (MemberKey { service: 1, backend: 1 }, 3),
            (MemberKey { service: 1, backend: 2 }, 1),
        ]),
        addresses: BTreeMap::from([
            (ip("10.96.0.1"), FrontendValue { service: 0, flags: flags::KIND_CLUSTER_IP }),
            (ip("fd00:96::1"), FrontendValue { service: 0, flags: flags::KIND_LOAD_BALANCER }),
        ]),
        ranges: BTreeSet::from([(1, net("10.9.0.0/17")), (2, net("fd00:aa::/33"))]),
        cidrs: BTreeMap::from([
            ((Family::V4, 3), ActualCidr { net: Some(net("10.96.0.0/12")), flags: 3 }),
            ((Family::V6, 0), ActualCidr { net: Some(net("fd00:96::/108")), flags: 1 }),
        ]),
    }
}

#[test]
fn what_is_applied_is_read_back_also_by_the_next_process() -> Result<()> {
    let state = State::new(&[])?;
    let mut maps = Maps::open(&state.maps())?;
    assert_eq!(maps.read_actual()?, ActualState::default());
    let applied = maps.apply(&two_services())?;
    assert_eq!((applied.done, applied.refused.len()), (two_services().len(), 0));
    assert_eq!(maps.read_actual()?, state_of_two_services());
    drop(maps);
    assert_eq!(Maps::open(&state.maps())?.read_actual()?, state_of_two_services());
    Ok(())
}

/// The programs read arrays through the kernel's own lookup, so the memory map and bpf(2) must agree on every byte.
#[test]
fn stores_through_memory_are_what_lookups_see() -> Result<()> {
    let state = State::new(&[])?;
    Maps::open(&state.maps())?.apply(&two_services())?;
    let array = [MapType::Array];
    let slots: Table<u32, u32> = Table::open(&state.maps(), name::SLOTS, &array)?;
    let seen: Vec<u32> = (0..6).map(|i| slots.get(&i).unwrap().unwrap()).collect();
    assert_eq!(seen, [1, 2, 1, 1, 7, 0]);
    let services: Table<u32, ServiceRecord> = Table::open(&state.maps(), name::SERVICES, &array)?;
    assert_eq!(services.get(&1)?, Some(record(SlotRange::new(0, 3), SlotRange::new(3, 1))));
    let backends: Table<u32, [u8; 8]> = Table::open(&state.maps(), name::BACKENDS4, &array)?;
    // 10.1.0.2, port 8080 in network order, IN_USE | LOCAL, TCP.
    assert_eq!(backends.get(&1)?, Some([10, 1, 0, 2, 0x1f, 0x90, 3, 6]));
    let backends: Table<u32, [u8; 20]> = Table::open(&state.maps(), name::BACKENDS6, &array)?;
    let expected = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0x1f, 0x90, 1, 6];
    assert_eq!(backends.get(&7)?, Some(expected));
    Ok(())
}

#[test]
fn the_last_element_of_every_array_can_be_written_and_none_beyond() -> Result<()> {
    let sizes = [(name::SLOTS, 1001), (name::BACKENDS4, 333), (name::BACKENDS6, 333), (name::SERVICES, 77)];
    let state = State::new(&sizes)?;
    let mut maps = Maps::open(&state.maps())?;
    maps.apply(&[
        MapOp::WriteSlots { base: 1000, backends: vec![5] },
        MapOp::WriteBackend { id: 332, backend: backend("10.1.0.2", 1, true) },
        MapOp::WriteBackend { id: 332, backend: backend("fd00::2", 1, true) },
        MapOp::WriteService { service: 76, record: record(SlotRange::new(1000, 1), SlotRange::EMPTY) },
    ])?;
    let read = maps.read_actual()?;
    assert_eq!((read.slots.len(), read.slots.last()), (1001, Some(&5)));
    for op in [
        MapOp::WriteSlots { base: 1000, backends: vec![5, 6] },
        MapOp::WriteBackend { id: 333, backend: backend("fd00::2", 1, true) },
        MapOp::ClearService { service: 77 },
    ] {
        let error = maps.apply(&[op]).unwrap_err();
        assert!(matches!(error, MapError::OutOfRange { .. }), "{error}");
    }
    Ok(())
}

#[test]
fn removal_leaves_nothing() -> Result<()> {
    let state = State::new(&[])?;
    let mut maps = Maps::open(&state.maps())?;
    maps.apply(&two_services())?;
    let applied = maps.apply(&[
        MapOp::DeleteFrontend { frontend: frontend("10.96.0.1", 80) },
        MapOp::DeleteFrontend { frontend: frontend("10.96.0.77", 80) },
        MapOp::DeleteFrontend { frontend: frontend("192.168.7.2", 30080) },
        MapOp::DeleteFrontend { frontend: frontend("fd00:96::1", 80) },
        MapOp::DeleteMember { key: MemberKey { service: 1, backend: 1 } },
        MapOp::DeleteMember { key: MemberKey { service: 1, backend: 2 } },
        MapOp::DeleteAddress { addr: ip("10.96.0.1") },
        MapOp::DeleteAddress { addr: ip("fd00:96::1") },
        MapOp::DeleteRange { service: 1, net: net("10.9.0.0/17") },
        MapOp::DeleteRange { service: 2, net: net("fd00:aa::/33") },
        MapOp::SwitchCidr { family: Family::V4, index: 3, flags: 0 },
        MapOp::SwitchCidr { family: Family::V6, index: 0, flags: 0 },
        MapOp::Grace,
        MapOp::ClearService { service: 1 },
        MapOp::ClearService { service: 2 },
        MapOp::ClearBackend { family: Family::V4, id: 1 },
        MapOp::ClearBackend { family: Family::V4, id: 2 },
        MapOp::ClearBackend { family: Family::V6, id: 7 },
    ])?;
    // One of the frontends never existed, which is as good as deleted.
    assert!(applied.refused.is_empty(), "{:?}", applied.refused);
    assert_eq!(maps.read_actual()?, ActualState::default());
    Ok(())
}

fn many_frontends(n: u32) -> Vec<MapOp> {
    let value = FrontendValue { service: 1, flags: flags::KIND_CLUSTER_IP };
    let v4 = |i: u32| IpAddr::from(Ipv4Addr::from(0x0a61_0000 + i));
    let v6 = |i: u32| IpAddr::from(Ipv6Addr::from((0xfd00_0097_u128 << 96) + u128::from(i)));
    (0..n)
        .flat_map(|i| [v4(i), v6(i)])
        .map(|addr| Frontend { addr, port: 80, protocol: Protocol::Udp })
        .map(|frontend| MapOp::PutFrontend { frontend, value })
        .collect()
}

#[test]
fn batches_and_single_writes_give_the_same() -> Result<()> {
    let put = many_frontends(10_000);
    let delete: Vec<MapOp> = put
        .iter()
        .step_by(3)
        .filter_map(|op| match op {
            MapOp::PutFrontend { frontend, .. } => Some(MapOp::DeleteFrontend { frontend: *frontend }),
            _ => None,
        })
        .collect();
    let mut results = Vec::new();
    for batches in [true, false] {
        let state = State::new(&[])?;
        let mut maps = Maps::open(&state.maps())?;
        if !batches {
            maps.without_batches();
        }
        assert_eq!(maps.apply(&put)?.done, put.len());
        assert_eq!(maps.apply(&delete)?.done, delete.len());
        results.push(maps.read_actual()?);
    }
    assert_eq!(results[0].frontends.len(), put.len() - delete.len());
    assert!(results[0] == results[1]);
    Ok(())
}

#[test]
fn a_full_map_is_named_with_its_option_and_stops_nothing_else() -> Result<()> {
    for batches in [true, false] {
        let state = State::new(&[(name::FRONTENDS4, 100), (name::AFFINITY_MEMBERS, 1)])?;
        let mut maps = Maps::open(&state.maps())?;
        if !batches {
            maps.without_batches();
        }
        let mut ops = two_services();
        ops.retain(|op| !matches!(op, MapOp::PutAddress { .. }));
        ops.extend(many_frontends(150));
        let applied = maps.apply(&ops)?;
        let refused: BTreeMap<_, _> =
            applied.refused.iter().map(|r| (r.map, (r.entries, r.is_full()))).collect();
        // 152 IPv4 frontends for 100 places, two members for one.
        let expected = BTreeMap::from([(name::FRONTENDS4, (52, true)), (name::AFFINITY_MEMBERS, (1, true))]);
        assert_eq!(refused, expected);
        let message = applied.refused.iter().find(|r| r.map == name::FRONTENDS4).map(|r| r.to_string());
        let expected =
            "52 entries of FRONTENDS4 could not be written: the map is full, raise --max-frontends";
        assert_eq!(message.as_deref(), Some(expected));
        assert_eq!(applied.done, ops.len() - 53);
        let read = maps.read_actual()?;
        assert_eq!(read.frontends.keys().filter(|f| f.addr.is_ipv4()).count(), 100);
        assert_eq!(read.frontends.keys().filter(|f| f.addr.is_ipv6()).count(), 151);
        // What is there already can still be changed in a full map.
        let value = FrontendValue { service: 9, flags: 0 };
        let change = [MapOp::PutFrontend { frontend: frontend("10.96.0.1", 80), value }];
        assert!(maps.apply(&change)?.refused.is_empty());
        assert_eq!(maps.read_actual()?.frontends[&frontend("10.96.0.1", 80)], value);
    }
    Ok(())
}

/// What the programs look up in a trie is what the agent wrote: the longest prefix of the record asked for, never another's.
#[test]
fn e1_source_ranges_are_found_by_record_and_address() -> Result<()> {
    let state = State::new(&[])?;
    let put = |service, range| MapOp::PutRange { service, net: net(range) };
    let ops = [put(7, "10.1.0.0/16"), put(7, "192.0.2.1/32"), put(8, "10.2.0.0/15"), put(7, "fd00:aa::/33")];
    assert_eq!(Maps::open(&state.maps())?.apply(&ops)?.done, 4);
    let trie = |name| -> Result<Map> { Ok(Map::LpmTrie(MapData::from_pin(state.maps().join(name))?)) };
    let four: LpmTrie<_, SourceRange<V4>, u32> = trie(name::SOURCE_RANGES4)?.try_into()?;
    let admits = |service, addr: [u8; 4]| {
        let data = SourceRange { service, addr: Ipv4Addr::from(addr).into() };
        four.get(&Key::new(SourceRange::<V4>::LOOKUP_BITS, data), 0).is_ok()
    };
    assert!(admits(7, [10, 1, 255, 255]) && admits(7, [192, 0, 2, 1]) && admits(8, [10, 3, 0, 1]));
    assert!(!admits(7, [10, 2, 0, 1]) && !admits(7, [192, 0, 2, 2]) && !admits(8, [10, 1, 0, 1]));
    assert!(!admits(0, [10, 1, 0, 1]) && !admits(9, [10, 1, 0, 1]));
    let six: LpmTrie<_, SourceRange<V6>, u32> = trie(name::SOURCE_RANGES6)?.try_into()?;
    let admits = |service, addr: &str| {
        let data = SourceRange { service, addr: addr::v6(addr.parse().unwrap()) };
        six.get(&Key::new(SourceRange::<V6>::LOOKUP_BITS, data), 0).is_ok()
    };
    assert!(admits(7, "fd00:aa:7fff::1") && !admits(7, "fd00:aa:8000::1") && !admits(8, "fd00:aa::1"));
    Ok(())
}

#[test]
fn tries_are_written_and_read_back_with_and_without_batches_and_say_when_they_are_full() -> Result<()> {
    for batches in [true, false] {
        let state = State::new(&[(name::SOURCE_RANGES4, 5000)])?;
        let mut maps = Maps::open(&state.maps())?;
        if !batches {
            maps.without_batches();
        }
        let range = |i: u32| (i % 3 + 1, IpNet::from(IpAddr::from(Ipv4Addr::from(0x0a00_0000 + i))));
        let put = |i| MapOp::PutRange { service: range(i).0, net: range(i).1 };
        let applied = maps.apply(&(0..5007).map(put).collect::<Vec<_>>())?;
        assert_eq!(applied.done, 5000);
        let refused: Vec<_> = applied.refused.iter().map(|r| (r.map, r.entries, r.is_full())).collect();
        assert_eq!(refused, [(name::SOURCE_RANGES4, 7, true)]);
        assert!(applied.refused[0].to_string().ends_with("raise --max-source-ranges"));
        let expected: BTreeSet<(u32, IpNet)> = (0..5000).map(range).collect();
        assert_eq!(maps.read_actual()?.ranges, expected);
        let delete = |i| MapOp::DeleteRange { service: range(i).0, net: range(i).1 };
        // The last ones do not exist, which is as good as deleted.
        let applied = maps.apply(&(1..5007).map(delete).collect::<Vec<_>>())?;
        assert!(applied.refused.is_empty(), "{:?}", applied.refused);
        assert_eq!(maps.read_actual()?.ranges, BTreeSet::from([range(0)]));
    }
    Ok(())
}

#[test]
fn c7_elements_of_service_cidrs_are_what_the_programs_read() -> Result<()> {
    let state = State::new(&[])?;
    let mut maps = Maps::open(&state.maps())?;
    maps.apply(&[
        MapOp::WriteCidr { index: 7, net: net("10.96.0.0/12") },
        MapOp::WriteCidr { index: 7, net: net("fd00:96::/108") },
    ])?;
    let array = [MapType::Array];
    let four: Table<u32, ServiceCidrs<V4>> = Table::open(&state.maps(), name::SERVICE_CIDRS4, &array)?;
    let six: Table<u32, ServiceCidrs<V6>> = Table::open(&state.maps(), name::SERVICE_CIDRS6, &array)?;
    let inside = |addr: &str| -> Result<bool> {
        Ok(match ip(addr) {
            IpAddr::V4(a) => four.get(&0)?.context("an element")?.flags_of(&a.into()) != 0,
            IpAddr::V6(a) => six.get(&0)?.context("an element")?.flags_of(&addr::v6(a)) != 0,
        })
    };
    assert!(!inside("10.96.0.1")? && !inside("fd00:96::1")?, "not active yet");
    maps.apply(&[Family::V4, Family::V6].map(|family| MapOp::SwitchCidr { family, index: 7, flags: 3 }))?;
    assert!(inside("10.111.255.255")? && !inside("10.112.0.0")? && !inside("10.95.255.255")?);
    assert!(inside("fd00:96::f:ffff")? && !inside("fd00:96::10:0")?);
    let beyond = MapOp::SwitchCidr { family: Family::V4, index: cidr::CAPACITY, flags: 1 };
    assert!(matches!(maps.apply(&[beyond]), Err(MapError::OutOfRange { .. })));
    // Somebody else's hand: no prefix.
    drop(maps);
    let strange = ServiceCidr { net: Be32::new(1), mask: Be32::new(0xff00_ff00), flags: 1, _pad: 0 };
    let mut all = four.get(&0)?.context("an element")?;
    all.ranges[0] = strange;
    four.put(&0, &all)?;
    let read = Maps::open(&state.maps())?.read_actual()?;
    assert_eq!(read.cidrs[&(Family::V4, 0)], ActualCidr { net: None, flags: 1 });
    Ok(())
}

/// Service `name` at `ip`:80 with these endpoints, on this node.
fn objects(name: &str, ip: &str, endpoints: &[&str]) -> Result<[Object; 2]> {
    let service: Service = serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": ip, "clusterIPs": [ip], "ports": [{"port": 80, "protocol": "TCP"}]},
    }))?;
    let endpoints: Vec<_> =
        endpoints.iter().map(|e| json!({"addresses": [e], "nodeName": "node1"})).collect();
    let slice: EndpointSlice = serde_json::from_value(json!({
        "metadata": {
            "name": format!("{name}-x"), "namespace": "default", "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints,
    }))?;
    Ok([service.into(), slice.into()])
}

fn core(state: &State) -> Result<Core<Maps>> {
    let rules = NodeRules {
        name: "node1".into(),
        nodeport_addresses: NodePortAddresses::All,
        allow_external_ips: Vec::new(),
        localhost_nodeports: true,
        service_cidrs: Vec::new(),
    };
    Ok(Core::new(Maps::open(&state.maps())?, rules))
}

#[test]
fn a_restart_changes_only_what_has_changed() -> Result<()> {
    let state = State::new(&[])?;
    let addresses = BTreeSet::new();
    let before =
        [objects("a", "10.96.0.1", &["10.1.0.2", "10.1.0.3"])?, objects("b", "10.96.0.2", &["10.1.0.2"])?];
    let mut first = core(&state)?;
    before.iter().flatten().for_each(|o| first.apply(o));
    first.sync(&addresses)?;
    let actual = Maps::open(&state.maps())?.read_actual()?;
    assert_eq!((actual.frontends.len(), actual.backends4.len(), actual.services.len()), (2, 2, 2));
    drop(first);

    let mut second = core(&state)?;
    before.iter().flatten().for_each(|o| second.apply(o));
    assert_eq!(second.sync(&addresses)?.operations, BTreeMap::new());
    assert_eq!(Maps::open(&state.maps())?.read_actual()?, actual);

    // While nobody looked, one Service lost an endpoint and the other one went.
    let mut third = core(&state)?;
    objects("a", "10.96.0.1", &["10.1.0.3"])?.iter().for_each(|o| third.apply(o));
    let operations = third.sync(&addresses)?.operations;
    assert_eq!(operations["delete_frontend"], 1);
    assert!(
        !operations.contains_key("put_frontend") && !operations.contains_key("name_service"),
        "{operations:?}"
    );
    let actual = Maps::open(&state.maps())?.read_actual()?;
    assert_eq!((actual.frontends.len(), actual.backends4.len(), actual.services.len()), (1, 1, 1));
    Ok(())
}

#[test]
fn what_does_not_fit_is_left_out_and_the_rest_works() -> Result<()> {
    // A frontend and its address each, twice.
    let state = State::new(&[(name::FRONTENDS4, 4)])?;
    let mut core = core(&state)?;
    for (name, ip) in [("a", "10.96.0.1"), ("b", "10.96.0.2"), ("c", "10.96.0.3")] {
        objects(name, ip, &["10.1.0.2"])?.iter().for_each(|o| core.apply(o));
    }
    let outcome = core.sync(&BTreeSet::new())?;
    assert_eq!(outcome.rejected, BTreeMap::from([("full", 2)]));
    assert_eq!(Maps::open(&state.maps())?.read_actual()?.frontends.len(), 2);
    // Whoever goes makes room.
    core.delete(&ObjectRef { kind: Kind::Service, namespace: "default".into(), name: "a".into() });
    let outcome = core.sync(&BTreeSet::new())?;
    assert_eq!(outcome.rejected, BTreeMap::new());
    let frontends: Vec<IpAddr> =
        Maps::open(&state.maps())?.read_actual()?.frontends.into_keys().map(|f| f.addr).collect();
    assert_eq!(frontends, [IpAddr::from([10, 96, 0, 2]), IpAddr::from([10, 96, 0, 3])]);
    Ok(())
}

#[test]
fn a_new_name_starts_its_counters_at_zero() -> Result<()> {
    let state = State::new(&[])?;
    let mut maps = Maps::open(&state.maps())?;
    let cpus = aya::util::nr_cpus().map_err(|(_, e)| e)?;
    let data = MapData::from_pin(state.maps().join(name::SERVICE_STATS))?;
    let mut raw = Array::<_, ServiceStats>::try_from(Map::Array(data))?;
    let records = raw.len() / cpus as u32;
    let stats = |packets| ServiceStats { packets, bytes: 600, connections: 2, xdp_packets: 1 };
    for cpu in 0..cpus as u32 {
        raw.set(cpu * records + 1, stats(5), 0)?;
        // Those of the records beside it are none of its business.
        raw.set(cpu * records, stats(1000), 0)?;
        raw.set(cpu * records + 2, stats(1000), 0)?;
    }
    let counters = ServiceCounters::open(&state.maps())?;
    let (n, sum) = (cpus as u64, counters.sum(1)?);
    assert_eq!((sum.packets, sum.bytes, sum.connections, sum.xdp_packets), (5 * n, 600 * n, 2 * n, n));
    maps.apply(&[MapOp::NameService { service: 1, name: "a/b:c".into() }])?;
    assert_eq!(counters.sum(1)?, ServiceStats::default());
    let packets: Vec<u64> = counters.sums(4)?.iter().map(|s| s.packets).collect();
    assert_eq!(packets, [1000 * n, 0, 1000 * n, 0]);
    assert_eq!(counters.sum(records)?, ServiceStats::default(), "beyond the end");
    Ok(())
}

#[test]
fn strangers_and_absentees_are_refused() -> Result<()> {
    let state = State::new(&[])?;
    let slots = state.maps().join(name::SLOTS);
    std::fs::remove_file(&slots)?;
    let error = Maps::open(&state.maps()).map(drop).unwrap_err();
    assert!(matches!(&error, MapError::Missing { path } if *path == slots), "{error}");
    // A map of another shape under the name: the kernel would write 20 bytes into 4.
    MapData::from_pin(state.maps().join(name::BACKENDS6))?.pin(&slots)?;
    let error = Maps::open(&state.maps()).map(drop).unwrap_err();
    assert!(matches!(&error, MapError::Layout { what: "value size", .. }), "{error}");
    std::fs::remove_file(&slots)?;
    MapData::from_pin(state.maps().join(name::FLOWS4))?.pin(&slots)?;
    let error = Maps::open(&state.maps()).map(drop).unwrap_err();
    assert!(matches!(&error, MapError::Layout { what: "type", .. }), "{error}");
    Ok(())
}

/// What the agent changes in the flow table, no CPU believes any longer; nor anything once a device changes.
#[test]
fn epochs_are_renewed_with_what_they_stand_for() -> Result<()> {
    let state = State::new(&[])?;
    let flows = FlowTables::open(&state.maps())?;
    let devices = Devices::open(&state.maps())?;
    let map = Map::Array(MapData::from_pin(state.maps().join(name::FLOW_EPOCHS))?);
    let map: aya::maps::Array<_, u64> = map.try_into()?;
    let epochs = || map.iter().collect::<Result<Vec<_>, _>>();
    let changed = |before: &[u64], after: &[u64]| -> Vec<usize> {
        (0..before.len()).filter(|i| before[*i] != after[*i]).collect()
    };
    let Pair { forward: (key, flow), .. } = pair(0x0a00_0001, proto::UDP, 1000, 0, true);
    let own = vec![flow_cache::epoch_index(flow_cache::hash(&key)) as usize];
    let nothing = vec![flow_cache::nothing_epoch_index(flow_cache::hash(&key)) as usize];
    let start = epochs()?;
    flows.v4.put(&key, &flow)?;
    let put = epochs()?;
    assert_eq!(changed(&start, &put), nothing, "packets of this tuple may have been none of ours");
    ensure!(flows.v4.delete_silent(&key)?);
    assert_eq!(epochs()?, put, "silent ones are in no cache");
    flows.v4.put(&key, &flow)?;
    let put = epochs()?;
    ensure!(flows.v4.replace(&key, &flow)?);
    let replaced = epochs()?;
    assert_eq!(changed(&put, &replaced), own);
    ensure!(flows.v4.delete(&key)?);
    let deleted = epochs()?;
    assert_eq!(changed(&replaced, &deleted), own);
    devices.put(3, Device::default())?;
    let put = epochs()?;
    assert_eq!(changed(&deleted, &put).len(), put.len());
    devices.next_hops_changed();
    let all = epochs()?;
    assert_eq!(changed(&put, &all).len(), put.len());
    let mut maps = Maps::open(&state.maps())?;
    let of_nothing: Vec<usize> = (put.len() / 2..put.len()).collect();
    maps.apply(&[MapOp::PutAddress { addr: [10, 96, 0, 1].into(), kind: 0 }])?;
    let added = epochs()?;
    assert_eq!(changed(&all, &added), of_nothing, "packets may have become ours");
    maps.apply(&[MapOp::SwitchCidr { family: Family::V4, index: 0, flags: 1 }])?;
    let switched = epochs()?;
    assert_eq!(changed(&added, &switched), of_nothing);
    maps.apply(&[MapOp::DeleteAddress { addr: [10, 96, 0, 1].into() }])?;
    assert_eq!(epochs()?, switched);
    Ok(())
}

/// Bits of `BYSTANDERS` that are clear: what may be ours.
fn known(state: &State) -> Result<BTreeSet<(u32, u64)>> {
    let map = Map::Array(MapData::from_pin(state.maps().join(name::BYSTANDERS))?);
    let map: Array<_, u64> = map.try_into()?;
    let mut known = BTreeSet::new();
    for (index, word) in (0..).zip(map.iter()) {
        let word = word?;
        known.extend((0..64).map(|i| 1 << i).filter(|mask| word & mask == 0).map(|mask| (index, mask)));
    }
    Ok(known)
}

fn bits_of(addresses: &[&str], ports: &[u16]) -> BTreeSet<(u32, u64)> {
    let of_address = |addr: &&str| match ip(addr) {
        IpAddr::V4(a) => Bit::of_address::<V4>(&a.into()),
        IpAddr::V6(a) => Bit::of_address(&addr::v6(a)),
    };
    let ports = ports.iter().map(|port| Bit::of_port(Be16::new(*port)));
    addresses.iter().map(of_address).chain(ports).map(|bit| (bit.index(), bit.mask())).collect()
}

/// Whoever adds a frontend, a backend or an address of this node's makes its packets no bystanders; only a survey takes that back,
/// and it knows what flows have outlived.
#[test]
fn bystanders_are_all_that_nothing_is_known_about() -> Result<()> {
    let state = State::new(&[])?;
    assert_eq!(known(&state)?.len(), bystander::WORDS as usize * 64, "a new map: anything may be ours");
    survey(&state.maps(), true)?;
    assert_eq!(known(&state)?, BTreeSet::new());

    let (mut maps, devices) = (Maps::open(&state.maps())?, Devices::open(&state.maps())?);
    maps.apply(&two_services())?;
    maps.apply(&[MapOp::PutAddress { addr: ip("10.96.0.2"), kind: flags::KIND_CLUSTER_IP }])?;
    let of_device = Device {
        snat4: Be32::new(0xc0a8_0702),
        snat6: addr::v6("2001:db8::7".parse()?),
        ..Default::default()
    };
    devices.put(3, of_device)?;
    let of_node = Device {
        snat4: Be32::new(0xc0a8_0709),
        snat6: addr::v6("2001:db8::9".parse()?),
        ..Default::default()
    };
    devices.put(device::ANY, of_node)?;
    let nodes = ["192.168.7.9", "2001:db8::9"];
    let programmed = ["10.96.0.1", "10.96.0.2", "fd00:96::1", "192.168.7.2", "2001:db8::7"];
    let programmed = [&programmed[..], &nodes].concat();
    assert_eq!(known(&state)?, bits_of(&programmed, &[8080]));

    let tables = FlowTables::open(&state.maps())?;
    let flow = |dst: u32, sport, flags| {
        let key =
            Tuple::new(Be32::new(0x0a00_0001), Be16::new(sport), Be32::new(dst), Be16::new(7), proto::UDP);
        (key, Flow { flags, ..Flow::default() })
    };
    for (key, value) in [
        flow(0x0a60_0909, 1111, 0),
        flow(0xc0a8_0909, 2222, flow_flags::TRANSIT | flow_flags::REPLY),
        flow(0x0a00_0909, 3333, flow_flags::AT_EGRESS | flow_flags::REPLY),
    ] {
        tables.v4.put(&key, &value)?;
    }
    let key6 = Tuple::new(
        addr::v6("fd00::1".parse()?),
        Be16::new(4444),
        addr::v6("fd00:96::99".parse()?),
        Be16::new(1),
        6,
    );
    tables.v6.put(&key6, &Flow::default())?;
    let answer6 = Flow { flags: flow_flags::AT_EGRESS | flow_flags::REPLY, ..Flow::default() };
    tables.v6.put(&Tuple { sport: Be16::new(5555), ..key6.reversed() }, &answer6)?;
    maps.apply(&[
        MapOp::DeleteAddress { addr: ip("10.96.0.2") },
        MapOp::DeleteFrontend { frontend: frontend("192.168.7.2", 30080) },
        MapOp::WriteBackend { id: 3, backend: backend("10.1.0.3", 9090, true) },
    ])?;
    devices.put(3, Device::default())?;
    let with_none = [&programmed[..], &["0.0.0.0", "::"]].concat();
    assert_eq!(known(&state)?, bits_of(&with_none, &[8080, 9090]), "nothing is taken back");

    survey(&state.maps(), true)?;
    let of_flows = ["10.96.9.9", "192.168.9.9", "fd00:96::99"];
    let left = ["10.96.0.1", "fd00:96::1", "0.0.0.0", "::"];
    let known_now = [&left[..], &of_flows, &nodes].concat();
    assert_eq!(known(&state)?, bits_of(&known_now, &[8080, 9090, 3333, 5555]));

    survey(&state.maps(), false)?;
    assert_eq!(known(&state)?.len(), bystander::WORDS as usize * 64, "programs know more than the maps");
    Ok(())
}

#[test]
fn devices_are_put_and_deleted() -> Result<()> {
    let state = State::new(&[])?;
    let devices = Devices::open(&state.maps())?;
    let device = Device { flags: 1, snat4: Be32::new(0x0a00_0001), ..Default::default() };
    devices.put(3, device)?;
    devices.put(9, Device::default())?;
    devices.delete(9)?;
    devices.delete(10)?;
    assert_eq!(devices.all()?, BTreeMap::from([(3, device)]));
    Ok(())
}

/// A flow of `client` to 10.96.0.1:80 at 10.1.0.2:8080, with both entries.
struct Pair {
    forward: (Tuple<V4>, Flow<V4>),
    reply: (Tuple<V4>, Flow<V4>),
}

/// `idle` jiffies since the last packet, and one more since the flow began.
fn pair(client: u32, proto: u8, now: u32, idle: u32, answered: bool) -> Pair {
    let (vip, pod) = (Be32::new(0x0a60_0001), Be32::new(0x0a01_0002));
    let (src, sport) = (Be32::new(client), Be16::new(40_000));
    let last_seen = now.wrapping_sub(idle);
    let created = last_seen.wrapping_sub(1);
    let key = Tuple::new(src, sport, vip, Be16::new(80), proto);
    let forward = Flow {
        src,
        dst: pod,
        sport,
        dport: Be16::new(8080),
        service: 1,
        backend: 1,
        last_seen,
        created,
        ..Flow::default()
    };
    let reply = Flow {
        src: vip,
        dst: src,
        sport: Be16::new(80),
        dport: sport,
        flags: flow_flags::REPLY,
        last_seen: if answered { last_seen } else { created },
        ..forward
    };
    Pair { forward: (key, forward), reply: (forward.rewritten(proto).reversed(), reply) }
}

fn established(mut p: Pair) -> Pair {
    p.forward.1.tcp_seen = tcp::SYN | tcp::ACK;
    p.reply.1.tcp_seen = tcp::SYN | tcp::ACK;
    p
}

fn put(tables: &FlowTables, p: &Pair) -> Result<()> {
    tables.v4.put(&p.forward.0, &p.forward.1)?;
    Ok(tables.v4.put(&p.reply.0, &p.reply.1)?)
}

#[test]
fn flows_end_together_and_orphans_go() -> Result<()> {
    let state = State::new(&[])?;
    let tables = FlowTables::open(&state.maps())?;
    let clock = KernelClock::open(&state.version())?;
    let (now, hz) = (clock.jiffies()?, clock.jiffies_per_s());
    // More than one chunk of each.
    for i in 0..5000 {
        put(&tables, &pair(0x0b00_0000 + i, proto::UDP, now, 1000 * hz, true))?;
        put(&tables, &pair(0x0c00_0000 + i, proto::UDP, now, 0, true))?;
    }
    let orphan = pair(0x0d00_0001, proto::UDP, now, 6 * hz, true);
    tables.v4.put(&orphan.forward.0, &orphan.forward.1)?;
    let orphan_reply = pair(0x0d00_0002, proto::UDP, now, 6 * hz, true);
    tables.v4.put(&orphan_reply.reply.0, &orphan_reply.reply.1)?;
    let tcp = established(pair(0x0d00_0004, proto::TCP, now, 3600 * hz, true));
    put(&tables, &tcp)?;

    let entries = Arc::new(FlowEntries::default());
    let sweeper = Sweeper::open(&state.version(), Timeouts::DEFAULT, true, entries.clone())?;
    let [v4, v6] = sweeper.pass(Depth::Expiry, false)?;
    assert_eq!((v4.expired, v6), (5000, Pass::default()));
    // The half that has not had its five seconds yet stays.
    let beginning = pair(0x0d00_0003, proto::UDP, clock.jiffies()?, 0, false);
    tables.v4.put(&beginning.forward.0, &beginning.forward.1)?;
    let [v4, _] = sweeper.pass(Depth::Orphans, false)?;
    assert_eq!((v4.expired, v4.orphans), (0, 2));
    // 5000 live pairs, a TCP pair, and that half.
    assert_eq!(v4.entries, 10_003);
    assert_eq!(entries.v4.load(Ordering::Relaxed), 10_003);
    assert_eq!(tables.v4.entries()?.len(), 10_003);
    assert!(tables.v4.get(&tcp.reply.0)?.is_some() && tables.v4.get(&beginning.forward.0)?.is_some());
    Ok(())
}

#[test]
fn unanswered_flows_end_early_when_the_table_is_nearly_full() -> Result<()> {
    let state = State::new(&[])?;
    let tables = FlowTables::open(&state.maps())?;
    let clock = KernelClock::open(&state.version())?;
    let (now, hz) = (clock.jiffies()?, clock.jiffies_per_s());
    for (client, answered) in [(0x0b00_0001, false), (0x0b00_0002, true)] {
        put(&tables, &pair(client, proto::UDP, now, 15 * hz, answered))?;
    }
    let sweeper = Sweeper::open(&state.version(), Timeouts::DEFAULT, true, Arc::default())?;
    assert_eq!(sweeper.pass(Depth::Expiry, false)?[0].expired, 0);
    assert_eq!(sweeper.pass(Depth::Expiry, true)?[0].expired, 1);
    Ok(())
}

#[test]
fn udp_flows_to_backends_that_no_longer_serve_are_deleted() -> Result<()> {
    let state = State::new(&[])?;
    let tables = FlowTables::open(&state.maps())?;
    let sweeper = Sweeper::open(&state.version(), Timeouts::DEFAULT, true, Arc::default())?;
    let metrics = Metrics::new(Arc::default(), Arc::default());
    let sweeper = sweeper.counting(metrics.kube_proxy().clone());
    let udp = pair(0x0b00_0001, proto::UDP, 0, 0, true);
    let tcp = pair(0x0b00_0001, proto::TCP, 0, 0, true);
    put(&tables, &udp)?;
    put(&tables, &tcp)?;
    let serving = |addr: &str| {
        let retired = Retired {
            service: 1,
            family: Family::V4,
            protocol: Protocol::Udp,
            frontends: Vec::new(),
            serving: vec![(addr.parse().unwrap(), 8080)],
            lost: true,
        };
        Departures { retired: vec![retired], recovered: false }
    };
    assert_eq!(sweeper.purge(&serving("10.1.0.2"))?, (0, 0));
    assert_eq!(sweeper.purge(&serving("10.1.0.3"))?, (1, 0));
    let scrape = metrics.encode()?;
    for sample in [
        "kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv4\"} 1",
        "kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family=\"IPv4\"} 2",
        "kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv6\"} 0",
    ] {
        assert!(scrape.lines().any(|line| line == sample), "{sample} not in\n{scrape}");
    }
    // No record of that family was concerned.
    assert!(
        !scrape.contains("kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family=\"IPv6\"}")
    );
    // TCP flows end with their connections.
    let left: BTreeMap<_, _> = tables.v4.entries()?.into_iter().collect();
    assert_eq!(left.into_keys().collect::<Vec<_>>(), {
        let mut keys = [tcp.forward.0, tcp.reply.0];
        keys.sort();
        keys
    });
    Ok(())
}

/// A Service was deleted, and the agent killed when it had cleared the record and not yet come to the flows.
#[test]
fn i1_udp_flows_of_a_record_that_nobody_uses_are_deleted() -> Result<()> {
    let state = State::new(&[])?;
    let tables = FlowTables::open(&state.maps())?;
    let sweeper = Sweeper::open(&state.version(), Timeouts::DEFAULT, true, Arc::default())?;
    put(&tables, &pair(0x0b00_0001, proto::UDP, 0, 0, true))?;
    put(&tables, &pair(0x0b00_0001, proto::TCP, 0, 0, true))?;
    let mut maps = Maps::open(&state.maps())?;
    maps.apply(&two_services())?;
    let recovered = Departures { retired: Vec::new(), recovered: true };
    assert_eq!(sweeper.purge(&recovered)?, (0, 0));
    maps.apply(&[MapOp::ClearService { service: 1 }])?;
    assert_eq!(sweeper.purge(&Departures::default())?, (0, 0), "nothing to look for");
    assert_eq!(sweeper.purge(&recovered)?, (1, 0));
    let left: BTreeSet<u8> = tables.v4.entries()?.into_iter().map(|(key, _)| key.proto).collect();
    assert_eq!(left, BTreeSet::from([proto::TCP]));
    Ok(())
}

#[test]
fn jiffies_advance_at_the_rate_that_the_kernel_reports() -> Result<()> {
    let state = State::new(&[])?;
    let clock = KernelClock::open(&state.version())?;
    assert!([100, 250, 300, 1000].contains(&clock.jiffies_per_s()), "{}", clock.jiffies_per_s());
    let begun = std::time::Instant::now();
    let first = clock.jiffies()?;
    while begun.elapsed().as_millis() < 200 {
        std::thread::yield_now();
    }
    let ticks = clock.jiffies()?.wrapping_sub(first);
    // At least the time that has surely passed, with a tick to spare at either end.
    assert!(ticks + 2 >= clock.jiffies_per_s() / 5, "{ticks} ticks in {:?}", begun.elapsed());
    Ok(())
}

type Print = fn(&Path, Output, &mut dyn std::io::Write) -> Result<(), inspect::Error>;

fn printed(state: &State, output: Output, print: Print) -> Result<String> {
    let mut out = Vec::new();
    print(state.dir.path(), output, &mut out)?;
    Ok(String::from_utf8(out)?)
}

fn printed_json(state: &State, print: Print) -> Result<serde_json::Value> {
    Ok(serde_json::from_str(&printed(state, Output::Json, print)?)?)
}

#[test]
fn services_and_backends_are_printed_from_the_pins_alone() -> Result<()> {
    let state = State::new(&[])?;
    Maps::open(&state.maps())?.apply(&two_services())?;
    let expected = "\
NAME               KIND          FRONTEND           PROTO  POLICY   AFFINITY  BACKENDS     PACKETS  BYTES  CONNECTIONS
default/web6:http  LoadBalancer  [fd00:96::1]:80    TCP    Cluster  -         1 (0 local)        0      0            0
default/web:http   ClusterIP     10.96.0.1:80       TCP    Cluster  10800s    2 (1 local)        0      0            0
default/web:http   NodePort      192.168.7.2:30080  TCP    Local    10800s    2 (1 local)
";
    assert_eq!(printed(&state, Output::Table, inspect::write_services)?, expected);
    let expected = "\
BACKEND         PROTO  WHERE      SERVICES
10.1.0.2:8080   TCP    this node  default/web:http
10.1.1.2:8080   TCP    elsewhere  default/web:http
[fd00::2]:8080  TCP    elsewhere  default/web6:http
";
    assert_eq!(printed(&state, Output::Table, inspect::write_backends)?, expected);
    let services = printed_json(&state, inspect::write_services)?;
    assert_eq!(services[1]["name"], "default/web:http");
    assert_eq!(services[1]["cluster_backends"], 2);
    assert_eq!(services[1]["frontends"][1]["external"], "Local");
    assert_eq!(services[0]["affinity_timeout_s"], serde_json::Value::Null);
    let backends = printed_json(&state, inspect::write_backends)?;
    assert_eq!((&backends[2]["address"], &backends[0]["local"]), (&"fd00::2".into(), &true.into()));
    Ok(())
}

#[test]
fn flows_are_printed_with_their_stage() -> Result<()> {
    let state = State::new(&[])?;
    let tables = FlowTables::open(&state.maps())?;
    let clock = KernelClock::open(&state.version())?;
    let (now, hz) = (clock.jiffies()?, clock.jiffies_per_s());
    // An hour is shown to the minute.
    put(&tables, &established(pair(0x0b00_0001, proto::TCP, now, 3600 * hz, true)))?;
    put(&tables, &pair(0x0b00_0002, proto::UDP, now, 3600 * hz, false))?;
    let expected = "\
PROTO  CLIENT          FRONTEND      BACKEND        SEEN AS         STAGE          AGE   IDLE
TCP    11.0.0.1:40000  10.96.0.1:80  10.1.0.2:8080  11.0.0.1:40000  established  1h00m  1h00m
UDP    11.0.0.2:40000  10.96.0.1:80  10.1.0.2:8080  11.0.0.2:40000  opening      1h00m  1h00m
";
    assert_eq!(printed(&state, Output::Table, inspect::write_flows)?, expected);
    let flows = printed_json(&state, inspect::write_flows)?;
    assert_eq!((&flows[1]["client"], &flows[1]["stage"]), (&"11.0.0.2:40000".into(), &"opening".into()));
    Ok(())
}

#[test]
fn a_directory_without_pins_is_said_to_be_one() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for print in [inspect::write_services, inspect::write_backends, inspect::write_flows] {
        let error = print(dir.path(), Output::Table, &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("--state-dir"), "{error}");
    }
    Ok(())
}

#[test]
fn counters_are_summed_over_the_cpus() -> Result<()> {
    let state = State::new(&[])?;
    let cpus = aya::util::nr_cpus().map_err(|(_, e)| e)?;
    let data = MapData::from_pin(state.maps().join(name::COUNTERS))?;
    let mut raw = PerCpuArray::<_, u64>::try_from(Map::PerCpuArray(data))?;
    raw.set(Counter::DropBadMap as u32, vec![3; cpus].try_into()?, 0)?;
    let counters = Counters::open(&state.maps())?;
    assert_eq!(counters.sum(Counter::DropBadMap)?, 3 * cpus as u64);
    assert_eq!(counters.sum(Counter::FlowCreated)?, 0);
    Ok(())
}

//! Pinned maps that get another size, on nodes in namespaces of their own. Needs root.

#[path = "datapath/node.rs"]
#[allow(dead_code, reason = "shared with datapath.rs, which uses all of it")]
mod node;

use std::path::Path;

use anyhow::{Result, ensure};
use aya::{
    maps::{Array, HashMap, Map, MapData},
    programs::{SchedClassifier, TcAttachType},
};
use lb_agent::{
    datapath::{Datapath, TcSetting, map_pin},
    maps::{KernelClock, Maps, ServiceCounters},
    plan::{
        ActualState,
        op::{Family, MapOp},
    },
};
use lb_common::{
    Be32, LAYOUT_VERSION, V4,
    bystander::{Bit, WORDS},
    conntrack::{Flow, tcp},
    frontend::{ServiceRecord, ServiceStats},
    maps::{name, program},
    tuple::Tuple,
};
use lb_tests::{
    cluster::{Cluster, Layout, Options},
    manifests::{Service, nodes},
    place::Place,
    traffic::{Call, Load, Proto},
};
use node::{Elsewhere, Node, free, ifindex, on_a_node, run};

fn flows(node: &Node) -> Result<HashMap<MapData, Tuple<V4>, Flow<V4>>> {
    flows_at(&map_pin(&node.state_dir(), name::FLOWS4))
}

fn flows_at(pin: &Path) -> Result<HashMap<MapData, Tuple<V4>, Flow<V4>>> {
    Ok(HashMap::try_from(Map::HashMap(MapData::from_pin(pin)?))?)
}

fn flow(n: u32) -> (Tuple<V4>, Flow<V4>) {
    let flow = Flow { backend: n, ..Default::default() };
    let key = Flow { src: V4::new(n), ..Default::default() };
    (key.rewritten(lb_common::proto::TCP), flow)
}

#[test]
fn a_changed_capacity_keeps_flows_and_services() {
    on_a_node(|node| {
        const FLOWS: u32 = 8000;
        let mut settings = node.settings();
        node.start(&settings, TcSetting::Auto)?.stop()?;
        let mut before = flows(node)?;
        for n in 0..FLOWS {
            let (key, value) = flow(n);
            before.insert(key, value, 0)?;
        }
        drop(before);
        let services = || -> Result<Array<MapData, ServiceRecord>> {
            let map = Map::Array(MapData::from_pin(map_pin(&node.state_dir(), name::SERVICES))?);
            Ok(Array::try_from(map)?)
        };
        let record = ServiceRecord { affinity_timeout_s: 77, ..Default::default() };
        services()?.set(3, record, 0)?;
        let counts = || ServiceCounters::open(&node.state_dir().join(format!("v{LAYOUT_VERSION}/maps")));
        let pin = map_pin(&node.state_dir(), name::SERVICE_STATS);
        let mut raw = Array::<_, ServiceStats>::try_from(Map::Array(MapData::from_pin(pin)?))?;
        let of_cpu = settings.capacities.services;
        let cpus = raw.len() / of_cpu;
        for cpu in 0..cpus {
            raw.set(cpu * of_cpu + 3, ServiceStats { packets: 10, ..Default::default() }, 0)?;
        }

        settings.capacities.flows = 10_000;
        settings.capacities.services = 2048;
        node.start(&settings, TcSetting::Auto)?.stop()?;
        let after = flows(node)?;
        assert_eq!(
            MapData::from_pin(map_pin(&node.state_dir(), name::FLOWS4))?.info()?.max_entries(),
            20_000
        );
        for n in 0..FLOWS {
            let (key, value) = flow(n);
            assert_eq!(after.get(&key, 0)?, value);
        }
        assert_eq!(services()?.get(&3, 0)?, record);
        assert_eq!(counts()?.sum(3)?.packets, 10 * u64::from(cpus));
        assert_eq!(
            std::fs::read_dir(node.state_dir().join(format!("v{LAYOUT_VERSION}/maps-old")))?.count(),
            0
        );

        // Smaller, and the record still fits; then so small that it does not.
        settings.capacities.services = 16;
        node.start(&settings, TcSetting::Auto)?.stop()?;
        assert_eq!(services()?.get(&3, 0)?, record);
        settings.capacities.services = 2;
        node.start(&settings, TcSetting::Auto)?.stop()?;
        settings.capacities.services = 16;
        node.start(&settings, TcSetting::Auto)?.stop()?;
        assert_eq!(services()?.get(&3, 0)?, ServiceRecord::default());
        assert_eq!(flows(node)?.keys().count(), FLOWS as usize);

        // Flows that do not fit are lost, the others stay.
        settings.capacities.flows = 1000;
        node.start(&settings, TcSetting::Auto)?.stop()?;
        assert_eq!(flows(node)?.keys().count(), 2000);
        Ok(())
    });
}

/// A default that has shrunk with the node's memory is no reason to lose flows.
#[test]
fn a_smaller_default_leaves_larger_flow_tables_alone() {
    on_a_node(|node| {
        let entries_with = |flows, keep_flows| -> Result<u32> {
            let mut settings = node.settings();
            settings.capacities.flows = flows;
            settings.capacities.keep_flows = keep_flows;
            node.start(&settings, TcSetting::Auto)?.stop()?;
            Ok(MapData::from_pin(map_pin(&node.state_dir(), name::FLOWS4))?.info()?.max_entries())
        };
        assert_eq!(entries_with(5000, true)?, 10_000);
        assert_eq!(entries_with(1000, true)?, 10_000, "nobody asked for less");
        assert_eq!(entries_with(6000, true)?, 12_000, "there is memory for more");
        assert_eq!(entries_with(1000, false)?, 2000, "as asked");
        Ok(())
    });
}

#[test]
fn a_changed_capacity_keeps_source_ranges_or_gives_up_all_that_is_planned() {
    on_a_node(|node| {
        let mut settings = node.settings();
        settings.capacities.source_ranges = 200;
        node.start(&settings, TcSetting::Auto)?.stop()?;
        let maps = node.state_dir().join(format!("v{LAYOUT_VERSION}/maps"));
        let net = |i: u8| format!("10.{i}.0.0/16").parse();
        let range = |i| Ok(MapOp::PutRange { service: 3, net: net(i)? });
        let mut ops: Vec<MapOp> = (0..100).map(range).collect::<Result<_>>()?;
        ops.push(MapOp::WriteCidr { index: 2, net: "10.96.0.0/12".parse()? });
        ops.push(MapOp::SwitchCidr { family: Family::V4, index: 2, flags: 1 });
        ensure!(Maps::open(&maps)?.apply(&ops)?.refused.is_empty());
        let before = Maps::open(&maps)?.read_actual()?;
        ensure!((before.ranges.len(), before.cidrs.len()) == (100, 1));
        for capacity in [70_000, 100] {
            settings.capacities.source_ranges = capacity;
            node.start(&settings, TcSetting::Auto)?.stop()?;
            ensure!(Maps::open(&maps)?.capacities().source_ranges == capacity);
            assert_eq!(Maps::open(&maps)?.read_actual()?, before);
        }
        settings.capacities.source_ranges = 99;
        node.start(&settings, TcSetting::Auto)?.stop()?;
        assert_eq!(Maps::open(&maps)?.read_actual()?, ActualState::default());
        Ok(())
    });
}

/// Before our programs run, they have the last word on who is a bystander: a version that did not know the map may have run.
#[test]
fn a_start_knows_what_is_programmed_or_takes_nobody_for_a_bystander() {
    on_a_node(|node| {
        let mut settings = node.settings();
        node.start(&settings, TcSetting::Auto)?.stop()?;
        let maps = node.state_dir().join(format!("v{LAYOUT_VERSION}/maps"));
        let addr = "10.96.0.1".parse()?;
        ensure!(Maps::open(&maps)?.apply(&[MapOp::PutAddress { addr, kind: 0 }])?.refused.is_empty());
        let record =
            MapOp::WriteService { service: 9, record: ServiceRecord { in_use: 1, ..Default::default() } };
        ensure!(Maps::open(&maps)?.apply(&[record])?.refused.is_empty());
        let bit = Bit::of_address::<V4>(&Be32::new(0x0a60_0001));
        let words = || -> Result<Array<MapData, u64>> {
            Ok(Map::Array(MapData::from_pin(map_pin(&node.state_dir(), name::BYSTANDERS))?).try_into()?)
        };
        for i in 0..WORDS {
            words()?.set(i, u64::MAX, 0)?;
        }
        node.start(&settings, TcSetting::Auto)?.stop()?;
        ensure!(words()?.get(&bit.index(), 0)? & bit.mask() == 0, "a frontend's address");
        let set: u32 = words()?.iter().map(|w| w.map(u64::count_ones)).sum::<Result<u32, _>>()?;
        ensure!(set > WORDS * 64 - 64, "{set} bits of bystanders");
        std::fs::remove_file(map_pin(&node.state_dir(), name::BYSTANDERS))?;
        node.start(&settings, TcSetting::Auto)?.stop()?;
        ensure!(words()?.get(&bit.index(), 0)? & bit.mask() == 0, "a map that was not there");
        // What is programmed does not fit: the programs that run have maps that we do not see, and keep this one, too.
        let of_the_last_run = words()?;
        let all = |map: &Array<MapData, u64>| map.iter().collect::<Result<Vec<_>, _>>();
        let before = all(&of_the_last_run)?;
        settings.capacities.services = 4;
        node.start(&settings, TcSetting::Auto)?.stop()?;
        assert_eq!(
            all(&words()?)?,
            vec![0; WORDS as usize],
            "a bystander may be of what is not pinned any more"
        );
        node.start(&settings, TcSetting::Auto)?.stop()?;
        assert_ne!(all(&words()?)?, vec![0; WORDS as usize]);
        assert_eq!(all(&of_the_last_run)?, before);
        Ok(())
    });
}

#[test]
fn a_migration_that_was_cut_off_is_completed() {
    on_a_node(|node| {
        let settings = node.settings();
        node.start(&settings, TcSetting::Auto)?.stop()?;
        let (key, value) = flow(1);
        flows(node)?.insert(key, value, 0)?;
        // Moved away, and the new map not made yet.
        let old = node.state_dir().join(format!("v{LAYOUT_VERSION}/maps-old")).join(name::FLOWS4);
        std::fs::rename(map_pin(&node.state_dir(), name::FLOWS4), &old)?;
        node.start(&settings, TcSetting::Auto)?.stop()?;
        assert_eq!(flows(node)?.get(&key, 0)?, value);
        ensure!(!old.exists());
        // The new map made, with a younger flow, and the old one not copied.
        std::fs::rename(map_pin(&node.state_dir(), name::FLOWS4), &old)?;
        let made = HashMap::<MapData, Tuple<V4>, Flow<V4>>::create(8192, 0)?;
        made.pin(map_pin(&node.state_dir(), name::FLOWS4))?;
        let (young, younger) = flow(2);
        flows(node)?.insert(young, younger, 0)?;
        node.start(&settings, TcSetting::Auto)?.stop()?;
        assert_eq!(flows(node)?.get(&key, 0)?, value);
        assert_eq!(flows(node)?.get(&young, 0)?, younger);
        ensure!(!old.exists());
        Ok(())
    });
}

#[test]
fn what_the_old_programs_write_after_the_copy_is_carried_over() {
    on_a_node(|node| {
        let mut settings = node.settings();
        node.start(&settings, TcSetting::Auto)?.stop()?;
        let now = || {
            Ok::<_, anyhow::Error>(
                KernelClock::open(&node.state_dir().join(format!("v{LAYOUT_VERSION}")))?.jiffies()?,
            )
        };
        let begun = |n: u32, created: u32| {
            let (key, flow) = flow(n);
            (key, Flow { tcp_seen: tcp::SYN, last_seen: created, created, ..flow })
        };
        let long_ago = now()?.wrapping_sub(100_000);
        let [purged, ended, reused, ours] = [1, 2, 3, 4].map(|n| begun(n, long_ago));
        let mut old = flows(node)?;
        for (key, flow) in [purged, ended, reused, ours] {
            old.insert(key, flow, 0)?;
        }
        drop(old);
        settings.capacities.flows = 5000;
        let datapath = free(|| Datapath::start_with(&settings, TcSetting::Auto))?;
        let mut old =
            flows_at(&node.state_dir().join(format!("v{LAYOUT_VERSION}/maps-old")).join(name::FLOWS4))?;
        let mut new = flows(node)?;
        ensure!(new.keys().count() == 4);
        // A new flow; one that has ended; one whose tuple belongs to another by now; one whose tuple our programs have
        // given to another; and one that somebody has removed meanwhile.
        let opened = begun(5, now()?);
        old.insert(opened.0, opened.1, 0)?;
        let fin = Flow { tcp_seen: tcp::SYN | tcp::FIN, last_seen: now()?, ..ended.1 };
        old.insert(ended.0, fin, 0)?;
        let elsewhere = |flow: Flow<V4>| Flow { dst: V4::new(99), created: opened.1.created, ..flow };
        let successor = Flow { last_seen: opened.1.created, ..elsewhere(reused.1) };
        old.insert(reused.0, successor, 0)?;
        new.insert(ours.0, elsewhere(ours.1), 0)?;
        old.insert(ours.0, Flow { last_seen: now()?, ..ours.1 }, 0)?;
        new.remove(&purged.0)?;
        old.insert(purged.0, Flow { last_seen: now()?, ..purged.1 }, 0)?;

        node.follow(datapath, &settings)?.stop()?;
        assert_eq!(new.get(&opened.0, 0)?, opened.1);
        assert_eq!(new.get(&ended.0, 0)?, fin);
        assert_eq!(new.get(&reused.0, 0)?, successor);
        assert_eq!(new.get(&ours.0, 0)?, elsewhere(ours.1));
        ensure!(new.get(&purged.0, 0).is_err(), "what was purged is back");
        assert_eq!(
            std::fs::read_dir(node.state_dir().join(format!("v{LAYOUT_VERSION}/maps-old")))?.count(),
            0
        );
        Ok(())
    });
}

/// Our programs on a device, with the filters of clsact.
fn attached(device: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for (hook, name) in [(TcAttachType::Ingress, "ingress"), (TcAttachType::Egress, "egress")] {
        let (_, programs) = SchedClassifier::query_tcx(device, hook)?;
        found.extend(programs.iter().map(|p| format!("tcx {}", p.name_as_str().unwrap_or_default())));
        let shown = run(&format!("tc filter show dev {device} {name}")).unwrap_or_default();
        let filters = shown.lines().filter(|line| line.contains("handle"));
        found.extend(filters.map(|line| {
            let kind = if line.split_whitespace().any(|word| word == "bpf") { "bpf" } else { line };
            format!("clsact {kind}")
        }));
    }
    Ok(found)
}

#[test]
fn after_flows_have_moved_each_hook_has_one_program() {
    on_a_node(|node| {
        let elsewhere = Elsewhere::new()?;
        let mut settings = node.settings();
        elsewhere.veth("pod0")?;
        let tcx = [program::TC_INGRESS, program::TC_EGRESS].map(|name| format!("tcx {name}"));
        for (number, tc) in
            [TcSetting::Auto, TcSetting::Auto, TcSetting::Clsact, TcSetting::Clsact, TcSetting::Auto]
                .into_iter()
                .enumerate()
        {
            settings.capacities.flows = 5000 + number as u32;
            node.start(&settings, tc)?.stop()?;
            let found = attached("pod0")?;
            if tc == TcSetting::Auto {
                assert_eq!(found, tcx, "start {number}");
            } else {
                assert_eq!(found, ["clsact bpf", "clsact bpf"], "start {number}");
            }
            let left: Vec<_> = std::fs::read_dir(node.state_dir().join(format!("v{LAYOUT_VERSION}/links")))?
                .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
                .filter(|name| name.starts_with("beside"))
                .collect();
            ensure!(left.is_empty(), "start {number}: {left:?}");
        }
        Ok(())
    });
}

#[test]
fn a_program_left_beside_another_takes_the_hook_over() {
    on_a_node(|node| {
        let elsewhere = Elsewhere::new()?;
        let mut settings = node.settings();
        elsewhere.veth("pod0")?;
        let index = ifindex("pod0")?;
        node.start(&settings, TcSetting::Auto)?.stop()?;
        // As after a run that was killed when it had begun to take hooks over: with and without another migration.
        for flows in [settings.capacities.flows, 6000] {
            for hook in ["ingress", "egress"] {
                let pin = |kind: &str| node.link_pin(&format!("{kind}-{hook}-{index}"));
                std::fs::rename(pin("tc"), pin("beside"))?;
            }
            settings.capacities.flows = flows;
            node.start(&settings, TcSetting::Auto)?.stop()?;
            assert_eq!(attached("pod0")?.len(), 2);
            ensure!(node.link_pin(&format!("tc-ingress-{index}")).exists());
            ensure!(!node.link_pin(&format!("beside-ingress-{index}")).exists());
        }
        Ok(())
    });
}

/// Calls that are made one after the other, from outside and from a pod, to every address of the Service: each opens a flow
/// and ends before the next. Nobody sends a datagram again, so one that is lost is a call that failed.
fn calls_from_everywhere(cluster: &Cluster, service: &Service) -> Result<Vec<(String, Load)>> {
    let mut loads = Vec::new();
    let from: [&Place; 2] = [&cluster.client, cluster.pod("pod-1b")];
    for (i, place) in from.into_iter().enumerate() {
        for (k, (kind, to)) in service.frontends(cluster.node(1)).into_iter().enumerate() {
            // Two processors have to do all this: half of the combinations, each family and kind with both.
            let proto = if (i + k / 2 + k).is_multiple_of(2) { Proto::Udp } else { Proto::Tcp };
            let what = format!("{} to {kind} {to}, {proto:?}", place.name);
            loads.push((what, place.load(&Call::new(proto, to))?));
        }
    }
    Ok(loads)
}

#[test]
fn calls_during_migrations_of_the_flow_table_all_succeed() {
    // Flows also expire meanwhile.
    let options = Options::new(Layout::PointToPoint).flag("--udp-opening-timeout=2s");
    let mut cluster = Cluster::new(options).unwrap();
    cluster.manifests.write("nodes", &nodes(cluster.nodes.iter().map(|n| &n.place))).unwrap();
    cluster.start_agents().unwrap();
    let service = Service::on(&cluster, "resized", 70, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    let loads = calls_from_everywhere(&cluster, &service).unwrap();
    for flows in [300_000, 500_000, 200_000] {
        cluster.agent(1).terminate().unwrap();
        cluster.restart_agent(1, &[&format!("--max-flows={flows}")]).unwrap();
    }
    let mut lost = Vec::new();
    for (what, load) in loads {
        let calls = load.stop().unwrap();
        assert!(calls.total() > 10, "{what}: hardly any traffic: {calls:?}");
        if calls.failed > 0 {
            lost.push(format!("{what}: {calls:?}"));
        }
    }
    assert!(lost.is_empty(), "{lost:#?}");
    cluster.finish().unwrap();
}

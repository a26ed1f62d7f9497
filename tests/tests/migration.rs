//! Pinned maps that get another size, on nodes in namespaces of their own. Needs root.

#[path = "datapath/node.rs"]
#[allow(dead_code, reason = "shared with datapath.rs, which uses all of it")]
mod node;

use anyhow::{Result, ensure};
use aya::maps::{Array, HashMap, Map, MapData};
use lb_agent::{
    datapath::{TcSetting, map_pin},
    maps::Maps,
    plan::{
        ActualState,
        op::{Family, MapOp},
    },
};
use lb_common::{V4, conntrack::Flow, frontend::ServiceRecord, maps::name, tuple::Tuple};
use lb_tests::{
    cluster::{Cluster, Layout, Options},
    manifests::{Service, nodes},
    place::Place,
    traffic::{Call, Load, Proto},
};
use node::{Node, on_a_node};

fn flows(node: &Node) -> Result<HashMap<MapData, Tuple<V4>, Flow<V4>>> {
    let map = Map::HashMap(MapData::from_pin(map_pin(&node.state_dir(), name::FLOWS4))?);
    Ok(HashMap::try_from(map)?)
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
        assert_eq!(std::fs::read_dir(node.state_dir().join("v1/maps-old"))?.count(), 0);

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

#[test]
fn a_changed_capacity_keeps_source_ranges_or_gives_up_all_that_is_planned() {
    on_a_node(|node| {
        let mut settings = node.settings();
        settings.capacities.source_ranges = 200;
        node.start(&settings, TcSetting::Auto)?.stop()?;
        let maps = node.state_dir().join("v1/maps");
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

#[test]
fn a_migration_that_was_cut_off_is_completed() {
    on_a_node(|node| {
        let settings = node.settings();
        node.start(&settings, TcSetting::Auto)?.stop()?;
        let (key, value) = flow(1);
        flows(node)?.insert(key, value, 0)?;
        // Moved away, and the new map not made yet.
        let old = node.state_dir().join("v1/maps-old").join(name::FLOWS4);
        std::fs::rename(map_pin(&node.state_dir(), name::FLOWS4), &old)?;
        node.start(&settings, TcSetting::Auto)?.stop()?;
        assert_eq!(flows(node)?.get(&key, 0)?, value);
        ensure!(!old.exists());
        // The new map made, with a younger flow, and the old one not copied.
        std::fs::rename(map_pin(&node.state_dir(), name::FLOWS4), &old)?;
        let made = HashMap::<MapData, Tuple<V4>, Flow<V4>>::create(8192, 1)?;
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
    let mut cluster = Cluster::new(Options::new(Layout::PointToPoint)).unwrap();
    cluster.manifests.write("nodes", &nodes(cluster.nodes.iter().map(|n| &n.place))).unwrap();
    cluster.start_agents().unwrap();
    let service = Service::on(&cluster, "resized", 70, &["pod-1a", "pod-2a"]);
    cluster.serve(&service).unwrap();
    let loads = calls_from_everywhere(&cluster, &service).unwrap();
    for flows in [300_000, 500_000, 200_000, 400_000, 300_000, 500_000] {
        cluster.agent(1).terminate().unwrap();
        cluster.restart_agent(1, &[&format!("--max-flows={flows}")]).unwrap();
    }
    let mut lost = Vec::new();
    for (what, load) in loads {
        let calls = load.stop().unwrap();
        assert!(calls.total() > 10, "{what}: hardly any traffic: {calls:?}");
        println!("{what}: {} of {} failed: {:?}", calls.failed, calls.total(), calls.failures.first());
        if calls.failed > 0 {
            lost.push(format!("{what}: {calls:?}"));
        }
    }
    assert!(lost.is_empty(), "{lost:#?}");
    cluster.finish().unwrap();
}

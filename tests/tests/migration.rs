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

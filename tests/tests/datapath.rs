//! Loading, pinning and attaching, on nodes in namespaces of their own. Needs root.

#[path = "datapath/node.rs"]
mod node;

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf,
    maps::{Array, Map, MapData},
    programs::{
        LinkOrder, SchedClassifier, TcAttachType, TestRun as _, TestRunOptions, Xdp, XdpMode,
        links::PinnedLink, tc::TcAttachOptions,
    },
};
use lb_agent::{
    datapath::{self, Error, OBJECT, Role, Tc, TcSetting, map_pin, program_pin},
    settings::{SocketLb, XdpSetting},
};
use lb_common::{
    LAYOUT_VERSION, V4,
    device::flags,
    maps::{Clock, name, program},
};
use node::{Elsewhere, Node, free, ifindex, on_a_node, run};

/// Names of the programs on a device's tcx hook, in order.
fn tcx(device: &str, hook: TcAttachType) -> Result<Vec<String>> {
    let (_, programs) = SchedClassifier::query_tcx(device, hook)?;
    Ok(programs.iter().map(|p| p.name_as_str().unwrap_or_default().to_owned()).collect())
}

/// Link id and program id of a pinned link.
fn link(node: &Node, pin: &str) -> Result<(u32, u32)> {
    let info = aya::programs::links::FdLink::from(PinnedLink::from_pin(node.link_pin(pin))?).info()?;
    Ok((info.id(), info.program_id()))
}

/// What the outside can see of our work.
fn traces() -> Result<String> {
    // Without counters and timers that run by themselves, and without the carrier: the kernel notices a far end that is
    // down some time later (linkwatch).
    let links = run("ip -d link")?;
    let words: Vec<_> = links.split(' ').filter(|word| !matches!(*word, "DOWN" | "UNKNOWN")).collect();
    let links = words.join(" ").replace("NO-CARRIER,", "");
    Ok(format!("{links}{}{}", run("tc qdisc")?, run("mount")?))
}

#[test]
fn state_directory_is_mounted_locked_and_removed_again() {
    on_a_node(|node| {
        let before = traces()?;
        let agent = node.start(&node.settings(), TcSetting::Auto)?;
        let second = datapath::Datapath::start(&node.settings()).map(drop);
        ensure!(matches!(second, Err(Error::StateDirInUse(_))), "{second:?}");
        ensure!(matches!(datapath::cleanup(&node.state_dir()), Err(Error::StateDirInUse(_))));
        agent.stop()?;
        let removed = free(|| datapath::cleanup(&node.state_dir()))?;
        ensure!(!removed.is_empty() && !node.state_dir().exists(), "{removed:?}");
        assert_eq!(traces()?, before);
        assert_eq!(free(|| datapath::cleanup(&node.state_dir()))?, Vec::<String>::new());
        Ok(())
    });
}

#[test]
fn a_directory_on_an_existing_bpffs_is_used_as_it_is() {
    on_a_node(|node| {
        let mount = node.dir.join("bpf");
        std::fs::create_dir(&mount)?;
        run(&format!("mount -t bpf bpf {}", mount.display()))?;
        let mut settings = node.settings();
        settings.state_dir = mount.join("a/b");
        node.start(&settings, TcSetting::Auto)?.stop()?;
        free(|| datapath::cleanup(&settings.state_dir))?;
        ensure!(!settings.state_dir.exists());
        // Somebody else's mount stays.
        ensure!(run("mount")?.contains(&format!("{} type bpf", mount.display())));
        Ok(())
    });
}

#[test]
fn all_maps_and_the_clock_are_pinned_and_usable() {
    on_a_node(|node| {
        let agent = node.start(&node.settings(), TcSetting::Auto)?;
        for map in name::ALL {
            MapData::from_pin(map_pin(&node.state_dir(), map)).with_context(|| format!("map {map}"))?;
        }
        let clock = Xdp::from_pin(
            program_pin(&node.state_dir(), program::CLOCK),
            aya_obj::programs::XdpAttachType::Interface,
        )?;
        let frame = [0_u8; 64];
        let mut options = TestRunOptions::new();
        options.data_in = Some(&frame);
        clock.test_run(options)?;
        let map = Map::Array(MapData::from_pin(map_pin(&node.state_dir(), name::CLOCK))?);
        let time: Clock = Array::<_, Clock>::try_from(map)?.get(&0, 0)?;
        ensure!(time.jiffies > 0 && time.ktime_ns > 0, "{time:?}");
        agent.stop()
    });
}

#[test]
fn devices_get_programs_by_their_role_come_and_go() {
    on_a_node(|node| {
        let elsewhere = Elsewhere::new()?;
        let uplink = elsewhere.veth("up0")?;
        run("ip addr add 192.0.2.1/24 dev up0")?;
        run("ip addr add 2001:db8::1/64 dev up0 nodad")?;
        run("ip link add plain type veth peer name plainp")?;
        let agent = node.start(&node.settings(), TcSetting::Auto)?;

        let attached = agent.datapath.attached();
        let up = attached.iter().find(|a| a.device == "up0").context("up0 is not attached")?;
        assert_eq!((up.ifindex, up.role, up.tc), (uplink, Role::External, Tc::Tcx));
        assert_eq!(attached.len(), 1, "{attached:?}");
        let entry = agent.sink.get(uplink).context("no entry for up0")?;
        assert_eq!(entry.flags, flags::EXTERNAL);
        let snat4: V4 = std::net::Ipv4Addr::new(192, 0, 2, 1).into();
        assert_eq!(entry.snat4, snat4);
        assert_eq!(tcx("up0", TcAttachType::Ingress)?, [program::TC_INGRESS]);
        assert_eq!(tcx("up0", TcAttachType::Egress)?, [program::TC_EGRESS]);
        let expected: [std::net::IpAddr; 2] = ["192.0.2.1".parse()?, "2001:db8::1".parse()?];
        assert_eq!(*agent.addresses.borrow(), expected.into());

        let pod = elsewhere.veth("pod0")?;
        agent.until("pod0 attached", |a| a.datapath.attached().len() == 2)?;
        assert_eq!(agent.sink.get(pod).map(|d| d.flags), Some(0));
        assert_eq!(tcx("pod0", TcAttachType::Ingress)?, [program::TC_INGRESS]);

        run("ip link set pod0 down")?;
        run("ip link set pod0 name pod1")?;
        agent.until("the new name", |a| a.datapath.attached().iter().any(|d| d.device == "pod1"))?;

        run("ip addr add 192.0.2.9/24 dev up0")?;
        run("ip addr del 192.0.2.1/24 dev up0")?;
        let snat4: V4 = std::net::Ipv4Addr::new(192, 0, 2, 9).into();
        // Deleting a primary address takes its secondaries along, unless they are promoted.
        run("ip addr replace 192.0.2.9/24 dev up0")?;
        agent.until("the new source address", |a| a.sink.get(uplink).is_some_and(|d| d.snat4 == snat4))?;

        run("ip link del pod1")?;
        agent.until("pod1 forgotten", |a| a.sink.get(pod).is_none())?;
        ensure!(!node.link_pin(&format!("tc-ingress-{pod}")).exists());
        ensure!(!node.link_pin(&format!("tc-egress-{pod}")).exists());
        agent.stop()
    });
}

#[test]
fn a_device_that_leaves_this_namespace_is_released() {
    on_a_node(|node| {
        let elsewhere = Elsewhere::new()?;
        let pod = elsewhere.veth("pod0")?;
        let agent = node.start(&node.settings(), TcSetting::Auto)?;
        agent.until("pod0 attached", |a| a.datapath.attached().len() == 1)?;
        let other = Elsewhere::new()?;
        other.adopt("pod0")?;
        agent.until("pod0 forgotten", |a| a.sink.get(pod).is_none())?;
        ensure!(agent.datapath.attached().is_empty());
        ensure!(!node.link_pin(&format!("tc-ingress-{pod}")).exists());
        agent.stop()
    });
}

#[test]
fn a_restart_takes_links_over_and_drops_those_of_devices_that_went() {
    on_a_node(|node| {
        let elsewhere = Elsewhere::new()?;
        let (stays, goes) = (elsewhere.veth("pod0")?, elsewhere.veth("pod1")?);
        node.start(&node.settings(), TcSetting::Auto)?.stop()?;
        // Nobody runs, everything is in place.
        assert_eq!(tcx("pod0", TcAttachType::Egress)?, [program::TC_EGRESS]);
        let pin = format!("tc-ingress-{stays}");
        let before = link(node, &pin)?;
        run("ip link del pod1")?;
        ensure!(node.link_pin(&format!("tc-ingress-{goes}")).exists());

        let agent = node.start(&node.settings(), TcSetting::Auto)?;
        let after = link(node, &pin)?;
        assert_eq!(after.0, before.0, "the link is the same");
        assert_ne!(after.1, before.1, "the program is the new one");
        assert_eq!(tcx("pod0", TcAttachType::Ingress)?, [program::TC_INGRESS]);
        ensure!(!node.link_pin(&format!("tc-ingress-{goes}")).exists());
        ensure!(agent.sink.get(goes).is_none(), "the entry of a device that went is left");
        agent.stop()
    });
}

#[test]
fn programs_taken_off_by_hand_come_back_with_the_next_event() {
    on_a_node(|node| {
        let elsewhere = Elsewhere::new()?;
        let pod = elsewhere.veth("pod0")?;
        let agent = node.start(&node.settings(), TcSetting::Auto)?;
        std::fs::remove_file(node.link_pin(&format!("tc-ingress-{pod}")))?;
        // The kernel detaches some time after the last reference has gone.
        agent
            .until("ingress detached", |_| tcx("pod0", TcAttachType::Ingress).is_ok_and(|p| p.is_empty()))?;
        run("ip link set pod0 down")?;
        agent.until("ingress attached again", |_| {
            tcx("pod0", TcAttachType::Ingress).is_ok_and(|programs| programs.len() == 1)
        })?;
        agent.stop()
    });
}

/// The clock's program stands for a stranger's: loaded from the object, under no pin of ours.
fn stranger() -> Result<Ebpf> {
    Ok(Ebpf::load(OBJECT)?)
}

#[test]
fn programs_of_others_on_tcx_stay_behind_ours() {
    on_a_node(|node| {
        let elsewhere = Elsewhere::new()?;
        elsewhere.veth("pod0")?;
        let mut theirs = stranger()?;
        let theirs: &mut SchedClassifier =
            theirs.program_mut(program::TC_EGRESS).context("no program")?.try_into()?;
        theirs.load()?;
        let options = TcAttachOptions::TcxOrder(LinkOrder::default());
        theirs.attach_with_options("pod0", TcAttachType::Ingress, options)?;
        let agent = node.start(&node.settings(), TcSetting::Auto)?;
        assert_eq!(tcx("pod0", TcAttachType::Ingress)?, [program::TC_INGRESS, program::TC_EGRESS]);
        agent.stop()?;
        free(|| datapath::cleanup(&node.state_dir()))?;
        assert_eq!(tcx("pod0", TcAttachType::Ingress)?, [program::TC_EGRESS]);
        Ok(())
    });
}

#[test]
fn clsact_filters_are_replaced_in_place_and_removed_without_a_trace() {
    on_a_node(|node| {
        let elsewhere = Elsewhere::new()?;
        elsewhere.veth("pod0")?;
        let theirs = elsewhere.veth("pod1")?;
        run("tc qdisc add dev pod1 clsact")?;
        run("tc filter add dev pod1 ingress protocol ip prio 9 u32 match u32 0 0 flowid 1:1")?;
        let before = (traces()?, run("tc filter show dev pod1 ingress")?);
        for _ in 0..2 {
            let agent = node.start(&node.settings(), TcSetting::Clsact)?;
            ensure!(agent.datapath.attached().iter().all(|a| a.tc == Tc::Clsact));
            assert_eq!(agent.datapath.attached().len(), 2);
            agent.stop()?;
            for (hook, name) in [("ingress", program::TC_INGRESS), ("egress", program::TC_EGRESS)] {
                let shown = run(&format!("tc filter show dev pod0 {hook}"))?;
                ensure!(shown.contains(name), "{shown}");
                assert_eq!(shown.matches("direct-action").count(), 1, "{shown}");
            }
        }
        ensure!(!free(|| datapath::cleanup(&node.state_dir()))?.is_empty());
        assert_eq!((traces()?, run("tc filter show dev pod1 ingress")?), before);
        assert_eq!(theirs, ifindex("pod1")?);
        Ok(())
    });
}

#[test]
fn tcx_and_clsact_replace_each_other() {
    on_a_node(|node| {
        let elsewhere = Elsewhere::new()?;
        let pod = elsewhere.veth("pod0")?;
        let before = run("tc qdisc")?;
        node.start(&node.settings(), TcSetting::Auto)?.stop()?;
        node.start(&node.settings(), TcSetting::Clsact)?.stop()?;
        ensure!(!node.link_pin(&format!("tc-ingress-{pod}")).exists());
        ensure!(tcx("pod0", TcAttachType::Ingress)?.is_empty());
        ensure!(run("tc filter show dev pod0 ingress")?.contains(program::TC_INGRESS));
        node.start(&node.settings(), TcSetting::Auto)?.stop()?;
        assert_eq!(tcx("pod0", TcAttachType::Ingress)?, [program::TC_INGRESS]);
        assert_eq!(run("tc qdisc")?, before);
        Ok(())
    });
}

#[test]
fn xdp_follows_the_setting_and_leaves_strangers_alone() {
    on_a_node(|node| {
        let elsewhere = Elsewhere::new()?;
        elsewhere.veth("up0")?;
        run("ip addr add 192.0.2.1/24 dev up0")?;
        let with = |xdp| {
            let mut settings = node.settings();
            settings.xdp = xdp;
            let agent = node.start(&settings, TcSetting::Auto)?;
            let attached = agent.datapath.attached();
            let up = attached.into_iter().next().context("up0 is not attached")?;
            let known = agent.sink.get(up.ifindex).context("no entry")?;
            agent.stop()?;
            // At once: the kernel tells nobody about XDP links.
            let takes_frames = known.flags & flags::XDP_TARGET != 0;
            ensure!(takes_frames || up.xdp != datapath::Xdp::Native, "{up:?}");
            anyhow::Ok((up.xdp, up.xdp_refused))
        };
        // A veth has no wire.
        assert_eq!(with(XdpSetting::Auto)?, (datapath::Xdp::None, None));
        ensure!(!run("ip link show dev up0")?.contains("xdp"));
        assert_eq!(with(XdpSetting::Generic)?, (datapath::Xdp::Generic, None));
        ensure!(run("ip link show dev up0")?.contains("xdpgeneric"));
        assert_eq!(with(XdpSetting::Generic)?, (datapath::Xdp::Generic, None));
        assert_eq!(with(XdpSetting::Native)?, (datapath::Xdp::Native, None));
        let shown = run("ip link show dev up0")?;
        ensure!(shown.contains("xdp") && !shown.contains("xdpgeneric"), "{shown}");
        assert_eq!(with(XdpSetting::Off)?, (datapath::Xdp::None, None));

        let mut theirs = stranger()?;
        let theirs: &mut Xdp = theirs.program_mut(program::CLOCK).context("no program")?.try_into()?;
        theirs.load()?;
        theirs.attach("up0", XdpMode::Driver)?;
        let before = run("ip link show dev up0")?;
        let (xdp, refused) = with(XdpSetting::Native)?;
        assert_eq!(xdp, datapath::Xdp::None);
        ensure!(refused.is_some_and(|why| why.contains("another XDP program")));
        assert_eq!(run("ip link show dev up0")?, before);
        Ok(())
    });
}

#[test]
fn socket_hooks_follow_the_setting_and_the_cgroup() {
    on_a_node(|node| {
        let mount = node.dir.join("cgroup");
        std::fs::create_dir(&mount)?;
        run(&format!("mount -t cgroup2 cgroup2 {}", mount.display()))?;
        let names =
            ["lbd-sock-a", "lbd-sock-b"].map(|name| mount.join(format!("{name}-{}", std::process::id())));
        for cgroup in &names {
            std::fs::create_dir(cgroup)?;
        }
        let result = socket_hooks(node, &names);
        for cgroup in &names {
            std::fs::remove_dir(cgroup)?;
        }
        result
    });
}

fn socket_hooks(node: &Node, cgroups: &[std::path::PathBuf; 2]) -> Result<()> {
    let attached = |cgroup: &std::path::Path| {
        run(&format!("bpftool cgroup show {}", cgroup.display())).map(|shown| shown.matches("lb_").count())
    };
    let [a, b] = cgroups;
    let mut settings = node.settings();
    settings.socket_lb = SocketLb::Host;
    settings.cgroup_root = Some(a.clone());
    node.start(&settings, TcSetting::Auto)?.stop()?;
    assert_eq!(attached(a)?, 8);
    let before = link(node, program::CONNECT4)?;
    node.start(&settings, TcSetting::Auto)?.stop()?;
    let after = link(node, program::CONNECT4)?;
    assert_eq!(before.0, after.0);
    assert_ne!(before.1, after.1);
    settings.cgroup_root = Some(b.clone());
    node.start(&settings, TcSetting::Auto)?.stop()?;
    assert_eq!((attached(a)?, attached(b)?), (0, 8));
    settings.socket_lb = SocketLb::Off;
    node.start(&settings, TcSetting::Auto)?.stop()?;
    assert_eq!(attached(b)?, 0);
    settings.socket_lb = SocketLb::All;
    settings.cgroup_root = Some(node.dir.clone());
    let refused = datapath::Datapath::start(&settings).map(drop);
    ensure!(matches!(refused, Err(Error::Cgroup { .. })), "{refused:?}");
    Ok(())
}

#[test]
fn links_of_another_layout_version_go_once_ours_are_attached() {
    on_a_node(|node| {
        let elsewhere = Elsewhere::new()?;
        elsewhere.veth("pod0")?;
        node.start(&node.settings(), TcSetting::Auto)?.stop()?;
        let state = node.state_dir();
        std::fs::rename(state.join(format!("v{LAYOUT_VERSION}")), state.join("v9999"))?;
        let agent = node.start(&node.settings(), TcSetting::Auto)?;
        assert_eq!(tcx("pod0", TcAttachType::Ingress)?, [program::TC_INGRESS]);
        ensure!(!state.join("v9999").exists());
        agent.stop()
    });
}

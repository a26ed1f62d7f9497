//! D1, dynamic half: which helpers of the kernel each kind of packet calls.

use std::{
    collections::HashSet,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    thread,
};

use anyhow::{Context as _, Result, ensure};
use aya_obj::Object;
use lb_agent::datapath::OBJECT;
use lb_common::maps::program;

use super::{
    insn::{self, HELPERS, Insn},
    measure::Feed,
    packet::{self, Case, Role, World},
    sys::{self, MapType, ProgType},
    traffic::nets,
};
use crate::{
    frame::L4,
    lab::{Hook, Lab, OneCpu, TICKS},
    packets::ACK,
};

/// enum bpf_func_id.
const MAP_LOOKUP: usize = 1;

/// What one kind of packet calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    pub what: String,
    pub map_lookups: u64,
    /// All helpers, lookups among them.
    pub helper_calls: u64,
}

/// The object's programs once more, on the same maps, with every call of a helper counted.
struct Counted {
    programs: Vec<(Hook, OwnedFd)>,
    counters: OwnedFd,
}

impl Counted {
    fn load(lab: &Lab) -> Result<Self> {
        let counters = sys::map(MapType::Array, (HELPERS * 8) as u32, 1)?;
        let mut object = Object::parse(OBJECT)?;
        let fds = lab.map_fds()?;
        let definitions = object.maps.clone();
        let sections: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
        let maps = fds.iter().filter_map(|(name, fd)| {
            definitions.get(name).map(|definition| (name.as_str(), fd.as_raw_fd(), definition))
        });
        object.relocate_maps(maps, &sections)?;
        object.relocate_calls(&sections)?;
        let mut programs = Vec::new();
        for (hook, name) in [
            (Hook::Xdp, program::XDP),
            (Hook::Ingress, program::TC_INGRESS),
            (Hook::Egress, program::TC_EGRESS),
        ] {
            let of = object.programs.get(name).with_context(|| format!("no program {name}"))?;
            let function = object.functions.get(&(of.section_index, of.address)).context("no code")?;
            let code: Vec<Insn> = function
                .instructions
                .iter()
                .map(|i| Insn::new(i.code, i.dst_reg(), i.src_reg(), i.off, i.imm))
                .collect();
            let highest = code.iter().filter_map(Insn::helper).max().unwrap_or(0);
            ensure!((highest as usize) < HELPERS, "{name} calls helper {highest}");
            let counted = insn::counted(&code, counters.as_fd());
            let loaded = sys::load(packet::kind_of(hook), &counted);
            programs.push((hook, loaded.with_context(|| format!("{name} with its calls counted"))?));
        }
        Ok(Self { programs, counters })
    }

    /// Runs the program at a hook once; gives the calls of each helper.
    fn run(&self, hook: Hook, feed: &Feed) -> Result<[u64; HELPERS]> {
        let program = self.programs.iter().find(|(h, _)| *h == hook).context("no such program")?;
        sys::update(&self.counters, 0, [0u64; HELPERS])?;
        let kind: ProgType = packet::kind_of(hook);
        sys::test_run(&program.1, kind, &feed.frame, feed.ifindex, 1)?;
        Ok(sys::lookup(&self.counters, 0u32)?)
    }

    fn path(&self, case: &Case) -> Result<[u64; HELPERS]> {
        if let Some((hook, feed)) = &case.before {
            self.run(*hook, feed)?;
        }
        if case.role != Role::New {
            // Flows are cached from a later tick on than their first packet's, and of what is none of ours one packet in eight.
            // Then eight more look at their tags first.
            self.run(case.hook, &case.feed)?;
            thread::sleep(TICKS);
            for _ in 0..16 {
                self.run(case.hook, &case.feed)?;
            }
        }
        self.run(case.hook, &case.feed)
    }
}

/// The paths of P1, each once.
///
/// In a world whose second does not end meanwhile.
pub fn all(world: &mut World) -> Result<Vec<Path>> {
    let mut paths = Vec::new();
    // Caches are each CPU's own.
    let _cpu = OneCpu::here();
    let counted = Counted::load(&world.lab)?;
    for net in nets() {
        packet::serve(&mut world.lab, &net)?;
        for (l4, name) in [(L4::Udp, "UDP"), (L4::Tcp(ACK), "TCP")] {
            // With many flows the path is that of one.
            for case in packet::cases(world, &net, &l4)?.into_iter().filter(|c| c.is_one_path()) {
                let what = format!("{} {name} {}", net.name(), case.what.trim_end_matches(", hot"));
                let calls = counted.path(&case).with_context(|| what.clone())?;
                ensure!(calls[MAP_LOOKUP] > 0, "{what}: no lookup at all");
                let path = |what, calls: [u64; HELPERS]| Path {
                    what,
                    map_lookups: calls[MAP_LOOKUP],
                    helper_calls: calls.iter().sum(),
                };
                paths.push(path(what.clone(), calls));
                if case.role != Role::New {
                    world.lab.renew_epochs()?;
                    let by_tables = counted.run(case.hook, &case.feed)?;
                    paths.push(path(what + ", not cached", by_tables));
                }
            }
        }
    }
    Ok(paths)
}

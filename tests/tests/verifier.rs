//! What the kernel object asks of a verifier: every program loads whatever the agent may set at load time, well inside the
//! verifier's limits. Needs root. `cargo xtask kernels` runs this on the other supported kernels.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::MapType,
    programs::{Program, ProgramError},
};
use aya_obj::{Object, generated::bpf_insn};
use lb_agent::datapath::{OBJECT, uninterrupted};
use lb_common::{
    V4, V6,
    affinity::{AffinityKey, AffinityValue, MemberKey},
    backend::Backend,
    cidr::ServiceCidrs,
    conntrack::Flow,
    device::Device,
    fragment::{FragmentKey, FragmentPorts, HeldFrame, HeldKey},
    frontend::{FrontendKey, FrontendValue, ServiceName, ServiceRecord, ServiceStats},
    maps::{Clock, global, name, program},
    socket::{SocketKey, SocketOrigin},
    source::SourceRange,
    tuple::Tuple,
    verdict::Counter,
};
use object::{Object as _, ObjectSection as _};

/// Instructions that the verifier may walk for a program; the kernel's own limit is 1,000,000 (BPF_COMPLEXITY_LIMIT_INSNS).
/// Each is a quarter more than what the worst of 6.1, 6.12 and 6.18 needs: room for another compiler, and none for a branch that
/// multiplies the paths.
const BUDGETS: [(&str, u32); 12] = [
    (program::TC_INGRESS, 110_000),
    (program::TC_EGRESS, 23_000),
    (program::XDP, 30_000),
    (program::CLOCK, 50),
    (program::CONNECT4, 1_500),
    (program::CONNECT6, 3_000),
    (program::SENDMSG4, 1_500),
    (program::SENDMSG6, 3_000),
    (program::RECVMSG4, 100),
    (program::RECVMSG6, 150),
    (program::GETPEERNAME4, 100),
    (program::GETPEERNAME6, 150),
];

/// What `--trace-flows` may multiply the budgets by: the limit is still twice as high.
const TRACING_FACTOR: u32 = 4;

/// Stack of all frames of a call chain (MAX_BPF_STACK).
const MAX_STACK: u32 = 512;
/// Frames of a call chain (MAX_CALL_FRAMES).
const MAX_FRAMES: u32 = 8;
/// To this the verifier rounds each frame up; newer ones round less where the JIT allows (check_max_stack_depth).
const FRAME_ROUNDING: u32 = 32;

/// Values of the load-time constants.
#[derive(Clone, Copy, Debug)]
struct Constants {
    jiffies_per_s: u32,
    snat_ports: (u16, u16),
    hash_seed: u32,
    socket_netns: u64,
    flow_cache_slots: u32,
    log_level: u8,
}

/// The agent's two values of the log level: without and with `--trace-flows`.
const SILENT: u8 = 0;
const TRACING: u8 = 4;

const TYPICAL: Constants = Constants {
    jiffies_per_s: 250,
    snat_ports: (10_240, 29_999),
    hash_seed: 0x9e37_79b9,
    socket_netns: 1,
    flow_cache_slots: 8192,
    log_level: SILENT,
};

impl Constants {
    /// The verifier knows the values and prunes by them, so each may lead it another way.
    fn all(log_level: u8) -> Vec<Self> {
        let mut all = Vec::new();
        // CONFIG_HZ has these four values on x86; no port to choose from, some, and all of them.
        for jiffies_per_s in [100, 250, 300, 1000] {
            for snat_ports in [(40_000, 40_000), TYPICAL.snat_ports, (1024, 65_535)] {
                // All sockets, or those of one namespace.
                for socket_netns in [0, u64::MAX] {
                    let hash_seed = if socket_netns == 0 { 0 } else { u32::MAX };
                    let flow_cache_slots = if jiffies_per_s == 300 { 0 } else { TYPICAL.flow_cache_slots };
                    all.push(Self {
                        jiffies_per_s,
                        snat_ports,
                        hash_seed,
                        socket_netns,
                        flow_cache_slots,
                        log_level,
                    });
                }
            }
        }
        all
    }
}

/// Loads the object; `entries` is the size of every map that the agent gives a size to, or the object's own.
fn load(constants: Constants, entries: Option<u32>) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    loader
        .override_global(global::JIFFIES_PER_S, &constants.jiffies_per_s, true)
        .override_global(global::SNAT_PORT_FIRST, &constants.snat_ports.0, true)
        .override_global(global::SNAT_PORT_LAST, &constants.snat_ports.1, true)
        .override_global(global::HASH_SEED, &constants.hash_seed, true)
        .override_global(global::SOCKET_NETNS, &constants.socket_netns, true)
        .override_global(global::FLOW_CACHE_SLOTS, &constants.flow_cache_slots, true)
        .override_global(global::LOG_LEVEL, &constants.log_level, true);
    for map in name::ALL {
        if let Some(entries) = entries.filter(|_| ![name::COUNTERS, name::CLOCK].contains(&map)) {
            loader.map_max_entries(map, entries);
        }
    }
    let mut ebpf = loader.load(OBJECT).with_context(|| format!("maps, with {constants:?}"))?;
    for (name, _) in BUDGETS {
        verify(&mut ebpf, name).with_context(|| format!("{name}, with {constants:?}"))?;
    }
    Ok(ebpf)
}

/// Gives one program to the verifier.
fn verify(ebpf: &mut Ebpf, name: &str) -> Result<()> {
    let loaded = match ebpf.program_mut(name).context("not in the object")? {
        Program::SchedClassifier(p) => uninterrupted(|| p.load()),
        Program::Xdp(p) => uninterrupted(|| p.load()),
        Program::CgroupSockAddr(p) => uninterrupted(|| p.load()),
        other => anyhow::bail!("unexpected type {:?}", other.prog_type()),
    };
    match loaded {
        Err(ProgramError::LoadError { io_error, verifier_log }) => {
            let log = verifier_log.to_string();
            let tail: Vec<_> = log.lines().rev().take(30).collect();
            anyhow::bail!("{io_error}\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"))
        }
        other => Ok(other?),
    }
}

fn verified_instructions(ebpf: &Ebpf, name: &str) -> Result<u32> {
    let info = ebpf.program(name).context("not in the object")?.info()?;
    info.verified_instruction_count().context("the kernel does not tell (5.16 does)")
}

/// The most instructions that the verifier walks for each program.
fn worst(log_level: u8) -> Result<BTreeMap<&'static str, u32>> {
    let mut worst = BTreeMap::new();
    for constants in Constants::all(log_level) {
        let ebpf = load(constants, Some(64))?;
        for (name, _) in BUDGETS {
            let walked = verified_instructions(&ebpf, name)?;
            let most = worst.entry(name).or_default();
            *most = walked.max(*most);
        }
    }
    Ok(worst)
}

fn check(worst: &BTreeMap<&str, u32>, budget_of: impl Fn(&str, u32) -> u32) -> Result<()> {
    let mut over = Vec::new();
    for (name, budget) in BUDGETS {
        let (walked, budget) = (worst[name], budget_of(name, budget));
        println!("{name:18} {walked:7} of {budget} instructions walked by the verifier");
        if walked > budget {
            over.push(name);
        }
    }
    ensure!(over.is_empty(), "over budget: {over:?}");
    Ok(())
}

#[test]
fn every_program_loads_with_all_constants_within_its_budget() -> Result<()> {
    check(&worst(SILENT)?, |_, budget| budget)
}

#[test]
fn every_program_loads_with_flow_tracing_within_its_budget() -> Result<()> {
    // The log lines are written by functions of their own, which are walked once for each state they are called in.
    check(&worst(TRACING)?, |_, budget| TRACING_FACTOR * budget)
}

#[test]
fn every_program_loads_with_maps_of_default_size_and_of_one_entry() -> Result<()> {
    load(TYPICAL, None)?;
    load(TYPICAL, Some(1))?;
    Ok(())
}

#[test]
fn every_program_of_the_object_is_known() -> Result<()> {
    let object = Object::parse(OBJECT)?;
    let found: BTreeSet<_> = object.programs.keys().map(String::as_str).collect();
    assert_eq!(found, BUDGETS.into_iter().map(|(name, _)| name).collect());
    for name in program::SOCKET {
        ensure!(found.contains(name), "{name} is not in the object");
    }
    Ok(())
}

#[test]
fn the_stack_fits_with_frames_rounded_up() -> Result<()> {
    let mut object = Object::parse(OBJECT)?;
    let sections = object.functions.keys().map(|(section, _)| *section).collect();
    object.relocate_calls(&sections)?;
    for (name, program) in &object.programs {
        let key = (program.section_index, program.address);
        let code = &object.functions.get(&key).with_context(|| format!("{name} has no code"))?.instructions;
        let frames = Frames::of(code);
        let (stack, depth) = frames.deepest(0, MAX_FRAMES)?;
        println!("{name:18} {:5} instructions, stack {stack} in {depth} frames", code.len());
        ensure!(stack <= MAX_STACK, "{name}: {stack} bytes of stack: {frames:?}");
    }
    Ok(())
}

/// Functions of one linked program by their first instruction.
#[derive(Debug)]
struct Frames(BTreeMap<usize, Frame>);

#[derive(Debug, Default)]
struct Frame {
    /// Bytes below the frame pointer that are used.
    stack: u32,
    calls: BTreeSet<usize>,
}

/// Opcodes and registers (include/uapi/linux/bpf.h).
mod isa {
    pub const CALL: u8 = 0x85;
    pub const PSEUDO_CALL: u8 = 1;
    pub const MOV64_REG: u8 = 0xbf;
    pub const ADD64_IMM: u8 = 0x07;
    pub const CLASS: u8 = 0x07;
    pub const LDX: u8 = 0x01;
    pub const ST: u8 = 0x02;
    pub const STX: u8 = 0x03;
    pub const FRAME_POINTER: u8 = 10;
}

impl Frames {
    fn of(code: &[bpf_insn]) -> Self {
        let callee = |at: usize| {
            let i = &code[at];
            let is_call = i.code == isa::CALL && i.src_reg() == isa::PSEUDO_CALL;
            is_call.then(|| at.checked_add_signed(i.imm as isize + 1)).flatten()
        };
        let mut starts: Vec<usize> = (0..code.len()).filter_map(callee).chain([0]).collect();
        starts.sort_unstable();
        starts.dedup();
        let ends = starts.iter().skip(1).copied().chain([code.len()]);
        let frame = |(start, end): (usize, usize)| {
            let calls = (start..end).filter_map(callee).collect();
            (start, Frame { stack: stack_of(&code[start..end]), calls })
        };
        Self(starts.iter().copied().zip(ends).map(frame).collect())
    }

    /// Stack and number of frames of the deepest chain of calls from `start`.
    fn deepest(&self, start: usize, frames_left: u32) -> Result<(u32, u32)> {
        ensure!(frames_left > 0, "more than {MAX_FRAMES} frames");
        let frame = self.0.get(&start).context("a call into the middle of a function")?;
        let mut below = (0, 0);
        for callee in &frame.calls {
            below = below.max(self.deepest(*callee, frames_left - 1)?);
        }
        Ok((below.0 + frame.stack.max(1).next_multiple_of(FRAME_ROUNDING), below.1 + 1))
    }
}

/// The lowest address relative to the frame pointer that a function uses, by itself or through a copy of the pointer.
fn stack_of(code: &[bpf_insn]) -> u32 {
    let mut lowest = 0;
    let mut copied = None;
    for i in code {
        lowest = lowest.min(match (i.code, i.code & isa::CLASS) {
            (isa::ADD64_IMM, _) if copied == Some(i.dst_reg()) => i.imm,
            (_, isa::LDX) if i.src_reg() == isa::FRAME_POINTER => i32::from(i.off),
            (_, isa::ST | isa::STX) if i.dst_reg() == isa::FRAME_POINTER => i32::from(i.off),
            _ => 0,
        });
        // The compiler subtracts right after it copies.
        let copies = i.code == isa::MOV64_REG && i.src_reg() == isa::FRAME_POINTER;
        copied = copies.then(|| i.dst_reg());
    }
    lowest.unsigned_abs()
}

#[test]
fn maps_have_the_layouts_of_the_shared_types() -> Result<()> {
    fn of<K, V>() -> (u32, u32) {
        (size_of::<K>() as u32, size_of::<V>() as u32)
    }
    use MapType::{Array, Hash, LpmTrie, LruHash, PerCpuArray};
    let expected = BTreeMap::from([
        (name::FRONTENDS4, (Hash, of::<FrontendKey<V4>, FrontendValue>())),
        (name::FRONTENDS6, (Hash, of::<FrontendKey<V6>, FrontendValue>())),
        (name::SERVICES, (Array, of::<u32, ServiceRecord>())),
        (name::SLOTS, (Array, of::<u32, u32>())),
        (name::BACKENDS4, (Array, of::<u32, Backend<V4>>())),
        (name::BACKENDS6, (Array, of::<u32, Backend<V6>>())),
        (name::FLOWS4, (Hash, of::<Tuple<V4>, Flow<V4>>())),
        (name::FLOWS6, (Hash, of::<Tuple<V6>, Flow<V6>>())),
        (name::AFFINITY4, (LruHash, of::<AffinityKey<V4>, AffinityValue>())),
        (name::AFFINITY6, (LruHash, of::<AffinityKey<V6>, AffinityValue>())),
        (name::AFFINITY_MEMBERS, (Hash, of::<MemberKey, u32>())),
        (name::SERVICE_NAMES, (Hash, of::<u32, ServiceName>())),
        (name::SERVICE_STATS, (Array, of::<u32, ServiceStats>())),
        (name::COUNTERS, (PerCpuArray, of::<u32, u64>())),
        (name::DEVICES, (Hash, of::<u32, Device>())),
        (name::SOCKETS, (LruHash, of::<SocketKey, SocketOrigin>())),
        (name::FRAGMENTS4, (LruHash, of::<FragmentKey<V4>, FragmentPorts>())),
        (name::FRAGMENTS6, (LruHash, of::<FragmentKey<V6>, FragmentPorts>())),
        (name::HELD4, (LruHash, of::<HeldKey<V4>, HeldFrame>())),
        (name::HELD6, (LruHash, of::<HeldKey<V6>, HeldFrame>())),
        (name::SERVICE_CIDRS4, (Array, of::<u32, ServiceCidrs<V4>>())),
        (name::SERVICE_CIDRS6, (Array, of::<u32, ServiceCidrs<V6>>())),
        (name::SOURCE_RANGES4, (LpmTrie, (4 + size_of::<SourceRange<V4>>() as u32, 4))),
        (name::SOURCE_RANGES6, (LpmTrie, (4 + size_of::<SourceRange<V6>>() as u32, 4))),
        (name::CLOCK, (Array, of::<u32, Clock>())),
        (name::FLOW_EPOCHS, (Array, of::<u32, u64>())),
        (name::BYSTANDERS, (Array, of::<u32, u64>())),
    ]);
    assert_eq!(expected.keys().copied().collect::<BTreeSet<_>>(), name::ALL.into_iter().collect());
    let object = Object::parse(OBJECT)?;
    for (name, (kind, sizes)) in expected {
        let map = object.maps.get(name).with_context(|| format!("no map {name}"))?;
        assert_eq!((map.map_type(), (map.key_size(), map.value_size())), (kind as u32, sizes), "{name}");
    }
    assert_eq!(object.maps[name::COUNTERS].max_entries(), Counter::COUNT);
    for table in [name::FLOWS4, name::FLOWS6] {
        // BPF_F_NO_PREALLOC is 1: a new flow waits for no memory.
        assert_eq!(object.maps[table].map_flags(), 0, "{table}");
    }
    Ok(())
}

#[test]
fn licence_is_what_gpl_helpers_need_and_no_cold_code_is_split_off() -> Result<()> {
    let file = object::File::parse(OBJECT)?;
    let licence = file.section_by_name("license").context("no license section")?;
    // One of license_is_gpl_compatible (include/linux/license.h), with its NUL.
    assert_eq!(licence.data()?, b"Dual MIT/GPL\0");
    // Where the compiler puts what never returns; aya would not link it.
    let cold: Vec<_> =
        file.sections().filter_map(|s| s.name().ok()).filter(|n| n.contains("unlikely")).collect();
    ensure!(cold.is_empty(), "{cold:?}");
    Ok(())
}

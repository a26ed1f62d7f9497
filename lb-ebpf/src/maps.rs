//! Every map of the object and nothing else. Capacities here are defaults; the agent overrides them at load.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray},
    macros::btf_map,
};
use lb_common::{
    V4, V6,
    affinity::{AffinityKey, AffinityValue, MemberKey},
    backend::Backend,
    bystander,
    cidr::ServiceCidrs,
    conntrack::Flow,
    device::{Device, Neighbour},
    flow_cache::{ALL_EPOCHS, Entry4, Entry6, Tags},
    fragment::{FragmentKey, FragmentPorts, HeldFrame, HeldKey, OWN_FRAME_BYTES},
    frontend::{FrontendKey, FrontendValue, ServiceName, ServiceRecord, ServiceStats},
    maps::{Clock, capacity},
    socket::{SocketKey, SocketOrigin},
    source::SourceRange,
    tuple::Tuple,
    verdict::Counter,
};

use crate::{icmp::Budget, net::Scratch};

/// The agent writes these arrays through a memory map: a store is seen by the next packet.
const MMAP: usize = BPF_F_MMAPABLE as usize;
/// Memory follows the number of entries instead of the capacity.
const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
pub static FRONTENDS4: HashMap<FrontendKey<V4>, FrontendValue, { capacity::FRONTENDS as usize }, ON_DEMAND> =
    HashMap::new();
#[btf_map]
pub static FRONTENDS6: HashMap<FrontendKey<V6>, FrontendValue, { capacity::FRONTENDS as usize }, ON_DEMAND> =
    HashMap::new();
#[btf_map]
pub static SERVICES: Array<ServiceRecord, { capacity::SERVICES as usize }, MMAP> = Array::new();
#[btf_map]
pub static SLOTS: Array<u32, { capacity::SLOTS as usize }, MMAP> = Array::new();
#[btf_map]
pub static BACKENDS4: Array<Backend<V4>, { capacity::BACKENDS as usize }, MMAP> = Array::new();
#[btf_map]
pub static BACKENDS6: Array<Backend<V6>, { capacity::BACKENDS as usize }, MMAP> = Array::new();
#[btf_map]
pub static FLOWS4: HashMap<Tuple<V4>, Flow<V4>, { 2 * capacity::FLOWS as usize }> = HashMap::new();
#[btf_map]
pub static FLOWS6: HashMap<Tuple<V6>, Flow<V6>, { 2 * capacity::FLOWS as usize }> = HashMap::new();
#[btf_map]
pub static FLOW_EPOCHS: Array<u64, { ALL_EPOCHS as usize }, MMAP> = Array::new();
#[btf_map]
pub static BYSTANDERS: Array<u64, { bystander::WORDS as usize }, MMAP> = Array::new();
// Not written by the agent: the flag puts elements at the beginning of a page, and so each into a line of its own.
#[btf_map]
pub static FLOW_CACHE4: Array<Entry4, { capacity::FLOW_CACHE as usize }, MMAP> = Array::new();
#[btf_map]
pub static FLOW_CACHE6: Array<Entry6, { capacity::FLOW_CACHE as usize / 4 }, MMAP> = Array::new();
#[btf_map]
pub static FLOW_TAGS4: Array<Tags, { capacity::FLOW_CACHE as usize / Tags::SLOTS }> = Array::new();
#[btf_map]
pub static FLOW_TAGS6: Array<Tags, { capacity::FLOW_CACHE as usize / 4 / Tags::SLOTS }> = Array::new();
#[btf_map]
pub static AFFINITY4: LruHashMap<AffinityKey<V4>, AffinityValue, { capacity::AFFINITY as usize }> =
    LruHashMap::new();
#[btf_map]
pub static AFFINITY6: LruHashMap<AffinityKey<V6>, AffinityValue, { capacity::AFFINITY as usize }> =
    LruHashMap::new();
#[btf_map]
pub static AFFINITY_MEMBERS: HashMap<MemberKey, u32, { capacity::AFFINITY_MEMBERS as usize }, ON_DEMAND> =
    HashMap::new();
#[btf_map]
pub static SERVICE_NAMES: HashMap<u32, ServiceName, { capacity::SERVICES as usize }, ON_DEMAND> =
    HashMap::new();
#[btf_map]
pub static SERVICE_STATS: Array<ServiceStats, { capacity::SERVICES as usize }, MMAP> = Array::new();
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { Counter::COUNT as usize }> = PerCpuArray::new();
#[btf_map]
pub static DEVICES: HashMap<u32, Device, { capacity::DEVICES as usize }, ON_DEMAND> = HashMap::new();
#[btf_map]
pub static NEIGHBOURS: LruHashMap<Neighbour, u32, { capacity::NEIGHBOURS as usize }> = LruHashMap::new();
#[btf_map]
pub static SOCKETS: LruHashMap<SocketKey, SocketOrigin, { capacity::SOCKETS as usize }> = LruHashMap::new();
#[btf_map]
pub static FRAGMENTS4: LruHashMap<FragmentKey<V4>, FragmentPorts, { capacity::FRAGMENTS as usize }> =
    LruHashMap::new();
#[btf_map]
pub static FRAGMENTS6: LruHashMap<FragmentKey<V6>, FragmentPorts, { capacity::FRAGMENTS as usize }> =
    LruHashMap::new();
#[btf_map]
pub static HELD4: LruHashMap<HeldKey<V4>, HeldFrame, { capacity::HELD as usize }> = LruHashMap::new();
#[btf_map]
pub static HELD6: LruHashMap<HeldKey<V6>, HeldFrame, { capacity::HELD as usize }> = LruHashMap::new();
/// A fragment on its way to `HELD4` or `HELD6` and back.
#[btf_map]
pub static HELD_SCRATCH: PerCpuArray<HeldFrame, 1> = PerCpuArray::new();
/// A first fragment while it stands in for those that waited for it.
#[btf_map]
pub static OWN_SCRATCH: PerCpuArray<[u8; OWN_FRAME_BYTES], 1> = PerCpuArray::new();
#[btf_map]
pub static SERVICE_CIDRS4: Array<ServiceCidrs<V4>, 1, MMAP> = Array::new();
#[btf_map]
pub static SERVICE_CIDRS6: Array<ServiceCidrs<V6>, 1, MMAP> = Array::new();
#[btf_map]
pub static SOURCE_RANGES4: LpmTrie<SourceRange<V4>, u32, { capacity::SOURCE_RANGES as usize }> =
    LpmTrie::new();
#[btf_map]
pub static SOURCE_RANGES6: LpmTrie<SourceRange<V6>, u32, { capacity::SOURCE_RANGES as usize }> =
    LpmTrie::new();
#[btf_map]
pub static SCRATCH4: PerCpuArray<Scratch<V4>, 1> = PerCpuArray::new();
#[btf_map]
pub static SCRATCH6: PerCpuArray<Scratch<V6>, 1> = PerCpuArray::new();
#[btf_map]
pub static ICMP_BUDGET: PerCpuArray<Budget, 1> = PerCpuArray::new();
#[btf_map]
pub static CLOCK: Array<Clock, 1> = Array::new();

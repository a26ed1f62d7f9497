//! From the object to programs in the kernel: capacities, load-time constants, verifier messages.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{Program, ProgramError},
    util::nr_cpus,
};
use aya_obj::Object;
use lb_common::{
    flow_cache,
    maps::{global, name, program},
};

use super::{Error, OBJECT, bpf, state_dir::StateDir, trace};
use crate::{
    maps,
    settings::{Capacities, Settings, SocketLb},
};

/// Lines of the verifier's log that an error shows: the last instruction, the reason and the statistics.
const VERIFIER_LINES: usize = 12;

/// The loaded programs by name.
#[derive(Debug)]
pub struct Programs(BTreeMap<&'static str, OwnedFd>);

impl Programs {
    /// A program by its name in [`program`].
    pub fn fd(&self, name: &'static str) -> Result<BorrowedFd<'_>, Error> {
        self.0.get(name).map(|fd| fd.as_fd()).ok_or(Error::MissingProgram(name))
    }
}

/// Maps whose size is an option, with their number of entries on a node with so many possible CPUs.
pub fn max_entries(c: &Capacities, cpus: u32) -> Vec<(&'static str, u32)> {
    // A flow is two entries.
    let flow_entries = c.flows.saturating_mul(2);
    vec![
        (name::FRONTENDS4, c.frontends),
        (name::FRONTENDS6, c.frontends),
        (name::SERVICES, c.services),
        (name::SERVICE_NAMES, c.services),
        (name::SERVICE_STATS, c.services.saturating_mul(cpus)),
        (name::SLOTS, c.slots),
        (name::BACKENDS4, c.backends),
        (name::BACKENDS6, c.backends),
        (name::AFFINITY_MEMBERS, c.backends),
        (name::FLOWS4, flow_entries),
        (name::FLOWS6, flow_entries),
        (name::AFFINITY4, c.affinity),
        (name::AFFINITY6, c.affinity),
        (name::SOCKETS, c.sockets),
        (name::SOURCE_RANGES4, c.source_ranges),
        (name::SOURCE_RANGES6, c.source_ranges),
    ]
}

/// The object's definitions, to compare pins with.
pub fn parse() -> Result<Object, Error> {
    Ok(Object::parse(OBJECT)?)
}

/// Refuses kernels that lack something that all of this builds on.
pub fn check_kernel() -> Result<(), Error> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map_while(|n| n.trim().parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (6, 1) {
        return Err(Error::KernelTooOld {
            found: release.trim().to_owned(),
            missing: "the programs are only tested with the verifier and helpers of 6.1",
        });
    }
    Ok(())
}

/// Creates or takes over the maps and loads every program.
pub fn load(object: &Object, state: &StateDir, settings: &Settings) -> Result<Programs, Error> {
    let jiffies_per_s = jiffies_per_s();
    let seed = hash_seed();
    let log_level = trace::level(settings.trace_flows);
    let (first, last) = (settings.snat_ports.first, settings.snat_ports.last);
    let host_netns = netns_cookie().map_err(Error::NetnsCookie)?;
    let netns = match settings.socket_lb {
        SocketLb::All => 0,
        SocketLb::Host | SocketLb::Off => host_netns,
    };
    let answer_ping = u8::from(settings.answer_ping);
    let masquerade_all = u8::from(settings.masquerade_all);
    let cpus = possible_cpus()?;
    let cache_slots = flow_cache::slots_per_cpu(settings.capacities.flow_cache, cpus);
    let mut loader = EbpfLoader::new();
    loader
        .override_global(global::JIFFIES_PER_S, &jiffies_per_s, true)
        .override_global(global::SNAT_PORT_FIRST, &first, true)
        .override_global(global::SNAT_PORT_LAST, &last, true)
        .override_global(global::HASH_SEED, &seed, true)
        .override_global(global::SOCKET_NETNS, &netns, true)
        .override_global(global::HOST_NETNS, &host_netns, true)
        .override_global(global::ANSWER_PING, &answer_ping, true)
        .override_global(global::MASQUERADE_ALL, &masquerade_all, true)
        .override_global(global::SERVICE_RECORDS, &settings.capacities.services, true)
        .override_global(global::FLOW_CACHE_SLOTS, &cache_slots, true)
        .override_global(global::LOG_LEVEL, &log_level, true);
    let sizes = max_entries(&settings.capacities, cpus);
    for (map, entries) in sizes.iter().chain(&flow_cache::lengths(cache_slots, cpus)) {
        loader.map_max_entries(map, *entries);
    }
    for map in name::ALL {
        if object.maps.contains_key(map) {
            loader.map_pin_path(map, state.maps().join(map));
        }
    }
    let mut ebpf = loader.load(OBJECT).map_err(|e| explain(e, &sizes))?;
    let mut programs = BTreeMap::new();
    for name in all_programs() {
        programs.insert(name, load_program(&mut ebpf, name)?);
    }
    let programs = Programs(programs);
    pin_clock(&programs, state)?;
    if settings.trace_flows {
        trace::follow(&mut ebpf)?;
    }
    Ok(programs)
}

/// CPUs that there may ever be: programs number their parts of arrays by them.
pub fn possible_cpus() -> Result<u32, Error> {
    nr_cpus().map(|n| n as u32).map_err(|(_, source)| Error::PossibleCpus(source))
}

fn all_programs() -> impl Iterator<Item = &'static str> {
    [program::TC_INGRESS, program::TC_EGRESS, program::XDP, program::CLOCK].into_iter().chain(program::SOCKET)
}

/// How often a program is given to the verifier that was interrupted (bpf_check ends with EAGAIN when a signal or other
/// work waits for the thread). libbpf tries as often.
const LOAD_ATTEMPTS: usize = 5;

fn load_program(ebpf: &mut Ebpf, name: &'static str) -> Result<OwnedFd, Error> {
    let program = ebpf.program_mut(name).ok_or(Error::MissingProgram(name))?;
    uninterrupted(|| match program {
        Program::SchedClassifier(p) => p.load(),
        Program::Xdp(p) => p.load(),
        Program::CgroupSockAddr(p) => p.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    })
    .map_err(|e| refused(name, e))?;
    let fd = program.fd().map_err(|e| refused(name, e))?;
    fd.as_fd().try_clone_to_owned().map_err(|e| refused(name, e.into()))
}

/// Loads a program, again if the verifier was only interrupted.
pub fn uninterrupted(mut load: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    for _ in 1..LOAD_ATTEMPTS {
        match load() {
            Err(ProgramError::LoadError { io_error, .. })
                if io_error.raw_os_error() == Some(libc::EAGAIN) => {}
            done => return done,
        }
    }
    load()
}

fn refused(program: &'static str, error: ProgramError) -> Error {
    match error {
        ProgramError::LoadError { io_error, .. } if io_error.raw_os_error() == Some(libc::EPERM) => {
            Error::NotPermitted { what: "loading programs", source: io_error }
        }
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
            let from = lines.len().saturating_sub(VERIFIER_LINES);
            let tail = lines.get(from..).unwrap_or_default().join(" | ");
            Error::Verifier { program, tail, source: io_error }
        }
        source => Error::Program { program, source },
    }
}

/// `sizes` are those of [`max_entries`].
fn explain(error: aya::EbpfError, sizes: &[(&str, u32)]) -> Error {
    use aya::{EbpfError, maps::MapError};
    match error {
        EbpfError::MapError(MapError::CreateError { io_error, .. })
            if io_error.raw_os_error() == Some(libc::EPERM) =>
        {
            Error::NotPermitted { what: "creating maps", source: io_error }
        }
        EbpfError::MapError(MapError::CreateError { name, io_error })
            if matches!(io_error.raw_os_error(), Some(libc::ENOMEM | libc::E2BIG)) =>
        {
            let entries = sizes.iter().find(|(map, _)| *map == name).map_or(0, |(_, entries)| *entries);
            Error::NoMemory { option: maps::capacity_option(&name), map: name, entries, source: io_error }
        }
        other => Error::Load(other),
    }
}

/// The sweeper and the command line run it by its pin. Replaced by rename, so that there is always one.
fn pin_clock(programs: &Programs, state: &StateDir) -> Result<(), Error> {
    let pinned = state.programs().join(program::CLOCK);
    let fresh = state.programs().join(format!("{}-new", program::CLOCK));
    let fail = |action| {
        let path = pinned.clone();
        move |source| Error::Pin { path, action, source }
    };
    match fs::remove_file(&fresh) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(fail("unlink")(e)),
    }
    bpf::pin(programs.fd(program::CLOCK)?, &fresh).map_err(fail("BPF_OBJ_PIN"))?;
    fs::rename(&fresh, &pinned).map_err(fail("rename"))
}

/// The kernel's HZ: the coarse clock advances once a tick.
fn jiffies_per_s() -> u32 {
    let mut tick = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `tick` is a valid timespec to write to.
    let known = unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &mut tick) } == 0;
    if known && tick.tv_nsec > 0 {
        // HZ=300 has a tick of 3333333 ns: round to the nearest.
        ((1_000_000_000 + tick.tv_nsec / 2) / tick.tv_nsec) as u32
    } else {
        // CONFIG_HZ of Debian and Ubuntu.
        250
    }
}

/// The same for every run until the node boots, which is as long as pins live: the first 32 (random) bits of the boot id.
fn hash_seed() -> u32 {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.get(..8).and_then(|hex| u32::from_str_radix(hex, 16).ok()).unwrap_or(0x9e37_79b9)
}

/// Cookie of the network namespace of this thread.
fn netns_cookie() -> io::Result<u64> {
    // Every socket has one, and this kind needs no address.
    let socket = std::os::unix::net::UnixDatagram::unbound()?;
    let mut cookie = 0_u64;
    let mut size = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `cookie` has the size that `size` says.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &mut size,
        )
    };
    if done == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use aya::{EbpfError, maps::MapError};

    use super::*;

    #[test]
    fn a_map_that_does_not_fit_into_memory_names_its_option() {
        let refused = |errno| {
            let io_error = io::Error::from_raw_os_error(errno);
            EbpfError::MapError(MapError::CreateError { name: name::FLOWS6.to_owned(), io_error })
        };
        let sizes = max_entries(&Capacities { flows: 3_000_000, ..Capacities::default() }, 2);
        for errno in [libc::ENOMEM, libc::E2BIG] {
            let said = explain(refused(errno), &sizes).to_string();
            assert!(said.contains("FLOWS6 with 6000000 entries") && said.contains("--max-flows"), "{said}");
        }
        assert!(matches!(explain(refused(libc::EPERM), &sizes), Error::NotPermitted { .. }));
    }
}

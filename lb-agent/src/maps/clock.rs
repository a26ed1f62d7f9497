//! The kernel's clock as the programs stamp it: jiffies, which no file or system call tells exactly.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use aya::{
    maps::MapType,
    programs::{ProgramError, Xdp},
};
use aya_obj::programs::XdpAttachType;
use lb_common::maps::{Clock, name, program};

use super::{MapError, Table, sys};

#[derive(Debug, thiserror::Error)]
pub enum ClockError {
    #[error("cannot open the program pinned at {path}")]
    Program {
        path: PathBuf,
        #[source]
        source: Box<ProgramError>,
    },
    #[error("cannot run the program {name}", name = program::CLOCK)]
    Run(#[source] io::Error),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("cannot ask for the resolution of CLOCK_MONOTONIC_COARSE")]
    Resolution(#[source] io::Error),
}

/// Reads jiffies through the pinned program `lb_clock`.
pub struct KernelClock {
    program: OwnedFd,
    clock: Table<u32, Clock>,
    jiffies_per_s: u32,
}

impl KernelClock {
    /// Opens the program and the map below `dir` (`<state_dir>/v<LAYOUT_VERSION>`).
    pub fn open(dir: &Path) -> Result<Self, ClockError> {
        let path = dir.join("programs").join(program::CLOCK);
        // BPF_OBJ_GET alone: going from a program's information to its descriptor (BPF_PROG_GET_FD_BY_ID) would need
        // CAP_SYS_ADMIN, which the agent does without.
        let program = Xdp::from_pin(&path, XdpAttachType::Interface)
            .and_then(|program| Ok(program.fd()?.as_fd().try_clone_to_owned()?))
            .map_err(|e| ClockError::Program { path, source: Box::new(e) })?;
        let clock = Table::open(&dir.join("maps"), name::CLOCK, &[MapType::Array])?;
        Ok(Self { program, clock, jiffies_per_s: jiffies_per_s().map_err(ClockError::Resolution)? })
    }

    /// The low half of the kernel's jiffies, as in time stamps of flows.
    pub fn jiffies(&self) -> Result<u32, ClockError> {
        // At least an Ethernet header: the kernel runs XDP programs on nothing shorter.
        sys::run_program(self.program.as_fd(), &[0; 64]).map_err(ClockError::Run)?;
        let clock = self.clock.get(&0).map_err(|source| MapError::Read { map: name::CLOCK, source })?;
        Ok(clock.unwrap_or_default().jiffies as u32)
    }

    /// Kernel ticks per second.
    pub fn jiffies_per_s(&self) -> u32 {
        self.jiffies_per_s
    }
}

/// CONFIG_HZ of the running kernel: the coarse clocks advance once per tick, and report that as their resolution.
pub fn jiffies_per_s() -> io::Result<u32> {
    let mut resolution = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid place for the answer.
    if unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &mut resolution) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let tick_ns = u64::try_from(resolution.tv_nsec).unwrap_or(0).max(1);
    // CONFIG_HZ is at most 1000 (HZ=300 rounds to 3333333 ns).
    Ok((1_000_000_000 + tick_ns / 2).div_euclid(tick_ns) as u32)
}

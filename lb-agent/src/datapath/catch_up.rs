//! When what programs have written to the old tables is carried over, and when the old programs stop to open flows.

use std::{io, os::fd::AsFd as _};

use lb_common::{V4, V6, maps::name};

use super::{
    Error,
    carry::Carry,
    gates::Gates,
    hurry::Hurry,
    migrate::{failure, open_both},
    state_dir::StateDir,
};
use crate::maps::{FlowEpochs, KernelClock, wait_for_packets};

/// What tells when it was written.
pub const MAPS: [&str; 4] = [name::FLOWS4, name::FLOWS6, name::AFFINITY4, name::AFFINITY6];

/// What has been copied of both families' tables.
#[derive(Debug, Default)]
pub struct Progress {
    v4: Copied,
    v6: Copied,
}

/// Until when a family's tables have been copied. Low halves of jiffies.
#[derive(Clone, Copy, Debug, Default)]
struct Copied {
    /// Beginnings of flows.
    opened: u32,
    /// News of flows.
    touched: u32,
}

/// What is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    NewFlows,
    AllNews,
}

/// Of those that have been moved, all that are carried over, and what that takes.
struct Tables<'a> {
    state: &'a StateDir,
    moved: &'a [&'static str],
    clock: KernelClock,
    epochs: FlowEpochs,
}

impl Progress {
    /// To be called before the first copy.
    pub fn begin(state: &StateDir) -> Result<Self, Error> {
        let now = KernelClock::open(&state.version())?.jiffies()?;
        let copied = Copied { opened: now, touched: now };
        Ok(Self { v4: copied, v6: copied })
    }

    /// Carries over what the old programs have written since the last time.
    pub fn all_news(&mut self, state: &StateDir, moved: &[&'static str]) -> Result<(), Error> {
        let tables = Tables::open(state, moved)?;
        tables.carry4(&mut self.v4, Look::AllNews)?;
        tables.carry6(&mut self.v6, Look::AllNews)
    }

    /// Lets the old programs open no more flows, and carries over all that there are.
    ///
    /// As long as only the old table knows a flow, our programs may open another one with the same answers in the new. So
    /// walks through a table follow each other as closely as they can while one kind of programs takes over from the other.
    pub fn switch(&mut self, state: &StateDir, moved: &[&'static str], gates: &Gates) -> Result<(), Error> {
        self.all_news(state, moved)?;
        let tables = Tables::open(state, moved)?;
        let hurry = Hurry::begin();
        tables.carry4(&mut self.v4, Look::NewFlows)?;
        gates.close4().map_err(failure(name::FRONTENDS4))?;
        tables.carry4(&mut self.v4, Look::NewFlows)?;
        tables.carry6(&mut self.v6, Look::NewFlows)?;
        gates.close6().map_err(failure(name::FRONTENDS6))?;
        tables.carry6(&mut self.v6, Look::NewFlows)?;
        drop(hurry);
        // Programs that had found a frontend before it went.
        wait_for_packets();
        self.all_news(state, moved)
    }
}

impl<'a> Tables<'a> {
    fn open(state: &'a StateDir, moved: &'a [&'static str]) -> Result<Self, Error> {
        let clock = KernelClock::open(&state.version())?;
        Ok(Self { state, moved, clock, epochs: FlowEpochs::open(&state.maps())? })
    }

    fn carry4(&self, copied: &mut Copied, look: Look) -> Result<(), Error> {
        self.carry(copied, look, [name::FLOWS4, name::AFFINITY4], |map, carry| match map {
            name::FLOWS4 => carry.flows::<V4>(&self.epochs),
            _ => carry.affinity::<V4>(),
        })
    }

    fn carry6(&self, copied: &mut Copied, look: Look) -> Result<(), Error> {
        self.carry(copied, look, [name::FLOWS6, name::AFFINITY6], |map, carry| match map {
            name::FLOWS6 => carry.flows::<V6>(&self.epochs),
            _ => carry.affinity::<V6>(),
        })
    }

    fn carry(
        &self,
        copied: &mut Copied,
        look: Look,
        maps: [&'static str; 2],
        carry: impl Fn(&str, Carry<'_>) -> io::Result<()>,
    ) -> Result<(), Error> {
        let (now, per_s) = (self.clock.jiffies()?, self.clock.jiffies_per_s());
        // A program reads the clock before it writes, and stamps a flow once a second.
        let begun = copied.opened.wrapping_sub(per_s / 10);
        let touched = (look == Look::AllNews).then(|| copied.touched.wrapping_sub(per_s));
        for map in maps.into_iter().filter(|map| self.moved.contains(map)) {
            open_both(self.state, map)
                .and_then(|(from, to)| {
                    carry(map, Carry { from: from.as_fd(), to: to.as_fd(), begun, touched })
                })
                .map_err(failure(map))?;
        }
        copied.opened = now;
        if touched.is_some() {
            copied.touched = now;
        }
        Ok(())
    }
}

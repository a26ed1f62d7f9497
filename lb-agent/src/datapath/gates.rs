//! The maps by which programs open flows: frontends, and the ranges of ClusterIPs.
//!
//! Where flows move to another table, each set of programs gets these maps for itself. Taking them from the programs of the
//! last run makes those serve the flows that they know and pass on everything else.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use bytemuck::Pod;
use lb_common::{
    Addr, V4, V6,
    cidr::ServiceCidrs,
    frontend::{FrontendKey, FrontendValue},
    maps::name,
};

use super::{
    bpf::{self, BatchReader, EntrySize},
    elements::{self, Write},
    state_dir::StateDir,
};

/// Of each family the ranges are closed first: an address in one of them is refused if it has no frontend.
pub const NAMES: [&str; 4] = [name::SERVICE_CIDRS4, name::SERVICE_CIDRS6, name::FRONTENDS4, name::FRONTENDS6];

/// Those of the last run. No pin keeps them: if this run ends early, the old programs stay as they are.
#[derive(Debug)]
pub struct Gates {
    cidrs: [OwnedFd; 2],
    frontends: [OwnedFd; 2],
}

impl Gates {
    /// Opens them where they have been moved to.
    pub fn open(state: &StateDir) -> io::Result<Self> {
        let [cidrs4, cidrs6, frontends4, frontends6] =
            NAMES.map(|map| bpf::open_pin(&state.old_maps().join(map)));
        Ok(Self { cidrs: [cidrs4?, cidrs6?], frontends: [frontends4?, frontends6?] })
    }

    /// Those of IPv4. After each step a packet finds its frontend with the old programs or with ours, on all devices alike.
    pub fn close4(&self) -> io::Result<()> {
        let ([cidrs, _], [frontends, _]) = (&self.cidrs, &self.frontends);
        switch_off::<V4>(cidrs.as_fd())?;
        clear(frontends.as_fd(), size_of::<FrontendKey<V4>>())
    }

    /// Those of IPv6.
    pub fn close6(&self) -> io::Result<()> {
        let ([_, cidrs], [_, frontends]) = (&self.cidrs, &self.frontends);
        switch_off::<V6>(cidrs.as_fd())?;
        clear(frontends.as_fd(), size_of::<FrontendKey<V6>>())
    }
}

/// Only the flags change: a packet may read a range while it is written.
fn switch_off<A: Addr>(map: BorrowedFd<'_>) -> io::Result<()>
where
    ServiceCidrs<A>: Pod,
{
    let key = 0_u32.to_ne_bytes();
    let mut cidrs = ServiceCidrs::<A>::default();
    if elements::lookup(map, &key, bytemuck::bytes_of_mut(&mut cidrs))? {
        cidrs.ranges.iter_mut().for_each(|range| range.flags = 0);
        elements::update(map, &key, bytemuck::bytes_of(&cidrs), Write::Any)?;
    }
    Ok(())
}

fn clear(map: BorrowedFd<'_>, key: usize) -> io::Result<()> {
    let size = EntrySize { key, value: size_of::<FrontendValue>() };
    let mut reader = BatchReader::new(map, size);
    // Bucket by bucket: what is deleted meanwhile moves nothing.
    while let Some(batch) = reader.next(bpf::CHUNK)? {
        for key in batch.keys.chunks_exact(size.key) {
            elements::delete(map, key)?;
        }
    }
    Ok(())
}

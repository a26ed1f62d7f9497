//! `BYSTANDERS`: what tells packets that no Service has to do with ([`lb_common::bystander`]).
//!
//! One rule keeps Services reachable: a bit is cleared before anything that needs it is written, and set nowhere but in
//! [`survey`], which reads all that there is. So whoever writes frontends, backends or devices has a [`Bystanders`].

use std::{io, path::Path};

use aya::maps::MapType;
use bytemuck::Pod;
use lb_common::{
    Addr, Be16, V4, V6,
    backend::{self, Backend},
    bystander::{Bit, WORDS},
    conntrack::{Flow, flags},
    device::Device,
    frontend::{FrontendKey, FrontendValue},
    maps::name,
    tuple::Tuple,
};
use tracing::warn;

use super::{MapError, MmapArray, Table, flows};

/// The map, for those who write what its bits are about.
#[derive(Debug)]
pub struct Bystanders(MmapArray<u64>);

impl Bystanders {
    /// Opens the map pinned in `dir`.
    pub fn open(dir: &Path) -> Result<Self, MapError> {
        MmapArray::open(dir, name::BYSTANDERS).map(Self)
    }

    /// To be called before packets to this address may be ours.
    pub fn know_address<A: Addr>(&self, addr: &A) -> Result<(), MapError> {
        self.know(Bit::of_address(addr))
    }

    /// To be called before answers from this port may be ours.
    pub fn know_port(&self, port: Be16) -> Result<(), MapError> {
        self.know(Bit::of_port(port))
    }

    /// To be called before flows may get the addresses of this device.
    pub fn know_device(&self, device: &Device) -> Result<(), MapError> {
        self.know_address(&device.snat4)?;
        self.know_address(&device.snat6)
    }

    fn know(&self, bit: Bit) -> Result<(), MapError> {
        self.0.clear_bits(bit.index(), bit.mask())
    }
}

/// Finds out what is a bystander. To be called while nobody writes the maps pinned in `dir` but programs, and before ours run for
/// the first time: the last run may have been of a version that did not know this map. With `all_is_here` false, programs use maps
/// that are not pinned any more, and nothing is a bystander; nor if the maps cannot be read, which is no reason not to serve.
pub fn survey(dir: &Path, all_is_here: bool) -> Result<(), MapError> {
    let map: MmapArray<u64> = MmapArray::open(dir, name::BYSTANDERS)?;
    let known = match Known::read(dir) {
        Ok(known) if all_is_here => known,
        Ok(_) => Known::all(),
        Err(error) => {
            warn!(error = %crate::chain(&error), "every packet is looked up: what is programmed cannot be read");
            Known::all()
        }
    };
    for (index, known) in (0..).zip(known.0) {
        map.put(index, !known)?;
    }
    Ok(())
}

/// The opposite of the map.
struct Known(Vec<u64>);

impl Known {
    fn all() -> Self {
        Self(vec![u64::MAX; WORDS as usize])
    }

    fn read(dir: &Path) -> Result<Self, MapError> {
        let mut known = Self(vec![0; WORDS as usize]);
        known.of_family::<V4>(dir, [name::FRONTENDS4, name::BACKENDS4, name::FLOWS4])?;
        known.of_family::<V6>(dir, [name::FRONTENDS6, name::BACKENDS6, name::FLOWS6])?;
        known.devices(dir)?;
        Ok(known)
    }

    fn add(&mut self, bit: Bit) {
        if let Some(word) = self.0.get_mut(bit.index() as usize) {
            *word |= bit.mask();
        }
    }

    fn of_family<A: Addr>(&mut self, dir: &Path, maps: [&'static str; 3]) -> Result<(), MapError>
    where
        FrontendKey<A>: Pod,
        Backend<A>: Pod,
        Tuple<A>: Pod,
        Flow<A>: Pod,
    {
        let [frontends, backends, flow_table] = maps;
        // The programs that may still run open flows from what they find here, so it comes before the flows.
        let table: Table<FrontendKey<A>, FrontendValue> = Table::open(dir, frontends, &[MapType::Hash])?;
        let mut walk = table.walk();
        while let Some((keys, _)) = walk.next_chunk().map_err(read_error(frontends))? {
            keys.iter().for_each(|key| self.add(Bit::of_address(&key.addr)));
        }
        let array: MmapArray<Backend<A>> = MmapArray::open(dir, backends)?;
        array.read(u32::MAX, |_, backend| {
            if backend.flags & backend::flags::IN_USE != 0 {
                self.add(Bit::of_port(backend.port));
            }
        })?;
        // Flows outlive their frontend and their backend.
        let table: Table<Tuple<A>, Flow<A>> = Table::open(dir, flow_table, &[MapType::Hash])?;
        let mut walk = table.walk();
        while let Some((keys, flows)) = walk.next_chunk().map_err(flows::read_error::<A>)? {
            for (key, flow) in keys.iter().zip(flows) {
                self.add(if flow.flags & flags::AT_EGRESS != 0 {
                    Bit::of_port(key.sport)
                } else {
                    Bit::of_address(&key.dst)
                });
            }
        }
        Ok(())
    }

    fn devices(&mut self, dir: &Path) -> Result<(), MapError> {
        let table: Table<u32, Device> = Table::open(dir, name::DEVICES, &[MapType::Hash])?;
        for (_, device) in table.entries().map_err(read_error(name::DEVICES))? {
            self.add(Bit::of_address(&device.snat4));
            self.add(Bit::of_address(&device.snat6));
        }
        Ok(())
    }
}

fn read_error(map: &'static str) -> impl Fn(io::Error) -> MapError {
    move |source| MapError::Read { map, source }
}

//! Reading back what the maps hold: at start, and for audits.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use ipnet::IpNet;
use lb_common::{
    Addr,
    addr::ToIp,
    backend::Backend as RawBackend,
    cidr::ServiceCidr,
    frontend::{FrontendKey, FrontendValue, ServiceRecord, SlotRange},
    maps::name,
};

use super::{MapError, Maps, MmapArray, Table, apply, ranges};
use crate::plan::{
    ActualCidr, ActualService, ActualState,
    op::{Backend, Family, Frontend, Protocol},
};

impl Maps {
    /// Everything that plans write, as it is. Entries that no operation can have made (a frontend with an unknown
    /// protocol) are left out: the programs cannot find them either.
    pub fn read_actual(&self) -> Result<ActualState, MapError> {
        let mut actual = ActualState::default();
        read_frontends(&self.frontends4, name::FRONTENDS4, &mut actual)?;
        read_frontends(&self.frontends6, name::FRONTENDS6, &mut actual)?;
        let services = self.read_services()?;
        let members = self.members.entries().map_err(read_error(name::AFFINITY_MEMBERS))?;
        read_cidrs(&self.cidrs4, Family::V4, &mut actual.cidrs)?;
        read_cidrs(&self.cidrs6, Family::V6, &mut actual.cidrs)?;
        Ok(ActualState {
            slots: self.read_slots(&services)?,
            services,
            backends4: read_backends(&self.backends4)?,
            backends6: read_backends(&self.backends6)?,
            members: members.into_iter().collect(),
            ranges: self.read_ranges()?,
            ..actual
        })
    }

    fn read_ranges(&self) -> Result<BTreeSet<(u32, IpNet)>, MapError> {
        let keys4 = self.ranges4.keys().map_err(read_error(name::SOURCE_RANGES4))?;
        let keys6 = self.ranges6.keys().map_err(read_error(name::SOURCE_RANGES6))?;
        let ranges4 = keys4.into_iter().filter_map(ranges::from_key4);
        Ok(ranges4.chain(keys6.into_iter().filter_map(ranges::from_key6)).collect())
    }

    fn read_services(&self) -> Result<BTreeMap<u32, ActualService>, MapError> {
        let mut services = BTreeMap::new();
        self.services.read(u32::MAX, |id, record| {
            if record != ServiceRecord::default() {
                services.insert(id, ActualService { record, name: None });
            }
        })?;
        let mut walk = self.names.walk();
        while let Some((ids, names)) = walk.next_chunk().map_err(read_error(name::SERVICE_NAMES))? {
            for (id, name) in ids.iter().zip(names) {
                services.entry(*id).or_default().name = Some(apply::name_text(name));
            }
        }
        Ok(services)
    }

    /// The slots up to the end of the last range; a range that leaves the array is cut there.
    fn read_slots(&self, services: &BTreeMap<u32, ActualService>) -> Result<Vec<u32>, MapError> {
        let end = |r: SlotRange| r.base().saturating_add(r.len());
        let used =
            services.values().map(|s| end(s.record.cluster).max(end(s.record.local))).max().unwrap_or(0);
        let mut slots = Vec::new();
        self.slots.read(used, |_, backend| slots.push(backend))?;
        Ok(slots)
    }
}

fn read_error(map: &'static str) -> impl Fn(io::Error) -> MapError {
    move |source| MapError::Read { map, source }
}

fn read_frontends<A: Addr + ToIp>(
    table: &Table<FrontendKey<A>, FrontendValue>,
    map: &'static str,
    into: &mut ActualState,
) -> Result<(), MapError>
where
    FrontendKey<A>: bytemuck::Pod,
{
    let mut walk = table.walk();
    while let Some((keys, values)) = walk.next_chunk().map_err(read_error(map))? {
        for (key, value) in keys.iter().zip(values) {
            let address = FrontendKey::address(key.addr);
            if (key.port, key.proto) == (address.port, address.proto) {
                into.addresses.insert(key.addr.to_ip(), *value);
                continue;
            }
            let Some(protocol) = Protocol::from_number(key.proto) else { continue };
            into.frontends
                .insert(Frontend { addr: key.addr.to_ip(), port: key.port.get(), protocol }, *value);
        }
    }
    Ok(())
}

fn read_backends<A: Addr + ToIp>(array: &MmapArray<RawBackend<A>>) -> Result<BTreeMap<u32, Backend>, MapError>
where
    RawBackend<A>: bytemuck::Pod,
{
    let mut backends = BTreeMap::new();
    array.read(u32::MAX, |id, b| {
        let backend = apply::backend_from_flags(b.addr.to_ip(), b.port.get(), b.flags);
        backends.extend(backend.map(|backend| (id, backend)));
    })?;
    Ok(backends)
}

/// Elements that count, or would if they were whole.
fn read_cidrs<A: Addr + ToIp>(
    array: &MmapArray<ServiceCidr<A>>,
    family: Family,
    into: &mut BTreeMap<(Family, u32), ActualCidr>,
) -> Result<(), MapError>
where
    ServiceCidr<A>: bytemuck::Pod,
{
    array.read(u32::MAX, |index, element| {
        if element.flags != 0 {
            let net = IpNet::with_netmask(element.net.to_ip(), element.mask.to_ip());
            let net = net.ok().filter(|net| net.trunc() == *net);
            into.insert((family, index), ActualCidr { net, flags: element.flags });
        }
    })
}

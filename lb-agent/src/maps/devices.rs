//! `DEVICES`: what the data path knows about network devices.

use std::{collections::BTreeMap, path::Path};

use aya::maps::MapType;
use lb_common::{device::Device, maps::name};

use super::{Bystanders, FlowEpochs, MapError, Table};
use crate::datapath::{DeviceSink, DeviceSinkError};

/// `DEVICES`, by ifindex, and the epochs that end with each of its changes.
#[derive(Debug)]
pub struct Devices {
    table: Table<u32, Device>,
    epochs: FlowEpochs,
    bystanders: Bystanders,
}

impl Devices {
    /// Opens the map pinned in `dir`.
    pub fn open(dir: &Path) -> Result<Self, MapError> {
        let table = Table::open(dir, name::DEVICES, &[MapType::Hash])?;
        Ok(Self { table, epochs: FlowEpochs::open(dir)?, bystanders: Bystanders::open(dir)? })
    }

    /// Tells the data path about a device.
    pub fn put(&self, ifindex: u32, device: Device) -> Result<(), MapError> {
        self.bystanders.know_device(&device)?;
        let written = self.table.put(&ifindex, &device);
        self.epochs.renew_all();
        written.map_err(|source| MapError::Write { map: name::DEVICES, source })
    }

    /// Forgets a device. One that is not known is fine.
    pub fn delete(&self, ifindex: u32) -> Result<(), MapError> {
        let deleted = self.table.delete(&ifindex).map(drop);
        self.epochs.renew_all();
        deleted.map_err(|source| MapError::Write { map: name::DEVICES, source })
    }

    /// All devices that the data path was told about.
    pub fn all(&self) -> Result<BTreeMap<u32, Device>, MapError> {
        let entries = self.table.entries().map_err(|source| MapError::Read { map: name::DEVICES, source })?;
        Ok(entries.into_iter().collect())
    }
}

impl DeviceSink for Devices {
    fn put_device(&self, ifindex: u32, device: Device) -> Result<(), DeviceSinkError> {
        Ok(self.put(ifindex, device)?)
    }
    fn delete_device(&self, ifindex: u32) -> Result<(), DeviceSinkError> {
        Ok(self.delete(ifindex)?)
    }
    fn next_hops_changed(&self) {
        self.epochs.renew_all();
    }
}

//! What a source can say about itself, for metrics and readiness.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::SystemTime,
};

/// Shared by a source (which writes) and the metrics (which read). Cheap: atomics, and one lock per event.
#[derive(Debug, Default)]
pub struct SourceStatus {
    connected: AtomicBool,
    events: AtomicU64,
    rejected: AtomicU64,
    reconnects: AtomicU64,
    relists: AtomicU64,
    last_event: Mutex<Option<SystemTime>>,
}

impl SourceStatus {
    /// True while the source hears of changes: all watches of the API server stand, or the directory is being watched.
    pub fn connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }
    /// Events sent.
    pub fn events(&self) -> u64 {
        self.events.load(Ordering::Relaxed)
    }
    /// Documents and objects that could not be read.
    pub fn rejected(&self) -> u64 {
        self.rejected.load(Ordering::Relaxed)
    }
    /// Requests to the API server that failed and were tried again.
    pub fn reconnects(&self) -> u64 {
        self.reconnects.load(Ordering::Relaxed)
    }
    /// Complete lists read, the first ones included.
    pub fn relists(&self) -> u64 {
        self.relists.load(Ordering::Relaxed)
    }
    /// When the last event was sent.
    pub fn last_event(&self) -> Option<SystemTime> {
        *self.last_event.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Relaxed);
    }
    pub(super) fn count_event(&self) {
        self.events.fetch_add(1, Ordering::Relaxed);
        *self.last_event.lock().unwrap_or_else(PoisonError::into_inner) = Some(SystemTime::now());
    }
    pub(super) fn count_rejected(&self) {
        self.rejected.fetch_add(1, Ordering::Relaxed);
    }
    pub(super) fn count_reconnect(&self) {
        self.reconnects.fetch_add(1, Ordering::Relaxed);
    }
    pub(super) fn count_relist(&self) {
        self.relists.fetch_add(1, Ordering::Relaxed);
    }
}

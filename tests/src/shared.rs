//! One cluster for all tests of a file: building it and starting agents takes longer than most tests.

use std::{
    ops::{Deref, DerefMut},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::Duration,
};

use anyhow::Context as _;

use crate::{
    cluster::Cluster,
    manifests::Service,
    place::{Family, Place},
    traffic::{Call, Outcome},
    wait_for,
};

/// A cluster that is built on first use. The janitor takes it down when the process ends.
pub struct Shared {
    make: fn() -> anyhow::Result<Cluster>,
    made: OnceLock<Result<Mutex<Cluster>, String>>,
}

impl Shared {
    pub const fn new(make: fn() -> anyhow::Result<Cluster>) -> Self {
        Self { make, made: OnceLock::new() }
    }

    /// The cluster, for one test at a time.
    ///
    /// # Panics
    /// If it could not be built: each test of the file then fails with the reason.
    pub fn lock(&self) -> Guard<'_> {
        match self.made.get_or_init(|| (self.make)().map(Mutex::new).map_err(|e| format!("{e:#}"))) {
            // A test that failed leaves a cluster that is as good as before.
            Ok(cluster) => Guard(cluster.lock().unwrap_or_else(PoisonError::into_inner)),
            Err(reason) => panic!("no cluster: {reason}"),
        }
    }
}

/// For changes of manifests to take effect, which takes milliseconds; a loaded machine longer.
pub const SOON: Duration = Duration::from_secs(10);

impl Cluster {
    /// Writes a Service and waits until both nodes serve it.
    pub fn serve(&self, service: &Service) -> anyhow::Result<()> {
        self.manifests.write(&service.name, &service.documents())?;
        for node in &self.nodes {
            // From the node itself, over IPv6: it takes no part in what tests look at.
            let call = Call::tcp(service.cluster_ip(Family::V6)).timeout_ms(200);
            wait_for(&format!("{} to be served on {}", service.name, node.place.name), SOON, || {
                node.place.call(&call).is_ok_and(|outcome| outcome.is_ok())
            })?;
        }
        Ok(())
    }

    /// Waits until calls of `from` come to what `expected` wants.
    pub fn wait_for_calls(
        &self,
        what: &str,
        from: &Place,
        call: &Call,
        expected: impl Fn(&Outcome) -> bool,
    ) -> anyhow::Result<()> {
        let mut last = None;
        wait_for(what, SOON, || {
            last = from.call(call).ok();
            last.as_ref().is_some_and(&expected)
        })
        .with_context(|| format!("last: {last:?}"))
    }
}

/// The cluster in use; shows what the agents logged if the test fails.
pub struct Guard<'a>(MutexGuard<'a, Cluster>);

impl Deref for Guard<'_> {
    type Target = Cluster;
    fn deref(&self) -> &Cluster {
        &self.0
    }
}

impl DerefMut for Guard<'_> {
    fn deref_mut(&mut self) -> &mut Cluster {
        &mut self.0
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.0.logs());
        }
    }
}

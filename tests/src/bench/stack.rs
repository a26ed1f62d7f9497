//! P4, P5 and L3: the kernel's own ways to forward and to serve Services, beside the agent's programs, in the chain of
//! [`forward`](super::forward) and at the same number of Services and endpoints.
//!
//! Whatever goes through the stack enters it in the same way: by an XDP program on the node's first device that passes
//! every frame on. Clients are outside the cluster, so kube-proxy's rules masquerade, as the agent's programs do.

mod established;
mod first_packet;
mod fresh;
mod kernel;
mod real;

use std::sync::OnceLock;

use anyhow::{Context as _, Result};

pub use established::established;
pub use first_packet::first_packet;
pub use fresh::fresh;
use kernel::Kernel;
pub use kernel::rules;

use super::{forward::Bench, kube_proxy::Mode, report::Row};

/// Nodes whose rules take long to load: made for the first item that needs them, kept for the next.
#[derive(Default)]
pub struct Kept {
    kernels: OnceLock<[Kernel; 2]>,
    real: OnceLock<Kernel>,
}

impl Kept {
    /// Nodes with rules, in the order of [`Mode::ALL`].
    fn rules(&self, services: u32) -> Result<&[Kernel; 2]> {
        if let Some(kernels) = self.kernels.get() {
            return Ok(kernels);
        }
        let [nft, iptables] =
            Mode::ALL.map(|mode| std::thread::spawn(move || Kernel::serving(mode, services)));
        let joined = |thread: std::thread::JoinHandle<Result<Kernel>>| {
            thread.join().map_err(|_| anyhow::anyhow!("a thread that loads rules panicked"))?
        };
        let both = [joined(nft)?, joined(iptables)?];
        Ok(self.kernels.get_or_init(|| both))
    }

    /// The node with kube-proxy itself, if its program is given.
    fn kube_proxy(&self, bench: &Bench) -> Result<Option<&Kernel>> {
        if let (None, Some(program)) = (self.real.get(), &bench.kube_proxy) {
            let kernel = Kernel::kube_proxy(program, bench.services).context("kube-proxy")?;
            return Ok(Some(self.real.get_or_init(|| kernel)));
        }
        Ok(self.real.get())
    }
}

/// How many times `ours` the baseline costs, which should be at least so many.
fn times_cheaper(row: Row, baseline: &str, least: Option<f64>) -> Row {
    let ratio = row.baseline.zip(row.ours).map(|(baseline, ours)| baseline / ours);
    let (bar, met) = match least {
        Some(least) => (format!("{baseline} / ours >= {least}"), ratio.map(|r| r >= least)),
        None => (String::new(), None),
    };
    Row { ratio, bar, met, ..row }
}

/// What is said where kube-proxy's program is not given.
fn no_kube_proxy(id: &'static str) -> Row {
    Row::missing(
        id,
        "kube-proxy's own rules",
        "",
        "no program given (--kube-proxy BINARY): the suite writes its layout",
    )
}

/// As in the names of rows.
fn at(bench: &Bench) -> String {
    format!("{} Services of {}", bench.services, super::forward::objects::ENDPOINTS)
}

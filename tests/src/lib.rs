//! What tests share. Single packets: [`frame`] and [`lab`]. The rest is the test bed, a small cluster made of network
//! namespaces, with agents as processes in it and real traffic.
//!
//! * [`cluster`] builds nodes, pods, a router and a client, in the shape that a CNI gives them;
//! * [`agent`] runs `lb-agent` on a node;
//! * [`traffic`] is what servers and clients do, each a process of its own (`netproc`) in its namespace and cgroup;
//! * [`raw`] sends and shows what ordinary sockets do not: single packets, ICMP;
//! * [`expect`] knows what each of them should have seen;
//! * [`manifests`] are the objects that agents read;
//! * [`rule`] is one rule of Service semantics at work: a fixture, and a table of what traffic gets;
//! * [`bench`] is what `cargo xtask bench` measures;
//! * [`janitor`] takes everything down again, whatever becomes of the process that made it.

pub mod agent;
pub mod bench;
pub mod cluster;
pub mod expect;
pub mod frame;
pub mod janitor;
pub mod lab;
pub mod manifests;
pub mod netns;
pub mod packets;
pub mod place;
pub mod raw;
pub mod rule;
pub mod shared;
pub mod traffic;
pub mod vnet;

use std::time::{Duration, Instant};

use anyhow::bail;

/// Polls until `done` holds. `what` completes the sentence "gave up waiting for".
pub fn wait_for(what: &str, limit: Duration, mut done: impl FnMut() -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    while !done() {
        if Instant::now() > deadline {
            bail!("gave up waiting for {what} after {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

//! The planner against a simulated kernel.

mod cluster_ips;
mod decision;
mod economy;
mod held;
mod kernel;
mod laws;
mod limits;
mod no_local;
mod objects;
mod recovery;
mod reference;
mod rules;
mod sharing;
mod source_ranges;
mod world;

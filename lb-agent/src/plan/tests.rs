//! The planner against a simulated kernel.

mod economy;
mod kernel;
mod laws;
mod limits;
mod no_local;
mod recovery;
mod reference;
mod rules;
mod sharing;
mod world;

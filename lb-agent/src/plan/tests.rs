//! The planner against a simulated kernel.

mod decision;
mod economy;
mod kernel;
mod laws;
mod limits;
mod objects;
mod recovery;
mod reference;
mod rules;
mod sharing;
mod world;

//! The planner against a simulated kernel.

mod kernel;
mod laws;
mod limits;
mod recovery;
mod reference;
mod rules;
mod world;

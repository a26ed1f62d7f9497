//! Test harness.

pub mod frame;
pub mod lab;

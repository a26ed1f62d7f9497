//! From the model to map operations.

pub mod op;

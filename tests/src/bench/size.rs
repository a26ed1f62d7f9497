//! D1: what does not depend on the machine.
use super::report::Row;
use anyhow::Result;
pub fn rows() -> Result<Vec<Row>> {
    Ok(Vec::new())
}
pub fn record(_: &str) -> Result<()> {
    Ok(())
}

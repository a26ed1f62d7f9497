//! D1: what does not depend on how fast the machine is, and its record in the repository.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use aya_obj::Object;
use lb_agent::datapath::OBJECT;
use lb_common::maps::{capacity, program};
use serde::{Deserialize, Serialize};

use super::{machine, packet, paths, report::Row};
use crate::lab::Options;

/// A value may grow by this much without a word.
const GROWTH: f64 = 0.05;

/// In ticks: longer than the paths take.
const LONG_SECOND: u32 = 1 << 28;

/// Programs that the kernel is asked about: those that see packets.
const VERIFIED: [&str; 3] = [program::XDP, program::TC_INGRESS, program::TC_EGRESS];

/// docs/size.json.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Why the record was written, the latest last. What grows by more than 5 % needs a line here.
    pub reasons: Vec<String>,
    /// Of the verified instructions: other verifiers count otherwise.
    pub kernel: String,
    pub programs: BTreeMap<String, ProgramSize>,
    pub paths: BTreeMap<String, Calls>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramSize {
    /// With all its functions.
    pub instructions: u64,
    /// Walked by the verifier, with the constants of the single-packet tests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<u64>,
}

/// Of one packet on its way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Calls {
    pub map_lookups: u64,
    /// Lookups among them.
    pub helper_calls: u64,
}

/// What the object is now.
pub fn measure() -> Result<Record> {
    let mut object = Object::parse(OBJECT)?;
    let sections = object.functions.keys().map(|(section, _)| *section).collect();
    object.relocate_calls(&sections)?;
    let mut world = packet::world_with(Options {
        flow_cache: capacity::FLOW_CACHE,
        jiffies_per_s: LONG_SECOND,
        ..Options::default()
    })?;
    let mut programs = BTreeMap::new();
    for (name, program) in &object.programs {
        let key = (program.section_index, program.address);
        let code = &object.functions.get(&key).with_context(|| format!("{name} has no code"))?.instructions;
        let is_loaded = VERIFIED.contains(&name.as_str());
        let verified = is_loaded.then(|| world.lab.verified_instructions(name)).transpose()?.map(u64::from);
        programs.insert(name.clone(), ProgramSize { instructions: code.len() as u64, verified });
    }
    let calls = |p: paths::Path| (p.what, Calls { map_lookups: p.map_lookups, helper_calls: p.helper_calls });
    let paths = paths::all(&mut world)?.into_iter().map(calls).collect();
    Ok(Record { reasons: Vec::new(), kernel: machine::kernel_series(), programs, paths })
}

/// Where the record is.
fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/size.json")
}

pub fn recorded() -> Result<Record> {
    let path = path();
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no record", path.display()))
}

/// Writes the record anew.
pub fn record(why: &str) -> Result<()> {
    ensure!(!why.trim().is_empty(), "a record wants a reason");
    let reasons = if path().exists() { recorded()?.reasons } else { Vec::new() };
    let mut now = measure()?;
    now.reasons = reasons.into_iter().chain([why.trim().to_owned()]).collect();
    let text = serde_json::to_string_pretty(&now)? + "\n";
    fs::write(path(), text).with_context(|| format!("cannot write {}", path().display()))
}

impl Record {
    /// Every value under a name. Verified instructions only where the kernel is the same.
    fn values(&self, with_verified: bool) -> BTreeMap<String, u64> {
        let mut values = BTreeMap::new();
        for (name, size) in &self.programs {
            values.insert(format!("{name}: instructions"), size.instructions);
            if let Some(verified) = size.verified.filter(|_| with_verified) {
                values.insert(format!("{name}: verified instructions"), verified);
            }
        }
        for (name, calls) in &self.paths {
            values.insert(format!("{name}: map lookups"), calls.map_lookups);
            values.insert(format!("{name}: helper calls"), calls.helper_calls);
        }
        values
    }

    /// What has grown too much in `now`, or is not in this record.
    pub fn grown(&self, now: &Self) -> Vec<String> {
        let same_kernel = self.kernel == now.kernel;
        let was = self.values(same_kernel);
        let complaint = |(name, is): (String, u64)| match was.get(&name) {
            None => Some(format!("{name}: {is}, and no record of it")),
            Some(was) if is as f64 > *was as f64 * (1.0 + GROWTH) => Some(format!("{name}: {was} -> {is}")),
            Some(_) => None,
        };
        now.values(same_kernel).into_iter().filter_map(complaint).collect()
    }
}

/// The measured values beside the recorded ones.
pub fn rows() -> Result<Vec<Row>> {
    let (was, now) = (recorded()?, measure()?);
    let same_kernel = was.kernel == now.kernel;
    let recorded = was.values(same_kernel);
    let row = |(what, is): (String, u64)| {
        let row = Row::value("D1", what.clone(), "", is as f64);
        match recorded.get(&what) {
            // A path without any calls stays one.
            Some(0) => row.at_most(0.0),
            Some(was) => row.against(*was as f64).ratio_at_most(1.0 + GROWTH),
            None => row.noted("not in the record"),
        }
    };
    Ok(now.values(same_kernel).into_iter().map(row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kernel: &str, instructions: u64, verified: u64, lookups: u64) -> Record {
        let size = ProgramSize { instructions, verified: Some(verified) };
        let calls = Calls { map_lookups: lookups, helper_calls: 9 };
        Record {
            reasons: vec![],
            kernel: kernel.into(),
            programs: [("p".to_owned(), size)].into(),
            paths: [("way".to_owned(), calls)].into(),
        }
    }

    #[test]
    fn growth_beyond_five_percent_is_told_and_verifiers_are_not_mixed() {
        let was = record("6.18", 100, 1000, 3);
        assert!(was.grown(&record("6.18", 105, 1050, 3)).is_empty());
        assert!(was.grown(&record("6.18", 50, 500, 1)).is_empty());
        assert_eq!(was.grown(&record("6.18", 106, 1000, 3)), ["p: instructions: 100 -> 106"]);
        assert_eq!(was.grown(&record("6.18", 100, 1051, 4)).len(), 2);
        assert!(was.grown(&record("6.12", 100, 5000, 3)).is_empty());
        let mut more = was.clone();
        more.paths.insert("other way".into(), Calls::default());
        assert_eq!(was.grown(&more).len(), 2);
    }
}

//! What `cargo xtask bench` measures: the project's own object and agent, each beside a baseline in the same run.
//!
//! * [`packet`] (P1) and [`scale`] (P6): programs run by BPF_PROG_TEST_RUN, on frames that a [`feeder`](insn::feeder)
//!   makes, interleaved with programs that do nothing ([`measure`]);
//! * [`size`] and [`paths`] (D1): what does not depend on the machine;
//! * [`kube_proxy`]: what the kernel's own ways of serving Services are measured with;
//! * [`control`] (C1 to C5): the agent against a server that lists and watches;
//! * [`connect`] (L1, L2, C6): connections through real sockets;
//! * [`report`] and [`chart`]: what is said of it.
//!
//! Nothing here judges a time in a test: tests run all of it in a small form and look at what was measured, not how fast
//! it was.

pub mod chart;
pub mod connect;
pub mod control;
pub mod docs;
pub mod forward;
pub mod insn;
pub mod kube_proxy;
pub mod machine;
pub mod measure;
pub mod packet;
pub mod paths;
pub mod report;
pub mod scale;
pub mod size;
pub mod stack;
pub mod sys;
pub mod traffic;

use std::{path::PathBuf, str::FromStr};

use anyhow::{Result, bail};
use report::Row;

/// How much to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// What figures are taken from.
    Full,
    /// For development: figures are rough.
    Short,
    /// Everything once: only shows that it runs.
    Small,
}

impl Effort {
    pub const fn rounds(self) -> u32 {
        match self {
            Self::Full => 9,
            Self::Short => 3,
            Self::Small => 1,
        }
    }

    /// Runs of a program between two looks at the clock, where flows repeat.
    const fn repeat(self) -> u32 {
        match self {
            Self::Full => 200_000,
            Self::Short => 50_000,
            Self::Small => 64,
        }
    }

    /// The same where each run makes a flow, which stays in the table.
    const fn repeat_new(self) -> u32 {
        match self {
            Self::Full | Self::Short => 8_000,
            Self::Small => 64,
        }
    }

    /// `full`, or little.
    const fn at_most(self, full: u32, small: u32) -> u32 {
        match self {
            Self::Small if full > small => small,
            _ => full,
        }
    }
}

impl FromStr for Effort {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        Ok(match name {
            "full" => Self::Full,
            "short" => Self::Short,
            "small" => Self::Small,
            _ => bail!("effort is full, short or small, not {name:?}"),
        })
    }
}

/// What to run it with.
#[derive(Clone, Debug)]
pub struct Plan {
    pub effort: Effort,
    /// The agent to measure; without it, the one that was built along with this program.
    pub agent: Option<PathBuf>,
    pub forward: forward::Options,
}

/// A part of the suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Packet,
    Size,
    Control,
    Forward,
    Connect,
}

impl Part {
    pub const ALL: [Self; 5] = [Self::Packet, Self::Size, Self::Control, Self::Forward, Self::Connect];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Packet => "packet",
            Self::Size => "size",
            Self::Control => "control",
            Self::Forward => "forward",
            Self::Connect => "connect",
        }
    }

    /// Items of the suite that it has.
    pub const fn items(self) -> &'static [&'static str] {
        match self {
            Self::Packet => &["P1", "P6"],
            Self::Size => &["D1"],
            Self::Control => &["C1", "C2", "C3", "C4", "C5"],
            Self::Forward => &["P2", "P3", "P4", "P5", "P7", "P8", "P9", "L3"],
            Self::Connect => &["C6", "L1", "L2"],
        }
    }

    fn run(self, plan: &Plan) -> Result<Vec<Row>> {
        let effort = plan.effort;
        Ok(match self {
            Self::Packet => [packet::run(effort)?, scale::run(effort)?].concat(),
            Self::Size => size::rows()?,
            Self::Control => control::run(effort, plan.agent.clone())?,
            Self::Forward => forward::run(plan)?,
            Self::Connect => connect::run(effort, plan.agent.clone())?,
        })
    }
}

/// The items of the suite with the bars that stand for each: what a run leaves out is said with these.
const ITEMS: [(&str, &str, &str); 19] = [
    ("P1", "program cost", "<= 40 ns over an empty program"),
    ("P2", "forwarding, hot", "empty redirect / ours >= 0.88"),
    ("P3", "forwarding, cold", ">= 0.75 without, >= 0.55 with flow state"),
    ("P4", "against kube-proxy's rules, established", "XDP >= 7 x, tc >= 2.5 x"),
    ("P5", "against kube-proxy's rules, new flows", ">= 6 x nftables, >= 80 x iptables"),
    ("P6", "flatness in Services and endpoints", "hot <= 1.03 x, uniform <= 1.5 x"),
    ("P7", "reverse path through devices", "<= 1.2 x forward"),
    ("P8", "new-flow flood and endpoint churn", "0 lost, >= 0.97 of quiet"),
    ("P9", "two cores", ">= 1.95 x one core"),
    ("C1", "cold start with 10,000 x 10", "<= 1.5 s"),
    ("C2", "one endpoint change", "p99 <= 2 ms to the map"),
    ("C3", "1,000 slices at once", "<= 100 ms"),
    ("C4", "agent memory", "RSS <= 50 MB, maps <= 16 MB"),
    ("C5", "agent CPU", "<= 1 CPU-s for C1, <= 0.3 ms per change, idle < 0.1 %"),
    ("C6", "restart under traffic", "0 packets lost, 0 flows moved"),
    ("L1", "connect, one byte, close", ">= 0.98 of direct"),
    ("L2", "request and response", "p50 <= 1.02 x, p99 <= 1.05 x of direct"),
    ("L3", "first packet", "flat in Services"),
    ("D1", "size of programs and paths", "<= 5 % growth without a reason"),
];

/// What a run came to.
#[derive(Debug)]
pub struct Outcome {
    pub rows: Vec<Row>,
    /// Parts that could not be measured, and why: the others are worth having.
    pub failed: Vec<(Part, anyhow::Error)>,
}

/// Runs parts, and says of every other item of the suite that it was not measured.
pub fn run(parts: &[Part], plan: &Plan) -> Outcome {
    let mut outcome = Outcome { rows: Vec::new(), failed: Vec::new() };
    for part in parts {
        match part.run(plan) {
            Ok(rows) => outcome.rows.extend(rows),
            Err(e) => outcome.failed.push((*part, e)),
        }
    }
    for (id, what, bar) in ITEMS {
        let part = Part::ALL.into_iter().find(|p| p.items().contains(&id));
        let why = match part {
            Some(part) => match outcome.failed.iter().find(|(failed, _)| *failed == part) {
                Some((_, e)) => format!("failed: {e:#}"),
                None if parts.contains(&part) => continue,
                None => "not asked for in this run".to_owned(),
            },
            None => "not measured yet".to_owned(),
        };
        outcome.rows.push(Row::missing(id, what, bar, &why));
    }
    outcome
}

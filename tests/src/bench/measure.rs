//! Timing: programs side by side in interleaved rounds, and what is said of their times.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use anyhow::{Result, ensure};

use super::{
    Effort,
    insn::{self, Field, NOT_RUN},
    sys::{self, MapType, ProgType, Ran},
};
use crate::lab::OneCpu;

/// The two halves of a baseline may differ by this much; a run where they differ by more is marked.
const STEADY: f64 = 0.10;

/// A program that is given one frame after another.
pub struct Feeder {
    program: OwnedFd,
    kind: ProgType,
    frame: Vec<u8>,
    ifindex: u32,
    // The program refers to its map by itself, but user space must hold a program array: the kernel empties it when the
    // last descriptor closes.
    _programs: OwnedFd,
}

/// What is fed: a frame, and what differs from flow to flow.
#[derive(Clone, Debug)]
pub struct Feed {
    pub frame: Vec<u8>,
    pub fields: Vec<Field>,
    /// A power of two.
    pub flows: u32,
    pub ifindex: u32,
}

impl Feeder {
    /// Feeds `target`.
    pub fn new(kind: ProgType, feed: &Feed, target: BorrowedFd) -> Result<Self> {
        ensure!(feed.flows.is_power_of_two(), "{} flows", feed.flows);
        let counter = sys::map(MapType::Array, 8, 1)?;
        let programs = sys::map(MapType::ProgArray, 4, 1)?;
        sys::update_fd(&programs, 0, target)?;
        let code =
            insn::feeder(kind, &feed.frame, &feed.fields, feed.flows, counter.as_fd(), programs.as_fd());
        let program = sys::load(kind, &code)?;
        let (frame, ifindex) = (feed.frame.clone(), feed.ifindex);
        Ok(Self { program, kind, frame, ifindex, _programs: programs })
    }

    /// Feeds the program that does nothing.
    pub fn empty(kind: ProgType, feed: &Feed) -> Result<Self> {
        Self::new(kind, feed, sys::load(kind, &insn::empty(kind))?.as_fd())
    }

    /// Feeds the program that touches the packet and does nothing else.
    pub fn touching(kind: ProgType, feed: &Feed) -> Result<Self> {
        Self::new(kind, feed, sys::load(kind, &insn::touching(kind))?.as_fd())
    }

    /// The next `repeat` frames.
    pub fn run(&self, repeat: u32) -> Result<Ran> {
        let ran = sys::test_run(&self.program, self.kind, &self.frame, self.ifindex, repeat)?;
        ensure!(ran.code != NOT_RUN, "the frame did not reach the program");
        Ok(ran)
    }
}

/// Times of one thing and its baseline, in ns.
#[derive(Clone, Debug, PartialEq)]
pub struct Timing {
    pub ours: f64,
    pub baseline: f64,
    pub rounds: u32,
    /// Distance of the quartiles, as a part of the median.
    pub spread: f64,
    /// False if the baseline's two halves differ too much: something else ran on the machine.
    pub steady: bool,
}

impl Timing {
    /// ns above the baseline.
    pub fn over(&self) -> f64 {
        self.ours - self.baseline
    }

    /// From the times of each round: baseline, ours, ours, baseline.
    fn of(rounds: &[[f64; 4]]) -> Self {
        let column = |i: usize| rounds.iter().map(move |r| r[i]);
        let ours: Vec<f64> = column(1).chain(column(2)).collect();
        let (first, last): (Vec<f64>, Vec<f64>) = (column(0).collect(), column(3).collect());
        let (a, b) = (median(&first), median(&last));
        Self {
            ours: median(&ours),
            baseline: median(&[first, last].concat()),
            rounds: rounds.len() as u32,
            spread: spread(&ours),
            steady: (a - b).abs() <= STEADY * a.min(b),
        }
    }
}

/// Runs both in turns: A B B A.
pub fn compare(effort: Effort, repeat: u32, ours: &Feeder, baseline: &Feeder) -> Result<(Timing, Ran)> {
    let _cpu = OneCpu::here();
    let mut rounds = Vec::new();
    let mut last = None;
    for _ in 0..effort.rounds() {
        let before = baseline.run(repeat)?.ns;
        let first = ours.run(repeat)?.ns;
        let ran = ours.run(repeat)?;
        rounds.push([before, first, ran.ns, baseline.run(repeat)?.ns]);
        last = Some(ran);
    }
    let Some(last) = last else { anyhow::bail!("no rounds") };
    Ok((Timing::of(&rounds), last))
}

/// How many runs of `ours` a comparison makes.
pub fn runs(effort: Effort, repeat: u32) -> u64 {
    2 * u64::from(effort.rounds()) * u64::from(repeat)
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values
}

/// The value that `part` (0 to 1) of the values are below; between two of them, by their distance.
pub fn quantile(values: &[f64], part: f64) -> f64 {
    let values = sorted(values);
    let Some(last) = values.len().checked_sub(1) else { return f64::NAN };
    let at = part * last as f64;
    let (below, above) = (values[at.floor() as usize], values[at.ceil() as usize]);
    below + (above - below) * at.fract()
}

pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// Distance of the quartiles, as a part of the median.
pub fn spread(values: &[f64]) -> f64 {
    (quantile(values, 0.75) - quantile(values, 0.25)) / median(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_small_sets() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(quantile(&[0.0, 10.0], 0.99), 9.9);
        assert_eq!(spread(&[1.0, 2.0, 3.0, 4.0, 5.0]), 2.0 / 3.0);
    }

    #[test]
    fn a_baseline_that_drifts_makes_the_round_unsteady() {
        let steady = Timing::of(&[[20.0, 60.0, 62.0, 21.0], [20.0, 61.0, 61.0, 21.0]]);
        assert_eq!((steady.ours, steady.baseline, steady.steady), (61.0, 20.5, true));
        assert!(!Timing::of(&[[20.0, 60.0, 62.0, 23.0], [20.0, 61.0, 61.0, 23.0]]).steady);
    }
}

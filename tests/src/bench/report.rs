//! Results: one row per comparison; as a table for people, JSON, CSV and charts for everything else.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::{chart, measure::Timing};

/// One comparison.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Of the suite: P1, C2, ...
    pub id: &'static str,
    pub what: String,
    /// None: not measured, and `note` says why.
    pub ours: Option<f64>,
    pub baseline: Option<f64>,
    pub unit: &'static str,
    pub ratio: Option<f64>,
    /// What is to be reached, in words; empty for what is only shown.
    pub bar: String,
    pub met: Option<bool>,
    pub rounds: u32,
    /// Distance of the quartiles of the rounds, as a part of the median.
    pub spread: Option<f64>,
    pub note: String,
}

impl Row {
    /// Something that no part of the suite measures yet, or that this run left out.
    pub fn missing(id: &'static str, what: &str, bar: &str, note: &str) -> Self {
        Self {
            id,
            what: what.into(),
            ours: None,
            baseline: None,
            unit: "",
            ratio: None,
            bar: bar.into(),
            met: None,
            rounds: 0,
            spread: None,
            note: note.into(),
        }
    }

    /// A plain value.
    pub fn value(id: &'static str, what: impl Into<String>, unit: &'static str, ours: f64) -> Self {
        Self { ours: Some(ours), unit, what: what.into(), rounds: 1, ..Self::missing(id, "", "", "") }
    }

    /// A program's time against its baseline.
    pub fn timed(id: &'static str, what: impl Into<String>, t: &Timing) -> Self {
        let note = if t.steady { "" } else { "unsteady: the baseline drifted by over 10 %" };
        Self {
            baseline: Some(t.baseline),
            ratio: Some(t.ours / t.baseline),
            rounds: t.rounds,
            spread: Some(t.spread),
            note: note.into(),
            ..Self::value(id, what, "ns", t.ours)
        }
    }

    /// A value beside another one of this run.
    pub fn against(mut self, baseline: f64) -> Self {
        self.baseline = Some(baseline);
        self.ratio = self.ours.map(|ours| ours / baseline);
        self
    }

    /// At most so much above the baseline.
    pub fn over_at_most(self, most: f64) -> Self {
        let over = self.ours.zip(self.baseline).map(|(ours, baseline)| ours - baseline);
        let bar = format!("<= {most} {} over", self.unit);
        self.judged(bar, over.map(|over| over <= most))
    }

    /// At most so many times the baseline.
    pub fn ratio_at_most(self, most: f64) -> Self {
        let met = self.ratio.map(|ratio| ratio <= most);
        self.judged(format!("<= {most} x"), met)
    }

    pub fn at_most(self, most: f64) -> Self {
        let met = self.ours.map(|ours| ours <= most);
        let bar = format!("<= {most} {}", self.unit);
        self.judged(bar, met)
    }

    pub fn noted(mut self, note: &str) -> Self {
        if !self.note.is_empty() {
            self.note.push_str("; ");
        }
        self.note.push_str(note);
        self
    }

    fn judged(self, bar: String, met: Option<bool>) -> Self {
        Self { bar, met, ..self }
    }

    fn cells(&self) -> [String; 9] {
        let number = |n: Option<f64>| n.map_or("-".into(), plain);
        [
            self.id.into(),
            self.what.clone(),
            match self.ours {
                Some(ours) => format!("{} {}", plain(ours), self.unit),
                None => self.note.clone(),
            },
            number(self.baseline),
            self.ours.zip(self.baseline).map_or("-".into(), |(o, b)| plain(o - b)),
            self.ratio.map_or("-".into(), |r| format!("{r:.2}")),
            if self.bar.is_empty() { "-".into() } else { self.bar.clone() },
            match self.met {
                Some(true) => "yes".into(),
                Some(false) => "NO".into(),
                None => "-".into(),
            },
            self.spread.map_or("-".into(), |s| format!("{:.0} %", s * 100.0)),
        ]
    }
}

/// Three digits are more than any run repeats.
fn plain(n: f64) -> String {
    match n.abs() {
        a if a >= 100.0 => format!("{n:.0}"),
        a if a >= 1.0 => format!("{n:.1}"),
        _ => format!("{n:.3}"),
    }
}

const HEAD: [&str; 9] = ["id", "what", "ours", "baseline", "over", "ratio", "bar", "met", "spread"];

/// As Markdown, which reads well on a terminal too.
pub fn table(rows: &[Row]) -> String {
    let mut cells = vec![HEAD.map(String::from)];
    cells.extend(rows.iter().map(|row| {
        let mut cells = row.cells();
        if row.ours.is_some() && !row.note.is_empty() {
            let _ = write!(cells[1], " ({})", row.note);
        }
        cells
    }));
    let width = |column: usize| cells.iter().map(|c| c[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    let mut text = String::new();
    for (i, row) in cells.iter().enumerate() {
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(text, "| {cell:<width$} ");
        }
        text.push_str("|\n");
        if i == 0 {
            for width in &widths {
                let _ = write!(text, "|{}", "-".repeat(width + 2));
            }
            text.push_str("|\n");
        }
    }
    text
}

/// RFC 4180.
fn csv(rows: &[Row]) -> String {
    let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let number = |n: Option<f64>| n.map_or(String::new(), |n| n.to_string());
    let mut text = String::from("id,what,ours,baseline,unit,ratio,bar,met,rounds,spread,note\r\n");
    for r in rows {
        let met = r.met.map_or(String::new(), |met| met.to_string());
        let _ = write!(text, "{},{},{},{},", r.id, quoted(&r.what), number(r.ours), number(r.baseline));
        let _ = write!(text, "{},{},{},{met},", r.unit, number(r.ratio), quoted(&r.bar));
        let _ = write!(text, "{},{},{}\r\n", r.rounds, number(r.spread), quoted(&r.note));
    }
    text
}

/// Writes results.json, results.csv, and a chart for each item that has something to show.
pub fn write(rows: &[Row], dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let put = |name: &str, text: String| {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    put("results.json", serde_json::to_string_pretty(rows)? + "\n")?;
    put("results.csv", csv(rows))?;
    charts(rows, dir)
}

/// Writes the charts only.
pub fn charts(rows: &[Row], dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    for (name, svg) in chart::all(rows) {
        let path = dir.join(name);
        fs::write(&path, svg).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Row {
        Row::value("P1", "a \"b\"", "ns", 60.0).against(20.0)
    }

    #[test]
    fn bars_are_judged_by_what_they_say() {
        assert_eq!(row().over_at_most(40.0).met, Some(true));
        assert_eq!(row().over_at_most(39.9).met, Some(false));
        assert_eq!(row().ratio_at_most(2.9).met, Some(false));
        assert_eq!(row().at_most(60.0).met, Some(true));
        assert_eq!(Row::missing("P2", "x", "b", "n").ratio_at_most(1.0).met, None);
    }

    #[test]
    fn what_is_missing_shows_in_every_form() {
        let rows = [row(), Row::missing("P2", "forwarding", ">= 0.88", "not measured yet")];
        assert!(table(&rows).lines().any(|l| l.contains("P2") && l.contains("not measured yet")));
        assert!(csv(&rows).contains("P2,\"forwarding\",,,,,\">= 0.88\",,0,,\"not measured yet\"\r\n"));
        assert!(csv(&rows).contains("\"a \"\"b\"\"\""));
        let json = serde_json::to_value(&rows).unwrap();
        assert_eq!(json[0]["ratio"], 3.0);
        assert_eq!(json[1]["ours"], serde_json::Value::Null);
    }
}

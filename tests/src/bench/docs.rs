//! The last full run, in the documentation.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};

use super::{chart, report, report::Row};

/// Everything between these two lines is written by the command.
const BEGIN: &str = "<!-- results: written by `cargo xtask bench --docs` -->";
const END: &str = "<!-- end of results -->";

/// `text` with its results replaced.
pub fn with_results(text: &str, machine: &[(&str, String)], rows: &[Row]) -> Result<String> {
    let (before, rest) = text.split_once(BEGIN).with_context(|| format!("no line {BEGIN:?}"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("no line {END:?}"))?;
    let mut results = String::from("\n\n");
    for (name, value) in machine {
        let _ = writeln!(results, "* {name}: {value}");
    }
    let _ = write!(results, "\n{}\n", report::table(rows));
    for (name, _) in chart::all(rows) {
        let _ = writeln!(results, "![{name}](benchmarks/{name})\n");
    }
    Ok(format!("{before}{BEGIN}{results}{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_results_are_replaced() {
        let rows = ["P1", "L1", "P1"].map(|id| Row::value(id, "a", "ns", 1.0));
        let text = format!("intro\n{BEGIN}\nold\n{END}\nrest\n");
        let new = with_results(&text, &[("kernel", "6".into())], &rows).unwrap();
        assert!(new.starts_with("intro\n") && new.ends_with("\nrest\n"), "{new}");
        assert!(new.contains("* kernel: 6") && new.contains("benchmarks/p1.svg") && !new.contains("old"));
        assert_eq!(new.matches("benchmarks/p1.svg").count(), 1, "{new}");
        assert_eq!(with_results(&new, &[("kernel", "6".into())], &rows).unwrap(), new);
        assert!(with_results("nothing", &[], &rows).is_err());
    }
}

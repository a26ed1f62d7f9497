//! Bar charts as SVG: a bar per row, our part above the baseline in another colour.

use std::{collections::BTreeSet, fmt::Write as _};

use super::report::Row;

const BAR: usize = 16;
const GAP: usize = 6;
const LABELS: usize = 430;
const PLOT: f64 = 520.0;
const TOP: usize = 44;

/// Charts by file name: of each item whose rows are times.
pub fn all(rows: &[Row]) -> Vec<(String, String)> {
    // Rows of one item may come in several groups.
    let mut seen = BTreeSet::new();
    let ids = rows.iter().filter(|r| is_shown(r)).map(|r| r.id).filter(|id| seen.insert(*id));
    let of = |id: &str| rows.iter().filter(|r| r.id == id && is_shown(r)).collect::<Vec<_>>();
    ids.map(|id| (format!("{}.svg", id.to_lowercase()), chart(id, &of(id)))).collect()
}

fn is_shown(row: &Row) -> bool {
    row.unit == "ns" && row.ours.is_some()
}

fn chart(id: &str, rows: &[&Row]) -> String {
    let longest = rows.iter().filter_map(|r| r.ours).fold(1.0, f64::max);
    let height = TOP + rows.len() * (BAR + GAP) + GAP;
    let width = LABELS + PLOT as usize + 90;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"18\" font-size=\"14\">{id}: {} (grey: the baseline beside it)</text>\n",
        measured(id)
    );
    for (i, row) in rows.iter().enumerate() {
        let y = TOP + i * (BAR + GAP);
        let (ours, baseline) = (row.ours.unwrap_or(0.0), row.baseline.unwrap_or(0.0));
        let (all, grey) = (ours / longest * PLOT, baseline.min(ours) / longest * PLOT);
        let colour = if row.met == Some(false) { "#c0504d" } else { "#4f81bd" };
        let text = y + BAR - 4;
        let _ = write!(
            svg,
            "<text x=\"{}\" y=\"{text}\" text-anchor=\"end\">{}</text>\n\
             <rect x=\"{LABELS}\" y=\"{y}\" width=\"{all:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>\n\
             <rect x=\"{LABELS}\" y=\"{y}\" width=\"{grey:.1}\" height=\"{BAR}\" fill=\"#a6a6a6\"/>\n\
             <text x=\"{:.1}\" y=\"{text}\">{ours:.0}</text>\n",
            LABELS - 6,
            escaped(&row.what),
            LABELS as f64 + all + 6.0,
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// What the bars of an item are.
fn measured(id: &str) -> &'static str {
    match id {
        "L1" => "ns per connection",
        "L2" => "ns per request",
        _ => "ns per packet",
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_per_item_with_a_bar_per_row() {
        let rows = [
            Row::value("P1", "a < b", "ns", 50.0).against(20.0),
            Row::value("P1", "c", "ns", 100.0).against(20.0),
            Row::missing("P2", "d", "", "not measured yet"),
        ];
        let charts = all(&rows);
        assert_eq!(charts.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["p1.svg"]);
        let svg = &charts[0].1;
        // A background, and for each row a bar and its baseline; 50 of 100 is half the width.
        assert_eq!(svg.matches("<rect").count(), 5);
        assert!(svg.contains("width=\"260.0\"") && svg.contains("a &lt; b"), "{svg}");
    }
}

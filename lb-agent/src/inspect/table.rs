//! Aligned columns.

use std::io::{self, Write};

/// Rows of text under a header.
pub struct Table<const N: usize> {
    columns: [Column; N],
    rows: Vec<[String; N]>,
}

/// A column's header, and whether it holds numbers.
#[derive(Clone, Copy)]
pub enum Column {
    Text(&'static str),
    Number(&'static str),
}

impl Column {
    const fn title(self) -> &'static str {
        match self {
            Self::Text(t) | Self::Number(t) => t,
        }
    }
}

impl<const N: usize> Table<N> {
    pub fn new(columns: [Column; N]) -> Self {
        Self { columns, rows: Vec::new() }
    }

    pub fn push(&mut self, row: [String; N]) {
        self.rows.push(row);
    }

    /// Writes the header and the rows; two spaces between columns, none at the end of a line.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let titles = self.columns.map(|c| c.title().to_string());
        let mut widths = titles.each_ref().map(|t| t.chars().count());
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        for row in std::iter::once(&titles).chain(&self.rows) {
            let mut line = String::new();
            for ((cell, column), width) in row.iter().zip(self.columns).zip(widths) {
                if !line.is_empty() {
                    line.push_str("  ");
                }
                line.push_str(&match column {
                    Column::Text(_) => format!("{cell:<width$}"),
                    Column::Number(_) => format!("{cell:>width$}"),
                });
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new([Column::Text("NAME"), Column::Number("PACKETS"), Column::Text("POLICY")]);
        table.push(["default/web".into(), "7".into(), "Cluster".into()]);
        table.push(["é".into(), "12345678".into(), "".into()]);
        let mut out = Vec::new();
        table.write(&mut out).unwrap();
        let expected = "\
NAME          PACKETS  POLICY
default/web         7  Cluster
é            12345678
";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}

//! Numbers and tables as people read them.

use anyhow::Result;
use std::io::Write;

/// A number as people read it: 4,108,123.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

pub(super) fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A table: names to the left, the rest to the right, as wide as what is in it.
pub(super) struct Table {
    rows: Vec<[String; 5]>,
}

impl Table {
    pub(super) fn new(heads: [&str; 5]) -> Table {
        Table { rows: vec![heads.map(str::to_string)] }
    }

    pub(super) fn row(&mut self, name: String, [a, b, c, d]: [String; 4]) {
        self.rows.push([name, a, b, c, d]);
    }

    pub(super) fn print(&self, out: &mut impl Write) -> Result<()> {
        let width =
            |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; 5] = std::array::from_fn(width);
        for [name, rest @ ..] in &self.rows {
            write!(out, "{name:<0$}", widths[0])?;
            for (cell, width) in rest.iter().zip(&widths[1..]) {
                write!(out, "  {cell:>width$}")?;
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }
}

//! A table for a terminal or a document, and the statistics in its cells.

use std::fmt::Write;
use std::time::Duration;

pub struct Table {
    pub title: String,
    pub head: Vec<String>,
    pub rows: Vec<Vec<String>>,
    /// What was measured where, below the table.
    pub notes: Vec<String>,
}

impl Table {
    pub fn text(&self) -> String {
        let all = || [&self.head].into_iter().chain(&self.rows);
        let width = |column: usize| all().filter_map(|row| Some(row.get(column)?.chars().count())).max();
        let widths: Vec<usize> = (0..self.head.len()).map(|column| width(column).unwrap_or(0)).collect();
        let mut text = format!("\n{}\n", self.title);
        for row in all() {
            for (cell, width) in row.iter().zip(&widths) {
                let _ = write!(text, "  {cell:width$}");
            }
            text.push('\n');
        }
        self.notes.iter().for_each(|note| _ = writeln!(text, "  {note}"));
        text
    }

    pub fn markdown(&self) -> String {
        let mut text = format!("\n**{}**\n\n", self.title);
        let rule = vec!["---".to_owned(); self.head.len()];
        for row in [&self.head, &rule].into_iter().chain(&self.rows) {
            let _ = writeln!(text, "| {} |", row.join(" | "));
        }
        text.push('\n');
        self.notes.iter().for_each(|note| _ = writeln!(text, "{note}  "));
        text
    }
}

/// The value below which this share of `values` lies (nearest rank). `values` is not empty.
pub fn quantile<T: Copy + Ord>(values: &[T], share: f64) -> T {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// "median (p10-p90)" in milliseconds.
pub fn spread(times: &[Duration]) -> String {
    let [low, middle, high] = [0.1, 0.5, 0.9].map(|share| ms(quantile(times, share)));
    format!("{middle} ({low}-{high})")
}

/// Milliseconds to three digits or so.
pub fn ms(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1e3;
    let decimals = if ms < 100.0 { 2 } else { 1 };
    format!("{ms:.decimals$}")
}

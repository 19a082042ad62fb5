//! Handling times of events that have something in common, as rows of the page's tables.

use std::collections::BTreeMap;

use serde::Serialize;

/// Rows of a table at most.
const ROWS: usize = 200;
/// Steps of a histogram: three a decade, from 100 ns.
pub const STEPS: usize = 24;

/// A row of a table.
#[derive(Debug, Serialize)]
pub struct Row {
    name: String,
    /// Number of the reason, in the table of reasons only.
    reason: Option<usize>,
    /// To the monitor, in KVM.
    counts: [usize; 2],
    /// Handling time of those, nanoseconds.
    took: [f64; 2],
    p50: f64,
    p99: f64,
    histogram: Vec<usize>,
}

/// Handling times of what is alike.
#[derive(Debug, Default)]
pub struct Group {
    counts: [usize; 2],
    sums: [f64; 2],
    took: Vec<f64>,
}

impl Group {
    /// One event more; `side` is 1 for those that KVM answered.
    pub fn add(&mut self, side: usize, took: i64) {
        self.counts[side] += 1;
        self.sums[side] += took as f64;
        self.took.push(took as f64);
    }

    /// All of them.
    pub fn row(mut self, name: String, reason: Option<usize>) -> Row {
        self.took.sort_by(f64::total_cmp);
        let last = self.took.len().saturating_sub(1) as f64;
        let at = |share: f64| self.took.get((last * share).round() as usize).copied().unwrap_or(0.0);
        let mut histogram = vec![0; STEPS];
        for ns in &self.took {
            let step = ((ns.max(100.0) / 100.0).log10() * 3.0).floor() as usize;
            histogram[step.min(STEPS - 1)] += 1;
        }
        Row { name, reason, counts: self.counts, took: self.sums, p50: at(0.5), p99: at(0.99), histogram }
    }
}

/// The costliest first, and not too many.
pub fn costliest(groups: BTreeMap<&str, Group>) -> Vec<Row> {
    let rows = groups.into_iter().map(|(name, group)| group.row(name.to_owned(), None));
    let mut rows: Vec<_> = rows.collect();
    rows.sort_by(|a, b| b.took.iter().sum::<f64>().total_cmp(&a.took.iter().sum()));
    rows.truncate(ROWS);
    rows
}

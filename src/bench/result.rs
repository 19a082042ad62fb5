//! What a benchmark leaves behind: samples with everything that is needed to judge them. The same tree is the JSON output.
//!
//! Only raw samples are kept: medians, spreads and ratios are worked out where they are shown, by `measure::stats`.

use serde::{Deserialize, Serialize};

use super::host::Host;

/// A whole run of `vmm bench`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// The command line that was given.
    pub command: Vec<String>,
    /// Given up before its end (Ctrl-C): the samples are fewer than asked for.
    pub interrupted: bool,
    /// What was measured, in order.
    pub suites: Vec<Suite>,
}

/// What one suite found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Suite {
    /// As on the command line: `boot`.
    pub name: String,
    /// For people: "Start: VM against container".
    pub title: String,
    /// Where. Suites of one run may have different hosts: what this host's KVM cannot do runs in an emulated machine.
    pub host: Host,
    /// Seed of the order and of the resampling.
    pub seed: u64,
    /// How it was measured: what is in and out of the span, one sentence each.
    pub method: Vec<String>,
    /// Those who took part, with their exact commands, in the order in which they are shown.
    pub contenders: Vec<Contender>,
    /// One for each quantity.
    pub figures: Vec<Figure>,
}

impl Suite {
    /// Those who failed, with their errors, and whether there are samples of them in some figure all the same.
    pub fn failures(&self) -> impl Iterator<Item = (&Contender, &str, bool)> {
        self.contenders.iter().filter_map(|contender| {
            let why = contender.failure.as_deref()?;
            let mut series = self.figures.iter().flat_map(|figure| &figure.series);
            Some((contender, why, series.any(|series| series.who == contender.name)))
        })
    }
}

/// Who was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Contender {
    /// Short and unique in its suite: "crun".
    pub name: String,
    /// The exact command, or what was done in place of one.
    pub command: String,
    /// The version that it tells of itself, if it does.
    pub version: Option<String>,
    /// Why it was not measured: its own error. Nothing that cannot run is left out silently.
    pub failure: Option<String>,
}

/// One quantity, of every contender that could be measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// "exec to first output".
    pub name: String,
    /// Of the samples.
    pub unit: Unit,
    /// Which way is better.
    pub better: Better,
    /// The contender that the others are compared with, by name.
    pub baseline: Option<String>,
    /// In the suite's order of contenders; those that failed have none.
    pub series: Vec<Series>,
}

/// The samples of one contender, in the order in which they were taken.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// The contender's name.
    pub who: String,
    /// In the figure's unit. Never empty.
    pub samples: Vec<f64>,
}

/// The unit of a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Wall-clock milliseconds of the host's monotonic clock, or virtual ones of a repeatable clock.
    Milliseconds,
    /// Nanoseconds.
    Nanoseconds,
    /// Cycles of the host's time-stamp counter.
    Cycles,
    /// Instructions of the whole host, by a repeatable clock.
    Instructions,
    /// 1024 bytes.
    Kibibytes,
    /// 2^20 bytes a second.
    MebibytesPerSecond,
    /// Operations a second.
    PerSecond,
    /// Exits from a guest to the host's kernel.
    Exits,
}

impl Unit {
    /// As it is written behind a number.
    pub fn symbol(self) -> &'static str {
        match self {
            Self::Milliseconds => "ms",
            Self::Nanoseconds => "ns",
            Self::Cycles => "cycles",
            Self::Instructions => "instructions",
            Self::Kibibytes => "KiB",
            Self::MebibytesPerSecond => "MiB/s",
            Self::PerSecond => "/s",
            Self::Exits => "exits",
        }
    }
}

/// Which way a figure is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    /// Times and sizes.
    Lower,
    /// Rates.
    Higher,
}

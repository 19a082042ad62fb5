//! A figure worked out for people: medians, spreads, and what may be said of each contender beside the baseline. The table and
//! the page both show these, so they cannot disagree.

use super::number::{scale, three_digits};
use crate::measure::Random;
use crate::measure::stats::{Comparison, Ratio, Summary};
use crate::result::{Better, Figure, Suite};

/// A figure in the unit in which it is shown.
pub struct View<'a> {
    /// The figure itself.
    pub figure: &'a Figure,
    /// What its samples are divided by.
    pub divisor: f64,
    /// The unit after that.
    pub unit: &'static str,
    /// One for each series, in their order.
    pub rows: Vec<Row<'a>>,
}

/// A contender in a figure.
pub struct Row<'a> {
    /// Its name.
    pub who: &'a str,
    /// Its samples, in the unit in which they are shown.
    pub samples: Vec<f64>,
    /// Of those.
    pub summary: Summary,
    /// Beside the baseline.
    pub verdict: Verdict,
}

/// What is said of a contender beside the baseline.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    /// The figure has no baseline.
    Alone,
    /// It is the baseline.
    Baseline,
    /// It is compared.
    Compared(Comparison),
}

impl<'a> View<'a> {
    /// Of `figure`, which is one of `suite`'s.
    pub fn of(suite: &Suite, figure: &'a Figure) -> Self {
        let medians = figure.series.iter().map(|series| Summary::of(&series.samples).median.abs());
        let smallest = medians.filter(|median| *median > 0.0).min_by(f64::total_cmp).unwrap_or(0.0);
        let (divisor, unit) = scale(figure.unit, smallest);
        let baseline = figure.series.iter().find(|series| Some(&series.who) == figure.baseline.as_ref());
        let rows = figure.series.iter().map(|series| {
            let samples: Vec<f64> = series.samples.iter().map(|sample| sample / divisor).collect();
            let verdict = match baseline {
                None => Verdict::Alone,
                Some(baseline) if baseline.who == series.who => Verdict::Baseline,
                // From the seed each time, so that the same samples give the same interval wherever they stand.
                Some(baseline) => Verdict::Compared(Comparison::of(
                    &series.samples,
                    &baseline.samples,
                    &mut Random::new(suite.seed),
                )),
            };
            Row { who: &series.who, summary: Summary::of(&samples), samples, verdict }
        });
        Self { figure, divisor, unit, rows: rows.collect() }
    }

    /// "ms, lower is better".
    pub fn legend(&self) -> String {
        let better = match self.figure.better {
            Better::Lower => "lower",
            Better::Higher => "higher",
        };
        format!("{}, {better} is better", self.unit)
    }
}

impl Verdict {
    /// The ratio, where one may be told, and what is said in its place or of its certainty. `times` is the sign behind it.
    pub fn words(self, times: &str, repeatable_clock: bool) -> (String, String) {
        let interval = |ratio: Ratio| {
            let [low, high] = [ratio.low, ratio.high].map(three_digits);
            format!("{low} - {high}")
        };
        match self {
            Self::Alone => (String::new(), String::new()),
            Self::Baseline => (String::new(), "baseline".to_owned()),
            Self::Compared(Comparison::Without) => {
                (String::new(), "no ratio: a median is not above zero".to_owned())
            }
            Self::Compared(Comparison::Bare(value)) => {
                let why = if repeatable_clock {
                    "counted, not sampled".to_owned()
                } else {
                    format!("no interval: fewer than {} samples", Ratio::FEWEST)
                };
                (three_digits(value) + times, why)
            }
            Self::Compared(Comparison::Open(ratio)) => {
                (String::new(), format!("no difference shown ({})", interval(ratio)))
            }
            Self::Compared(Comparison::Different(ratio)) => {
                (three_digits(ratio.value) + times, interval(ratio))
            }
        }
    }
}

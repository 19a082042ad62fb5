//! Medians, spreads, and what may be said of a ratio.

use super::Random;

/// The value below which `share` of `samples` lies, interpolated between its neighbours (type 7 of Hyndman and Fan, the
/// default of R and NumPy). NaN if there are none.
pub fn quantile(samples: &[f64], share: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile_of_sorted(&sorted, share)
}

fn quantile_of_sorted(sorted: &[f64], share: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = share.clamp(0.0, 1.0) * last as f64;
    let below = at.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (at - below as f64)
}

/// The usual summary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// How many samples.
    pub count: usize,
    /// A tenth lies below.
    pub p10: f64,
    /// Half lies below.
    pub median: f64,
    /// Nine tenths lie below.
    pub p90: f64,
}

impl Summary {
    /// Of `samples`.
    pub fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let [p10, median, p90] = [0.1, 0.5, 0.9].map(|share| quantile_of_sorted(&sorted, share));
        Self { count: samples.len(), p10, median, p90 }
    }
}

/// The ratio of two medians, with a 95% confidence interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratio {
    /// Of the medians.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

impl Ratio {
    /// Resamples: so many that the interval's ends hold to two digits.
    pub const RESAMPLES: usize = 2000;
    /// With fewer samples than this, even the whole range of them covers the true median in less than 95% of cases
    /// (1 - 2 / 2^n), so no resampling can give such an interval.
    pub const FEWEST: usize = 6;

    /// median(`samples`) / median(`baseline`), its interval by the percentile bootstrap. `None` where there is no ratio: no
    /// samples, or medians (of them, or of what was resampled) that are not above zero.
    pub fn of(samples: &[f64], baseline: &[f64], random: &mut Random) -> Option<Self> {
        let value = ratio(median(&mut samples.to_vec()), median(&mut baseline.to_vec()))?;
        let mut drawn = Vec::new();
        let mut median_of_resample = |from: &[f64]| {
            drawn.clear();
            drawn.extend(from.iter().map(|_| from[random.below(from.len())]));
            median(&mut drawn)
        };
        let ratios = (0..Self::RESAMPLES).map(|_| {
            let of = median_of_resample(samples);
            ratio(of, median_of_resample(baseline))
        });
        let mut ratios = ratios.collect::<Option<Vec<f64>>>()?;
        ratios.sort_by(f64::total_cmp);
        let [low, high] = [0.025, 0.975].map(|share| quantile_of_sorted(&ratios, share));
        Some(Self { value, low, high })
    }

    /// Whether the interval leaves open which of the two is larger: then nobody may claim that either is.
    pub fn is_open(&self) -> bool {
        self.low <= 1.0 && self.high >= 1.0
    }
}

fn ratio(of: f64, to: f64) -> Option<f64> {
    let ratio = of / to;
    (of > 0.0 && to > 0.0 && ratio.is_finite() && ratio > 0.0).then_some(ratio)
}

/// The quantile at a half, without sorting more than it takes: resampling asks for thousands of them.
fn median(samples: &mut [f64]) -> f64 {
    let Some(last) = samples.len().checked_sub(1) else { return f64::NAN };
    let (_, &mut below, rest) = samples.select_nth_unstable_by(last / 2, f64::total_cmp);
    if last.is_multiple_of(2) {
        return below;
    }
    let above = rest.iter().copied().min_by(f64::total_cmp).unwrap_or(below);
    below + (above - below) * 0.5
}

/// What may be said of samples beside those of the baseline.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Comparison {
    /// No ratio: a median is not above zero.
    Without,
    /// The ratio of the medians; there are too few samples for an interval.
    Bare(f64),
    /// The interval covers 1: no difference is shown.
    Open(Ratio),
    /// The interval leaves out 1.
    Different(Ratio),
}

impl Comparison {
    /// Of `samples` with `baseline`.
    pub fn of(samples: &[f64], baseline: &[f64], random: &mut Random) -> Self {
        if samples.len().min(baseline.len()) < Ratio::FEWEST {
            let value = ratio(median(&mut samples.to_vec()), median(&mut baseline.to_vec()));
            return value.map_or(Self::Without, Self::Bare);
        }
        match Ratio::of(samples, baseline, random) {
            None => Self::Without,
            Some(ratio) if ratio.is_open() => Self::Open(ratio),
            Some(ratio) => Self::Different(ratio),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_r_and_numpy() {
        let samples = [7.0, 1.0, 3.0, 9.0];
        assert_eq!(
            [0.0, 0.1, 0.5, 0.9, 1.0].map(|share| quantile(&samples, share)),
            [1.0, 1.6, 5.0, 8.4, 9.0]
        );
        assert_eq!(Summary::of(&samples), Summary { count: 4, p10: 1.6, median: 5.0, p90: 8.4 });
        assert!(quantile(&[], 0.5).is_nan());
        let mut random = Random::new(1);
        for count in 1..40 {
            let mut drawn: Vec<f64> = (0..count).map(|_| random.below(1000) as f64).collect();
            assert_eq!(quantile(&drawn, 0.5), median(&mut drawn), "{drawn:?}");
        }
    }

    #[test]
    fn no_ratio_where_there_is_none() {
        let compare = |a: &[f64], b: &[f64]| Comparison::of(a, b, &mut Random::new(1));
        let (ones, twos) = ([1.0; 10], [2.0; 10]);
        assert_eq!(compare(&twos, &ones), Comparison::Different(Ratio { value: 2.0, low: 2.0, high: 2.0 }));
        assert!(matches!(compare(&ones, &ones), Comparison::Open(_)));
        assert_eq!(compare(&twos, &[0.0; 10]), Comparison::Without);
        assert_eq!(compare(&[-2.0; 10], &[-1.0; 10]), Comparison::Without);
        assert_eq!(compare(&[], &ones), Comparison::Without);
        assert_eq!(compare(&[f64::MAX; 10], &[f64::MIN_POSITIVE; 10]), Comparison::Without);
        // A baseline of which a resample may be zero has no ratio either.
        assert_eq!(compare(&ones, &[0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]), Comparison::Without);
        // Five of five on one side happen to a fair coin often enough.
        assert_eq!(compare(&[2.0; 5], &ones), Comparison::Bare(2.0));
    }
}

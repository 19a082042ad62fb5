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
    const RESAMPLES: usize = 2000;

    /// median(`samples`) / median(`baseline`), its interval by the percentile bootstrap. `None` where there is no ratio: no
    /// samples, or medians that are not above zero.
    pub fn of(samples: &[f64], baseline: &[f64], random: &mut Random) -> Option<Self> {
        let value = quantile(samples, 0.5) / quantile(baseline, 0.5);
        if !value.is_finite() || value <= 0.0 {
            return None;
        }
        let mut median_of_resample = |from: &[f64]| {
            let mut drawn: Vec<f64> = from.iter().map(|_| from[random.below(from.len())]).collect();
            drawn.sort_by(f64::total_cmp);
            quantile_of_sorted(&drawn, 0.5)
        };
        let mut ratios: Vec<f64> = (0..Self::RESAMPLES)
            .map(|_| median_of_resample(samples) / median_of_resample(baseline))
            .filter(|ratio| ratio.is_finite())
            .collect();
        ratios.sort_by(f64::total_cmp);
        let [low, high] = [0.025, 0.975].map(|share| quantile_of_sorted(&ratios, share));
        (low.is_finite() && high.is_finite()).then_some(Self { value, low, high })
    }

    /// Whether the interval leaves open which of the two is larger: then nobody may claim that either is.
    pub fn is_open(&self) -> bool {
        self.low <= 1.0 && self.high >= 1.0
    }
}

//! A figure's distributions as SVG: one strip a contender, on an axis that all share.
//!
//! Positions are in percent of the width, so the page can be of any width and its dots stay round; no script draws.

use std::fmt::Write;

use super::number::three_digits;
use super::rows::{Row, View};

/// Height of a strip in pixels.
const HEIGHT: f64 = 46.0;
const MIDDLE: f64 = HEIGHT / 2.0;
/// Dots keep so far from the strip's edges, in percent of its width.
const MARGIN: f64 = 1.5;
/// The width for which dots are laid beside each other. On another, some overlap or stand apart.
const WIDTH: f64 = 560.0;
const RADIUS: f64 = 3.2;
/// More dots than this say no more: then they are so many quantiles.
pub const MOST_DOTS: usize = 200;
/// From this ratio of largest to smallest on, the axis is logarithmic.
const WIDE: f64 = 10.0;

/// Where values stand from left (0) to right (1).
pub struct Axis {
    low: f64,
    high: f64,
    /// Whether it is logarithmic.
    pub log: bool,
    /// Marks with their labels.
    pub ticks: Vec<(f64, String)>,
}

impl Axis {
    /// One that has room for every sample of `view`.
    pub fn of(view: &View) -> Self {
        let samples = || view.rows.iter().flat_map(|row| row.samples.iter().copied());
        let low = samples().min_by(f64::total_cmp).unwrap_or(0.0);
        let high = samples().max_by(f64::total_cmp).unwrap_or(1.0);
        let log = low > 0.0 && high / low >= WIDE;
        let [mut from, mut to] = [low, high].map(|value| if log { value.log10() } else { value });
        // Room beside the outermost; around a single value too. Halves, because the difference may overflow.
        let room = match to / 2.0 - from / 2.0 {
            0.0 => (to.abs() * 0.1).max(1e-9),
            half => half * 0.08,
        };
        // From zero, unless that would hide what there is to see.
        if !log && low >= 0.0 && low < 0.6 * high {
            from = 0.0;
        } else {
            from -= room;
        }
        to += room;
        let mut axis = Self { low: from, high: to, log, ticks: Vec::new() };
        let ticks = if log { decades(from, to) } else { steps(from, to) };
        let inside = ticks.into_iter().filter(|value| (from..=to).contains(&axis.scaled(*value)));
        axis.ticks = inside.map(|value| (axis.at(value), label(value))).collect();
        axis
    }

    /// Whether a reader must be told that bars from its left end would lie.
    pub fn omits_zero(&self) -> bool {
        !self.log && self.low > 0.0
    }

    fn scaled(&self, value: f64) -> f64 {
        if self.log { value.log10() } else { value }
    }

    /// The place of `value`, 0 to 1.
    pub fn at(&self, value: f64) -> f64 {
        let at = (self.scaled(value) / 2.0 - self.low / 2.0) / (self.high / 2.0 - self.low / 2.0);
        if at.is_finite() { at.clamp(0.0, 1.0) } else { 0.5 }
    }
}

/// In percent of the strip.
pub fn percent(at: f64) -> String {
    format!("{:.2}%", MARGIN + at * (100.0 - 2.0 * MARGIN))
}

/// Short, so that labels stay apart: 0.5, 20, 50k, 2M.
fn label(value: f64) -> String {
    let (value, letter) = match value.abs() {
        1e4..1e6 => (value / 1e3, "k"),
        1e6..1e9 => (value / 1e6, "M"),
        _ => (value, ""),
    };
    let text = three_digits(value);
    if text.contains('e') || !text.contains('.') {
        return text + letter;
    }
    format!("{}{letter}", text.trim_end_matches('0').trim_end_matches('.'))
}

/// 1, 2 and 5 of each decade, or fewer, so that there are seven or so.
fn decades(from: f64, to: f64) -> Vec<f64> {
    let (first, last) = (from.floor() as i32, to.ceil() as i32);
    let digits: &[f64] = match to - from {
        ..1.6 => &[1.0, 2.0, 3.0, 5.0, 7.0],
        ..2.2 => &[1.0, 2.0, 5.0],
        ..4.2 => &[1.0, 3.0],
        _ => &[1.0],
    };
    let step = usize::try_from((last - first) / 7 + 1).unwrap_or(1);
    let decades = (first..=last).step_by(step);
    decades.flat_map(|decade| digits.iter().map(move |digit| digit * 10f64.powi(decade))).collect()
}

/// Round values, five or so.
fn steps(from: f64, to: f64) -> Vec<f64> {
    let rough = to / 5.0 - from / 5.0;
    let size = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|digit| digit * size).into_iter().find(|step| *step >= rough);
    let Some(step) = step.filter(|step| step.is_finite() && *step > 0.0) else { return Vec::new() };
    let first = (from / step).ceil();
    (0..10).map(|number| (first + f64::from(number)) * step).filter(|value| value.is_finite()).collect()
}

/// The strip of `row`. `baseline` is the baseline's median.
pub fn svg(axis: &Axis, row: &Row, baseline: Option<f64>) -> String {
    let mut svg =
        format!("<svg class=\"strip\" width=\"100%\" height=\"{HEIGHT}\" role=\"img\" aria-hidden=\"true\">");
    // Writing to a string does not fail.
    let mut add = |element: std::fmt::Arguments| _ = svg.write_fmt(element);
    for (at, _) in &axis.ticks {
        let x = percent(*at);
        add(format_args!("<line class=\"grid\" x1=\"{x}\" x2=\"{x}\" y1=\"-9\" y2=\"{}\"/>", HEIGHT + 9.0));
    }
    if let Some(baseline) = baseline {
        let x = percent(axis.at(baseline));
        add(format_args!("<line class=\"base\" x1=\"{x}\" x2=\"{x}\" y1=\"-9\" y2=\"{}\"/>", HEIGHT + 9.0));
    }
    let places: Vec<f64> = drawn(&row.samples).into_iter().map(|sample| axis.at(sample)).collect();
    if let Some(path) = density(&places) {
        // Stretched to the width, which is what a change of scale does to a density.
        let (x, width) = (MARGIN, 100.0 - 2.0 * MARGIN);
        add(format_args!(
            "<svg class=\"density\" x=\"{x}%\" width=\"{width}%\" height=\"{HEIGHT}\" viewBox=\"0 0 1000 {HEIGHT}\" \
             preserveAspectRatio=\"none\"><path d=\"{path}\"/></svg>"
        ));
    }
    let [p10, median, p90] =
        [row.summary.p10, row.summary.median, row.summary.p90].map(|value| axis.at(value));
    let width = (p90 - p10).max(0.0) * (100.0 - 2.0 * MARGIN);
    let (x, y) = (percent(p10), MIDDLE - 4.0);
    add(format_args!(
        "<rect class=\"spread\" x=\"{x}\" y=\"{y}\" width=\"{width:.2}%\" height=\"8\" rx=\"4\"/>"
    ));
    for (place, up) in swarm(&places) {
        let (x, y) = (percent(place), MIDDLE + up);
        add(format_args!("<circle class=\"dot\" cx=\"{x}\" cy=\"{y:.1}\" r=\"{RADIUS}\"/>"));
    }
    let (x, top, bottom) = (percent(median), MIDDLE - 17.0, MIDDLE + 17.0);
    for class in ["halo", "median"] {
        add(format_args!("<line class=\"{class}\" x1=\"{x}\" x2=\"{x}\" y1=\"{top}\" y2=\"{bottom}\"/>"));
    }
    svg.push_str("</svg>");
    svg
}

/// The samples that get dots, ascending.
fn drawn(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    if sorted.len() <= MOST_DOTS {
        return sorted;
    }
    let last = sorted.len() - 1;
    (0..MOST_DOTS).map(|dot| sorted[dot * last / (MOST_DOTS - 1)]).collect()
}

/// Dots beside each other where they would overlap: the place of each and how far from the middle it stands.
fn swarm(places: &[f64]) -> Vec<(f64, f64)> {
    let apart = 2.0 * RADIUS - 0.6;
    let mut put: Vec<(f64, f64)> = Vec::with_capacity(places.len());
    for &place in places {
        let near: Vec<(f64, f64)> = put.iter().rev().map(|(x, y)| ((place - x) * WIDTH, *y)).collect();
        let free = |up: &f64| near.iter().all(|(dx, y)| dx.hypot(up - y) >= apart);
        let ups = (0..=8).flat_map(|step| [2.0, -2.0].map(|side| side * f64::from(step)));
        // Where there is no room left, they lie upon each other.
        let up = ups.into_iter().find(free).unwrap_or(0.0);
        put.push((place, up));
    }
    put
}

/// The outline of a kernel density estimate (Gaussian, Silverman's bandwidth) on the axis; none where it would say nothing.
fn density(places: &[f64]) -> Option<String> {
    let count = places.len() as f64;
    if places.len() < 10 {
        return None;
    }
    let mean = places.iter().sum::<f64>() / count;
    let deviation = (places.iter().map(|place| (place - mean).powi(2)).sum::<f64>() / (count - 1.0)).sqrt();
    let quartile = |share: f64| places[((count - 1.0) * share) as usize];
    let middle = (quartile(0.75) - quartile(0.25)) / 1.34;
    let spread = if middle > 0.0 { deviation.min(middle) } else { deviation };
    let bandwidth = (0.9 * spread * count.powf(-0.2)).max(0.003);
    let (first, last) = (places.first()? - 1.5 * bandwidth, places.last()? + 1.5 * bandwidth);
    let points: Vec<(f64, f64)> = (0..=80)
        .map(|point| {
            let x = first + (last - first) * f64::from(point) / 80.0;
            let height = places.iter().map(|place| (-0.5 * ((x - place) / bandwidth).powi(2)).exp()).sum();
            (x, height)
        })
        .collect();
    let highest = points.iter().map(|point| point.1).fold(0.0, f64::max);
    let place = |(x, height): &(f64, f64), side: f64| {
        format!("{:.1},{:.1}", x * 1000.0, MIDDLE - side * height / highest * (MIDDLE - 3.0))
    };
    let above = points.iter().map(|point| place(point, 1.0));
    let below = points.iter().rev().map(|point| place(point, -1.0));
    Some(format!("M{}Z", above.chain(below).collect::<Vec<_>>().join("L")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::sample::run;
    use crate::result::Figure;

    fn with_axis<T>(samples: &[f64], test: impl Fn(&View, &Axis) -> T) -> T {
        let mut run = run();
        let figure: &mut Figure = &mut run.suites[0].figures[0];
        figure.series.truncate(1);
        figure.series[0].samples = samples.to_vec();
        let view = View::of(&run.suites[0], &run.suites[0].figures[0]);
        test(&view, &Axis::of(&view))
    }

    #[test]
    fn axes_suit_their_samples() {
        let labels = |samples: &[f64]| {
            with_axis(samples, |_, axis| {
                let labels: Vec<_> = axis.ticks.iter().map(|(_, label)| label.clone()).collect();
                (axis.log, axis.omits_zero(), labels.join(" "))
            })
        };
        assert_eq!(labels(&[0.3, 300.0]), (true, false, "0.3 1 3 10 30 100 300".to_owned()));
        assert_eq!(labels(&[1.0, 9.0]), (false, false, "0 2 4 6 8".to_owned()));
        assert_eq!(labels(&[100.0, 108.0]), (false, true, "100 102 104 106 108".to_owned()));
        assert_eq!(
            [0.5, 20.0, 2500.0, 5e4, 2e6, 1e12].map(label),
            ["0.5", "20", "2500", "50k", "2M", "1.00e12"]
        );
        assert_eq!(labels(&[-5.0, 10.0]), (false, false, "-5 0 5 10".to_owned()));
        for odd in [
            &[0.0][..],
            &[5.0, 5.0, 5.0],
            &[f64::MIN, f64::MAX],
            &[f64::MIN_POSITIVE, f64::MAX],
            &[5e-324, 1.0],
            &[-0.0, 0.0],
            &[f64::MAX; 30],
            &[1e16, 1e16 + 2.0],
        ] {
            with_axis(odd, |view, axis| {
                let svg = svg(axis, &view.rows[0], Some(odd[0]));
                assert!(
                    !svg.contains("NaN") && !svg.contains("inf") && axis.ticks.len() < 20,
                    "{odd:?} {svg}"
                );
            });
        }
    }

    #[test]
    fn a_strip_has_a_dot_for_each_sample_up_to_a_number() {
        for (samples, dots) in [(1, 1), (20, 20), (MOST_DOTS, MOST_DOTS), (1000, MOST_DOTS)] {
            let values: Vec<f64> = (0..samples).map(|n| 1.0 + (n as f64).sqrt()).collect();
            let svg = with_axis(&values, |view, axis| svg(axis, &view.rows[0], None));
            assert_eq!(svg.matches("class=\"dot\"").count(), dots);
            assert_eq!(svg.matches("class=\"median\"").count(), 1);
        }
    }

    #[test]
    fn dots_stand_apart_where_there_is_room() {
        let put = swarm(&[0.5; 9]);
        for (index, (_, up)) in put.iter().enumerate() {
            assert!(
                put[..index].iter().all(|(_, other)| (up - other).abs() >= 2.0 * RADIUS - 0.6 || *up == 0.0)
            );
        }
    }
}

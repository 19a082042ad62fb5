//! A result held against an earlier one, figure by figure: the gate of the repeatable clock.

use std::collections::BTreeSet;
use std::fmt;

use super::measure::stats::quantile;
use super::render::number::three_digits;
use super::result::{Better, Figure, Run, Suite, Unit};

/// A change of so much is told.
const TOLERANCE: f64 = 0.05;

/// A difference of less is none: the tick of the counted machine's kernel (250 a second), by which whoever waits may go on
/// sooner or later.
const TICK_MS: f64 = 4.0;

/// What the comparison found.
#[derive(Debug, Default, PartialEq)]
pub struct Verdict {
    /// What got worse, or is not there any more: any of these fails.
    pub worse: Vec<Change>,
    /// What got better: the baseline should be renewed.
    pub better: Vec<Change>,
    /// How many medians were compared.
    pub compared: usize,
}

/// One figure of one contender that is not what it was.
#[derive(Debug, PartialEq)]
pub struct Change {
    suite: String,
    figure: String,
    contender: String,
    what: What,
}

#[derive(Debug, PartialEq)]
enum What {
    /// By so much of the baseline's median, as a cost: positive is worse.
    By { worse: f64, was: f64, is: f64, unit: Unit },
    /// The baseline's median is not above zero, and the new one differs.
    FromNothing { was: f64, is: f64, unit: Unit },
    /// No samples any more, and why.
    Gone(String),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}: ", self.suite, self.figure, self.contender)?;
        let values = |was: f64, is: f64, unit: Unit| {
            format!("{} {}, was {}", three_digits(is), unit.symbol(), three_digits(was))
        };
        match &self.what {
            What::By { worse, was, is, unit } => {
                let direction = if *worse > 0.0 { "worse" } else { "better" };
                write!(f, "{:.1}% {direction} ({})", 100.0 * worse.abs(), values(*was, *is, *unit))
            }
            What::FromNothing { was, is, unit } => f.write_str(&values(*was, *is, *unit)),
            What::Gone(why) => write!(f, "not measured any more: {why}"),
        }
    }
}

/// Compares each figure of each contender of `baseline` with that of `run`. Only suites that `names` has are looked at,
/// unless it is empty.
///
/// # Errors
/// The two cannot be compared: a clock that does not repeat, or nothing in common.
pub fn compare(run: &Run, baseline: &Run, names: &[&str]) -> Result<Verdict, String> {
    for (which, run) in [("the result", run), ("the baseline", baseline)] {
        if let Some(suite) = run.suites.iter().find(|suite| !suite.host.repeatable_clock) {
            let name = &suite.name;
            return Err(format!("suite {name} of {which} was not taken on a repeatable clock (--icount)"));
        }
    }
    let mut verdict = Verdict::default();
    let mut seen = BTreeSet::new();
    let wanted = |suite: &&Suite| names.is_empty() || names.contains(&suite.name.as_str());
    for old in baseline.suites.iter().filter(wanted) {
        if !seen.insert(&old.name) {
            return Err(format!("the baseline has suite {} twice", old.name));
        }
        let new = run.suites.iter().find(|suite| suite.name == old.name);
        for figure in &old.figures {
            let new_figure = new.and_then(|suite| suite.figures.iter().find(|new| new.name == figure.name));
            one(&mut verdict, old, figure, new, new_figure);
        }
    }
    if verdict.compared == 0 && verdict.worse.is_empty() {
        return Err("the baseline has nothing to compare with".to_owned());
    }
    Ok(verdict)
}

fn one(
    verdict: &mut Verdict,
    old: &Suite,
    figure: &Figure,
    new: Option<&Suite>,
    new_figure: Option<&Figure>,
) {
    for series in &figure.series {
        let change = |what| Change {
            suite: old.name.clone(),
            figure: figure.name.clone(),
            contender: series.who.clone(),
            what,
        };
        let found = new_figure.and_then(|figure| figure.series.iter().find(|new| new.who == series.who));
        let Some(found) = found.filter(|_| new_figure.is_some_and(|new| new.unit == figure.unit)) else {
            let contender = new.and_then(|suite| suite.contenders.iter().find(|new| new.name == series.who));
            let why = contender.and_then(|contender| contender.failure.clone());
            verdict
                .worse
                .push(change(What::Gone(why.unwrap_or_else(|| "it is not in the result".to_owned()))));
            continue;
        };
        let [was, is] = [series, found].map(|series| quantile(&series.samples, 0.5));
        let unit = figure.unit;
        verdict.compared += 1;
        if was <= 0.0 {
            if is != was {
                verdict.worse.push(change(What::FromNothing { was, is, unit }));
            }
            continue;
        }
        let worse = match figure.better {
            Better::Lower => is / was - 1.0,
            Better::Higher => 1.0 - is / was,
        };
        let tick = match unit {
            Unit::Milliseconds => TICK_MS,
            Unit::Nanoseconds => TICK_MS * 1e6,
            _ => 0.0,
        };
        if (is - was).abs() < tick {
            continue;
        }
        let by = change(What::By { worse, was, is, unit });
        if worse > TOLERANCE {
            verdict.worse.push(by);
        } else if worse < -TOLERANCE {
            verdict.better.push(by);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::sample::run;

    fn counted() -> Run {
        let mut run = run();
        run.suites[0].host.repeatable_clock = true;
        run
    }

    /// The counted run with the samples of the second contender in the first figure as large as those of a boot, and these
    /// multiplied.
    fn changed(by: f64, better: Better) -> [Run; 2] {
        let mut before = counted();
        before.suites[0].figures[0].better = better;
        before.suites[0].figures[0].series[1].samples.iter_mut().for_each(|sample| *sample *= 100.0);
        let mut after = before.clone();
        after.suites[0].figures[0].series[1].samples.iter_mut().for_each(|sample| *sample *= by);
        [before, after]
    }

    #[test]
    fn more_than_five_percent_is_told_either_way() {
        for (by, better, worse, improved) in [
            (1.0, Better::Lower, 0, 0),
            (1.049, Better::Lower, 0, 0),
            (0.951, Better::Lower, 0, 0),
            (1.06, Better::Lower, 1, 0),
            (0.94, Better::Lower, 0, 1),
            (1.06, Better::Higher, 0, 1),
            (0.94, Better::Higher, 1, 0),
        ] {
            let [before, after] = changed(by, better);
            let verdict = compare(&after, &before, &[]).unwrap();
            assert_eq!((verdict.worse.len(), verdict.better.len()), (worse, improved), "{by} {verdict:?}");
        }
        let [before, after] = changed(1.5, Better::Lower);
        let text = compare(&after, &before, &[]).unwrap().worse[0].to_string();
        assert!(text.starts_with("boot: exec to first output: crun: 50.0% worse ("), "{text}");
    }

    #[test]
    fn less_than_a_tick_is_a_tie() {
        let before = counted();
        let mut after = before.clone();
        let samples = &mut after.suites[0].figures[0].series[1].samples;
        samples.iter_mut().for_each(|sample| *sample += TICK_MS - 0.1);
        assert_eq!(compare(&after, &before, &[]).unwrap(), Verdict { compared: 8, ..Verdict::default() });
        after.suites[0].figures[0].series[1].samples.iter_mut().for_each(|sample| *sample += 0.2);
        assert_eq!(compare(&after, &before, &[]).unwrap().worse.len(), 1);
    }

    #[test]
    fn what_is_gone_is_worse() {
        let before = counted();
        let mut after = before.clone();
        after.suites[0].figures.iter_mut().for_each(|figure| figure.series.retain(|s| s.who != "crun"));
        after.suites[0].contenders.iter_mut().find(|c| c.name == "crun").unwrap().failure =
            Some("woe".into());
        let verdict = compare(&after, &before, &[]).unwrap();
        assert_eq!(verdict.worse.len(), before.suites[0].figures.len());
        assert!(verdict.worse[0].to_string().ends_with("not measured any more: woe"), "{}", verdict.worse[0]);
        after.suites.clear();
        assert!(!compare(&after, &before, &[]).unwrap().worse.is_empty());
    }

    #[test]
    fn what_cannot_be_compared_is_not() {
        let (before, wall) = (counted(), run());
        assert!(compare(&wall, &before, &[]).unwrap_err().contains("the result"));
        assert!(compare(&before, &wall, &[]).unwrap_err().contains("the baseline"));
        assert!(compare(&before, &before, &["cpu"]).unwrap_err().contains("nothing"));
        let mut twice = before.clone();
        twice.suites.push(before.suites[0].clone());
        assert!(compare(&before, &twice, &[]).unwrap_err().contains("twice"));
    }
}

//! Results that were written earlier, perhaps on another machine: read back, judged, and put together.
//!
//! A file is not trusted. Whatever it says, the renderers get names that fit together and numbers that are numbers.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::render::html;
use super::result::{Run, Suite};

/// No result of ours comes near it.
const LARGEST: u64 = 64 << 20;

/// The most samples that a contender may have: resampling takes time in proportion.
pub const MOST_SAMPLES: usize = 10_000;

/// Reads a result: JSON, or a page, which has the JSON in it.
///
/// # Errors
/// It cannot be read, is no result, or does not make sense; without the path.
pub fn read(path: &Path) -> Result<Run, String> {
    let mut text = String::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    if !file.metadata().is_ok_and(|meta| meta.is_file()) {
        return Err("not a regular file".to_owned());
    }
    file.take(LARGEST + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > LARGEST {
        return Err(format!("larger than {} MiB", LARGEST >> 20));
    }
    parse(&text)
}

/// The same from its text.
///
/// # Errors
/// It is no result, or does not make sense.
pub fn parse(text: &str) -> Result<Run, String> {
    let json = html::data(text).unwrap_or(text);
    let run: Run =
        serde_json::from_str(json).map_err(|error| format!("not a result of vmm bench: {error}"))?;
    for suite in &run.suites {
        check(suite).map_err(|why| format!("suite {:?}: {why}", suite.name))?;
    }
    Ok(run)
}

/// Whether a suite fits together: what every reader of a result relies on.
///
/// # Errors
/// What does not fit.
pub fn check(suite: &Suite) -> Result<(), String> {
    let mut contenders = HashSet::new();
    for contender in &suite.contenders {
        if !contenders.insert(contender.name.as_str()) {
            return Err(format!("two contenders have the name {:?}", contender.name));
        }
    }
    let mut figures = HashSet::new();
    for figure in &suite.figures {
        let wrong = |what: String| Err(format!("figure {:?}: {what}", figure.name));
        if !figures.insert(figure.name.as_str()) {
            return wrong("it is there twice".to_owned());
        }
        let mut measured = HashSet::new();
        for series in &figure.series {
            let who = series.who.as_str();
            if !contenders.contains(who) {
                return wrong(format!("samples of {who:?}, who is no contender"));
            }
            if !measured.insert(who) {
                return wrong(format!("{who:?} has two series"));
            }
            let count = series.samples.len();
            if !(1..=MOST_SAMPLES).contains(&count) {
                return wrong(format!("{count} samples of {who:?}; 1 to {MOST_SAMPLES} can be"));
            }
            // JSON has no infinities, but 1e999 is read as one by some.
            if let Some(value) = series.samples.iter().find(|value| !value.is_finite()) {
                return wrong(format!("a sample of {who:?} is {value}"));
            }
        }
        if let Some(baseline) = figure.baseline.as_deref().filter(|&baseline| !measured.contains(baseline)) {
            return wrong(format!("the baseline {baseline:?} has no samples"));
        }
    }
    Ok(())
}

/// Puts results together, in their order; what is there twice is taken once. `command` is that of the whole. One alone stays
/// as it is; in more than one, each suite's method tells the command that it is from.
pub fn merge(runs: Vec<Run>, command: Vec<String>) -> Run {
    let runs = match <[Run; 1]>::try_from(runs) {
        Ok([run]) => return run,
        Err(runs) => runs,
    };
    let mut whole = Run { command, interrupted: false, suites: Vec::new() };
    for run in runs {
        whole.interrupted |= run.interrupted;
        for mut suite in run.suites {
            suite.method.push(format!("Measured by: {}", run.command.join(" ")));
            if !whole.suites.contains(&suite) {
                whole.suites.push(suite);
            }
        }
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::sample::run;

    #[test]
    fn what_was_written_reads_back_the_same() {
        let run = run();
        assert_eq!(parse(&serde_json::to_string(&run).unwrap()).unwrap(), run);
        assert_eq!(parse(&html::page(&run)).unwrap(), run);
    }

    #[test]
    fn nothing_that_does_not_fit_together_is_taken() {
        let good = serde_json::to_value(run()).unwrap();
        let figure = "/suites/0/figures/0";
        for (at, value, words) in [
            ("/suites/0/contenders/1/name".to_owned(), "native".into(), "two contenders"),
            (format!("{figure}/series/0/samples"), serde_json::json!([]), "0 samples"),
            (format!("{figure}/series/0/samples/0"), serde_json::Value::Null, "not a result"),
            (format!("{figure}/series/0/samples"), vec![1.0; MOST_SAMPLES + 1].into(), "10001 samples"),
            (format!("{figure}/series/0/who"), "nobody".into(), "no contender"),
            (format!("{figure}/series/0/who"), "crun".into(), "two series"),
            (format!("{figure}/baseline"), "podman".into(), "no samples"),
            (format!("{figure}/name"), "exec to exit".into(), "twice"),
            (format!("{figure}/unit"), "furlongs".into(), "furlongs"),
            ("/suites/0/host/time".to_owned(), (-1).into(), "not a result"),
        ] {
            let mut bad = good.clone();
            *bad.pointer_mut(&at).unwrap() = value;
            let error = parse(&bad.to_string()).unwrap_err();
            assert!(error.contains(words), "{at}: {error}");
        }
        for garbage in ["", "{}", "[1, 2]", "\0\0", "{\"command\": [", "<!doctype html><p>hello"] {
            parse(garbage).unwrap_err();
        }
        parse(&good.to_string().replace("7.25", "1e999")).unwrap_err();
    }

    #[test]
    fn merging_keeps_each_suite_with_its_host_and_command() {
        let one = run();
        assert_eq!(merge(vec![one.clone()], vec!["whole".to_owned()]), one);
        let mut other = one.clone();
        other.interrupted = true;
        for suite in &mut other.suites {
            suite.host.cpu = "another".to_owned();
        }
        other.command = vec!["there".to_owned()];
        let whole = merge(vec![one.clone(), other, one.clone()], vec!["whole".to_owned()]);
        assert_eq!((whole.suites.len(), whole.interrupted), (2 * one.suites.len(), true));
        assert_eq!(whole.suites.last().unwrap().host.cpu, "another");
        assert_eq!(whole.suites.last().unwrap().method.last().unwrap(), "Measured by: there");
    }
}

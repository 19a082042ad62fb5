//! Samples as comma-separated values (RFC 4180, but for the line feeds alone): one line each, in the unit of the result.

use std::fmt::Write;

use super::facts;
use crate::result::Run;

/// All samples of `run`. The host is in it because a suite may have been measured on several.
pub fn csv(run: &Run) -> String {
    let mut text = "suite,figure,unit,contender,sample,value,host\n".to_owned();
    for suite in &run.suites {
        let host = quoted(&facts::short(&suite.host));
        for figure in &suite.figures {
            for series in &figure.series {
                let [name, figure_name, who] =
                    [&suite.name, &figure.name, &series.who].map(|text| quoted(text));
                let unit = figure.unit.symbol();
                for (number, value) in series.samples.iter().enumerate() {
                    // Writing to a string does not fail.
                    let _ = writeln!(text, "{name},{figure_name},{unit},{who},{},{value},{host}", number + 1);
                }
            }
        }
    }
    text
}

fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) || text.trim() != text {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::sample::run;

    #[test]
    fn every_sample_has_its_line() {
        let text = csv(&run());
        let first = "boot,exec to first output,ms,native,1,0.31,\"AMD EPYC, Linux 6.18.44\"";
        assert_eq!(text.lines().nth(1).unwrap(), first);
        assert_eq!(text.lines().count(), 1 + 2 * 4 * 8);
        assert!(text.contains(",crun twin,8,9.3,"), "{text}");
    }

    #[test]
    fn names_stay_in_their_field() {
        let mut run = run();
        run.suites[0].figures[0].series[0].who = "a \"b\", c\nd".to_owned();
        assert!(csv(&run).contains(",\"a \"\"b\"\", c\nd\",1,0.31,"));
    }
}

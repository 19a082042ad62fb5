//! The table for a terminal: per suite its figures, who failed, and what must be known to judge them.
//!
//! Names and errors come from other programs and from files: no control character of theirs reaches the terminal.

use super::facts;
use super::number::{align, three_digits};
use super::rows::View;
use crate::result::{Run, Suite};

/// Nothing is wider, commands and errors being wrapped.
const WIDTH: usize = 110;
/// A contender's name has so much room at least; a longer one is cut where the line is full.
const NAME: usize = 30;

/// All of `run`. With `colour`, headings stand out by escape sequences.
pub fn table(run: &Run, colour: bool) -> String {
    let mut out = Out { text: String::new(), colour };
    for suite in &run.suites {
        out.suite(suite);
    }
    if run.suites.is_empty() {
        out.line("nothing was measured");
    }
    if run.interrupted {
        out.line(&out.strong("interrupted: fewer samples than asked for", "1;33"));
    }
    out.text
}

struct Out {
    text: String,
    colour: bool,
}

impl Out {
    fn line(&mut self, line: &str) {
        self.text.push_str(line.trim_end());
        self.text.push('\n');
    }

    fn strong(&self, text: &str, code: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn suite(&mut self, suite: &Suite) {
        let heading = cut(&format!("{}: {}", suite.name, suite.title), WIDTH);
        self.line(&self.strong(&heading, "1"));
        self.line(&self.strong(&cut(&format!("on {}", facts::short(&suite.host)), WIDTH), "2"));
        for figure in &suite.figures {
            self.figure(suite, &View::of(suite, figure));
        }
        for (number, (contender, why, in_part)) in suite.failures().enumerate() {
            if number == 0 {
                self.line("");
                self.line(&self.strong("  not measured", "1;31"));
            }
            let in_part = if in_part { " (in part)" } else { "" };
            self.wrapped("    ", &format!("{}{in_part}: ", contender.name), why);
        }
        self.line("");
        for line in facts::lines(&suite.host) {
            self.wrapped("  ", "host    ", &line);
        }
        for line in &suite.method {
            self.wrapped("  ", "method  ", line);
        }
        self.line(&format!("  seed    {}", suite.seed));
        self.line("");
    }

    fn figure(&mut self, suite: &Suite, view: &View) {
        self.line("");
        let heading = cut(&view.figure.name, WIDTH / 2);
        let ratio = view.figure.baseline.as_ref().map(|who| format!("; ratio to {}", cut(who, NAME)));
        let legend = format!(" ({}{})", view.legend(), ratio.unwrap_or_default());
        self.line(&format!("  {}{legend}", self.strong(&heading, "1")));
        if view.rows.is_empty() {
            self.line("    no samples");
            return;
        }
        let mut columns: Vec<Vec<String>> = vec![Vec::new(); 7];
        for row in &view.rows {
            let (ratio, words) = row.verdict.words("x", suite.host.repeatable_clock);
            let summary = row.summary;
            let numbers = [summary.median, summary.p10, summary.p90].map(three_digits);
            let cells = std::iter::once(printable(row.who)).chain(numbers);
            let cells = cells.chain([summary.count.to_string(), ratio, words]);
            columns.iter_mut().zip(cells).for_each(|(column, cell)| column.push(cell));
        }
        columns[1..6].iter_mut().for_each(|column| align(column));
        let heads = ["", "median", "p10", "p90", "n", "ratio", "95% interval"];
        let width = |column: &[String], head: &str| {
            column.iter().map(|cell| cell.chars().count()).max().unwrap_or(0).max(head.len())
        };
        // Each column has two blanks, and the line three.
        let others: usize =
            columns.iter().zip(heads).skip(1).map(|(column, head)| width(column, head) + 2).sum();
        let room = WIDTH.saturating_sub(others + 5).max(NAME);
        columns[0].iter_mut().for_each(|name| *name = cut(name, room));
        let widths: Vec<usize> =
            columns.iter().zip(heads).map(|(column, head)| width(column, head)).collect();
        let line = |cells: &[&str]| {
            let mut line = "   ".to_owned();
            for (index, (cell, width)) in cells.iter().zip(&widths).enumerate() {
                let pad = " ".repeat(width.saturating_sub(cell.chars().count()));
                let (left, right) = if (1..6).contains(&index) { (&*pad, "") } else { ("", &*pad) };
                line.push_str(&format!(" {left}{cell}{right} "));
            }
            line
        };
        let head = line(&heads);
        self.line(&self.strong(head.trim_end(), "2"));
        for index in 0..view.rows.len() {
            let cells: Vec<&str> = columns.iter().map(|column| column[index].as_str()).collect();
            self.line(&line(&cells));
        }
    }

    /// `first` and then `text`, whose lines all begin below its first one.
    fn wrapped(&mut self, indent: &str, first: &str, text: &str) {
        let text: String = text.chars().map(|c| if c == '\n' { ' ' } else { c }).collect();
        let mut line = format!("{indent}{}", printable(first));
        let start = line.chars().count().min(40);
        let mut empty = true;
        for word in printable(&text).split_whitespace() {
            // A word longer than a line is cut, so that nothing is left out.
            for piece in pieces(word, WIDTH - start) {
                if !empty && line.chars().count() + 1 + piece.chars().count() > WIDTH {
                    self.line(&line);
                    line = " ".repeat(start);
                    empty = true;
                }
                if !empty {
                    line.push(' ');
                }
                line.push_str(&piece);
                empty = false;
            }
        }
        self.line(&line);
    }
}

fn pieces(word: &str, width: usize) -> Vec<String> {
    let chars: Vec<char> = word.chars().collect();
    chars.chunks(width.max(1)).map(|piece| piece.iter().collect()).collect()
}

/// Without control characters, and those that turn the direction of what follows.
fn printable(text: &str) -> String {
    let odd = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|c| if odd(c) { '\u{fffd}' } else { c }).collect()
}

/// The same, with no more than `limit` characters.
fn cut(name: &str, limit: usize) -> String {
    let name = printable(name);
    if name.chars().count() <= limit {
        return name;
    }
    name.chars().take(limit - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::sample::run;

    #[test]
    fn it_says_what_is_shown_and_what_is_not() {
        let text = table(&run(), false);
        for words in [
            "boot: Start: VM against container",
            "exec to first output (ms, lower is better; ratio to native)",
            "baseline",
            "exec to exit (ms, lower is better; ratio to crun)",
            "no difference shown (",
            "podman: podman ended (exit status: 126)",
            "firecracker: not installed",
            "host    AMD EPYC, 2 CPUs, 23.5 GiB, Linux 6.18.44, in a virtual machine",
            "method  From the call",
            "seed    1795245000123",
        ] {
            assert!(text.contains(words), "{words:?} is not in\n{text}");
        }
        assert!(!text.contains('\x1b') && !text.contains("interrupted"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        // A ratio that may be 1 is not told.
        let line = text.lines().rfind(|line| line.contains("crun twin")).unwrap();
        assert!(line.contains("no difference shown") && !line.contains('x'), "{line}");
        assert!(table(&run(), true).contains("\x1b[1mboot"));
    }

    #[test]
    fn few_samples_and_none_are_told() {
        let mut run = run();
        for figure in &mut run.suites[0].figures {
            figure.series.iter_mut().for_each(|series| series.samples.truncate(3));
        }
        assert!(table(&run, false).contains("no interval: fewer than 6 samples"));
        run.suites[0].host.repeatable_clock = true;
        assert!(table(&run, false).contains("counted, not sampled"));
        run.suites[0].contenders[1].failure = Some("the rest of it".to_owned());
        assert!(table(&run, false).contains("crun (in part): the rest of it"));
        run.suites[0].figures[0].series.clear();
        assert!(table(&run, false).contains("no samples"));
        run.suites.clear();
        run.interrupted = true;
        assert_eq!(table(&run, false), "nothing was measured\ninterrupted: fewer samples than asked for\n");
    }

    #[test]
    fn odd_words_do_no_harm() {
        let mut run = run();
        let suite = &mut run.suites[0];
        let evil = format!("\x1b]0;title\x07\u{202e}{}", "long ".repeat(40));
        suite.title.clone_from(&evil);
        suite.figures[0].name.clone_from(&evil);
        suite.contenders[0].name.clone_from(&evil);
        suite.contenders[4].failure = Some(format!("{evil}\n{}", "x".repeat(500)));
        suite.figures[0].series[0].who.clone_from(&evil);
        suite.figures[0].baseline = Some(evil.clone());
        suite.host.cpu.clone_from(&evil);
        suite.method.push(evil);
        suite.figures[1].series[0].samples = vec![f64::MAX, f64::MIN, f64::MIN_POSITIVE, 0.0, -0.0, 1e300];
        let text = table(&run, false);
        assert!(!text.contains(|c: char| (c.is_control() && c != '\n') || c == '\u{202e}'), "{text:?}");
        assert!(text.matches('x').count() >= 500, "the error is cut: {text}");
    }
}

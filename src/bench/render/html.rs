//! A page that stands alone: no script, no network, the result itself in it as data.
//!
//! Every name, command and error in a result is another program's, so all text is escaped, and the page's policy lets nothing
//! run or load.

use std::fmt::Write;

use super::facts;
use super::number::three_digits;
use super::rows::{Row, Verdict, View};
use super::strip::{self, Axis, MOST_DOTS, percent};
use crate::measure::stats::Ratio;
use crate::result::{Run, Suite};

const PAGE: &str = include_str!("page.html");
/// Where the parts come in `PAGE`.
const MARKS: [&str; 3] = ["<!--TITLE-->", "<!--BODY-->", "<!--DATA-->"];
/// What stands around the data in `PAGE`.
const DATA: [&str; 2] = ["<script type=\"application/json\" id=\"result\">", "</script>"];

/// The page of `run`.
pub fn page(run: &Run) -> String {
    let names: Vec<&str> = run.suites.iter().map(|suite| suite.name.as_str()).collect();
    let data = serde_json::to_string(run).unwrap_or_default();
    let parts = [escape(&names.join(", ")), body(run), inert(&data)];
    let mut page = String::new();
    let mut rest = PAGE;
    for (mark, part) in MARKS.iter().zip(parts) {
        let (before, after) = rest.split_once(mark).unwrap_or((rest, ""));
        page.push_str(before);
        page.push_str(&part);
        rest = after;
    }
    page + rest
}

/// The result in a page that was made here, as JSON.
pub fn data(page: &str) -> Option<&str> {
    let start = page.find(DATA[0])? + DATA[0].len();
    let length = page[start..].find(DATA[1])?;
    Some(&page[start..start + length])
}

/// JSON that stays data inside of a script element: nothing in it can end the element or begin a comment.
fn inert(json: &str) -> String {
    // These stand in strings only, where JSON may write any character by its number.
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => _ = write!(text, "\\u{:04x}", c as u32),
            c => text.push(c),
        }
    }
    text
}

/// Text that stays text, in an element and in a quoted attribute.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' | '\t' => escaped.push(c),
            c if c.is_control() => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

fn body(run: &Run) -> String {
    let mut text = String::new();
    if run.interrupted {
        text.push_str("<p class=\"warning\">Interrupted: fewer samples than asked for.</p>\n");
    }
    if run.suites.len() > 1 {
        text.push_str("<nav>");
        for (number, suite) in run.suites.iter().enumerate() {
            let (name, host) = (escape(&suite.name), escape(&suite.host.cpu));
            let again = run.suites.iter().filter(|other| other.name == suite.name).count() > 1;
            let host = if again { format!(" <small>{host}</small>") } else { String::new() };
            _ = write!(text, "<a href=\"#suite-{number}\">{name}{host}</a>");
        }
        text.push_str("</nav>\n");
    }
    for (number, suite) in run.suites.iter().enumerate() {
        _ = writeln!(text, "<section class=\"suite\" id=\"suite-{number}\">");
        text.push_str(&section(suite));
        text.push_str("</section>\n");
    }
    if run.suites.is_empty() {
        text.push_str("<p>Nothing was measured.</p>\n");
    }
    let command = escape(&run.command.join(" "));
    _ = writeln!(
        text,
        "<footer><p>Made by <code>{command}</code></p><p>Medians; spreads from the 10th to the 90th percentile; intervals of 95% by \
         the percentile bootstrap of both medians ({} resamples). The result itself is in this page: <code>vmm bench --from \
         PAGE.html --json - </code>reads it.</p></footer>",
        Ratio::RESAMPLES
    );
    text
}

fn section(suite: &Suite) -> String {
    let [machine, state] = facts::lines(&suite.host).map(|line| escape(&line));
    let (name, title) = (escape(&suite.name), escape(&suite.title));
    let mut text = format!(
        "<header><p class=\"name\">{name}</p><h2>{title}</h2>\n<p class=\"host\">{machine}<br>{state}</p></header>\n"
    );
    for figure in &suite.figures {
        text.push_str(&self::figure(suite, &View::of(suite, figure)));
    }
    if suite.failures().next().is_some() {
        text.push_str("<div class=\"failures\"><h3>Not measured</h3><dl>\n");
        for (contender, why, in_part) in suite.failures() {
            let (who, why) = (escape(&contender.name), escape(why));
            let in_part = if in_part { " <small>in part</small>" } else { "" };
            _ = writeln!(text, "<dt>{who}{in_part}</dt><dd class=\"failure\">{why}</dd>");
        }
        text.push_str("</dl></div>\n");
    }
    text.push_str("<div class=\"details\"><div class=\"method\"><h3>Method</h3><ul>\n");
    for sentence in &suite.method {
        _ = writeln!(text, "<li>{}</li>", escape(sentence));
    }
    _ = writeln!(text, "<li>Seed of the order and of the resampling: {}</li>", suite.seed);
    text.push_str("</ul></div>\n<div class=\"commands\"><h3>Commands</h3><dl>\n");
    for contender in &suite.contenders {
        let (who, command) = (escape(&contender.name), escape(&contender.command));
        let version =
            contender.version.as_ref().map(|version| format!(" <small>{}</small>", escape(version)));
        let version = version.unwrap_or_default();
        _ = writeln!(text, "<dt>{who}{version}</dt><dd><code class=\"command\">{command}</code></dd>");
    }
    text.push_str("</dl></div></div>\n");
    text
}

fn figure(suite: &Suite, view: &View) -> String {
    let axis = Axis::of(view);
    let baseline = view.rows.iter().find(|row| row.verdict == Verdict::Baseline);
    let mut legend = vec![view.legend()];
    legend.push(match (axis.log, axis.omits_zero()) {
        (true, _) => "logarithmic axis".to_owned(),
        (false, true) => "axis does not begin at zero".to_owned(),
        (false, false) => "linear axis".to_owned(),
    });
    if view.rows.iter().any(|row| row.samples.len() > MOST_DOTS) {
        legend.push(format!("dots are {MOST_DOTS} quantiles where there are more samples"));
    }
    let (name, legend) = (escape(&view.figure.name), escape(&legend.join(" · ")));
    let mut text =
        format!("<figure class=\"figure\"><figcaption><h3>{name}</h3><p>{legend}</p></figcaption>\n");
    if view.rows.is_empty() {
        return text + "<p class=\"none\">No samples.</p></figure>\n";
    }
    let (unit, to) = (escape(view.unit), baseline.map(|row| format!("ratio to {}", escape(row.who))));
    _ = writeln!(
        text,
        "<table><thead><tr><th></th><th class=\"plot\"></th><th class=\"number\">median, {unit}</th><th class=\"number \
         range\">p10 – p90</th><th class=\"number count\">n</th><th class=\"ratio\">{}</th></tr></thead><tbody>",
        to.unwrap_or_default()
    );
    for row in &view.rows {
        text.push_str(&line(suite, row, &axis, baseline.map(|row| row.summary.median)));
    }
    text.push_str("</tbody><tfoot><tr><td></td><td class=\"plot\"><div class=\"axis\">");
    for (at, label) in &axis.ticks {
        _ = write!(text, "<span style=\"left:{}\">{}</span>", percent(*at), escape(label));
    }
    _ = writeln!(text, "</div></td><td class=\"unit\">{unit}</td></tr></tfoot></table></figure>");
    text
}

fn line(suite: &Suite, row: &Row, axis: &Axis, baseline: Option<f64>) -> String {
    let (ratio, words) = row.verdict.words("×", suite.host.repeatable_clock);
    let words = words.replace(" - ", " – ").replace(" (", "<br>(");
    let mut class = String::new();
    if row.who.starts_with("vmm") {
        class.push_str("ours ");
    }
    if row.verdict == Verdict::Baseline {
        class.push_str("baseline");
    }
    let [median, p10, p90] = [row.summary.median, row.summary.p10, row.summary.p90].map(three_digits);
    let (who, svg, count) = (escape(row.who), strip::svg(axis, row, baseline), row.summary.count);
    format!(
        "<tr class=\"{}\" data-who=\"{who}\"><th scope=\"row\">{who}</th><td class=\"plot\">{svg}</td><td class=\"number \
         value\">{median}</td><td class=\"number range\">{p10} – {p90}</td><td class=\"number count\">{count}</td><td \
         class=\"ratio\"><b>{ratio}</b> <small>{words}</small></td></tr>\n",
        class.trim()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::sample::run;

    /// A result in which every text tries to get out of its place.
    fn evil() -> (Run, &'static str) {
        let evil = "</script><script>alert(1)</script><!--<img src=x onerror='alert(2)'>\"><b>&amp;\u{2028}\0<!--DATA-->";
        let mut run = run();
        run.command.push(evil.to_owned());
        let suite = &mut run.suites[0];
        for text in [
            &mut suite.name,
            &mut suite.title,
            &mut suite.host.cpu,
            &mut suite.host.kernel,
            &mut suite.host.vmm,
        ] {
            *text = evil.to_owned();
        }
        suite.host.governor = Some(evil.to_owned());
        suite.host.kvm = vec![evil.to_owned()];
        suite.method.push(evil.to_owned());
        suite.contenders[0].name = evil.to_owned();
        suite.contenders[0].command = evil.to_owned();
        suite.contenders[1].version = Some(evil.to_owned());
        suite.contenders[4].failure = Some(evil.to_owned());
        for figure in &mut suite.figures {
            figure.name = evil.to_owned();
            figure.baseline = Some(evil.to_owned());
            figure.series[0].who = evil.to_owned();
        }
        (run, evil)
    }

    #[test]
    fn nothing_in_a_result_gets_out_of_its_place() {
        let (run, evil) = evil();
        let page = page(&run);
        assert_eq!(page.matches("<script").count(), 1);
        assert_eq!(page.matches("</script").count(), 1);
        let data = data(&page).unwrap();
        for word in ["<img", "<!--", "onerror='", "<b>&amp;\u{2028}", "\u{0}"] {
            assert!(!page.replace(data, "").contains(word), "{word:?} got out");
        }
        assert!(!data.contains(['<', '>', '&', '\u{2028}', '\u{0}']), "{data}");
        let back: Run = serde_json::from_str(data).unwrap();
        assert_eq!(back, run);
        assert_eq!(back.suites[0].title, evil);
    }

    #[test]
    fn it_loads_and_runs_nothing() {
        let page = page(&run());
        assert!(page.contains("default-src 'none'; style-src 'unsafe-inline'"), "the policy");
        for word in ["http:", "https:", "src=\"", "@import", "url(", "<link", "onclick"] {
            assert!(!page.contains(word), "{word}");
        }
        assert!(MARKS.iter().all(|mark| PAGE.matches(mark).count() == 1 && !page.contains(mark)));
    }

    #[test]
    fn it_shows_what_the_result_has() {
        let run = run();
        let page = page(&run);
        let suite = &run.suites[0];
        for contender in &suite.contenders {
            assert!(page.contains(&escape(&contender.command)), "{}", contender.command);
            assert!(contender.failure.iter().all(|why| page.contains(&escape(why))));
        }
        assert!(suite.method.iter().all(|sentence| page.contains(sentence)));
        let key = 1;
        assert_eq!(page.matches("class=\"dot\"").count(), key + 2 * 4 * 8);
        assert!(page.contains("no difference shown<br>(") && page.contains(">baseline<"), "{page}");
    }

    #[test]
    fn odd_values_are_drawn_somewhere() {
        let mut run = run();
        let odd = [f64::MAX, f64::MIN, f64::MIN_POSITIVE, 5e-324, 0.0, -0.0, 1e-300, 1e15];
        for figure in &mut run.suites[0].figures {
            for (series, count) in figure.series.iter_mut().zip([8, 1, 2, 8]) {
                series.samples = odd[..count].to_vec();
            }
            figure.series[3].samples = vec![1.0; 300];
        }
        run.suites[0].figures[1].series.clear();
        run.suites[0].figures[1].baseline = None;
        run.suites[0].host.time = u64::MAX;
        run.suites[0].host.memory = u64::MAX;
        run.suites[0].host.load = f64::MAX;
        let page = page(&run);
        let (_, svg) = page.split_once("<svg class=\"strip\"").unwrap();
        let (svg, _) = svg.rsplit_once("</svg>").unwrap();
        assert!(!svg.contains("NaN") && !svg.contains("\"inf"), "{svg}");
        assert!(page.contains("No samples.") && page.contains("no ratio"), "{page}");
    }
}

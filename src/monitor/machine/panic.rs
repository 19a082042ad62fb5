//! Recognizes a panic of the guest's kernel: the kernel reports it (`legacy::pvpanic`), or, where it has no
//! driver for that, its last console output before a reset shows it.

use crate::chardev::LastWords;

/// What Linux writes first of all when it panics.
const PANIC: &str = "Kernel panic - not syncing";
/// What it writes before it reboots because it was told to.
const RESTART: &str = "reboot: Restarting system";
/// Lines of a report.
const LINES: usize = 24;
/// Bytes of a line in it.
const WIDTH: usize = 160;

/// Whether a guest that resets the machine does so because of a panic, by its last words. A guest can write
/// anything, so this can be wrong; whom it deceives is who runs it.
pub fn is_told(words: &LastWords) -> bool {
    words.texts().any(|text| panicked(&text).is_some())
}

/// The report of a panic, for a person.
pub fn report(words: &LastWords) -> String {
    let texts: Vec<_> = words.texts().collect();
    describe(&texts)
}

/// Where in `text` the panic begins that ended it.
fn panicked(text: &str) -> Option<usize> {
    let at = text.rfind(PANIC)?;
    let line = text[..at].rfind('\n').map_or(0, |end| end + 1);
    (!text[at..].contains(RESTART)).then_some(line)
}

fn describe(texts: &[String]) -> String {
    let from_panic = texts.iter().find_map(|text| Some(&text[panicked(text)?..]));
    let lines: Vec<_> = match from_panic {
        Some(text) => text.lines().map(plain).filter(|line| !line.is_empty()).take(LINES).collect(),
        // No word of it there: a kernel that is not Linux, or a quiet one.
        None => {
            let text = texts.iter().find(|text| !text.trim().is_empty());
            let lines = text.into_iter().flat_map(|text| text.lines().rev());
            let mut last: Vec<_> = lines.map(plain).filter(|line| !line.is_empty()).take(LINES / 2).collect();
            last.reverse();
            last
        }
    };
    if lines.is_empty() {
        return "the guest's kernel panicked, and wrote nothing to its console".to_owned();
    }
    format!("the guest's kernel panicked; its console says\n  {}", lines.join("\n  "))
}

/// A line of the guest's, fit for a terminal: printable ASCII, and not too long.
fn plain(line: &str) -> String {
    line.trim_end().chars().filter(|c| matches!(c, ' '..='~')).take(WIDTH).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_from_an_orderly_reboot_and_from_talk_of_one() {
        let panic = "[    1.5] Kernel panic - not syncing: sysrq triggered crash\n[    1.6] CPU: 0 PID: 1\n";
        for (text, told) in [
            (panic.to_owned(), true),
            (format!("a\n{panic}[    1.7] Rebooting in 5 seconds..\n"), true),
            (format!("{panic}[  9.1] reboot: Restarting system\n"), false),
            (format!("reboot: Restarting system\n{panic}"), true),
            ("[ 9.1] reboot: Restarting system\n".to_owned(), false),
            (String::new(), false),
        ] {
            assert_eq!(panicked(&text).is_some(), told, "{text:?}");
        }
    }

    #[test]
    fn a_report_shows_the_panic_and_nothing_that_a_terminal_would_obey() {
        let dump: String = (0..100).map(|i| format!("line {i}\n")).collect();
        let text = format!(
            "before\n[ 1.5] \x1b[31mKernel panic - not syncing: \u{9b}2J\u{202e}x\r\n{dump}{}",
            "y".repeat(1000)
        );
        let report = describe(&[String::new(), text]);
        assert!(report.starts_with("the guest's kernel panicked; its console says\n  [ 1.5] [31mKernel panic - not syncing: 2Jx\n  line 0\n"));
        assert_eq!(report.lines().count(), 1 + LINES);
        assert!(
            report.chars().all(|c| c == '\n' || matches!(c, ' '..='~'))
                && report.len() < LINES * (WIDTH + 3) + 100
        );

        let report = describe(&[format!("{dump}end\n\n"), String::new()]);
        assert!(report.ends_with("\n  line 99\n  end"), "{report}");
        assert_eq!(describe(&[]), "the guest's kernel panicked, and wrote nothing to its console");
    }
}

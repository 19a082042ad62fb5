//! Where log lines go: stderr, warnings unless `-v`, `-vv` or `RUST_LOG` say otherwise.

use std::io::{IsTerminal, Write};

use env_logger::{Builder, Env};

use crate::printable;

/// Starts logging with so many `-v`s.
pub fn start(verbose: u8) {
    let level = ["warn", "info", "debug", "trace"][usize::from(verbose.min(3))];
    // A guest's console may have put the terminal into raw mode, where a line feed does not return to the first column;
    // in any other mode the extra return does no harm.
    let end = if std::io::stderr().is_terminal() { "\r\n" } else { "\n" };
    let environment = Env::default().default_filter_or(level);
    Builder::from_env(environment)
        .format(move |out, record| {
            let text = printable::lines(&record.args().to_string()).replace('\n', end);
            let level = record.level().as_str().to_lowercase();
            if verbose == 0 {
                return write!(out, "vmm: {level}: {text}{end}");
            }
            let time = out.timestamp_millis();
            write!(out, "{time} {level} {}: {text}{end}", record.target())
        })
        .init();
}

//! A panic is a defect of ours: it ends the process, on whichever thread it is.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic;
use std::process;

use crate::chardev::terminal;

/// Ends the process (SIGABRT) at any thread's panic, because the others must not go on without it: gives the terminal back, then
/// tells `say` what happened and where. `say` must not wait for long: nobody controls the machine meanwhile.
pub fn end_on_panic(say: fn(&str)) {
    panic::set_hook(Box::new(move |info| {
        terminal::restore();
        say(&format!("vmm: {info}\n"));
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            // Names can take seconds to find.
            say(&format!("{backtrace}\n"));
        }
        process::abort();
    }));
}

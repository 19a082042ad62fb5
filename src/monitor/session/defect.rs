//! What ends the process at once, on whichever thread it is: a panic, which is a defect of ours, and guest memory that is lost.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic;
use std::process;
use std::sync::Arc;

use super::Keeper;
use crate::chardev::terminal;
use crate::memory::{self, lost};

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

/// Ends the process when a thread meets guest memory whose file is no longer there: gives the terminal back, has `say` tell what
/// happened, and exits with the status that it gives, which `keeper` keeps.
pub(super) fn end_on_lost_memory(say: fn(memory::Error) -> u8, keeper: Option<Arc<dyn Keeper>>) {
    lost::end_with(move |error| {
        terminal::restore();
        let status = say(error);
        keeper.iter().for_each(|keeper| keeper.ends_at_once(status));
        signal_hook::low_level::exit(status.into());
    });
}

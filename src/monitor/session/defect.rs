//! What ends the process at once, on whichever thread it is: a panic, which is a defect of ours, guest memory that is lost, and a system
//! call that the jail refuses.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic;
use std::process;
use std::sync::Arc;

use super::Keeper;
use crate::chardev::terminal;
use crate::memory::{self, lost};
use crate::sandbox::Refused;

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
    lost::end_with(move |error| end_at_once(|| say(error), keeper.as_deref()));
}

/// The same for a system call that the jail has refused.
pub(super) fn end_on_refused(
    say: fn(&Refused) -> u8,
    keeper: Option<Arc<dyn Keeper>>,
) -> impl Fn(&Refused) + Send + Sync + 'static {
    move |call| end_at_once(|| say(call), keeper.as_deref())
}

fn end_at_once(say: impl FnOnce() -> u8, keeper: Option<&dyn Keeper>) {
    terminal::restore();
    let status = say();
    keeper.into_iter().for_each(|keeper| keeper.ends_at_once(status));
    signal_hook::low_level::exit(status.into());
}

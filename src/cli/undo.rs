//! What a command has begun and would leave behind if a signal ended it.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::{process, thread};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use vmm_monitor::api::signals::is_ignored;

/// From now on the first signal to end does `undo` with what is here by then, and ends this process. While this is locked it waits.
///
/// # Errors
/// The host is out of descriptors.
pub fn at_signals<T: Default + Send + 'static>(
    undo: impl FnOnce(&mut T) + Send + 'static,
) -> io::Result<Arc<Mutex<T>>> {
    let signals = [SIGHUP, SIGINT, SIGTERM].into_iter().filter(|signal| !is_ignored(*signal));
    let mut signals = Signals::new(signals)?;
    let begun = Arc::<Mutex<T>>::default();
    let there = begun.clone();
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            undo(&mut there.lock().unwrap_or_else(PoisonError::into_inner));
            process::exit(128 + signal);
        }
    });
    Ok(begun)
}

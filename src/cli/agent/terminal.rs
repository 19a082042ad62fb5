//! The terminal that `vmm exec -t` hands to a command: raw meanwhile, and given back whatever happens.

use std::io;
use std::panic;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::stdio::{stdin, stdout};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use vmm_agent::protocol::Size;

/// How it was, while it is not.
static ORIGINAL: Mutex<Option<Termios>> = Mutex::new(None);

/// Of a terminal that does not say.
const USUAL: Size = Size { rows: 24, columns: 80 };

fn original() -> MutexGuard<'static, Option<Termios>> {
    ORIGINAL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The terminal on standard input, raw until this is dropped.
#[derive(Debug)]
pub struct Raw(());

impl Raw {
    /// Takes it.
    ///
    /// # Errors
    /// Standard input is none.
    pub fn take() -> io::Result<Self> {
        *original() = Some(tcgetattr(stdin())?);
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |what| {
            restore();
            before(what);
        }));
        set_raw()?;
        Ok(Self(()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Makes it raw again, after whoever ran meanwhile; nothing if it was never taken.
///
/// # Errors
/// The terminal is gone.
pub fn set_raw() -> io::Result<()> {
    if let Some(mode) = &*original() {
        let mut mode = mode.clone();
        mode.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &mode)?;
    }
    Ok(())
}

/// Gives it back. At once, not when output is drained: a terminal that is stalled must not keep us from ending.
pub fn restore() {
    if let Some(mode) = original().take() {
        let _ = tcsetattr(stdin(), OptionalActions::Now, &mode);
    }
}

/// Whether standard input is a terminal.
pub fn is_there() -> bool {
    isatty(stdin())
}

/// The size of the one on standard input or output.
pub fn size() -> Size {
    let size = tcgetwinsize(stdin()).or_else(|_| tcgetwinsize(stdout()));
    size.map_or(USUAL, |size| Size { rows: size.ws_row, columns: size.ws_col })
}

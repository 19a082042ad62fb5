//! What the programs share: exit codes, failures with hints, what goes to standard output and error, scratch folders.
//!
//! Used by `vmm` and `vmm-bench`. The libraries below say what went wrong; this is where it becomes an exit code.

mod exit;
mod failures;
pub mod log_output;
mod scratch;

pub use exit::{Code, Failure, pretty, print, table};
pub use scratch::Scratch;

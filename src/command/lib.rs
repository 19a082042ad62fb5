//! What the programs share: exit codes, failures with hints, results on standard output, scratch folders.
//!
//! Used by `vmm` and `vmm-bench`. The libraries below say what went wrong; this is where it becomes an exit code.

mod exit;
mod failures;
mod scratch;

pub use exit::{Code, Failure, pretty, print, table};
pub use scratch::Scratch;

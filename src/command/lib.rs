//! What `vmm` and `vmm-bench` share: exit codes, errors with hints, standard output and error, scratch folders.
//!
//! The libraries report what went wrong; here it becomes an exit code and a hint.

mod exit;
mod failures;
pub mod log_output;
mod scratch;

pub use exit::{Code, Failure, pretty, print, print_bytes, table};
pub use scratch::Scratch;

//! `vmm bench`: that its harness cannot lie, that its page shows what the result has, and how its command takes bad input.

mod command;
mod harness;
mod page;
#[path = "../cli/place.rs"]
#[allow(dead_code, reason = "shared with the tests of the other commands")]
mod place;
mod work;

/// What the tests run.
const PROGRAM: &str = env!("CARGO_BIN_EXE_vmm-bench");

/// A small result, with failures and a pair that does not differ.
const SMALL: &str = include_str!("small.json");

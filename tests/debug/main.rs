//! Debugging as a user meets it: single steps told on lines, the real gdb, and peers that are not gdb. The guests are a few
//! instructions each, so they run wherever there is a KVM at all; Linux under gdb is in `tests/boot`.

mod firmware;
mod garbage;
mod gdb;
mod guests;
#[path = "../images/mod.rs"]
#[allow(dead_code, reason = "shared with others, which make other kernels")]
mod images;
mod linux;
#[path = "../cli/place.rs"]
#[allow(dead_code, reason = "shared with others, which refuse more")]
mod place;
mod steps;

/// What the tests run.
const PROGRAM: &str = env!("CARGO_BIN_EXE_vmm");

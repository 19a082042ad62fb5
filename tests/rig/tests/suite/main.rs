//! Tests of the `rig` program as its callers use it.

mod host;
mod inside;
mod machine;
mod support;
mod terminal;

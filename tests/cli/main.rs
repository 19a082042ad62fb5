//! The `vmm` command as a user meets it: a table of input that cannot work, and tiny guests from start to end.

mod agent;
mod attacker;
#[path = "../back_end/mod.rs"]
mod back_end;
mod bad_input;
mod counting;
mod detached;
mod device;
mod firmware;
mod fork;
mod fuse;
mod huge_pages;
#[path = "../images/mod.rs"]
#[allow(dead_code, reason = "shared with others, which make other kernels")]
mod images;
mod limits;
mod lives;
mod lost;
mod memory_ways;
mod net;
mod net_life;
mod obeys;
mod overlay;
mod page;
mod pci;
mod place;
mod planted;
mod pool;
mod sandbox;
mod served;
mod snapshot;
#[path = "../starter.rs"]
mod starter;
mod state;
mod strangers;
mod template;
mod terminal;
mod top;
mod trace;
mod trace_damage;
mod tree;
mod vsock;
mod working_set;

/// What the tests run.
const PROGRAM: &str = env!("CARGO_BIN_EXE_vmm");

//! Every guest physical address and interrupt line that the monitor decides: one table per architecture.

mod x86_64;

pub use x86_64::*;

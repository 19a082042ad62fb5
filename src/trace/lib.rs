//! Traces: what the recorder saw, kept in a file and told as sentences; `vmm top`, steps, gdb and the labs.
//!
//! [`recording`] writes traces and [`mod@file`] reads them, [`kernel`] adds the exits inside KVM; [`reasons`] names the hardware's
//! exit reasons, [`devices`] what an access meant to its device, [`symbols`] (also the guest's own: [`kallsyms`]) and [`code`]
//! where in the guest it was; [`report`] puts them into lines, statistics, advice and a page; [`live`] adds up what a running
//! machine does.

pub mod code;
pub mod debug;
mod demangle;
pub mod devices;
pub mod file;
mod frames;
mod header;
pub mod kallsyms;
pub mod kernel;
pub mod lab;
pub mod live;
mod pci;
pub mod reasons;
pub mod recorded;
pub mod recording;
pub mod report;
pub mod saved_memory;
pub mod symbols;

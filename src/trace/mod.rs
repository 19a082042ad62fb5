//! Traces: what the recorder took down, kept in a file and told as sentences.
//!
//! [`mod@file`] writes and reads traces, [`kernel`] adds the exits inside KVM; [`reasons`] names the hardware's exit reasons,
//! [`devices`] what an access meant to its device, [`symbols`] (also from [`kallsyms`], the
//! guest's own) and [`code`] where in the guest it was; [`report`] puts them
//! into lines, statistics, advice and a page.

pub mod code;
mod demangle;
pub mod devices;
pub mod file;
pub mod kallsyms;
pub mod kernel;
pub mod reasons;
pub mod report;
pub mod symbols;

//! A guest seen from outside, instruction by instruction: [`step`] tells what each does, [`gdb`] lets gdb take over.
//!
//! Each is an observer of a session ([`vmm_monitor::session::Observer`]). What stops and resumes vCPUs is
//! [`vmm_monitor::machine::Debug`].

pub mod gdb;
pub mod step;
mod view;

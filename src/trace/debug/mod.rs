//! A guest seen from outside, instruction by instruction: [`step`] tells what each does, [`gdb`] lets gdb take over.
//!
//! `cli` makes a [`Debugger`] and shows it every machine of a run. What stops and resumes vCPUs is [`machine::Debug`].

pub mod gdb;
pub mod step;
mod view;

use vmm_monitor::machine::{self, Machine};

/// Who debugs the machines of a run: the first, and those that reboots make.
pub trait Debugger {
    /// `machine` is built and will run next.
    ///
    /// # Errors
    /// This host's KVM cannot debug guests, or the host is out of threads.
    fn attach(&mut self, machine: &Machine) -> Result<(), machine::Error>;

    /// Its run is over. `status` is the exit status of the monitor; none if there will be another machine.
    fn ended(&mut self, status: Option<u8>);
}

//! A guest that says nothing on the console in front of a person: that this is so, why it may be, and what to
//! do.

use std::time::Duration;

use crate::chardev::{Endpoint, Ends};
use crate::config::{Kernel, VmConfig, Where};
use crate::machine::{Machine, Outcome, Phase};

/// A kernel that speaks at all has done so by then, unless it is told to be quiet.
const PATIENCE: Duration = Duration::from_secs(10);

/// The console that is standard input and output.
#[derive(Debug, Clone)]
pub struct Silence {
    end: Endpoint,
    what: &'static str,
    hint: &'static str,
    /// How many speak on it, if all goes well: the program that boots a disk, and its kernel.
    speakers: u32,
    /// Whoever has an initrd or a disk is a system, which has something to say before it ends.
    expected: bool,
}

impl Silence {
    /// Of the machine that `config` describes; none if neither of its consoles is there for a person.
    pub fn of(config: &VmConfig, ends: &Ends) -> Option<Self> {
        let (role, what, hint) = if config.serial == Where::Stdio {
            let hint = "its command line needs console=ttyS0; a kernel without a driver for the serial port may \
                        have hvc0: --console stdio";
            ("serial", "serial port (ttyS0)", hint)
        } else {
            let hint = "its command line needs console=hvc0, and its kernel virtio_console, built in or in the \
                        initrd; every distribution's kernel has a serial port: --serial stdio";
            ("console", "console (hvc0)", hint)
        };
        let open =
            ends.get_open(role).filter(|_| config.console() == Where::Stdio || config.serial == Where::Stdio);
        let speakers = 1 + u32::from(matches!(config.to_boot(), Ok(Some(Kernel::BootDisk))));
        let expected = config.initrd.is_some() || !config.disk.is_empty();
        Some(Self { end: open?, what, hint, speakers, expected })
    }

    fn lasts(&self) -> bool {
        self.end.speakers() < self.speakers
    }

    /// Says so once, if it lasts.
    pub fn watch(&self, machine: &mut Machine) {
        let (silence, handle) = (self.clone(), machine.handle());
        machine.later(PATIENCE, move || {
            if silence.lasts() && handle.phase() == Phase::Running {
                let (what, hint, seconds) = (silence.what, silence.hint, PATIENCE.as_secs());
                let hint = format_args!("hint: if it stays silent: {hint}");
                log::warn!("nothing has come from the guest's {what} in {seconds} s\n{hint}");
            }
        });
    }

    /// Says so where the whole run was silent. Other ends than these are told with a reason of their own.
    pub fn ended(&self, outcome: &Outcome) {
        if self.expected && self.lasts() && matches!(outcome, Outcome::Reset | Outcome::Shutdown) {
            let (what, hint) = (self.what, self.hint);
            log::warn!("the guest has ended, and nothing ever came from its {what}\nhint: {hint}");
        }
    }
}

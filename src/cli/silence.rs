//! A console in front of a person that nobody in the guest opens: that this is so, and what to do.

use std::time::Duration;

use crate::chardev::{Endpoint, Ends};
use crate::config::{Kernel, VmConfig, Where};
use crate::machine::{Machine, Outcome, Phase};

/// A kernel has found its console by then.
const PATIENCE: Duration = Duration::from_secs(10);

/// The console that is standard input and output.
#[derive(Debug, Clone)]
pub struct Silence {
    end: Endpoint,
    what: &'static str,
    hint: &'static str,
    /// How many open it, if all goes well: the program that boots a disk, and its kernel.
    openers: u32,
    /// Whoever has an initrd or a disk is a system, which has a console.
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
            let hint = "its kernel needs virtio_console, built in or in the initrd, and console=hvc0; every \
                        distribution's kernel has a driver for the serial port: --serial stdio";
            ("console", "console (hvc0)", hint)
        };
        let open =
            ends.get_open(role).filter(|_| config.console() == Where::Stdio || config.serial == Where::Stdio);
        let openers = 1 + u32::from(matches!(config.to_boot(), Ok(Some(Kernel::BootDisk))));
        let expected = config.initrd.is_some() || !config.disk.is_empty();
        Some(Self { end: open?, what, hint, openers, expected })
    }

    fn lasts(&self) -> bool {
        self.end.openers() < self.openers
    }

    /// Says so once, if it lasts.
    pub fn watch(&self, machine: &mut Machine) {
        let (silence, handle) = (self.clone(), machine.handle());
        machine.later(PATIENCE, move || {
            if silence.lasts() && handle.phase() == Phase::Running {
                let (what, hint, seconds) = (silence.what, silence.hint, PATIENCE.as_secs());
                log::warn!("nobody in the guest has opened its {what} in {seconds} s\nhint: {hint}");
            }
        });
    }

    /// Says so where that lasted to the end. Other ends than these are told with a reason of their own.
    pub fn ended(&self, outcome: &Outcome) {
        if self.expected && self.lasts() && matches!(outcome, Outcome::Reset | Outcome::Shutdown) {
            let (what, hint) = (self.what, self.hint);
            log::warn!("the guest has ended, and nobody there ever opened its {what}\nhint: {hint}");
        }
    }
}

//! Warns when the guest never opens the console on this terminal, and says what to do.

use std::error::Error;
use std::time::Duration;

use vmm_monitor::chardev::Endpoint;
use vmm_monitor::config::{CharTarget, Kernel, VmConfig};
use vmm_monitor::machine::{Outcome, Phase};
use vmm_monitor::session::{Built, End, Observer};

/// A kernel has found its console by then.
const PATIENCE: Duration = Duration::from_secs(10);

/// The console that is standard input and output.
#[derive(Debug)]
pub struct Silence {
    role: &'static str,
    what: &'static str,
    hint: &'static str,
    /// How many open it, if all goes well: the program that boots a disk, and its kernel.
    openers: u32,
    /// Whoever has an initrd or a disk is a system, which has a console.
    expected: bool,
    /// Once there is a machine.
    end: Option<Endpoint>,
}

impl Silence {
    /// Of the machine that `config` describes; none if neither of its consoles is there for a person.
    pub fn of(config: &VmConfig) -> Option<Self> {
        let (role, what, hint) = if config.serial == CharTarget::Stdio {
            let hint = "its command line needs console=ttyS0; a kernel without a driver for the serial port may \
                        have hvc0: --console stdio";
            ("serial", "serial port (ttyS0)", hint)
        } else if config.console() == CharTarget::Stdio {
            let hint = "its kernel needs virtio_console, built in or in the initrd, and console=hvc0; every \
                        distribution's kernel has a driver for the serial port: --serial stdio";
            ("console", "console (hvc0)", hint)
        } else {
            return None;
        };
        let openers = 1 + u32::from(matches!(config.to_boot(), Ok(Some(Kernel::BootDisk))));
        let expected = config.initrd.is_some() || !config.disk.is_empty();
        Some(Self { role, what, hint, openers, expected, end: None })
    }
}

impl Observer for Silence {
    fn built(&mut self, built: &mut Built<'_>) -> Result<(), Box<dyn Error + Send + Sync>> {
        let Some(end) = built.ends.get_open(self.role) else { return Ok(()) };
        self.end = Some(end.clone());
        let (handle, openers, what, hint) = (built.machine.handle(), self.openers, self.what, self.hint);
        built.machine.later(PATIENCE, move || {
            if end.openers() < openers && handle.phase() == Phase::Running {
                let seconds = PATIENCE.as_secs();
                log::warn!("nobody in the guest has opened its {what} in {seconds} s\nhint: {hint}");
            }
        });
        Ok(())
    }

    /// Other ends than these are told with a reason of their own.
    fn ended(&mut self, end: &End<'_>) {
        let lasted = self.end.as_ref().is_some_and(|end| end.openers() < self.openers);
        let ended = !end.reboots && matches!(end.outcome, Ok(Outcome::Reset | Outcome::Shutdown));
        if self.expected && lasted && ended {
            let (what, hint) = (self.what, self.hint);
            log::warn!("the guest has ended, and nobody there ever opened its {what}\nhint: {hint}");
        }
    }
}

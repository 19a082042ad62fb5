//! The labs, in the order in which they are best read.

use std::time::Duration;

use super::{Host, Lab, closing};
use vmm_monitor::config::{CharTarget, Console, Cpus, Transport, VmConfig};

/// Longer than any of them takes, in an emulated machine too.
const LIMIT: Duration = Duration::from_secs(5);

macro_rules! lab {
    ($name:literal, $closing:path $(, $field:ident: $value:expr)*) => {
        #[allow(clippy::needless_update, reason = "some labs are as they come")]
        Lab {
            $($field: $value,)*
            ..Lab {
                name: $name,
                source: include_str!(concat!("../../../guest/labs/", $name, ".s")),
                image: include_bytes!(concat!(env!("OUT_DIR"), "/", $name)),
                machine: ordinary,
                host: Host::Watches,
                limit: LIMIT,
                closing: $closing,
            }
        }
    };
}

/// All of them.
pub static LABS: [Lab; 15] = [
    lab!("pio", closing::pio),
    lab!("rep-outs", closing::rep_outs),
    lab!("mmio", closing::mmio),
    lab!("halt", closing::halt, limit: Duration::from_millis(300)),
    lab!("cpuid", closing::cpuid),
    lab!("msr", closing::msr),
    // Where it never comes back, that is known soon.
    lab!("hypercall", closing::hypercall, limit: Duration::from_secs(2)),
    lab!("longmode", closing::longmode),
    lab!("interrupt", closing::interrupt, host: Host::PressesPowerButton),
    lab!("apic-timer", closing::apic_timer),
    lab!("triple-fault", closing::triple_fault),
    lab!("sipi", closing::sipi, machine: two_cpus),
    lab!("doorbell", closing::doorbell, machine: with_console),
    lab!("msix", closing::msix, machine: on_pci),
    lab!("dirty-log", closing::dirty_log, host: Host::FetchesDirtyLog),
];

fn ordinary(_: &mut VmConfig) {}

fn two_cpus(config: &mut VmConfig) {
    config.cpus = Cpus(2);
}

fn on_pci(config: &mut VmConfig) {
    config.transport = Transport::Pci;
}

/// Its end is in this process, whatever stands here.
fn with_console(config: &mut VmConfig) {
    config.console = Console(Some(CharTarget::Pty));
}

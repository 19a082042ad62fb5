//! What a configuration says of x86-64 alone: the CPU model and its features, MSRs, the ways into a kernel, the PC's timer.

pub mod cpu;
pub mod cpu_features;
pub mod msr;

use serde::{Deserialize, Serialize};

use super::VmConfig;

/// The way into the kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootProtocol {
    /// PVH for an ELF that has the note, Multiboot for what has its header, else the 64-bit Linux boot protocol.
    #[default]
    Auto,
    /// Linux's 64-bit boot protocol.
    Linux64,
    /// PVH: 32-bit entry with start_info.
    Pvh,
    /// Multiboot 1: 32-bit entry with its information block.
    Multiboot,
}

impl VmConfig {
    /// Whether there is an 8254 timer: asked for, or needed by a Linux with this command line. Told to do without ACPI or the APICs it
    /// takes its ticks from nothing else; without kvmclock it measures the processor's clock by it, where CPUID's word for that is not
    /// believed (on AMD's processors).
    pub fn has_pit(&self) -> bool {
        const NEEDED: [&str; 5] = ["acpi=off", "noapic", "nolapic", "nolapic_timer", "no-kvmclock"];
        let cmdline = self.cmdline.as_deref().unwrap_or_default();
        self.pit || cmdline.split_ascii_whitespace().any(|word| NEEDED.contains(&word))
    }

    /// Whether there are two 8259s, and so all interrupt controllers are KVM's. Firmware knows them by their ports, and so do the test
    /// device's programs and whatever needs an 8254. All others are told by the ACPI tables that there are none.
    pub fn has_pics(&self) -> bool {
        self.has_pit() || self.firmware.is_some() || self.test_device
    }
}

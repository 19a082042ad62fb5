//! What a trace says of its machine and host, gathered when it begins.

use std::path::PathBuf;

use super::file::{Header, Range};
use vmm_monitor::bus::{Kind, Place, Slot};
use vmm_monitor::config::{Kernel, VmConfig};
use vmm_monitor::machine;

impl Header {
    /// For the machine that `config` describes, which has what is on the `inventory`, on this host.
    pub fn of(config: &VmConfig, inventory: &[Slot]) -> Self {
        // What is added later is told of by its place.
        let spare = machine::spare_functions(inventory);
        let ranges = |ports| {
            let here = move |slot: &&Slot| (slot.place == Place::Pio) == ports && slot.kind != Kind::InKernel;
            let range = |slot: &Slot| Range { name: slot.name.clone(), base: slot.base, size: slot.size };
            let mut ranges: Vec<_> = inventory.iter().chain(&spare).filter(here).map(range).collect();
            ranges.sort_unstable_by_key(|range| range.base);
            ranges
        };
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let vendor = cpuinfo.lines().find_map(|line| line.strip_prefix("vendor_id")?.split_once(": "));
        // What is no text is told as well as can be: a header is JSON.
        let absolute = |path: &PathBuf| -> PathBuf {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            path.to_string_lossy().into_owned().into()
        };
        Self {
            vmm: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: config.kernel.as_ref().map(absolute),
            boots_disk: matches!(config.to_boot(), Ok(Some(Kernel::BootDisk))),
            cmdline: config.cmdline.clone(),
            vendor: vendor.map_or("", |(_, vendor)| vendor).to_owned(),
            ports: ranges(true),
            addresses: ranges(false),
            ..Self::default()
        }
    }
}

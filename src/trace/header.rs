//! What a trace says of its machine and host, gathered when it begins.

use std::path::PathBuf;

use super::file::{Header, Range};
use crate::bus::Bus;
use crate::config::{Kernel, VmConfig};
use crate::vcpu::dispatch::Buses;

impl Header {
    /// For the machine that `config` describes, with its devices on `buses`, on this host.
    pub fn of(config: &VmConfig, buses: &Buses) -> Self {
        let ranges = |bus: &Bus| {
            let range = |(base, size, name): (u64, u64, &str)| Range { name: name.to_owned(), base, size };
            bus.ranges().map(range).collect()
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
            ports: ranges(&buses.pio),
            addresses: ranges(&buses.mmio),
            ..Self::default()
        }
    }
}

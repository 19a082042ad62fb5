//! Which events are shown.

use std::ops::RangeInclusive;

use super::Report;
use crate::devices;
use vmm_monitor::recorder::{Event, Kind};

/// What an event must be to be shown; nothing set: all but code.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Of these kinds.
    pub only: Vec<Kind>,
    /// At these ports.
    pub port: Option<RangeInclusive<u64>>,
    /// Answered by the device of this name.
    pub device: Option<String>,
    /// Of this vCPU.
    pub vcpu: Option<u32>,
    /// At least so many nanoseconds after the start of the recording.
    pub after: Option<f64>,
    /// With the guest in a function whose name contains this.
    pub symbol: Option<String>,
}

impl Filter {
    /// The kinds that a word of `--only` stands for: `pio`, `mmio`, `halt`, `kvm`, `virtio`, `net`,
    /// `other`.
    pub fn kinds(word: &str) -> Option<&'static [Kind]> {
        Some(match word {
            "pio" => &[Kind::PioIn, Kind::PioOut],
            "mmio" => &[Kind::MmioRead, Kind::MmioWrite],
            "halt" => &[Kind::Halt],
            "kvm" => &[Kind::InKernel],
            "virtio" => &[Kind::Queue, Kind::Source, Kind::Interrupt],
            "net" => &[Kind::Frame],
            "other" => &[
                Kind::Shutdown,
                Kind::SystemEvent,
                Kind::FailEntry,
                Kind::InternalError,
                Kind::Debug,
                Kind::IoApicEoi,
                Kind::Kicked,
                Kind::Other,
                Kind::MsrRead,
                Kind::MsrWrite,
                Kind::Hypercall,
            ],
            _ => return None,
        })
    }

    /// Whether it lets less than everything through.
    pub(super) fn is_set(&self) -> bool {
        !self.only.is_empty()
            || self.port.is_some()
            || self.device.is_some()
            || self.vcpu.is_some()
            || self.after.is_some()
            || self.symbol.is_some()
    }

    /// Whether `event` is to be shown.
    pub(super) fn passes(&self, report: &Report<'_>, track: u32, event: &Event) -> bool {
        let Some(kind) = event.kind().filter(|kind| !kind.is_detail()) else { return false };
        let header = &report.trace.header;
        let is_port = matches!(kind, Kind::PioIn | Kind::PioOut);
        let device = || match kind {
            Kind::Queue | Kind::Source | Kind::Interrupt | Kind::Frame => Some(report.track(track)),
            _ => devices::name(header, event),
        };
        let symbol = || report.symbols.find(report.code.instruction(event).0).map_or("", |(name, _)| name);
        (self.only.is_empty() || self.only.contains(&kind))
            && self.port.as_ref().is_none_or(|ports| is_port && ports.contains(&event.address))
            && self.device.as_deref().is_none_or(|wanted| device() == Some(wanted))
            && self.vcpu.is_none_or(|id| report.track(track) == format!("vcpu{id}"))
            && self.after.is_none_or(|ns| report.trace.since_start(event.time) >= ns)
            && self.symbol.as_deref().is_none_or(|part| symbol().contains(part))
    }
}

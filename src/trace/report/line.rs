//! One event as a line, or as a JSON object.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde_json::{Value, json};

use super::{Report, duration};
use crate::reasons::Shown;
use crate::{devices, frames, reasons};
use vmm_monitor::config::cpu::Vendor;
use vmm_monitor::recorder::{Event, Kind, Registers, registers};

const DIM: &str = "\x1b[2m";
const BOLD: &str = "\x1b[1m";
const PLAIN: &str = "\x1b[0m";

impl Report<'_> {
    /// `vcpu0 +12.345ms  serial8250_console_putchar+0x15  out dx,al | VT-x 30 I/O instruction = AMD-V 0x7b IOIO (out 1B 0x3f8) |
    /// serial THR <- 'H' | 1.80us`
    pub(super) fn line(&self, track: u32, event: &Event, out: &mut dyn Write) -> io::Result<()> {
        let Some(kind) = event.kind() else { return Ok(()) };
        let [dim, bold, plain] = if self.colour { [DIM, BOLD, PLAIN] } else { [""; 3] };
        let time = format!("+{:.3}ms", self.trace.since_start(event.time) / 1e6);
        let took = duration(self.trace.ns(event.handled.into()));
        let width = self.reason_width();
        write!(out, "{dim}{:<16} {time:>12}{plain}  ", self.track(track))?;
        if kind == Kind::InKernel {
            let place = self.symbols.name(event.rip);
            let reason = self.reason(kind, event);
            return writeln!(
                out,
                "{place:<40} {:<28} {dim}|{plain} {reason:<width$} {dim}| in KVM | {took}{plain}",
                ""
            );
        }
        if matches!(kind, Kind::Interrupt | Kind::Frame) {
            return writeln!(out, "{}", worker(kind, event));
        }
        if !kind.is_exit() {
            return writeln!(out, "{} {dim}| {took}{plain}", worker(kind, event));
        }
        let (rip, instruction) = self.code.instruction(event);
        let place = if rip == 0 { "?".to_owned() } else { self.symbols.name(rip) };
        let instruction = instruction.unwrap_or_default();
        let hardware = self.reason(kind, event);
        let answer = devices::tell(&self.trace.header, event).unwrap_or_else(|| monitor(kind).to_owned());
        writeln!(
            out,
            "{place:<40} {instruction:<28} {dim}|{plain} {hardware:<width$} {dim}|{plain} {bold}{answer}{plain} {dim}| {took}{plain}"
        )
    }

    /// The hardware's reason, in the terms of the vendors that are shown, and what it said beside it.
    pub(super) fn reason(&self, kind: Kind, event: &Event) -> String {
        let name = match self.hardware(kind, event) {
            Some(both) => both.text(self.shown),
            None if kind == Kind::InKernel => {
                let known = self.kernel_reasons.get(&event.count.into());
                known.map_or("?", |(given, _)| given.as_str()).to_owned()
            }
            None => plain_name(kind).to_owned(),
        };
        let beside = match self.reason_in_kvm(event).map(|own| (own.vendor, own.number)) {
            _ if kind != Kind::InKernel => reasons::qualification(event),
            Some((Vendor::Amd, 0x400)) => Some(format!("guest address {:#x}", event.value)),
            Some((Vendor::Intel, 48)) => Some(format!("qualification {:#x}", event.address)),
            _ => None,
        };
        match beside {
            Some(beside) => format!("{name} ({beside})"),
            None => name,
        }
    }

    /// Columns for [`Report::reason`], so that what follows it stands in a column in most lines.
    fn reason_width(&self) -> usize {
        if self.shown == Shown::Both { 74 } else { 52 }
    }

    /// All that is known, for programs. Reasons in both architectures' terms.
    pub(super) fn object(&self, track: u32, event: &Event, registers: Option<&Registers>) -> Value {
        let registers = registers.map(|all| {
            let general = registers::NAMES.into_iter().zip(all.general);
            let system = registers::SYSTEM_NAMES.into_iter().zip(all.system.into_iter().flatten());
            general
                .chain(system)
                .map(|(name, value)| (name, format!("{value:#x}")))
                .collect::<BTreeMap<_, _>>()
        });
        let kind = event.kind();
        let both = kind.and_then(|kind| self.hardware(kind, event));
        let vtx = both.as_ref().and_then(|both| both.single(Vendor::Intel));
        let svm = both.as_ref().and_then(|both| both.single(Vendor::Amd));
        if kind == Some(Kind::Frame) {
            return json!({
                "track": self.track(track),
                "ns": self.trace.since_start(event.time),
                "kind": "frame",
                "bytes": event.as_frame().len,
                "from_guest": event.as_frame().from_guest,
                "answer": frames::tell(event),
            });
        }
        let (rip, instruction) = self.code.instruction(event);
        json!({
            "track": self.track(track),
            "ns": self.trace.since_start(event.time),
            "kind": kind.map(plain_name),
            "rip": format!("{rip:#x}"),
            "symbol": self.symbols.find(rip).map(|(name, offset)| format!("{name}+{offset:#x}")),
            "instruction": instruction,
            "vtx": vtx.map(|vtx| json!({"number": vtx.number, "name": reasons::vtx_name(vtx.number)})),
            "svm": svm.map(|svm| json!({"code": svm.number, "name": reasons::svm_name(svm.number)})),
            "address": event.address,
            "size": event.size,
            "count": event.count,
            "value": event.value,
            "device": devices::name(&self.trace.header, event),
            "answer": devices::tell(&self.trace.header, event),
            "hardware": kind.filter(|kind| kind.is_exit() || *kind == Kind::InKernel).map(|kind| self.reason(kind, event)),
            "in_kernel": (kind == Some(Kind::InKernel)).then(|| self.reason(Kind::InKernel, event)),
            "registers": registers,
            "guest_ns": self.trace.ns(event.guest),
            "handled_ns": self.trace.ns(event.handled.into()),
        })
    }
}

/// What a device's worker did.
pub(super) fn worker(kind: Kind, event: &Event) -> String {
    match kind {
        Kind::Queue => format!("serves queue {}: {} completed", event.address, event.value),
        Kind::Source => format!("polls host end {}: {} completed", event.address, event.value),
        Kind::Interrupt if event.address == u64::MAX => {
            "interrupts the guest: configuration changed".to_owned()
        }
        Kind::Interrupt => format!("interrupts the guest: queue {} has used buffers", event.address),
        Kind::Frame => frames::tell(event),
        _ => plain_name(kind).to_owned(),
    }
}

/// What the monitor does about an exit that is no device's.
pub(super) fn monitor(kind: Kind) -> &'static str {
    match kind {
        Kind::Kicked => "back to the monitor",
        Kind::Shutdown | Kind::SystemEvent | Kind::FailEntry | Kind::InternalError => "the run ends",
        _ => "continues",
    }
}

/// A kind in one word.
pub fn plain_name(kind: Kind) -> &'static str {
    match kind {
        Kind::PioIn => "in",
        Kind::PioOut => "out",
        Kind::MmioRead => "mmio read",
        Kind::MmioWrite => "mmio write",
        Kind::Halt => "halt",
        Kind::Shutdown => "shutdown",
        Kind::SystemEvent => "system event",
        Kind::FailEntry => "failed entry",
        Kind::InternalError => "internal error",
        Kind::Debug => "debug",
        Kind::IoApicEoi => "EOI",
        Kind::Kicked => "signal",
        Kind::Other => "other",
        Kind::Code => "code",
        Kind::Queue => "queue",
        Kind::Source => "host end",
        Kind::Interrupt => "interrupt",
        Kind::InKernel => "in KVM",
        Kind::Registers => "registers",
        Kind::Step => "step",
        Kind::MsrRead => "msr read",
        Kind::MsrWrite => "msr write",
        Kind::Hypercall => "hypercall",
        Kind::Frame => "frame",
        Kind::Pages => "pages",
        Kind::Stretch => "stretch of pages",
        Kind::HostFault => "host fault",
    }
}

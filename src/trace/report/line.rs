//! One event as a line, or as a JSON object.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde_json::{Value, json};

use super::{Report, duration};
use crate::{devices, reasons};
use vmm_monitor::recorder::{Event, Kind, Registers, registers};

const DIM: &str = "\x1b[2m";
const BOLD: &str = "\x1b[1m";
const PLAIN: &str = "\x1b[0m";

impl Report<'_> {
    /// `vcpu0 +12.345ms  serial8250_console_putchar+0x15  out dx,al | VT-x 30 I/O instruction (out 1B 0x3f8) | serial THR <- 'H' |
    /// 1.80us`
    pub(super) fn line(&self, track: u32, event: &Event, out: &mut dyn Write) -> io::Result<()> {
        let Some(kind) = event.kind() else { return Ok(()) };
        let [dim, bold, plain] = if self.colour { [DIM, BOLD, PLAIN] } else { [""; 3] };
        let time = format!("+{:.3}ms", self.trace.since_start(event.time) / 1e6);
        let took = duration(self.trace.ns(event.handled.into()));
        write!(out, "{dim}{:<16} {time:>12}{plain}  ", self.track(track))?;
        if kind == Kind::InKernel {
            let place = self.symbols.name(event.rip);
            let reason = self.reason(kind, event);
            return writeln!(
                out,
                "{place:<40} {:<28} {dim}|{plain} {reason:<52} {dim}| in KVM | {took}{plain}",
                ""
            );
        }
        if kind == Kind::Interrupt {
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
            "{place:<40} {instruction:<28} {dim}|{plain} {hardware:<52} {dim}|{plain} {bold}{answer}{plain} {dim}| {took}{plain}"
        )
    }

    /// The hardware's reason, in the terms of the processor that the trace was made on.
    pub(super) fn reason(&self, kind: Kind, event: &Event) -> String {
        if kind == Kind::InKernel {
            return self.kernel_reason(event);
        }
        let amd = self.is_amd();
        let told = event.reason.checked_sub(1).and_then(|number| self.kernel_reasons.get(&number.into()));
        let name = match reasons::of(kind) {
            // Hardware's own word, where the kernel's trace passed it on.
            _ if told.is_some() => told.map_or("", |(_, shown)| shown).to_owned(),
            Some(reason) if amd => format!("AMD-V {:#x} {}", reason.svm, reasons::svm_name(reason.svm)),
            Some(reason) => format!("VT-x {} {}", reason.vtx, reasons::vtx_name(reason.vtx)),
            None => plain_name(kind).to_owned(),
        };
        match reasons::qualification(event) {
            Some(qualification) => format!("{name} ({qualification})"),
            None => name,
        }
    }

    /// Whether AMD-V's names are the hardware's.
    pub fn is_amd(&self) -> bool {
        self.trace.header.vendor == "AuthenticAMD"
    }

    fn kernel_reason(&self, event: &Event) -> String {
        let known = self.kernel_reasons.get(&event.count.into());
        let (given, shown) = known.map_or(("?", "?"), |(given, shown)| (given.as_str(), shown.as_str()));
        match given {
            "npf" => format!("{shown} (guest address {:#x})", event.value),
            "EPT_VIOLATION" => format!("{shown} (qualification {:#x})", event.address),
            _ => shown.to_owned(),
        }
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
        let reason = kind.and_then(reasons::of);
        let (rip, instruction) = self.code.instruction(event);
        json!({
            "track": self.track(track),
            "ns": self.trace.since_start(event.time),
            "kind": kind.map(plain_name),
            "rip": format!("{rip:#x}"),
            "symbol": self.symbols.find(rip).map(|(name, offset)| format!("{name}+{offset:#x}")),
            "instruction": instruction,
            "vtx": reason.map(|reason| json!({"number": reason.vtx, "name": reasons::vtx_name(reason.vtx)})),
            "svm": reason.map(|reason| json!({"code": reason.svm, "name": reasons::svm_name(reason.svm)})),
            "address": event.address,
            "size": event.size,
            "count": event.count,
            "value": event.value,
            "device": devices::name(&self.trace.header, event),
            "answer": devices::tell(&self.trace.header, event),
            "hardware": kind.filter(|kind| kind.is_exit() || *kind == Kind::InKernel).map(|kind| self.reason(kind, event)),
            "in_kernel": (kind == Some(Kind::InKernel)).then(|| self.kernel_reason(event)),
            "registers": registers,
            "guest_ns": self.trace.ns(event.guest),
            "handled_ns": self.trace.ns(event.handled.into()),
        })
    }
}

/// What a device's worker did.
pub(super) fn worker(kind: Kind, event: &Event) -> String {
    match kind {
        Kind::Queue => format!("takes queue {} up: {} completed", event.address, event.value),
        Kind::Source => format!("looks at its host end {}: {} completed", event.address, event.value),
        Kind::Interrupt if event.address == u64::MAX => {
            "interrupts the guest: configuration changed".to_owned()
        }
        Kind::Interrupt => format!("interrupts the guest: queue {} has used buffers", event.address),
        _ => plain_name(kind).to_owned(),
    }
}

/// What the monitor does about an exit that is no device's.
pub(super) fn monitor(kind: Kind) -> &'static str {
    match kind {
        Kind::Kicked => "back to the monitor",
        Kind::Shutdown | Kind::SystemEvent | Kind::FailEntry | Kind::InternalError => "the run ends",
        _ => "goes on",
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
    }
}

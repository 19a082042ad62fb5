//! The guests of the exits suite: a few instructions each, entered in 32-bit protected mode by PVH, run alike by the bare
//! loop and by the whole monitor. What they touch is where a machine of vmm has it (`memory::layout`).

use std::sync::LazyLock;

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, CodeLabel, al, cl, dword_ptr, dx, eax, ecx, edi, esp, fword_ptr};
use kvm_bindings::{KVM_EXIT_IO, KVM_EXIT_MMIO};

use crate::elf;
use vmm_monitor::legacy::acpi_pm;
use vmm_monitor::memory::layout;
use vmm_monitor::virtio::doorbells;

/// A way out of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// OUT to the serial port's scratch register.
    PioOut,
    /// IN from it.
    PioIn,
    /// A write to a register of a virtio device.
    MmioWrite,
    /// A read of one.
    MmioRead,
    /// A write to a queue's doorbell, which the kernel turns into an eventfd's signal.
    Doorbell,
    /// VMCALL or VMMCALL with a number that KVM does not know.
    Hypercall,
    /// CPUID.
    Cpuid,
    /// RDMSR of IA32_TSC_ADJUST, which KVM answers and no processor does in its stead.
    Msr,
    /// An irqfd wakes a halted vCPU.
    Wake,
    /// An irqfd interrupts one that computes.
    Injection,
}

impl Kind {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 10] = [
        Self::PioOut,
        Self::PioIn,
        Self::MmioWrite,
        Self::MmioRead,
        Self::Doorbell,
        Self::Hypercall,
        Self::Cpuid,
        Self::Msr,
        Self::Wake,
        Self::Injection,
    ];

    /// Names of the figures: in nanoseconds, and in cycles.
    pub fn names(self) -> [&'static str; 2] {
        match self {
            Self::PioOut => ["PIO out", "PIO out, cycles"],
            Self::PioIn => ["PIO in", "PIO in, cycles"],
            Self::MmioWrite => ["MMIO write", "MMIO write, cycles"],
            Self::MmioRead => ["MMIO read", "MMIO read, cycles"],
            Self::Doorbell => ["ioeventfd kick", "ioeventfd kick, cycles"],
            Self::Hypercall => ["hypercall", "hypercall, cycles"],
            Self::Cpuid => ["CPUID", "CPUID, cycles"],
            Self::Msr => ["MSR read", "MSR read, cycles"],
            Self::Wake => ["HLT, irqfd to answer", "HLT, irqfd to answer, cycles"],
            Self::Injection => ["busy, irqfd to answer", "busy, irqfd to answer, cycles"],
        }
    }

    /// What KVM_RUN returns once a round; `None` where the kernel answers by itself.
    pub fn exit_reason(self) -> Option<u32> {
        match self {
            Self::PioOut | Self::PioIn => Some(KVM_EXIT_IO),
            Self::MmioWrite | Self::MmioRead => Some(KVM_EXIT_MMIO),
            _ => None,
        }
    }

    /// The host triggers, the guest's interrupt handler answers by a mark; else the guest goes round by itself.
    pub fn is_interrupt(self) -> bool {
        matches!(self, Self::Wake | Self::Injection)
    }

    /// The kernel to boot: it marks, goes `rounds` times round, marks and asks for a reset; or marks once it can be
    /// interrupted, and again at each interrupt.
    ///
    /// # Errors
    /// A mistake in the assembly.
    pub fn kernel(self, rounds: u32) -> Result<Vec<u8>, String> {
        let code = if self.is_interrupt() { self.listener() } else { self.rounds(rounds) };
        code.map(|code| elf::pvh_kernel(&code)).map_err(|error| format!("assemble {self:?}: {error}"))
    }

    fn rounds(self, rounds: u32) -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(32)?;
        let mut again = a.create_label();
        if self == Self::Doorbell {
            let mut before = a.create_label();
            a.mov(ecx, doorbells::EXITS)?;
            a.set_label(&mut before)?;
            self.once(&mut a)?;
            a.dec(ecx)?;
            a.jnz(before)?;
        }
        // EDI counts: the instructions below leave it alone.
        a.mov(edi, rounds)?;
        mark(&mut a)?;
        a.set_label(&mut again)?;
        self.once(&mut a)?;
        a.dec(edi)?;
        a.jnz(again)?;
        mark(&mut a)?;
        a.mov(dx, (layout::ACPI_PM + acpi_pm::RESET) as u32)?;
        a.mov(al, u32::from(acpi_pm::RESET_VALUE))?;
        a.out(dx, al)?;
        stop(&mut a)?;
        a.assemble(elf::LOAD)
    }

    /// One round trip.
    fn once(self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        match self {
            Self::PioOut => {
                a.mov(dx, SCRATCH)?;
                a.out(dx, al)
            }
            Self::PioIn => {
                a.mov(dx, SCRATCH)?;
                a.in_(al, dx)
            }
            Self::MmioWrite => a.mov(dword_ptr(VIRTIO + DEVICE_FEATURES_SEL), eax),
            Self::MmioRead => a.mov(eax, dword_ptr(VIRTIO + MAGIC_VALUE)),
            Self::Doorbell => {
                a.xor(eax, eax)?;
                a.mov(dword_ptr(DOORBELL), eax)
            }
            Self::Hypercall => {
                a.mov(eax, NO_HYPERCALL)?;
                if *AMD { a.vmmcall() } else { a.vmcall() }
            }
            Self::Cpuid => {
                a.xor(eax, eax)?;
                a.cpuid()
            }
            Self::Msr => {
                a.mov(ecx, IA32_TSC_ADJUST)?;
                a.rdmsr()
            }
            // These do not go round.
            Self::Wake | Self::Injection => Ok(()),
        }
    }

    /// Sets interrupts up, says so by a mark, and waits: halted or not. The handler stands at [`HANDLER`].
    fn listener(self) -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(32)?;
        a.mov(esp, STACK)?;
        // The gate: 32-bit interrupt gate, the boot code segment (SDM vol. 3, 7.11).
        a.mov(dword_ptr(IDT + VECTOR * 8), (HANDLER & 0xffff) | BOOT_CS << 16)?;
        a.mov(dword_ptr(IDT + VECTOR * 8 + 4), (HANDLER & 0xffff_0000) | 0x8e00)?;
        a.mov(dword_ptr(IDTR), (IDT & 0xffff) << 16 | (VECTOR * 8 + 7))?;
        a.mov(dword_ptr(IDTR + 4), IDT >> 16)?;
        a.lidt(fword_ptr(IDTR))?;
        // The 8259s hear of the same line: masked.
        a.mov(al, 0xffu32)?;
        a.out(0x21u32, al)?;
        a.out(0xa1u32, al)?;
        // Local APIC on (spurious vector register), the I/O APIC's pin to this CPU as an edge of our vector.
        a.mov(dword_ptr(APIC_SPURIOUS), 0x1ffu32)?;
        a.mov(dword_ptr(IO_APIC_SELECT), 0x10 + 2 * layout::ACPI_GSI + 1)?;
        a.mov(dword_ptr(IO_APIC_WINDOW), 0u32)?;
        a.mov(dword_ptr(IO_APIC_SELECT), 0x10 + 2 * layout::ACPI_GSI)?;
        a.mov(dword_ptr(IO_APIC_WINDOW), VECTOR)?;
        mark(&mut a)?;
        self.wait(&mut a)?;
        let mut code = a.assemble(elf::LOAD)?;
        assert!(code.len() as u32 <= HANDLER - LOAD, "the handler has room");
        code.resize((HANDLER - LOAD) as usize, 0x90);

        let mut a = CodeAssembler::new(32)?;
        mark(&mut a)?;
        a.mov(dword_ptr(APIC_EOI), 0u32)?;
        // Waits anew in place of going back, which takes no IRET: not every KVM that emulates has one.
        a.mov(esp, STACK)?;
        self.wait(&mut a)?;
        code.extend(a.assemble(u64::from(HANDLER))?);
        Ok(code)
    }

    fn wait(self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        if self == Self::Wake {
            a.sti()?;
            return stop(a);
        }
        a.xor(ecx, ecx)?;
        a.sti()?;
        let mut here: CodeLabel = a.create_label();
        a.set_label(&mut here)?;
        a.add(cl, 1u32)?;
        a.jmp(here)
    }
}

/// A byte to the serial port: it ends in the host's hands, in both contenders.
fn mark(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dx, layout::COM1 as u32)?;
    a.mov(al, u32::from(b'!'))?;
    a.out(dx, al)
}

fn stop(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut here = a.create_label();
    a.set_label(&mut here)?;
    a.hlt()?;
    a.jmp(here)
}

/// The UART's scratch register: written and read without effect.
const SCRATCH: u32 = layout::COM1 as u32 + 7;
const VIRTIO: u32 = layout::VIRTIO_MMIO as u32;
// virtio 1.3, 4.2.2.
const MAGIC_VALUE: u32 = 0;
const DEVICE_FEATURES_SEL: u32 = 0x14;
/// QueueNotify.
pub const DOORBELL: u32 = VIRTIO + 0x50;
/// No KVM_HC_* has it.
const NO_HYPERCALL: u32 = 0x7fff_ffff;
const IA32_TSC_ADJUST: u32 = 0x3b;
const APIC_EOI: u32 = layout::LOCAL_APIC as u32 + 0xb0;
const APIC_SPURIOUS: u32 = layout::LOCAL_APIC as u32 + 0xf0;
const IO_APIC_SELECT: u32 = layout::IO_APIC as u32;
const IO_APIC_WINDOW: u32 = layout::IO_APIC as u32 + 0x10;
const LOAD: u32 = elf::LOAD as u32;
const HANDLER: u32 = LOAD + 0x400;
/// Free memory below the code.
const IDT: u32 = layout::HIGH_RAM as u32;
const IDTR: u32 = IDT + 0x1000;
const STACK: u32 = IDT + 0x3000;
const VECTOR: u32 = 0x30;
/// The flat 32-bit code segment of the GDT that the loader leaves (the monitor's `boot`).
const BOOT_CS: u32 = 0x08;

/// AMD's processors have VMMCALL, Intel's VMCALL.
static AMD: LazyLock<bool> = LazyLock::new(|| {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    info.lines().any(|line| line.starts_with("vendor_id") && !line.ends_with("GenuineIntel"))
});

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Formatter, NasmFormatter};

    use super::*;

    fn listing(code: &[u8]) -> String {
        let mut text = String::new();
        for instruction in Decoder::with_ip(32, code, elf::LOAD, DecoderOptions::NONE).iter() {
            assert!(!instruction.is_invalid());
            NasmFormatter::new().format(&instruction, &mut text);
            text.push('\n');
        }
        text
    }

    #[test]
    fn rounds_are_what_they_say() {
        let text = listing(&Kind::PioOut.rounds(7).unwrap());
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "mov edi,7");
        assert_eq!(
            lines[4..8],
            ["mov dx,3FFh", "out dx,al", "dec edi", "jne short 0100000Ch"].map(str::to_owned),
            "{text}"
        );
        for kind in Kind::ALL {
            assert!(kind.kernel(3).unwrap().starts_with(b"\x7fELF"), "{kind:?}");
        }
    }

    #[test]
    fn the_handler_stands_where_the_gate_says() {
        for kind in [Kind::Wake, Kind::Injection] {
            let code = kind.listener().unwrap();
            let handler = listing(&code[(HANDLER - LOAD) as usize..]);
            assert!(handler.starts_with("mov dx,3F8h\nmov al,21h\nout dx,al\n"), "{handler}");
            assert_eq!(handler.contains("hlt"), kind == Kind::Wake);
        }
    }
}

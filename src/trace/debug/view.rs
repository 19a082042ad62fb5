//! A vCPU that stands still, as a person wants to see it: its mode, the instruction that comes next, what a step changed.

use std::fmt::Write;

use iced_x86::{Decoder, DecoderOptions};
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use crate::code;
use vmm_monitor::kvm::{Error, Vcpu};
use vmm_monitor::memory::GuestRam;
use vmm_monitor::vcpu::linear;

const CR0_PE: u64 = 1;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_VM: u64 = 1 << 17;

/// A bit's number and name.
pub type Bit = (u32, &'static str);

/// RFLAGS, CR0, CR4 and EFER by bit (SDM vol. 3, 2.3, 2.5 and 2.2.1; vol. 1, 3.4.3).
pub const FLAGS: [Bit; 12] = [
    (0, "CF"),
    (2, "PF"),
    (4, "AF"),
    (6, "ZF"),
    (7, "SF"),
    (9, "IF"),
    (10, "DF"),
    (11, "OF"),
    (14, "NT"),
    (17, "VM"),
    (18, "AC"),
    (21, "ID"),
];
pub const CR0: [Bit; 11] = [
    (0, "PE"),
    (1, "MP"),
    (2, "EM"),
    (3, "TS"),
    (4, "ET"),
    (5, "NE"),
    (16, "WP"),
    (18, "AM"),
    (29, "NW"),
    (30, "CD"),
    (31, "PG"),
];
pub const CR4: [Bit; 20] = [
    (0, "VME"),
    (1, "PVI"),
    (2, "TSD"),
    (3, "DE"),
    (4, "PSE"),
    (5, "PAE"),
    (6, "MCE"),
    (7, "PGE"),
    (8, "PCE"),
    (9, "OSFXSR"),
    (10, "OSXMMEXCPT"),
    (11, "UMIP"),
    (12, "LA57"),
    (13, "VMXE"),
    (16, "FSGSBASE"),
    (17, "PCIDE"),
    (18, "OSXSAVE"),
    (20, "SMEP"),
    (21, "SMAP"),
    (22, "PKE"),
];
pub const EFER: [Bit; 5] = [(0, "SCE"), (8, "LME"), (10, "LMA"), (11, "NXE"), (12, "SVME")];

/// How a vCPU reads its instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Real mode.
    Real,
    /// Virtual-8086 mode.
    Virtual8086,
    /// Protected mode, with code of so many bits.
    Protected(u32),
    /// Long mode, in a segment of 16 or 32 bits.
    Compatibility(u32),
    /// Long mode.
    Long,
}

impl Mode {
    fn of(regs: &kvm_regs, sregs: &kvm_sregs) -> Self {
        let bits = if sregs.cs.db != 0 { 32 } else { 16 };
        match () {
            () if sregs.cr0 & CR0_PE == 0 => Self::Real,
            () if sregs.efer & EFER_LMA != 0 && sregs.cs.l != 0 => Self::Long,
            () if sregs.efer & EFER_LMA != 0 => Self::Compatibility(bits),
            () if regs.rflags & RFLAGS_VM != 0 => Self::Virtual8086,
            () => Self::Protected(bits),
        }
    }

    fn bits(self) -> u32 {
        match self {
            Self::Real | Self::Virtual8086 => 16,
            Self::Protected(bits) | Self::Compatibility(bits) => bits,
            Self::Long => 64,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Real => "real",
            Self::Virtual8086 => "virtual 8086",
            Self::Protected(16) => "protected 16",
            Self::Protected(_) => "protected 32",
            Self::Compatibility(16) => "compat 16",
            Self::Compatibility(_) => "compat 32",
            Self::Long => "long 64",
        }
    }
}

/// Where a vCPU stands.
#[derive(Debug, Clone)]
pub struct View {
    /// General registers.
    pub regs: kvm_regs,
    /// Segment, control and table registers.
    pub sregs: kvm_sregs,
    /// What is in memory at RIP.
    code: Vec<u8>,
}

impl View {
    /// Of a vCPU that stands still.
    ///
    /// # Errors
    /// KVM does not tell its registers.
    pub fn of(vcpu: &Vcpu, ram: &GuestRam) -> Result<Self, Error> {
        let (regs, sregs) = (vcpu.regs()?, vcpu.sregs()?);
        let mut code = vec![0; linear::MAX_INSTRUCTION];
        let count = linear::read(vcpu, ram, sregs.cs.base.wrapping_add(regs.rip), &mut code);
        code.truncate(count);
        Ok(Self { regs, sregs, code })
    }

    /// The linear address of the next instruction.
    pub fn pc(&self) -> u64 {
        self.sregs.cs.base.wrapping_add(self.regs.rip)
    }

    /// The mode that it runs in.
    pub fn mode(&self) -> Mode {
        Mode::of(&self.regs, &self.sregs)
    }

    /// The mode's name: "protected 32".
    pub fn mode_name(&self) -> &'static str {
        self.mode().name()
    }

    /// The next instruction: its bytes, and what it is.
    pub fn instruction(&self) -> (String, String) {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        if self.code.is_empty() {
            return (String::new(), "(no readable memory)".to_owned());
        }
        let mut decoder =
            Decoder::with_ip(self.mode().bits(), &self.code, self.regs.rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            return (hex(&self.code), "(no valid instruction)".to_owned());
        }
        (hex(&self.code[..instruction.len()]), code::text(&instruction))
    }

    /// The registers that differ `after`, RIP apart: "rax=0x1 flags+ZF cr0=0x80000011+PG".
    pub fn changes(&self, after: &Self) -> String {
        let mut text = String::new();
        let (before, after_s) = (&self.sregs, &after.sregs);
        for ((name, old), (_, new)) in general(&self.regs).into_iter().zip(general(&after.regs)) {
            if old != new {
                let _ = write!(text, " {name}={new:#x}");
            }
        }
        let flags = named(self.regs.rflags, after.regs.rflags, &FLAGS);
        if !flags.is_empty() {
            let _ = write!(text, " flags{flags}");
        }
        for (name, old, new, bits) in [
            ("cr0", before.cr0, after_s.cr0, &CR0[..]),
            ("cr2", before.cr2, after_s.cr2, &[]),
            ("cr3", before.cr3, after_s.cr3, &[]),
            ("cr4", before.cr4, after_s.cr4, &CR4),
            ("efer", before.efer, after_s.efer, &EFER),
        ] {
            if old != new {
                let _ = write!(text, " {name}={new:#x}{}", named(old, new, bits));
            }
        }
        for ((name, old), (_, new)) in segments(before).into_iter().zip(segments(after_s)) {
            if old.selector != new.selector {
                let _ = write!(text, " {name}={:#x}", new.selector);
            }
            if old.base != new.base {
                let _ = write!(text, " {name}.base={:#x}", new.base);
            }
        }
        let same = |old: &kvm_dtable, new: &kvm_dtable| (old.base, old.limit) == (new.base, new.limit);
        for (name, old, new) in [("gdtr", &before.gdt, &after_s.gdt), ("idtr", &before.idt, &after_s.idt)] {
            if !same(old, new) {
                let _ = write!(text, " {name}={:#x}:{:#x}", new.base, new.limit);
            }
        }
        text.trim_start().to_owned()
    }
}

/// `+A-B`: the bits that were set and cleared, by name.
fn named(old: u64, new: u64, names: &[Bit]) -> String {
    let changed = names.iter().filter(|(bit, _)| (old ^ new) >> bit & 1 != 0);
    changed.map(|(bit, name)| format!("{}{name}", if new >> bit & 1 != 0 { '+' } else { '-' })).collect()
}

fn general(r: &kvm_regs) -> [(&'static str, u64); 16] {
    [
        ("rax", r.rax),
        ("rbx", r.rbx),
        ("rcx", r.rcx),
        ("rdx", r.rdx),
        ("rsi", r.rsi),
        ("rdi", r.rdi),
        ("rbp", r.rbp),
        ("rsp", r.rsp),
        ("r8", r.r8),
        ("r9", r.r9),
        ("r10", r.r10),
        ("r11", r.r11),
        ("r12", r.r12),
        ("r13", r.r13),
        ("r14", r.r14),
        ("r15", r.r15),
    ]
}

fn segments(s: &kvm_sregs) -> [(&'static str, &kvm_segment); 8] {
    [
        ("cs", &s.cs),
        ("ss", &s.ss),
        ("ds", &s.ds),
        ("es", &s.es),
        ("fs", &s.fs),
        ("gs", &s.gs),
        ("tr", &s.tr),
        ("ldt", &s.ldt),
    ]
}

//! The registers that gdb sees, and the description of them that it asks for.
//!
//! [`Registers::each`] and [`FEATURES`] name them in the same order: that of gdb's "g" packet.

use std::fmt::Write;
use std::sync::LazyLock;

use gdbstub::arch::{self, Arch};
use kvm_bindings::{kvm_fpu, kvm_regs, kvm_sregs};

use crate::debug::view;
use vmm_monitor::kvm::{Error, Vcpu};

/// MSR: the base that SWAPGS puts in GS (SDM vol. 4, table 2-2).
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// x86-64 with the registers that only a kernel sees.
#[derive(Debug)]
pub enum X86_64 {}

impl Arch for X86_64 {
    type Usize = u64;
    type Registers = Registers;
    type BreakpointKind = usize;
    type RegId = ();

    fn target_description_xml() -> Option<&'static str> {
        static XML: LazyLock<String> = LazyLock::new(description);
        Some(&XML)
    }
}

/// A vCPU's registers.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Registers {
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
    kernel_gs_base: u64,
}

/// A register, to be read or written.
enum Field<'a> {
    U64(&'a mut u64),
    /// The low half.
    Low32(&'a mut u64),
    /// 32 bits for gdb.
    U16(&'a mut u16),
    /// x87's tags: a bit for each register here, two for gdb.
    Tags(&'a mut u8),
    /// Not kept.
    Zero,
    /// Ten bytes of these.
    X87(&'a mut [u8; 16]),
    Xmm(&'a mut [u8; 16]),
    Mxcsr(&'a mut u32),
}

impl Field<'_> {
    fn get(&self) -> ([u8; 16], usize) {
        let number = |number: u64, size| (u128::from(number).to_le_bytes(), size);
        match self {
            Self::U64(value) => number(**value, 8),
            Self::Low32(value) => number(u64::from(**value as u32), 4),
            Self::U16(value) => number(u64::from(**value), 4),
            Self::Tags(value) => {
                // 0 is valid, 3 is empty (SDM vol. 1, 8.1.7).
                let tags = (0..8).map(|n| if **value >> n & 1 != 0 { 0 } else { 3 << (2 * n) });
                number(tags.fold(0, |all, tag| all | tag), 4)
            }
            Self::Zero => number(0, 4),
            Self::X87(value) => (**value, 10),
            Self::Xmm(value) => (**value, 16),
            Self::Mxcsr(value) => number(u64::from(**value), 4),
        }
    }

    /// As many bytes as [`Field::get`] gives.
    fn set(self, bytes: &[u8]) {
        let mut all = [0; 16];
        all[..bytes.len()].copy_from_slice(bytes);
        let number = u128::from_le_bytes(all) as u64;
        match self {
            Self::U64(value) => *value = number,
            Self::Low32(value) => *value = *value & !0xffff_ffff | number,
            Self::U16(value) => *value = number as u16,
            Self::Tags(value) => {
                let valid = (0..8).filter(|n| number >> (2 * n) & 3 != 3);
                *value = valid.fold(0, |all, n| all | 1 << n);
            }
            Self::Zero => {}
            Self::X87(value) => value[..10].copy_from_slice(&all[..10]),
            Self::Xmm(value) => *value = all,
            Self::Mxcsr(value) => *value = number as u32,
        }
    }
}

impl Registers {
    /// Of a vCPU that stands still.
    ///
    /// # Errors
    /// KVM does not tell them.
    pub fn of(vcpu: &Vcpu) -> Result<Self, Error> {
        let kernel_gs_base = vcpu.msr(KERNEL_GS_BASE).unwrap_or(0);
        Ok(Self { regs: vcpu.regs()?, sregs: vcpu.sregs()?, fpu: vcpu.fpu()?, kernel_gs_base })
    }

    /// Gives those that gdb knows to the vCPU, as far as they differ from what it has.
    ///
    /// # Errors
    /// KVM refuses them: they do not go together.
    pub fn set(&self, vcpu: &Vcpu) -> Result<(), Error> {
        let now = Self::of(vcpu)?;
        let wanted = now.with(self);
        if wanted.sregs != now.sregs {
            vcpu.set_sregs(&wanted.sregs)?;
        }
        if wanted.fpu != now.fpu {
            vcpu.set_fpu(&wanted.fpu)?;
        }
        if wanted.regs != now.regs {
            vcpu.set_regs(&wanted.regs)?;
        }
        if wanted.kernel_gs_base != now.kernel_gs_base && !vcpu.set_msr(KERNEL_GS_BASE, wanted.kernel_gs_base)
        {
            return Err(Error::Missing("room for this value in k_gs_base"));
        }
        Ok(())
    }

    /// Itself, with what gdb knows from `other`: not what stands behind a segment's selector, say.
    fn with(&self, other: &Self) -> Self {
        let mut bytes = Vec::new();
        arch::Registers::gdb_serialize(other, |byte| bytes.extend(byte));
        let mut all = self.clone();
        // As many bytes as it takes, by construction.
        let _ = arch::Registers::gdb_deserialize(&mut all, &bytes);
        all
    }

    /// All, in gdb's order.
    fn each(&mut self, f: &mut dyn FnMut(Field<'_>)) {
        let (r, s, x) = (&mut self.regs, &mut self.sregs, &mut self.fpu);
        for register in [
            &mut r.rax, &mut r.rbx, &mut r.rcx, &mut r.rdx, &mut r.rsi, &mut r.rdi, &mut r.rbp, &mut r.rsp,
            &mut r.r8, &mut r.r9, &mut r.r10, &mut r.r11, &mut r.r12, &mut r.r13, &mut r.r14, &mut r.r15,
            &mut r.rip,
        ] {
            f(Field::U64(register));
        }
        f(Field::Low32(&mut r.rflags));
        for segment in [&mut s.cs, &mut s.ss, &mut s.ds, &mut s.es, &mut s.fs, &mut s.gs] {
            f(Field::U16(&mut segment.selector));
        }
        x.fpr.iter_mut().for_each(|register| f(Field::X87(register)));
        f(Field::U16(&mut x.fcw));
        f(Field::U16(&mut x.fsw));
        f(Field::Tags(&mut x.ftwx));
        f(Field::Zero);
        f(Field::Low32(&mut x.last_ip));
        f(Field::Zero);
        f(Field::Low32(&mut x.last_dp));
        f(Field::U16(&mut x.last_opcode));
        x.xmm.iter_mut().for_each(|register| f(Field::Xmm(register)));
        f(Field::Mxcsr(&mut x.mxcsr));
        for register in [
            &mut s.fs.base,
            &mut s.gs.base,
            &mut self.kernel_gs_base,
            &mut s.cr0,
            &mut s.cr2,
            &mut s.cr3,
            &mut s.cr4,
            &mut s.cr8,
            &mut s.efer,
        ] {
            f(Field::U64(register));
        }
    }
}

impl arch::Registers for Registers {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.regs.rip
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.clone().each(&mut |field| {
            let (bytes, size) = field.get();
            bytes[..size].iter().for_each(|byte| write_byte(Some(*byte)));
        });
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        let mut rest = bytes;
        let mut whole = true;
        self.each(&mut |field| {
            let (_, size) = field.get();
            match rest.split_at_checked(size) {
                Some((first, others)) => {
                    field.set(first);
                    rest = others;
                }
                None => whole = false,
            }
        });
        whole.then_some(()).ok_or(())
    }
}

/// Names with blanks between, bits, type.
type Described = (&'static str, u32, &'static str);

/// Features by name, with the registers of each: name, bits, type. gdb knows the names of the first three (gdb's manual,
/// G.5.16); the last is our own.
const FEATURES: [(&str, &[Described]); 4] = [
    (
        "org.gnu.gdb.i386.core",
        &[
            ("rax rbx rcx rdx rsi rdi", 64, "int64"),
            ("rbp rsp", 64, "data_ptr"),
            ("r8 r9 r10 r11 r12 r13 r14 r15", 64, "int64"),
            ("rip", 64, "code_ptr"),
            ("eflags", 32, "eflags"),
            ("cs ss ds es fs gs", 32, "int32"),
            ("st0 st1 st2 st3 st4 st5 st6 st7", 80, "i387_ext"),
            ("fctrl fstat ftag fiseg fioff foseg fooff fop", 32, "int"),
        ],
    ),
    (
        "org.gnu.gdb.i386.sse",
        &[
            (
                "xmm0 xmm1 xmm2 xmm3 xmm4 xmm5 xmm6 xmm7 xmm8 xmm9 xmm10 xmm11 xmm12 xmm13 xmm14 xmm15",
                128,
                "vec128",
            ),
            ("mxcsr", 32, "int"),
        ],
    ),
    ("org.gnu.gdb.i386.segments", &[("fs_base gs_base", 64, "int64")]),
    (
        "vmm.system",
        &[
            ("k_gs_base", 64, "int64"),
            ("cr0", 64, "cr0"),
            ("cr2", 64, "int64"),
            ("cr3", 64, "int64"),
            ("cr4", 64, "cr4"),
            ("cr8", 64, "int64"),
            ("efer", 64, "efer"),
        ],
    ),
];

/// Bits by name, for registers of a type of that name; the feature and the size in bytes that they are for.
const FLAGS: [(&str, &str, u32, &[view::Bit]); 4] = [
    ("org.gnu.gdb.i386.core", "eflags", 4, &view::FLAGS),
    ("vmm.system", "cr0", 8, &view::CR0),
    ("vmm.system", "cr4", 8, &view::CR4),
    ("vmm.system", "efer", 8, &view::EFER),
];

/// Ways to look at 128 bits.
const VECTORS: [(&str, &str, u32); 6] = [
    ("v4_float", "ieee_single", 4),
    ("v2_double", "ieee_double", 2),
    ("v16_int8", "int8", 16),
    ("v8_int16", "int16", 8),
    ("v4_int32", "int32", 4),
    ("v2_int64", "int64", 2),
];

/// target.xml (gdb's manual, appendix G).
fn description() -> String {
    let mut xml = "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\"><target>\
                   <architecture>i386:x86-64</architecture>"
        .to_owned();
    // Writing to a String does not fail.
    for (feature, registers) in FEATURES {
        let _ = write!(xml, "<feature name=\"{feature}\">");
        for (_, id, size, bits) in FLAGS.iter().filter(|(of, ..)| *of == feature) {
            let _ = write!(xml, "<flags id=\"{id}\" size=\"{size}\">");
            for (bit, name) in *bits {
                let _ = write!(xml, "<field name=\"{name}\" start=\"{bit}\" end=\"{bit}\"/>");
            }
            xml.push_str("</flags>");
        }
        if feature.ends_with("sse") {
            for (id, of, count) in VECTORS {
                let _ = write!(xml, "<vector id=\"{id}\" type=\"{of}\" count=\"{count}\"/>");
            }
            xml.push_str("<union id=\"vec128\">");
            for (id, ..) in VECTORS {
                let _ = write!(xml, "<field name=\"{id}\" type=\"{id}\"/>");
            }
            xml.push_str("<field name=\"uint128\" type=\"uint128\"/></union>");
        }
        for (names, bits, of) in registers {
            for name in names.split(' ') {
                let _ = write!(xml, "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{of}\"/>");
            }
        }
        xml.push_str("</feature>");
    }
    xml.push_str("</target>");
    xml
}

#[cfg(test)]
mod tests {
    use gdbstub::arch::Registers as _;

    use super::*;

    #[test]
    fn the_description_has_the_registers_that_are_sent() {
        let mut sizes = Vec::new();
        Registers::default().each(&mut |field| sizes.push(field.get().1 as u32 * 8));
        let registers = FEATURES.iter().flat_map(|(_, registers)| registers.iter());
        let described: Vec<_> =
            registers.flat_map(|(names, bits, _)| names.split(' ').map(|_| *bits)).collect();
        assert_eq!(described, sizes);
    }

    #[test]
    fn what_was_written_is_read_back() {
        let mut sent = Registers::default();
        let mut n = 0u8;
        sent.each(&mut |field| {
            n += 1;
            let (_, size) = field.get();
            field.set(&[n; 16][..size]);
        });
        sent.fpu.ftwx = 0b1010_0101;
        let mut bytes = Vec::new();
        sent.gdb_serialize(|byte| bytes.push(byte.unwrap()));
        let mut received = Registers::default();
        received.gdb_deserialize(&bytes).unwrap();
        assert_eq!(received, sent);
        assert!(received.gdb_deserialize(&bytes[1..]).is_err());
        // What gdb does not know of stays.
        let mut now = Registers::default();
        (now.sregs.cs.l, now.sregs.gdt.base) = (1, 0x1000);
        let wanted = now.with(&sent);
        assert_eq!((wanted.sregs.cs.l, wanted.sregs.gdt.base), (1, 0x1000));
        assert_eq!((wanted.regs, wanted.sregs.cs.selector), (sent.regs, sent.sregs.cs.selector));
    }
}

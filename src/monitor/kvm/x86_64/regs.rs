//! The register state in which a vCPU enters what was loaded: one variant per entry protocol.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use crate::memory::layout;

/// Where and how vCPU 0 starts. The loaders in `boot` return it, having put the GDT and the page tables at
/// [`layout::GDT`] and [`layout::PAGE_TABLES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// At the reset vector, as a processor starts (SDM vol. 3, 11.1): KVM creates vCPUs so, and nothing is changed.
    Reset,
    /// Linux's 64-bit boot protocol: long mode, flat segments, paging on (identity), interrupts off,
    /// RSI = boot_params (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
    Linux64 {
        /// Guest physical address of the first instruction.
        rip: u64,
        /// Guest physical address of boot_params.
        boot_params: u64,
    },
    /// PVH: 32-bit protected mode, flat segments, paging off, interrupts off, EBX = start_info
    /// (Xen's x86/HVM direct boot ABI).
    Pvh {
        /// Guest physical address of the first instruction.
        rip: u32,
        /// Guest physical address of hvm_start_info.
        start_info: u32,
    },
    /// Multiboot 1: the same state, with EAX = 0x2badb002 and EBX = the information block (3.2).
    Multiboot {
        /// Guest physical address of the first instruction.
        rip: u32,
        /// Guest physical address of the information block.
        info: u32,
    },
}

/// The boot GDT's descriptors; the loaders write them at [`layout::GDT`].
/// Linux's 64-bit entry wants __BOOT_CS = 0x10 and __BOOT_DS = 0x18; PVH takes any flat ones.
pub const GDT: [u64; 5] = [
    0,
    0x00cf_9b00_0000_ffff, // 0x08: 32-bit code, flat
    0x00af_9b00_0000_ffff, // 0x10: 64-bit code, flat
    0x00cf_9300_0000_ffff, // 0x18: data, flat
    0x0000_8b00_0000_0067, // 0x20: busy 32-bit TSS, 0x68 bytes at 0
];

/// What firmware leaves behind and kernels rely on: fast string operations, and write-back as the memory type of
/// all that no MTRR covers (SDM vol. 3, 12.11.2.1: E and type 6). All others have their reset values from KVM.
pub const BOOT_MSRS: [(u32, u64); 2] = [(0x1a0, 1), (0x2ff, 0x806)];

/// What a Multiboot kernel finds in EAX.
const MULTIBOOT_MAGIC: u64 = 0x2bad_b002;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// A segment register as loading `selector` from [`GDT`] would leave it.
fn segment(selector: u16) -> kvm_segment {
    let descriptor = GDT[usize::from(selector >> 3)];
    let bits = |shift: u32, count: u32| (descriptor >> shift) & ((1 << count) - 1);
    let raw_limit = bits(0, 16) | bits(48, 4) << 16;
    let granular = bits(55, 1) != 0;
    kvm_segment {
        base: bits(16, 24) | bits(56, 8) << 24,
        limit: if granular { (raw_limit << 12 | 0xfff) as u32 } else { raw_limit as u32 },
        selector,
        type_: bits(40, 4) as u8,
        s: bits(44, 1) as u8,
        dpl: bits(45, 2) as u8,
        present: bits(47, 1) as u8,
        avl: bits(52, 1) as u8,
        l: bits(53, 1) as u8,
        db: bits(54, 1) as u8,
        g: bits(55, 1) as u8,
        unusable: 0,
        padding: 0,
    }
}

/// Changes the system registers for `entry`; what is not named keeps its reset value. The x87 and SSE state needs
/// nothing: KVM creates vCPUs with FNINIT's values, which is what both protocols allow.
pub(super) fn set_system(sregs: &mut kvm_sregs, entry: Entry) {
    let code = match entry {
        Entry::Linux64 { .. } => 0x10,
        Entry::Pvh { .. } | Entry::Multiboot { .. } => 0x08,
        Entry::Reset => return,
    };
    sregs.cs = segment(code);
    let data = segment(0x18);
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.tr = segment(0x20);
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
    sregs.cr0 = CR0_PE | CR0_ET;
    if let Entry::Linux64 { .. } = entry {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = layout::PAGE_TABLES;
        sregs.cr4 |= CR4_PAE;
        sregs.efer |= EFER_LME | EFER_LMA;
    }
}

/// The general registers for `entry`. No stack: both protocols' first instructions set their own.
/// None where they are to stay as they are.
pub(super) fn general(entry: Entry) -> Option<kvm_regs> {
    // Bit 1 always reads as one; interrupts are off.
    let blank = kvm_regs { rflags: 2, ..Default::default() };
    Some(match entry {
        Entry::Linux64 { rip, boot_params } => kvm_regs { rip, rsi: boot_params, ..blank },
        Entry::Pvh { rip, start_info } => {
            kvm_regs { rip: u64::from(rip), rbx: u64::from(start_info), ..blank }
        }
        Entry::Multiboot { rip, info } => {
            kvm_regs { rip: u64::from(rip), rax: MULTIBOOT_MAGIC, rbx: u64::from(info), ..blank }
        }
        Entry::Reset => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_what_the_protocols_want() {
        let code = segment(0x10);
        assert_eq!((code.base, code.limit, code.l, code.db, code.type_, code.s), (0, u32::MAX, 1, 0, 0xb, 1));
        let code = segment(0x08);
        assert_eq!((code.limit, code.l, code.db), (u32::MAX, 0, 1));
        let data = segment(0x18);
        assert_eq!((data.limit, data.type_, data.present), (u32::MAX, 3, 1));
        let tss = segment(0x20);
        assert_eq!((tss.limit, tss.type_, tss.s, tss.present), (0x67, 0xb, 0, 1));
    }

    #[test]
    fn pvh_enters_with_paging_off_and_linux64_in_long_mode() {
        let mut sregs = kvm_sregs::default();
        set_system(&mut sregs, Entry::Pvh { rip: 1, start_info: 2 });
        assert_eq!((sregs.cr0 & CR0_PG, sregs.cr4, sregs.efer), (0, 0, 0));
        set_system(&mut sregs, Entry::Linux64 { rip: 1, boot_params: 2 });
        assert_eq!(sregs.efer, EFER_LME | EFER_LMA);
        assert_ne!(sregs.cr0 & CR0_PG, 0);
    }
}

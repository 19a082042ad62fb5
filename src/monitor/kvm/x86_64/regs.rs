//! [`Entry`]: the registers with which vCPUs begin, as plain data, and what KVM calls them.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

/// The registers with which vCPUs enter what was loaded. The loaders in `boot`, which know the protocols, make it;
/// [`Vcpu::enter_at`](crate::kvm::Vcpu::enter_at) applies it. Other general registers are 0, interrupts are off, and all else
/// keeps its value from the reset.
#[allow(missing_docs, reason = "registers by their names")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Numbers and values of MSRs. Of every vCPU; all else is of vCPU 0, which starts the others.
    pub msrs: &'static [(u32, u64)],
    /// Address of the first instruction.
    pub rip: u64,
    pub rax: u64,
    pub rbx: u64,
    pub rsi: u64,
    /// CS.
    pub code: Segment,
    /// DS, ES, FS, GS and SS.
    pub data: Segment,
    /// TR.
    pub task: Segment,
    /// Guest physical address of the GDT.
    pub gdt: u64,
    /// Its size in bytes less one.
    pub gdt_limit: u16,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
}

/// A segment register, as if its selector had been loaded from a GDT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Index in the GDT times 8, and the privilege level.
    pub selector: u16,
    /// What the GDT has for it (SDM vol. 3, 3.4.5).
    pub descriptor: u64,
}

impl From<Segment> for kvm_segment {
    fn from(Segment { selector, descriptor }: Segment) -> Self {
        let bits = |shift: u32, count: u32| (descriptor >> shift) & ((1 << count) - 1);
        let raw_limit = bits(0, 16) | bits(48, 4) << 16;
        let granular = bits(55, 1) != 0;
        Self {
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
}

/// Puts the entry's system registers into those after the reset. The x87 and SSE state needs nothing: KVM creates vCPUs with FNINIT's
/// values.
pub(super) fn set_system(sregs: &mut kvm_sregs, entry: &Entry) {
    let data = entry.data.into();
    sregs.cs = entry.code.into();
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.tr = entry.task.into();
    (sregs.gdt.base, sregs.gdt.limit) = (entry.gdt, entry.gdt_limit);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (entry.cr0, entry.cr3, entry.cr4, entry.efer);
}

/// The entry's general registers.
pub(super) fn general(entry: &Entry) -> kvm_regs {
    let Entry { rip, rax, rbx, rsi, .. } = *entry;
    // Bit 1 always reads as one; interrupts are off.
    kvm_regs { rip, rax, rbx, rsi, rflags: 2, ..Default::default() }
}

/// 32-bit protected mode with flat segments, for what vCPUs run in tests.
#[cfg(test)]
pub const FLAT: Entry = Entry {
    msrs: &[],
    rip: 0,
    rax: 0,
    rbx: 0,
    rsi: 0,
    code: Segment { selector: 0x08, descriptor: 0x00cf_9b00_0000_ffff },
    data: Segment { selector: 0x18, descriptor: 0x00cf_9300_0000_ffff },
    task: Segment { selector: 0x20, descriptor: 0x0000_8b00_0000_0067 },
    gdt: 0x500,
    gdt_limit: 39,
    cr0: 0x11,
    cr3: 0,
    cr4: 0,
    efer: 0,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_what_its_descriptor_says() {
        let code = kvm_segment::from(Segment { selector: 0x10, descriptor: 0x00af_9b00_0000_ffff });
        assert_eq!((code.base, code.limit, code.l, code.db, code.type_, code.s), (0, u32::MAX, 1, 0, 0xb, 1));
        let code = kvm_segment::from(FLAT.code);
        assert_eq!((code.limit, code.l, code.db, code.selector), (u32::MAX, 0, 1, 0x08));
        let data = kvm_segment::from(FLAT.data);
        assert_eq!((data.limit, data.type_, data.present), (u32::MAX, 3, 1));
        let task = kvm_segment::from(FLAT.task);
        assert_eq!((task.limit, task.type_, task.s, task.present), (0x67, 0xb, 0, 1));
        let odd = kvm_segment::from(Segment { selector: 0, descriptor: 0x1200_0034_5678_9abc });
        assert_eq!((odd.base, odd.limit), (0x1234_5678, 0x9abc));
    }

    #[test]
    fn an_entry_names_registers_and_leaves_the_others() {
        let entry = Entry { rip: 1, rax: 2, rbx: 3, rsi: 4, cr3: 5, cr4: 6, efer: 7, ..FLAT };
        let general = general(&entry);
        let expected = kvm_regs { rip: 1, rax: 2, rbx: 3, rsi: 4, rflags: 2, ..Default::default() };
        assert_eq!(general, expected);
        let mut sregs = kvm_sregs { apic_base: 8, cr8: 9, ..Default::default() };
        set_system(&mut sregs, &entry);
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x11, 5, 6, 7));
        assert_eq!((sregs.gdt.base, sregs.gdt.limit, sregs.gs.selector), (0x500, 39, 0x18));
        assert_eq!((sregs.apic_base, sregs.cr8), (8, 9));
    }
}

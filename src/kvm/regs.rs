//! The register state in which a vCPU enters what was loaded: one variant per entry protocol.

/// Where and how vCPU 0 starts. The loaders in `boot` return it, having put the GDT and the page tables at
/// [`layout::GDT`](crate::memory::layout::GDT) and [`layout::PAGE_TABLES`](crate::memory::layout::PAGE_TABLES).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
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
}

//! From PVH's entry (32-bit protected mode, no paging) to 64-bit Rust; ports; the end.

use core::arch::{asm, global_asm};

global_asm!(
    // PVH: an ELF note of Xen's, type 18, holds the entry point.
    ".section .note.Xen, \"a\", @note",
    ".balign 4",
    ".long 4, 4, 18",
    ".asciz \"Xen\"",
    ".long start",
    ".section .text.start, \"ax\", @progbits",
    ".code32",
    ".globl start",
    "start:",
    "cld",
    // EBX holds start_info's address; nothing here changes it. The page tables are zero as all of .bss: set the first
    // 4 GiB to themselves, by pages of 2 MiB.
    "movl $(tables + 0x1003), tables",
    "movl $(tables + 0x1000), %edi",
    "movl $(tables + 0x2003), %eax",
    "movl $4, %ecx",
    "1: movl %eax, (%edi)",
    "addl $0x1000, %eax",
    "addl $8, %edi",
    "loop 1b",
    "movl $(tables + 0x2000), %edi",
    "movl $0x83, %eax",
    "movl $2048, %ecx",
    "2: movl %eax, (%edi)",
    "addl $0x200000, %eax",
    "addl $8, %edi",
    "loop 2b",
    // CR4: PAE for long mode; OSFXSR and OSXMMEXCPT, since the compiler uses SSE registers.
    "movl %cr4, %eax",
    "orl $0x620, %eax",
    "movl %eax, %cr4",
    "movl $tables, %eax",
    "movl %eax, %cr3",
    // EFER.LME
    "movl $0xc0000080, %ecx",
    "rdmsr",
    "orl $0x100, %eax",
    "wrmsr",
    // CR0: PG, MP and PE on, EM off. Now in long mode, compatibility submode.
    "movl %cr0, %eax",
    "andl $~4, %eax",
    "orl $0x80000003, %eax",
    "movl %eax, %cr0",
    "lgdt gdt_pointer",
    "ljmp $0x10, $start64",
    ".code64",
    "start64:",
    "movl $0x18, %eax",
    "movl %eax, %ds",
    "movl %eax, %es",
    "movl %eax, %ss",
    "movl $stack_end, %esp",
    "movl %ebx, %edi",
    "xorl %ebp, %ebp",
    "call {main}",
    "ud2",
    ".section .rodata",
    ".balign 8",
    // As Linux's boot protocol wants it: 64-bit code at 0x10, data at 0x18.
    "gdt: .quad 0, 0, 0x00af9b000000ffff, 0x00cf93000000ffff",
    "gdt_pointer: .word 31",
    ".quad gdt",
    ".section .bss",
    ".balign 4096",
    "tables: .skip 0x6000",
    ".skip 0x20000",
    "stack_end:",
    ".text",
    main = sym crate::main,
    options(att_syntax),
);

unsafe extern "C" {
    #[link_name = "__start"]
    static START: u8;
    #[link_name = "__end"]
    static END: u8;
}

/// The memory that this program takes, its stack and page tables included.
pub fn own_memory() -> core::ops::Range<u64> {
    (&raw const START) as u64..(&raw const END) as u64
}

/// Writes one byte to a port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: ports are devices; none of those used here touches memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

/// Reads one byte from a port.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: as for `outb`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Tells the monitor that there is nothing to boot (`src/monitor/legacy/acpi_pm.rs`), which ends the run; or stops.
pub fn give_up() -> ! {
    outb(0x605, 1);
    loop {
        // SAFETY: nothing is left to do.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}

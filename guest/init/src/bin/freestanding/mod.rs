//! What a program needs that has no libc below it: an entry point, a panic handler, and the memory functions that the
//! compiler calls. Each program defines `entry`.

#[path = "../../../../../firmware/disk/src/memory.rs"]
mod memory;

use core::arch::{asm, global_asm};

global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {entry}",
    "ud2",
    entry = sym super::entry,
);

/// Says that it happened; the kernel then panics because PID 1 ended, which the monitor sees.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    const SYS_WRITE: usize = 1;
    const SYS_EXIT_GROUP: usize = 231;
    let text = b"guest-init: bug: panicked\n";
    // SAFETY: write of a static text; exit_group does not return.
    unsafe {
        asm!("syscall", inlateout("rax") SYS_WRITE => _, in("rdi") 2, in("rsi") text.as_ptr(), in("rdx") text.len(),
            lateout("rcx") _, lateout("r11") _, options(nostack));
        asm!("syscall", in("rax") SYS_EXIT_GROUP, in("rdi") 101, options(noreturn, nostack));
    }
}

/// # Safety
/// As C's strlen.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut length = 0;
    // SAFETY: the caller's contract; volatile, so that the compiler does not make a call to strlen of this loop.
    while unsafe { text.add(length).read_volatile() } != 0 {
        length += 1;
    }
    length
}

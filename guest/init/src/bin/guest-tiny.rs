//! The least that a boot benchmark needs as PID 1: says the marker line on the console that the kernel opened for it, then
//! powers off, or resets the machine if it was given any argument (`... -- reboot`).
#![no_std]
#![no_main]

#[path = "freestanding/mod.rs"]
mod freestanding;

use core::arch::asm;

const SYS_WRITE: usize = 1;
const SYS_REBOOT: usize = 169;

// linux/reboot.h
const MAGIC1: usize = 0xfee1_dead;
const MAGIC2: usize = 672_274_793;
const CMD_RESTART: usize = 0x0123_4567;
const CMD_POWER_OFF: usize = 0x4321_fedc;

/// Called by `_start` with the stack as the kernel left it: argc first.
///
/// # Safety
/// `stack` must be that stack.
#[unsafe(no_mangle)]
unsafe extern "C" fn entry(stack: *const usize) -> ! {
    let line = b"guest: init\n";
    // SAFETY: the kernel's layout (System V ABI for x86-64, 3.4.1).
    let how = if unsafe { stack.read() } > 1 { CMD_RESTART } else { CMD_POWER_OFF };
    // SAFETY: a write of a static text, then the end of the machine.
    unsafe {
        asm!("syscall", inlateout("rax") SYS_WRITE => _, in("rdi") 1, in("rsi") line.as_ptr(), in("rdx") line.len(),
            lateout("rcx") _, lateout("r11") _, options(nostack));
        asm!("syscall", inlateout("rax") SYS_REBOOT => _, in("rdi") MAGIC1, in("rsi") MAGIC2, in("rdx") how,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    loop {
        core::hint::spin_loop();
    }
}

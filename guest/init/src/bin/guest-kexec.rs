//! Starts another kernel from this one: `guest-kexec KERNEL INITRD COMMAND-LINE`, as `kexec -s -l` and `kexec
//! -e` do, without asking anybody to stop. It returns only if the kernel refuses, with the error's number as
//! exit code.
#![no_std]
#![no_main]

#[path = "freestanding/mod.rs"]
mod freestanding;

use core::arch::asm;

const SYS_OPEN: usize = 2;
const SYS_REBOOT: usize = 169;
const SYS_EXIT_GROUP: usize = 231;
const SYS_KEXEC_FILE_LOAD: usize = 320;

// linux/reboot.h
const MAGIC1: usize = 0xfee1_dead;
const MAGIC2: usize = 672_274_793;
const CMD_KEXEC: usize = 0x4558_4543;

/// # Safety
/// As the system call's.
unsafe fn call(number: usize, arguments: [usize; 5]) -> isize {
    let result: isize;
    let [a, b, c, d, e] = arguments;
    // SAFETY: the caller's contract; the system call changes RCX, R11 and what its arguments say.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

fn exit(code: usize) -> ! {
    // SAFETY: it takes a number.
    unsafe { call(SYS_EXIT_GROUP, [code, 0, 0, 0, 0]) };
    loop {
        core::hint::spin_loop();
    }
}

/// Called by `_start` with the stack as the kernel left it: argc, argv, NULL.
///
/// # Safety
/// `stack` must be that stack.
#[unsafe(no_mangle)]
unsafe extern "C" fn entry(stack: *const usize) -> ! {
    // SAFETY: the kernel's layout (System V ABI for x86-64, 3.4.1); with four arguments all of these are C
    // strings.
    unsafe {
        if stack.read() != 4 {
            exit(2);
        }
        let [kernel, initrd, line] = [2, 3, 4].map(|at| stack.add(at).read());
        let open =
            |path: usize| usize::try_from(call(SYS_OPEN, [path, 0, 0, 0, 0])).unwrap_or_else(|_| exit(3));
        let mut length = 1;
        while (line as *const u8).add(length - 1).read_volatile() != 0 {
            length += 1;
        }
        let loaded = call(SYS_KEXEC_FILE_LOAD, [open(kernel), open(initrd), length, line, 0]);
        if loaded != 0 {
            exit(loaded.unsigned_abs());
        }
        exit(call(SYS_REBOOT, [MAGIC1, MAGIC2, CMD_KEXEC, 0, 0]).unsigned_abs())
    }
}

//! PID 1: the entry point around [`guest_init::run`]. Built by `cargo guest -- initramfs`, never by plain cargo.
#![no_std]
#![no_main]

#[path = "freestanding/mod.rs"]
mod freestanding;

/// Called by `_start` with the stack as the kernel left it: argc, argv, NULL, envp, NULL, auxv.
///
/// # Safety
/// `stack` must be that stack.
#[unsafe(no_mangle)]
unsafe extern "C" fn entry(stack: *const usize) -> ! {
    // SAFETY: the kernel's layout (System V ABI for x86-64, 3.4.1): argc words follow argc, then a NULL, then envp.
    unsafe {
        let argc = stack.read();
        guest_init::run(stack.add(argc + 2).cast())
    }
}

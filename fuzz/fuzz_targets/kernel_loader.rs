//! Kernel images of any content, by every boot protocol: an entry or an error, never anything else.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use vmm::boot::tables::Platform;
use vmm::boot::{Payload, load};
use vmm::config::BootProtocol;
use vmm::memory::Memory;

fuzz_target!(|data: &[u8]| {
    let Some((head, rest)) = data.split_at_checked(2) else { return };
    // The middle of an image is of no interest to a loader: the fuzzer gives the start, and how far it goes.
    let file = |bytes: &[u8], len: u64| {
        let mut file = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(bytes).unwrap();
        file.set_len(len.max(bytes.len() as u64)).unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        (file, path)
    };
    let (_kernel, kernel) = file(rest, u64::from(head[0] & 0x3f) << 14);
    let (_initrd, initrd) = file(b"initrd", 6);
    let protocol = [BootProtocol::Auto, BootProtocol::Linux64, BootProtocol::Pvh, BootProtocol::Auto]
        [usize::from(head[1] & 3)];
    let payload = Payload {
        kernel,
        initrd: (head[1] & 4 != 0).then_some(initrd),
        cmdline: "console=hvc0".to_owned(),
        protocol,
    };
    let size = if head[1] & 8 != 0 { "2M" } else { "32M" };
    let memory = Memory::new(&size.parse().unwrap()).unwrap();
    let platform = Platform { cpus: 2, ..Platform::default() };
    match load(&memory, &payload, &platform) {
        Ok(_) => {}
        // The whole text, as a user would see it.
        Err(error) => assert!(!vmm::error_chain(&error).is_empty() && !error.hint().is_empty()),
    }
});

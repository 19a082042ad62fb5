//! Kernel images of any content, by every boot protocol: an entry or an error, never anything else.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use vmm_monitor::boot::tables::Platform;
use vmm_monitor::boot::{Entry, Error, Payload, load};
use vmm_monitor::config::BootProtocol;
use vmm_monitor::memory::Memory;

/// An ELF that loads: one segment, one PVH note.
fn elf() -> Vec<u8> {
    let mut image = vec![0; 0x2000];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(24, &0x10_0000u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 2, 0]);
    // Type, flags; offset, virtual and physical address, file and memory size, alignment.
    for (at, kind, words) in [
        (64, 1u8, [0x1000u64, 0x10_0000, 0x10_0000, 0x1000, 0x3000, 0x1000]),
        (120, 4, [0x200, 0x10_0200, 0x10_0200, 20, 20, 4]),
    ] {
        put(at, &[kind, 0, 0, 0, 5, 0, 0, 0]);
        for (i, word) in words.iter().enumerate() {
            put(at + 8 + 8 * i, &word.to_le_bytes());
        }
    }
    put(0x200, b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0\0\0\x10\0");
    image
}

/// A bzImage that loads: one setup sector, 64-bit entry.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 0x4000];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &0x3c0u32.to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 21, 1, 0]);
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    image
}

/// Loads `image`, made `len` bytes long if it is shorter, in the way that `how` says.
fn boot(how: u8, image: &[u8], len: u64) -> Result<Entry, Error> {
    let file = |bytes: &[u8], len: u64| {
        let mut file = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(bytes).unwrap();
        file.set_len(len.max(bytes.len() as u64)).unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        (file, path)
    };
    let (_kernel, kernel) = file(image, len);
    let (_initrd, initrd) = file(b"initrd", 6);
    let protocols = [BootProtocol::Auto, BootProtocol::Linux64, BootProtocol::Pvh, BootProtocol::Auto];
    let initrd = (how & 4 != 0).then_some(&*initrd);
    let protocol = protocols[usize::from(how & 3)];
    let payload = Payload::open(&kernel.into(), initrd, "console=hvc0".to_owned(), protocol)?;
    let size = if how & 8 != 0 { "2M" } else { "32M" };
    let memory = Memory::new(&size.parse().unwrap()).unwrap();
    let platform = Platform { cpus: 2, ..Platform::default() };
    load(&memory, &payload, &platform)
}

/// Half of the inputs are images as they are; the others are changes to one that loads.
fn kernel(how: u8, data: &[u8]) -> Vec<u8> {
    let mut image = match how & 3 {
        2 => elf(),
        3 => bzimage(),
        _ => return data.to_vec(),
    };
    // Where the headers are, and what to put there.
    for change in data.chunks_exact(4) {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % 0x280;
        let len = 1 + usize::from(change[3] & 7);
        image[at..at + len].fill(change[2]);
    }
    image
}

fuzz_target!(init: {
    // The templates are worth their name.
    for (protocol, image) in [(0, elf()), (1, elf()), (2, elf()), (0, bzimage())] {
        let loaded = boot(protocol, &image, 0);
        assert!(loaded.is_ok(), "{loaded:?}");
    }
}, |data: &[u8]| {
    let Some((head, rest)) = data.split_at_checked(2) else { return };
    let image = kernel(head[1] >> 4, rest);
    match boot(head[1], &image, u64::from(head[0] & 0x3f) << 14) {
        Ok(_) => {}
        // The whole text, as a user would see it.
        Err(error) => assert!(!vmm_monitor::error_chain(&error).is_empty() && !error.hint().is_empty()),
    }
});

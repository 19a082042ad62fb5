//! Multiboot images of any content: an entry into RAM or an error, never anything else.
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

const MAGIC: u32 = 0x1bad_b002;
/// What a kernel entered by Multiboot finds in EAX.
const MULTIBOOT: u64 = 0x2bad_b002;
const SIZE: u64 = 32 << 20;

fn put(image: &mut [u8], at: usize, words: &[u32]) {
    for (i, word) in words.iter().enumerate() {
        image[at + 4 * i..at + 4 * i + 4].copy_from_slice(&word.to_le_bytes());
    }
}

/// A flat image that loads at 1 MiB, with the addresses in its header.
fn flat() -> Vec<u8> {
    let (mut image, flags) = (vec![0x90; 0x800], 1u32 << 16);
    let sum = 0u32.wrapping_sub(MAGIC).wrapping_sub(flags);
    let base = 0x10_0000;
    put(&mut image, 0x40, &[MAGIC, flags, sum, base + 0x40, base, 0, base + 0x1000, base + 0x80]);
    image
}

/// An ELF32 of one segment, linked high.
fn elf() -> Vec<u8> {
    let mut image = vec![0; 0x1800];
    image[..7].copy_from_slice(b"\x7fELF\x01\x01\x01");
    put(&mut image, 16, &[3 << 16 | 2, 1, 0xc000_0010, 52]);
    put(&mut image, 42, &[1 << 16 | 32]);
    put(&mut image, 52, &[1, 0x1000, 0xc000_0000, 0x20_0000, 0x800, 0x4000, 5, 0x1000]);
    put(&mut image, 0x1000, &[MAGIC, 3, 0u32.wrapping_sub(MAGIC).wrapping_sub(3)]);
    image
}

/// Loads `image` by Multiboot, or by whatever it is taken for.
fn boot(auto: bool, image: &[u8]) -> Result<Entry, Error> {
    let mut file = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(image).unwrap();
    let kernel = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let protocol = if auto { BootProtocol::Auto } else { BootProtocol::Multiboot };
    let payload = Payload::open(&kernel.into(), None, "a b".to_owned(), protocol)?;
    let memory = Memory::new(&"32M".parse().unwrap()).unwrap();
    load(&memory, &payload, &Platform { cpus: 2, ..Platform::default() })
}

fuzz_target!(init: {
    for image in [flat(), elf()] {
        let loaded = boot(true, &image);
        assert!(loaded.as_ref().is_ok_and(|entry| entry.rax == MULTIBOOT), "{loaded:?}");
    }
}, |data: &[u8]| {
    let Some((how, rest)) = data.split_first() else { return };
    let mut image = match how & 3 {
        0 => rest.to_vec(),
        1 => elf(),
        _ => flat(),
    };
    // Changes where the headers are: a place, and the word to put there.
    if how & 3 != 0 {
        for change in rest.chunks_exact(5) {
            let at = usize::from(change[0]) % 32 * 4 + if how & 3 == 1 { 0 } else { 0x40 };
            image[at..at + 4].copy_from_slice(&change[1..]);
        }
        // Most changed headers would only miss their sum.
        if how & 4 != 0 {
            let flags = u32::from_le_bytes([image[0x44], image[0x45], image[0x46], image[0x47]]);
            put(&mut image, 0x48, &[0u32.wrapping_sub(MAGIC).wrapping_sub(flags)]);
        }
    }
    match boot(how & 8 != 0, &image) {
        Ok(Entry { rax: MULTIBOOT, rip, .. }) => assert!((0x8000..SIZE).contains(&rip), "{rip:#x}"),
        Ok(_) => {}
        Err(error) => assert!(!vmm_monitor::error_chain(&error).is_empty() && !error.hint().is_empty()),
    }
});

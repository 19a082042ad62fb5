//! Kernels of a few instructions: the ELF file around them. For tests and measurements, which bring the instructions.

/// Where a kernel of a few instructions starts.
pub const LOAD: u64 = 16 << 20;

/// A kernel of a few instructions, in an ELF file as Linux's vmlinux is one. It starts in 64-bit mode at 16 MiB.
pub fn kernel(code: &[u8]) -> Vec<u8> {
    elf(code, &[])
}

/// The same with the note that gives it a PVH entry point (Xen's elfnote.h, type 18): it starts in 32-bit mode, in
/// every monitor that loads ELF files.
pub fn pvh_kernel(code: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), LOAD as u32] {
        note.extend(word.to_le_bytes());
    }
    elf(code, &note)
}

fn elf(code: &[u8], note: &[u8]) -> Vec<u8> {
    const NOTE: u64 = 0x800;
    const CODE: u64 = 0x1000;
    let mut file = Vec::new();
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
    put(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    put(&2u16.to_le_bytes()); // ET_EXEC
    put(&62u16.to_le_bytes()); // EM_X86_64
    put(&1u32.to_le_bytes());
    put(&LOAD.to_le_bytes()); // entry
    put(&64u64.to_le_bytes()); // program headers
    put(&0u64.to_le_bytes()); // section headers
    put(&0u32.to_le_bytes());
    for half in [64u16, 56, if note.is_empty() { 1 } else { 2 }, 64, 0, 0] {
        put(&half.to_le_bytes());
    }
    // Kind, flags, then: place in the file, two addresses, two sizes, alignment.
    let (size, note_size) = (code.len() as u64, note.len() as u64);
    let load = (1u32, 7u32, [CODE, LOAD, LOAD, size, size, CODE]); // PT_LOAD, rwx
    let notes = (4u32, 4u32, [NOTE, 0, 0, note_size, note_size, 4]); // PT_NOTE, r
    for (kind, flags, words) in [Some(load), (!note.is_empty()).then_some(notes)].into_iter().flatten() {
        put(&kind.to_le_bytes());
        put(&flags.to_le_bytes());
        for word in words {
            put(&word.to_le_bytes());
        }
    }
    file.resize(NOTE as usize, 0);
    file.extend_from_slice(note);
    file.resize(CODE as usize, 0);
    file.extend_from_slice(code);
    file
}

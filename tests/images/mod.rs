//! Kernel images made for a test or a measurement, a few instructions each.

#[allow(unused_imports, reason = "not everyone makes every kind")]
pub use vmm_bench::elf::{kernel, pvh_kernel};

/// The head of a bzImage of protocol 2.15, which says that `setup` + `code` bytes follow it.
pub fn bzimage(xloadflags: u16, code: usize) -> Vec<u8> {
    let mut file = vec![0; 5 * 512 + code];
    file[0x1f1] = 4; // setup_sects
    file[0x1f4..0x1f8].copy_from_slice(&(code as u32 / 16).to_le_bytes());
    file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    file[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    file[0x211] = 1; // LOADED_HIGH
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    file[0x230..0x234].copy_from_slice(&0x20_0000u32.to_le_bytes()); // kernel_alignment
    file[0x234] = 1; // relocatable
    file[0x236..0x238].copy_from_slice(&xloadflags.to_le_bytes());
    file[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes()); // cmdline_size
    file[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes()); // pref_address
    file[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes()); // init_size
    file
}

/// Instructions: `out PORT, VALUE` then halt for good.
pub fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee, 0xf4, 0xeb, 0xfd]
}

/// Halts for ever.
pub const HALT: [u8; 3] = [0xf4, 0xeb, 0xfd];

//! What a PC's firmware has for software that resets the machine in the old ways: code where it jumps to, and
//! a word whose change tells a reset by triple fault from a crash (`vcpu/x86_64/restart.rs`).
//!
//! Linux jumps to F000:FFF0 for `reboot=bios`, and where it was to call EFI and there is none: that is what a
//! kernel with CONFIG_EFI does by default on hardware-reduced ACPI.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::{GuestRam, layout};

/// 16-bit code: mov al, 0xfe; out 0x64, al; hlt. It pulls the i8042's reset line (`legacy::i8042`). 5 bytes,
/// as many as a far jump: a BIOS has its date behind them.
const CODE: [u8; 5] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4];

/// Writes both.
///
/// # Errors
/// There is no RAM.
pub fn write(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    ram.write_slice(&CODE, GuestAddress(layout::RESET_VECTOR))?;
    let word = layout::RESET_FLAG_UNTOUCHED.to_le_bytes();
    ram.write_slice(&[word, word].concat(), GuestAddress(layout::RESET_FLAG))
}

//! A guest that counts aloud, by which one sees where a machine goes on.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use crate::images::*;
use crate::place::*;

/// Writes 64 characters to COM1 over and over, each some time after the last.
pub const COUNTING: [u8; 26] = [
    0x31, 0xdb, // xor ebx, ebx
    0xff, 0xc3, // inc ebx
    0x88, 0xd8, // mov al, bl
    0x24, 0x3f, // and al, 63
    0x04, 0x30, // add al, '0'
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xee, // out dx, al
    0xb9, 0x00, 0x40, 0x00, 0x00, // mov ecx, 0x4000
    0xff, 0xc9, // dec ecx
    0x75, 0xfc, // jnz to the dec
    0xeb, 0xe8, // jmp to the inc
];

/// Whether `said` is a part of what the guest says, without a gap.
pub fn is_counted(said: &str) -> bool {
    let follows = |pair: &[u8]| pair[1] == b'0' + (pair[0] - b'0' + 1) % 64;
    said.bytes().all(|byte| (b'0'..b'0' + 64).contains(&byte)) && said.as_bytes().windows(2).all(follows)
}

/// What the guest has said whose output goes to `file`, once that is `least` characters.
pub fn await_words(place: &Place, file: &str, least: usize) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let said = fs::read_to_string(place.path(file)).unwrap_or_default();
        if said.len() >= least {
            return said;
        }
        assert!(Instant::now() < deadline, "{file}: {said}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A place with the guest, and the guest, called `v`, which has counted for a while.
pub fn counting(more: &str) -> (Place, Running) {
    speaking(&COUNTING, more)
}

/// The same with another guest that speaks by COM1.
pub fn speaking(code: &[u8], more: &str) -> (Place, Running) {
    let place = Place::new();
    place.file("count", kernel(code));
    let command = format!("--kernel count --mem 32M --serial file=said --console off --name v {more}");
    let guest = Running::new(place.command(&command));
    await_words(&place, "said", 3);
    (place, guest)
}

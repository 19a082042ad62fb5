//! Entropy requests (virtio 1.3, 5.4.6).

use super::Fault;
use crate::guest::{DATA, Guest, NEEDS_RESET, STATUS};

const BUFFER: u64 = DATA + 0x1000;

/// The bytes that the device gives for a buffer of `len`.
fn get(guest: &mut Guest, at: u64, len: u32) -> Vec<u8> {
    guest.store(at, &vec![0; len as usize]);
    let used = guest.request(0, &[], &[(at, len)]);
    assert!(used <= len && (used > 0 || len == 0), "{used} of {len}");
    guest.load(at, used as usize)
}

pub const TABLE: &[Fault] = &[
    Fault("buffers of 1, 8, 4096 and more bytes: bytes that differ, at least one", |guest, _| {
        guest.start(0);
        for len in [1, 8, 4096, 0x1_0000] {
            let (first, second) = (get(guest, BUFFER, len), get(guest, BUFFER, len));
            assert!(len == 1 || first != second);
            assert!(len < 8 || first[..8] != [0; 8]);
        }
    }),
    Fault("a buffer of 0 bytes: nothing is written", |guest, _| {
        guest.start(0);
        assert_eq!(guest.request(0, &[], &[(BUFFER, 0)]), 0);
    }),
    Fault("a buffer of 2^32 - 1 bytes: NEEDS_RESET", |guest, _| {
        guest.start(0);
        guest.rings[0].add(&[], &[(BUFFER, u32::MAX)]);
        guest.notify(0);
        guest.wait_for("NEEDS_RESET", |guest| guest.read(STATUS) & NEEDS_RESET != 0);
    }),
    Fault("a readable buffer: untouched", |guest, _| {
        guest.start(0);
        guest.store(BUFFER, &[0x5a; 64]);
        assert_eq!(guest.request(0, &[(BUFFER, 64)], &[]), 0);
        assert_eq!(guest.load(BUFFER, 64), [0x5a; 64]);
    }),
    Fault("readable, then writable: only what is writable is filled", |guest, _| {
        guest.start(0);
        guest.store(BUFFER, &[0x5a; 128]);
        assert_eq!(guest.request(0, &[(BUFFER, 64)], &[(BUFFER + 64, 64)]), 64);
        assert_eq!(guest.load(BUFFER, 64), [0x5a; 64]);
        assert_ne!(guest.load(BUFFER + 64, 64), [0x5a; 64]);
    }),
    Fault("the same buffer twice, in one request and in two", |guest, _| {
        guest.start(0);
        assert_eq!(guest.request(0, &[], &[(BUFFER, 32), (BUFFER, 32)]), 64);
        for _ in 0..2 {
            guest.rings[0].add(&[], &[(BUFFER, 32)]);
        }
        guest.notify(0);
        (0..2).for_each(|_| assert_eq!(guest.rings[0].wait_used(20).1, 32));
    }),
    Fault("across a page, in many pieces", |guest, _| {
        guest.start(0);
        get(guest, BUFFER + 0xff0, 64);
        let pieces: Vec<_> = (0..40).map(|i| (BUFFER + 0x100 * i, 3)).collect();
        assert_eq!(guest.request(0, &[], &pieces), 120);
    }),
    Fault("a full ring: each gets its own", |guest, _| {
        guest.start(0);
        let count = guest.rings[0].free();
        guest.store(BUFFER, &vec![0; count * 16]);
        for i in 0..count as u64 {
            guest.rings[0].add(&[], &[(BUFFER + 16 * i, 16)]);
        }
        guest.notify(0);
        (0..count).for_each(|_| assert_eq!(guest.rings[0].wait_used(20).1, 16));
        let mut all: Vec<_> = guest.load(BUFFER, count * 16).chunks(16).map(<[u8]>::to_vec).collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
    }),
];

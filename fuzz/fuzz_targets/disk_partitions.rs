//! Disks with any partition table. A GPT's sums are set right, so that what is behind them is reached.
#![no_main]

use bootdisk::partition;
use libfuzzer_sys::fuzz_target;

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |sum, byte| {
        (0..8).fold(
            sum ^ u32::from(*byte),
            |sum, _| if sum & 1 != 0 { (sum >> 1) ^ 0xedb8_8320 } else { sum >> 1 },
        )
    })
}

fn number(disk: &[u8], at: usize) -> usize {
    u32::from_le_bytes(disk[at..at + 4].try_into().unwrap()) as usize
}

fuzz_target!(|data: &[u8]| {
    let mut disk = data.to_vec();
    if disk.len() >= 1024 && disk[0] & 1 != 0 {
        disk[512..520].copy_from_slice(b"EFI PART");
        disk[524..528].copy_from_slice(&92u32.to_le_bytes());
        disk[536..544].copy_from_slice(&1u64.to_le_bytes());
        let (start, length) =
            (number(&disk, 584) * 512, number(&disk, 592).saturating_mul(number(&disk, 596)));
        if let Some(entries) = disk.get(start..start.saturating_add(length)) {
            let sum = crc32(entries);
            disk[600..604].copy_from_slice(&sum.to_le_bytes());
        }
        disk[528..532].fill(0);
        let sum = crc32(&disk[512..604]);
        disk[528..532].copy_from_slice(&sum.to_le_bytes());
    }
    let disk = disk.as_slice();
    for partition in partition::find(&disk).unwrap().all() {
        assert!(partition.start.checked_add(partition.len).unwrap() <= disk.len() as u64);
    }
});

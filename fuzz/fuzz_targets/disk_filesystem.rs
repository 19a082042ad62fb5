//! FAT, ext2 and ext4 of any content: everything that a disk's boot does with them. The data patches an empty
//! image of 1 MiB: pieces of offset (3 bytes), length (1 byte), bytes; the first byte chooses a superblock to
//! begin with.
#![no_main]

use bootdisk::entries::{self, Entries};
use bootdisk::partition;
use bootdisk::unknown::Inhabitant;
use bootdisk::volume::Volume;
use libfuzzer_sys::fuzz_target;

fn start(kind: u8) -> Vec<u8> {
    let mut disk = vec![0; 1 << 20];
    let mut put = |at: usize, bytes: &[u8]| disk[at..at + bytes.len()].copy_from_slice(bytes);
    if kind & 1 != 0 {
        // FAT16 of 512-byte sectors and clusters; or FAT32, by the number of sectors.
        put(11, &[0, 2, 1, 1, 0, 1, 16, 0]);
        put(19, &if kind & 2 != 0 { 2048u16 } else { 20000 }.to_le_bytes());
        put(22, &[80, 0]);
        put(510, &[0x55, 0xaa]);
    } else {
        // ext4 with blocks of 1 KiB; the group's inode table is at block 4; inode 2 is a folder with an extent at block 8.
        put(1024, &64u32.to_le_bytes());
        put(1024 + 0x14, &[1]);
        put(1024 + 0x28, &64u32.to_le_bytes());
        put(1024 + 0x38, &[0x53, 0xef]);
        put(1024 + 0x4c, &[1]);
        put(1024 + 0x58, &[128]);
        let maps = kind & 2 != 0;
        put(1024 + 0x60, &[if maps { 2 } else { 0x42 }]);
        put(2048 + 8, &[4]);
        for inode in 1..8 {
            let at = 4096 + inode * 128;
            put(at, &if inode & 1 != 0 { 0x4000u16 } else { 0x8000 }.to_le_bytes());
            put(at + 4, &1024u32.to_le_bytes());
            if maps {
                // ext2: two blocks, and trees that begin in the block of the folders' first.
                put(at + 4, &(1u32 << 20).to_le_bytes());
                for slot in [0, 1, 12, 13, 14] {
                    put(at + 0x28 + slot * 4, &[7 + inode as u8]);
                }
                continue;
            }
            put(at + 0x22, &[8]);
            put(at + 0x28, &[0x0a, 0xf3, 1, 0, 4, 0]);
            put(at + 0x28 + 16, &[1, 0, 0, 0, 7 + inode as u8]);
        }
    }
    disk
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, mut rest)) = data.split_first() else { return };
    let mut disk = start(*kind);
    while let Some((&[a, b, c, length], tail)) = rest.split_first_chunk() {
        let at = u32::from_le_bytes([a, b, c, 0]) as usize % disk.len();
        let length = usize::from(length).min(tail.len()).min(disk.len() - at);
        disk[at..at + length].copy_from_slice(&tail[..length]);
        rest = &tail[length..];
    }
    let disk = disk.as_slice();
    let partitions = partition::find(&disk).unwrap();
    let volumes: Vec<_> = partitions.all().iter().map(|part| Volume::open(&disk, *part).ok()).collect();
    for partition in partitions.all() {
        let _ = Inhabitant::of(&disk, *partition).to_string();
    }
    let mut bytes = vec![0; 16 << 10];
    for volume in volumes.iter().flatten() {
        for path in ["/a", "/a/b", "/boot", "/vmlinuz"] {
            let _ = volume.link(path.as_bytes());
            if let Ok(node) = volume.find(path.as_bytes()) {
                let _ = volume.read(&node, node.size / 2, &mut bytes);
                let mut names = 0;
                let _ = volume.list(&node, &mut |_, handle| {
                    let _ = volume.node(handle);
                    names += 1;
                    names > 64
                });
            }
        }
    }
    entries::find(&volumes, &mut bytes, &mut Entries::new(), &mut |note| drop(note.to_string()));
});

//! A snapshot's folder whose files are anything, but for the checksums, which are right: it is opened and read in every way, or refused,
//! and whatever way its memory comes by, that is the same.
#![no_main]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_monitor::config::VmConfig;
use vmm_monitor::memory::packed::{Packed, Packer};
use vmm_monitor::memory::working_set::{Run, WorkingSet};
use vmm_monitor::memory::{Layer, Memory, RamFile, SavedRam, Way};
use vmm_monitor::snapshot::Snapshot;

const SIZE: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// Of a packed file: what precedes the checksums in its head, and its head.
const HEAD: (usize, usize) = (24, 32);
const STATE: [u8; 12] = *b"VMMSTATE\x03\0\0\0";
const WORKING_SET: [u8; 8] = *b"VMMPAGE\x01";

/// What a header has: checksums of configuration, state and memory, bytes of memory, whether it is packed; of its base the folder,
/// the checksums, and the runs of pages that are not as there.
type Header<'a> = (u32, u32, u32, u64, bool, Option<(&'a [u8], (u32, u32), Vec<(u64, u64)>)>);

struct Place {
    folder: PathBuf,
    base: PathBuf,
    config: VmConfig,
    text: Vec<u8>,
}

static PLACE: LazyLock<Place> = LazyLock::new(|| {
    let root = PathBuf::from(format!("/dev/shm/vmm-fuzz-snapshot-{}", std::process::id()));
    let mut config = VmConfig::default();
    config.mem = "1M".parse().unwrap();
    let text = serde_json::to_vec(&config).unwrap();
    let (folder, base) = (root.join("snapshot"), root.join("base"));
    for folder in [&folder, &base] {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("config.json"), &text).unwrap();
    }
    let header: Header<'_> = (crc32fast::hash(&text), crc32fast::hash(&[]), 0, SIZE, false, None);
    fs::write(base.join("state"), state(&header, &[])).unwrap();
    let memory = File::create(base.join("memory")).unwrap();
    memory.set_len(SIZE).unwrap();
    (0..SIZE / PAGE).step_by(3).for_each(|page| memory.write_all_at(&[page as u8; 99], page * PAGE).unwrap());
    Place { folder, base, config, text }
});

fn with_sum(magic: &[u8], bytes: &[u8]) -> Vec<u8> {
    [magic, &crc32fast::hash(bytes).to_le_bytes(), bytes].concat()
}

fn state(header: &Header<'_>, state: &[u8]) -> Vec<u8> {
    [with_sum(&STATE, &postcard::to_stdvec(header).unwrap()), state.to_vec()].concat()
}

/// `changes` of four bytes each: how, where, and by what.
fn change(bytes: &mut Vec<u8>, changes: &[u8]) {
    for change in changes.chunks_exact(4) {
        let at = usize::from(u16::from_le_bytes([change[1], change[2]])) % (bytes.len() + 1);
        // From its end: what is interesting is there.
        let at = bytes.len() - at;
        match change[0] % 4 {
            0 if at < bytes.len() => bytes[at] = change[3],
            1 if at < bytes.len() => bytes[at] ^= 1 << (change[3] % 8),
            2 => bytes.insert(at, change[3]),
            _ => bytes.truncate(at),
        }
    }
}

/// Memory that has `ram` in its first pieces, packed, with `changes`; then the checksums are made right again.
fn packed(ram: &[u8], changes: &[u8]) -> Vec<u8> {
    let file = rustix::fs::memfd_create("packed", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(file);
    let mut packer = Packer::new(&file, SIZE).unwrap();
    for (part, at) in ram.chunks(64).zip((0..SIZE).step_by(0x8000)) {
        packer.put(at, part).unwrap();
    }
    packer.finish().unwrap();
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    change(&mut bytes, changes);
    let index = bytes.get(16..24).map_or(0, |at| u64::from_le_bytes(at.try_into().unwrap()) as usize);
    let sum = bytes.get(index..).map(crc32fast::hash);
    if let (Some(sum), Some(place)) = (sum, bytes.get_mut(HEAD.0..HEAD.0 + 4)) {
        place.copy_from_slice(&sum.to_le_bytes());
    }
    if bytes.len() >= HEAD.1 {
        let sum = crc32fast::hash(&bytes[..HEAD.1 - 4]);
        bytes[HEAD.1 - 4..HEAD.1].copy_from_slice(&sum.to_le_bytes());
    }
    bytes
}

/// What `saved` has, by `way`; none if it does not come by that.
fn contents(saved: &SavedRam, way: Way, working_set: &[u8]) -> Option<Vec<u8>> {
    let memory = Memory::restored(&PLACE.config.mem, saved.clone(), way).ok()?;
    let mut end = 0;
    let runs = working_set.chunks_exact(2).map(|run| {
        let start = end + u64::from(run[0]);
        end = start + u64::from(run[1] >> 1);
        Run { pages: start..end, written: run[1] & 1 == 1 }
    });
    if let Some(set) = WorkingSet::of(runs.collect()).filter(|_| matches!(way, Way::Map)) {
        let _ = memory.lacks(&set);
        let _ = memory.fetch(&set);
    }
    let mut bytes = vec![0; SIZE as usize];
    memory.ram().read_slice(&mut bytes, GuestAddress(0)).ok()?;
    Some(bytes)
}

fuzz_target!(|data: &[u8]| {
    let Some(([flags, runs, changes, set, ram], rest)) = data.split_first_chunk() else { return };
    let (folder, config) = (&PLACE.folder, &PLACE.config);
    let mut rest = rest;
    let mut take = |count: usize| {
        let (taken, left) = rest.split_at(count.min(rest.len()));
        rest = left;
        taken
    };
    let (runs, changes, pages) =
        (take(4 * usize::from(*runs)), take(4 * usize::from(*changes)), take(usize::from(*set)));
    let ram = take(64 * usize::from(*ram % 33));
    let (is_packed, is_above) = (flags & 1 != 0, flags & 2 != 0);
    let number = |bytes: &[u8]| u64::from(u16::from_le_bytes([bytes[0], bytes[1]]));
    let runs = runs.chunks_exact(4).map(|run| {
        let (start, end) = (number(run), number(&run[2..]));
        // Whole pages in order, unless it says otherwise.
        if flags & 4 != 0 { (start * 512, end * 512) } else { (start % 256 * PAGE, (end % 256 + 1) * PAGE) }
    });
    let base = is_above.then(|| (&b"base"[..], (crc32fast::hash(&[]), 0), runs.collect()));
    let size = if flags & 8 != 0 { SIZE + u64::from(flags >> 4) } else { SIZE };
    let header: Header<'_> = (crc32fast::hash(&PLACE.text), crc32fast::hash(rest), 7, size, is_packed, base);
    fs::write(folder.join("state"), state(&header, rest)).unwrap();
    let memory = if is_packed {
        packed(ram, changes)
    } else {
        let mut bytes = ram.to_vec();
        bytes.resize(SIZE as usize, 0);
        bytes
    };
    fs::write(folder.join("memory"), memory).unwrap();
    let of = (header.0, header.1, header.2, header.3);
    let set = with_sum(&WORKING_SET, &[&postcard::to_stdvec(&of).unwrap(), pages].concat());
    fs::write(folder.join("working-set"), set).unwrap();

    let Ok(snapshot) = Snapshot::open(folder) else { return };
    let _ = snapshot.verify();
    // It is no machine's state, but for one by chance; all that it says of memory has been taken.
    let _ = snapshot.into_origin(config);
    let file = File::open(folder.join("memory")).unwrap();
    let path = Path::new("memory");
    let file = match is_packed {
        true => RamFile::packed(Packed::open(file, size).unwrap(), path),
        false => RamFile::plain(file, path),
    };
    let base = RamFile::plain(File::open(PLACE.base.join("memory")).unwrap(), path);
    let saved = match header.5 {
        Some((_, _, runs)) => {
            let runs = runs.into_iter().map(|(start, end)| start..end).collect();
            SavedRam { bottom: base, layers: vec![Layer { file, runs }] }
        }
        None => SavedRam { bottom: file, layers: Vec::new() },
    };
    let copied = contents(&saved, Way::Copy, &[]);
    if !is_packed {
        assert!(
            copied.is_some() == (size == SIZE) && contents(&saved, Way::Map, pages) == copied,
            "as copied"
        );
    }
    // What is lost while it is used is another's to tell of: it ends the process.
    if copied.is_some() && flags & 16 != 0 {
        assert!(contents(&saved, Way::Lazy, &[]).is_none_or(|lazy| Some(lazy) == copied), "as copied");
    }
    let parts = Snapshot::open_for_copies(folder).and_then(Snapshot::into_parts);
    assert!(size != SIZE || parts.is_ok() == copied.is_some());
    if let (Ok(parts), Some(copied)) = (parts, copied) {
        let memory = File::from(parts.into_descriptors().swap_remove(2));
        let mut bytes = vec![0; SIZE as usize];
        memory.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == copied, "the same without the files");
    }
});

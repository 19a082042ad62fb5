//! A guest that asks the server of a shared folder for anything: each request has a reply that is one, what is beside the folder stays as it
//! is, and another server takes over what it knew.
#![no_main]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use vm_memory::GuestAddress;
use vmm_monitor::config::{Share, ShareFrom};
use vmm_monitor::memory::{Buffers, GuestRam};
use vmm_monitor::share::{Folders, Outcome, Server};

const HALF: usize = 64 << 10;
/// Opcodes: all that are known, and some that are not.
const OPCODES: [u32; 47] = [
    1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30,
    31, 32, 33, 34, 35, 36, 37, 38, 39, 42, 43, 44, 45, 46, 47, 50, 51, 52, 4096,
];
/// Names that a request may begin, go on, or end with.
const NAMES: [&[u8]; 12] = [
    b"a\0",
    b"d\0",
    b"out\0",
    b"..\0",
    b".\0",
    b"../beside\0",
    b"d/a\0",
    b"/\0",
    b"\0",
    b"secret\0",
    b"user.x\0",
    b"user.containers.override_stat\0",
];

struct Place {
    root: PathBuf,
    ram: Arc<GuestRam>,
}

static PLACE: LazyLock<Place> = LazyLock::new(|| {
    let root = PathBuf::from(format!("/dev/shm/vmm-fuzz-share-{}", std::process::id()));
    fs::create_dir_all(root.join("beside")).unwrap();
    fs::write(root.join("beside/secret"), "secret").unwrap();
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 2 * HALF)]).unwrap();
    Place { root, ram: Arc::new(ram) }
});

/// A folder as it is at first, whatever was made of it.
fn anew(share: &Path) {
    fn open(folder: &Path) {
        let _ = fs::set_permissions(folder, fs::Permissions::from_mode(0o700));
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                open(&entry.path());
            }
        }
    }
    open(share);
    let _ = fs::remove_dir_all(share);
    fs::create_dir_all(share.join("d")).unwrap();
    fs::write(share.join("a"), "what is in it").unwrap();
    symlink("../beside", share.join("out")).unwrap();
}

fn buffers(at: usize, len: usize) -> Buffers {
    let mut buffers = Buffers::empty(PLACE.ram.clone());
    buffers.push(at as u64, len).unwrap();
    buffers
}

fn ask(server: &mut Server, opcode: u32, node: u64, body: &[u8], room: usize) {
    let mut request = Vec::with_capacity(40 + body.len());
    request.extend(((40 + body.len()) as u32).to_le_bytes());
    request.extend(opcode.to_le_bytes());
    request.extend(7u64.to_le_bytes());
    request.extend(node.to_le_bytes());
    request.resize(40, 0);
    request.extend(body);
    buffers(0, request.len()).write_all(&request).unwrap();
    let len = match server.serve(&mut buffers(0, request.len()), &mut buffers(HALF, room)) {
        Outcome::Replied(len) => len,
        Outcome::Waits(mut waiting) => server.again(&mut waiting).unwrap_or_else(|| server.refuse(waiting)),
    };
    assert!(len == 0 || (16..=room).contains(&len), "{len} of {room}");
    if len > 0 {
        let mut head = [0; 16];
        buffers(HALF, 16).read_exact(&mut head).unwrap();
        assert_eq!(
            (head[..4].to_vec(), head[8..].to_vec()),
            ((len as u32).to_le_bytes().to_vec(), 7u64.to_le_bytes().to_vec())
        );
        let error = i32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        assert!((-4095..=0).contains(&error) && (error == 0 || len == 16), "{error}, {len}");
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((how, mut rest)) = data.split_first() else { return };
    let path = PLACE.root.join("share");
    anew(&path);
    // A file alone, or the folder.
    let path = if how & 8 != 0 { path.join("a") } else { path };
    let text = format!(
        "{},owners={},locks={}",
        if how & 1 != 0 { ".:ro" } else { "." },
        if how & 2 != 0 { "xattr" } else { "map" },
        if how & 4 != 0 { "shared" } else { "local" }
    );
    let share = Share { from: ShareFrom::Path(path), ..text.parse().unwrap() };
    let serve = || Folders::default().server(0, 1, &share);
    // Where the file system keeps nothing beside its files.
    let Ok(mut server) = serve() else { return };
    let init: Vec<u8> =
        [7u32, 38, 0, u32::MAX].into_iter().flat_map(u32::to_le_bytes).chain([0xff; 48]).collect();
    ask(&mut server, 26, 0, &init, 80);
    for name in ["a", "d", "out"] {
        ask(&mut server, 1, 1, format!("{name}\0").as_bytes(), 144);
    }
    for _ in 0..64 {
        let Some(([opcode, node, len, name, room], left)) = rest.split_first_chunk() else { break };
        let (body, left) = left.split_at(usize::from(len % 128).min(left.len()));
        rest = left;
        let mut body = body.to_vec();
        for name in [name & 15, name >> 4] {
            body.extend(NAMES.get(usize::from(name)).copied().unwrap_or_default());
        }
        let opcode = OPCODES[usize::from(*opcode) % OPCODES.len()];
        let node = if *node < 240 { u64::from(node % 16) } else { u64::MAX - u64::from(*node) };
        ask(&mut server, opcode, node, &body, usize::from(*room) * 128);
    }
    let (state, locks) = (server.save(), server.save_locks());
    // Whose locks go.
    drop(server);
    let mut again = serve().unwrap();
    again.restore(state.clone()).unwrap();
    again.restore_locks(locks);
    assert_eq!(again.save(), state);
    ask(&mut again, 3, 1, &[0; 16], 200);
    let beside = fs::read_dir(PLACE.root.join("beside")).unwrap().count();
    assert_eq!((beside, fs::read(PLACE.root.join("beside/secret")).unwrap()), (1, b"secret".to_vec()));
    assert_eq!(fs::read_dir(&PLACE.root).unwrap().count(), 2);
});

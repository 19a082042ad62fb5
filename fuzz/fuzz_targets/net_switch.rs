//! A port of a segment: messages of any content from another machine's monitor, and frames of the guest's to whom it has learned of.
#![no_main]

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex};

use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_monitor::memory::{Buffers, GuestRam, Slices};
use vmm_monitor::net::switch::Switch;
use vmm_monitor::net::{HEADER, Head, Offloads, START, Wire};
use vmm_monitor::virtio::testing::ram;

/// The number of the other machine, which sends the messages.
const OTHER: u64 = 0xcc;
static RAM: LazyLock<Arc<GuestRam>> = LazyLock::new(|| ram(0x2000));

struct Segment {
    switch: Switch,
    /// The switch's own number, and where it is reached.
    id: u64,
    path: PathBuf,
    other: UnixDatagram,
    _dir: tempfile::TempDir,
}

/// One for all runs: what a message has taught is as good as forgotten by the next.
static SEGMENT: LazyLock<Mutex<Segment>> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let runtime = dir.path().join("vmm");
    let switch = Switch::join(&runtime, "lab").unwrap();
    let folder = runtime.join("switch-lab");
    let path = fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    let id = u64::from_str_radix(path.file_name().unwrap().to_str().unwrap(), 16).unwrap();
    let other = UnixDatagram::bind(folder.join(format!("{OTHER:016x}"))).unwrap();
    other.set_nonblocking(true).unwrap();
    Mutex::new(Segment { switch, id, path, other, _dir: dir })
});

fuzz_target!(|data: &[u8]| {
    let Segment { switch, id, path, other, .. } = &mut *SEGMENT.lock().unwrap();
    let mut rest = data;
    while let Some(([kind, len, room], more)) = rest.split_first_chunk() {
        let (bytes, more) = more.split_at((usize::from(*len) * 4).min(more.len()));
        rest = more;
        let takes_sums = kind & 1 != 0;
        switch.accept(if takes_sums { Offloads::CSUM } else { Offloads::empty() });
        let number = match kind >> 1 & 3 {
            0 => id.to_ne_bytes().to_vec(),
            1 => Vec::new(),
            _ => OTHER.to_ne_bytes().to_vec(),
        };
        // Headers that are right reach further.
        let header = if kind & 8 != 0 { &[0; HEADER][..] } else { &[] };
        let _ = other.send_to(&[&number, header, bytes].concat(), &path);

        let room = usize::from(*room) * 8;
        let mut buffers = Buffers::empty(RAM.clone());
        for at in 0..2 {
            buffers.push(at * 0x1000, room / 2).unwrap();
        }
        // The guest's memory behind the buffers is not ours.
        let guard = 0x5a_u8;
        for at in [room / 2, 0x1000 + room / 2] {
            RAM.write_obj(guard, GuestAddress(at as u64)).unwrap();
        }
        let mut head = Head::default();
        while let Some(len) = switch.receive(&mut head, &Slices::of([&buffers], 0)) {
            let word = |at: usize| usize::from(u16::from_le_bytes([head.header[at], head.header[at + 1]]));
            assert!(len >= 12 && head.header[0] <= 1 && head.header[1..6] == [0; 5]);
            let fits = len <= START + room / 2 * 2;
            assert!(takes_sums || !fits || head.header == [0; HEADER], "the guest takes no sums");
            assert!(head.header[0] == 0 || word(6) + word(8) + 2 <= len);
        }
        for at in [room / 2, 0x1000 + room / 2] {
            assert_eq!(RAM.read_obj::<u8>(GuestAddress(at as u64)).unwrap(), guard);
        }

        if kind & 16 != 0 {
            let mut frame = Buffers::empty(RAM.clone());
            RAM.write_slice(bytes, GuestAddress(0)).unwrap();
            frame.push(0, bytes.len()).unwrap();
            switch.send(&[0; HEADER], &frame);
            switch.take_refused();
            while other.recv(&mut [0; 4096]).is_ok() {}
        }
    }
});

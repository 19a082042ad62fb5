//! A PCI bus with two entropy devices: accesses of any kind to configuration space, by ports and by
//! memory, and to the functions' memory, wherever it is moved.
#![no_main]

use std::sync::{Arc, LazyLock, Mutex, Weak};

use libfuzzer_sys::fuzz_target;
use vmm_monitor::bus::{Device, Effect};
use vmm_monitor::legacy::reset_control::ResetControl;
use vmm_monitor::memory::GuestRam;
use vmm_monitor::pci::{ConfigPorts, Ecam, HostBridge, Line, Memory, Segment};
use vmm_monitor::state::Saved;
use vmm_monitor::virtio::pci::{Pci, Place, SIZE};
use vmm_monitor::virtio::rng::Rng;
use vmm_monitor::virtio::testing::ram;
use vmm_monitor::vm::fake::FakeVm;

/// Room for four functions' memory.
const WINDOW: std::ops::Range<u64> = 0xe000_0000..0xe000_0000 + 4 * SIZE;
static RAM: LazyLock<Arc<GuestRam>> = LazyLock::new(|| ram(0x1_0000));

fuzz_target!(|data: &[u8]| {
    let vm = Arc::new(FakeVm::default());
    let weak: Weak<FakeVm> = Arc::downgrade(&vm);
    let segment = Arc::new(Segment::new([WINDOW]));
    segment.insert(0, Arc::new(Mutex::new(HostBridge::default())), 0..0).unwrap();
    let line = Arc::new(Line::new(weak.clone(), 17));
    let functions = [1, 2].map(|number| {
        let base = WINDOW.start + u64::from(number - 1) * SIZE;
        let place = Place { number, base, line: line.clone() };
        let function = Pci::new(weak.clone(), &RAM, place, "fuzz", Box::new(Rng), &Arc::default()).unwrap();
        let function = Arc::new(Mutex::new(function));
        segment.insert(number, function.clone(), base..base + SIZE).unwrap();
        function
    });
    let mut windows: [Box<dyn Device>; 3] = [
        Box::new(Ecam(segment.clone())),
        Box::new(Memory { segment: segment.clone(), base: WINDOW.start }),
        Box::new(ConfigPorts::new(segment, Box::new(ResetControl::default()))),
    ];
    let sizes = [3 << 15, 4 * SIZE, 8];
    for step in data.chunks_exact(12) {
        let window = usize::from(step[0] & 3).min(2);
        let (len, writes) = (1 << (step[0] >> 2 & 3), step[0] & 0x10 != 0);
        let offset = u64::from(u32::from_le_bytes([step[1], step[2], step[3], 0])) % sizes[window];
        if offset + len as u64 > sizes[window] {
            continue;
        }
        let mut value = [0; 8];
        value.copy_from_slice(&step[4..]);
        if !writes {
            windows[window].read(offset, &mut value[..len]);
        } else if windows[window].write(offset, &value[..len]) == Effect::Serve {
            // No thread: what a run finds is the same each time.
            functions.iter().for_each(|function| drop(function.lock().unwrap().save_bytes()));
        }
        vm.take_messages();
    }
    // What was reached can be saved, and taken back by a device as built.
    for function in functions {
        let saved = function.lock().unwrap().save_bytes();
        let place = Place { number: 3, base: WINDOW.start, line: line.clone() };
        let mut other = Pci::new(weak.clone(), &RAM, place, "fuzz", Box::new(Rng), &Arc::default()).unwrap();
        let _ = other.restore_bytes(&saved);
    }
});

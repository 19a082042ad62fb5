//! A PCI bus with entropy devices that come and go: accesses of any kind to configuration space, by ports and by memory, to the functions'
//! memory, wherever it is moved, and to the registers of hot plug.
#![no_main]

use std::sync::{Arc, LazyLock, Mutex, Weak};

use libfuzzer_sys::fuzz_target;
use vmm_monitor::bus::{Device, Effect};
use vmm_monitor::legacy::reset_control::ResetControl;
use vmm_monitor::memory::GuestRam;
use vmm_monitor::pci::{ConfigPorts, Ecam, HostBridge, HotPlug, Line, Memory, Segment, hot_plug};
use vmm_monitor::state::Saved;
use vmm_monitor::virtio::pci::{Pci, Place, SIZE};
use vmm_monitor::virtio::rng::Rng;
use vmm_monitor::virtio::testing::ram;
use vmm_monitor::vm::fake::FakeVm;

/// Room for four functions' memory, below and above 4 GiB.
const ROOM: u64 = 4 * SIZE;
const WINDOW: u64 = 0xe000_0000;
const HIGH: u64 = 0x1_4000_0000;
/// Numbers that functions have: two are there at the start.
const NUMBERS: u8 = 4;
static RAM: LazyLock<Arc<GuestRam>> = LazyLock::new(|| ram(0x1_0000));

fn function(vm: &Weak<FakeVm>, line: &Arc<Line>, number: u8) -> Pci {
    let base = WINDOW + u64::from(number - 1) * SIZE;
    let place = Place { number, base, line: line.clone() };
    Pci::new(vm.clone(), &RAM, place, "fuzz", Box::new(Rng), &Arc::default()).unwrap()
}

fuzz_target!(|data: &[u8]| {
    let vm = Arc::new(FakeVm::default());
    let weak: Weak<FakeVm> = Arc::downgrade(&vm);
    let segment = Arc::new(Segment::new([WINDOW, HIGH].map(|base| base..base + ROOM)));
    segment.insert(0, Arc::new(Mutex::new(HostBridge::default())), 0..0).unwrap();
    let line = Arc::new(Line::new(weak.clone(), 17));
    let mut functions: [Option<Arc<Mutex<Pci>>>; NUMBERS as usize] = Default::default();
    for number in 1..=2 {
        let base = WINDOW + u64::from(number - 1) * SIZE;
        let new = Arc::new(Mutex::new(function(&weak, &line, number)));
        segment.insert(number, new.clone(), base..base + SIZE).unwrap();
        functions[usize::from(number - 1)] = Some(new);
    }
    let memory = |base| Box::new(Memory { segment: segment.clone(), base });
    let mut windows: [(u64, Box<dyn Device>); 4] = [
        (u64::from(NUMBERS + 1) << 15, Box::new(Ecam(segment.clone()))),
        (8, Box::new(ConfigPorts::new(segment.clone(), Box::new(ResetControl::default())))),
        (ROOM, memory(WINDOW)),
        (ROOM, memory(HIGH)),
    ];
    let mut hot_plug = HotPlug::new(segment.clone());
    for step in data.chunks_exact(12) {
        let (len, writes) = (1 << (step[0] >> 3 & 3), step[0] & 0x20 != 0);
        let at = u64::from(u32::from_le_bytes([step[1], step[2], step[3], 0]));
        let mut value = [0; 8];
        value.copy_from_slice(&step[4..]);
        let number = step[1] % NUMBERS + 1;
        let place = usize::from(number - 1);
        let (size, device): (u64, &mut dyn Device) = match step[0] & 7 {
            window @ 0..=3 => {
                let (size, device) = &mut windows[usize::from(window)];
                (*size, &mut **device)
            }
            4 => (hot_plug::SIZE, &mut hot_plug),
            // The host: a device comes; one is asked for; one is taken away.
            5 if functions[place].is_none() => {
                let new = Arc::new(Mutex::new(function(&weak, &line, number)));
                segment.insert(number, new.clone(), 0..0).unwrap();
                hot_plug.announce(number);
                functions[place] = Some(new);
                continue;
            }
            6 if functions[place].is_some() => {
                hot_plug.ask_for(number);
                continue;
            }
            7 if functions[place].take().is_some() => {
                hot_plug.take_away(number);
                continue;
            }
            _ => continue,
        };
        let offset = at % size;
        if offset + len as u64 > size {
            continue;
        }
        if !writes {
            device.read(offset, &mut value[..len]);
        } else if device.write(offset, &value[..len]) == Effect::Serve {
            // No thread: what a run finds is the same each time.
            functions.iter().flatten().for_each(|function| drop(function.lock().unwrap().save_bytes()));
        }
        for number in hot_plug.take_ejected() {
            assert!(functions[usize::from(number - 1)].take().is_some(), "{number} went twice");
        }
        vm.take_messages();
    }
    // What was reached can be saved, and taken back by a device as built.
    for (number, there) in (1..).zip(functions) {
        if let Some(there) = &there {
            let saved = there.lock().unwrap().save_bytes();
            let _ = function(&weak, &line, number).restore_bytes(&saved);
        }
        assert_eq!(segment.remove(number), there.is_some());
    }
    assert_eq!(vm.doorbells(), 0, "of functions that are not there");
});

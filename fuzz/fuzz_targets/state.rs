//! What a snapshot holds of a device, changed in any way: every kind of device takes it or refuses it, and goes on with what it took.
#![no_main]

use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock, Weak};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_monitor::bus::Device;
use vmm_monitor::chardev::Endpoint;
use vmm_monitor::event_loop::EventLoop;
use vmm_monitor::legacy::acpi_pm::AcpiPm;
use vmm_monitor::legacy::crtc::Crtc;
use vmm_monitor::legacy::fw_cfg::{FwCfg, Items};
use vmm_monitor::legacy::io_apic::IoApic;
use vmm_monitor::legacy::rtc_cmos::RtcCmos;
use vmm_monitor::legacy::serial::SerialPort;
use vmm_monitor::memory::GuestRam;
use vmm_monitor::net::{Port, from_descriptor};
use vmm_monitor::pci::{HotPlug, Line, Segment};
use vmm_monitor::virtio::console::Console;
use vmm_monitor::virtio::device::VirtioDevice;
use vmm_monitor::virtio::mmio::Mmio;
use vmm_monitor::virtio::net::Net;
use vmm_monitor::virtio::pci::{Pci, Place, SIZE};
use vmm_monitor::virtio::rng::Rng;
use vmm_monitor::virtio::testing::ram;
use vmm_monitor::virtio::vsock::Vsock;
use vmm_monitor::vm::fake::FakeVm;
use vmm_monitor::vm::{Interrupt, Vm};
use vmm_monitor::vsock::Sockets;

static RAM: LazyLock<Arc<GuestRam>> = LazyLock::new(|| ram(0x8000));
static SOCKETS: LazyLock<Sockets> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("vmm-fuzz-state-{}", std::process::id()));
    Sockets::open(&path).unwrap()
});
/// Kinds of devices: those of a PC, then virtio's, by memory and on PCI.
const LEGACY: u8 = 7;
const VIRTIO: u8 = 4;
const KINDS: u8 = LEGACY + 2 * VIRTIO;
/// Registers of virtio over MMIO (virtio 1.3, 4.2.2).
const FEATURES_SELECT: u64 = 0x24;
const FEATURES: u64 = 0x20;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const STATUS: u64 = 0x70;
const QUEUE_AREAS: [u64; 3] = [0x80, 0x90, 0xa0];

fn stream() -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    // Nobody reads or writes: a device meets a peer that is gone.
    drop(ours);
    theirs
}

fn virtio(kind: u8) -> Box<dyn VirtioDevice> {
    match kind {
        0 => Box::new(Rng),
        1 => Box::new(Console::new(Endpoint::from_stream(stream()).unwrap(), Vec::new()).unwrap()),
        2 => {
            let link = from_descriptor(stream().into(), 0).unwrap();
            Box::new(Net::new(Port::new(vec![link], [2, 0, 0, 0, 0, 1]), None))
        }
        _ => Box::new(Vsock::new(SOCKETS.clone(), 3)),
    }
}

fn build(kind: u8, vm: &Arc<FakeVm>) -> Box<dyn Device> {
    let dynamic: Arc<dyn Vm> = vm.clone();
    let weak: Weak<FakeVm> = Arc::downgrade(vm);
    let line: Arc<dyn Interrupt> = vm.irq_line(4).unwrap();
    match kind {
        0 => Box::new(AcpiPm::new(line)),
        1 => {
            let end = Endpoint::from_stream(stream()).unwrap();
            Box::new(SerialPort::new(end, line, EventLoop::new().unwrap()))
        }
        2 => Box::new(RtcCmos::new(64 << 20, 1)),
        3 => Box::new(IoApic::new(weak, 24)),
        4 => Box::new(FwCfg::new(Items::default(), RAM.clone())),
        5 => Box::new(Crtc::default()),
        6 => Box::new(HotPlug::new(Arc::new(Segment::new([0xe000_0000..0xe000_0000 + SIZE])))),
        kind if kind < LEGACY + VIRTIO => {
            let device = virtio(kind - LEGACY);
            Box::new(Mmio::new(&dynamic, &RAM, 0xfe00_0000, 16, "fuzz", device, &Arc::default()).unwrap())
        }
        kind => {
            let place = Place { number: 1, base: 0xe000_0000, line: Arc::new(Line::new(weak.clone(), 16)) };
            let device = virtio(kind - LEGACY - VIRTIO);
            Box::new(Pci::new(weak, &RAM, place, "fuzz", device, &Arc::default()).unwrap())
        }
    }
}

/// Brings a device on MMIO as far as DRIVER_OK, with `queues` of its queues.
fn negotiate(device: &mut dyn Device, queues: u32) {
    let mut write = |at: u64, value: u32| _ = device.write(at, &value.to_le_bytes());
    write(STATUS, 1);
    write(STATUS, 3);
    write(FEATURES_SELECT, 1);
    write(FEATURES, 1);
    write(STATUS, 11);
    for queue in 0..queues {
        write(QUEUE_SELECT, queue);
        write(QUEUE_SIZE, 16);
        for (area, at) in QUEUE_AREAS.into_iter().zip(0..) {
            write(area, 0x1000 + 0x400 * queue + 0x100 * at);
        }
        write(QUEUE_READY, 1);
    }
    write(STATUS, 15);
}

/// Accesses of one byte or four, as `steps` say.
fn drive(device: &mut dyn Device, steps: &[u8]) {
    for step in steps.chunks_exact(4).take(16) {
        let (at, bytes) = (u64::from(step[1] & 0x7f), [step[2], step[3], 0, 0]);
        let len = if step[0] & 1 == 0 { 1 } else { 4 };
        match step[0] & 2 {
            0 => _ = device.write(at, &bytes[..len]),
            _ => device.read(at, &mut [0xff; 4][..len]),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some(([kind, queues, before, changes], rest)) = data.split_first_chunk() else { return };
    let vm = Arc::new(FakeVm::default());
    let kind = kind % KINDS;
    let (steps, rest) = rest.split_at(usize::from(*before).min(rest.len()));
    let (changes, rest) = rest.split_at((3 * usize::from(*changes)).min(rest.len()));
    let mut saved = {
        let mut device = build(kind, &vm);
        if (LEGACY..LEGACY + VIRTIO).contains(&kind) {
            negotiate(&mut *device, u32::from(queues % 4));
        }
        drive(&mut *device, steps);
        device.save_bytes()
    };
    for change in changes.chunks_exact(3) {
        let at = usize::from(change[1]) % (saved.len() + 1);
        match change[0] % 4 {
            0 if at < saved.len() => saved[at] = change[2],
            1 if at < saved.len() => saved[at] ^= 1 << (change[2] % 8),
            2 => saved.insert(at, change[2]),
            _ => saved.truncate(at.max(1)),
        }
    }
    RAM.write_slice(&rest[..rest.len().min(0x4000)], GuestAddress(0x1000)).unwrap();
    let mut device = build(kind, &vm);
    if device.restore_bytes(&saved).is_err() {
        return;
    }
    // What it took is a state that it can be in: another takes it back.
    let again = device.save_bytes();
    build(kind, &vm).restore_bytes(&again).expect("what was taken is taken back");
    device.resume();
    drive(&mut *device, rest);
    device.pause(Instant::now() + Duration::from_secs(10)).expect("it comes to rest");
    let at_rest = device.save_bytes();
    build(kind, &vm).restore_bytes(&at_rest).expect("what was saved is taken back");
});

//! Pauses and ends of a machine whose device does not come to rest, without KVM.

use std::sync::mpsc::channel;
use std::thread;

use vm_memory::GuestAddress;

use super::*;
use crate::backends::Changes;
use crate::bus::{Bus, Device, Effect};
use crate::config::VmConfig;
use crate::legacy::fw_cfg::Items;
use crate::memory::GuestRam;
use crate::state::Stateless;
use crate::vcpu::dispatch::Buses;
use crate::vcpu::gate::Gate;
use crate::vm::Vm;
use crate::vm::fake::FakeVm;

/// A device that comes to rest only when it is let go.
#[derive(Default)]
struct Hanging {
    pauses: usize,
    resumes: usize,
    free: bool,
}

impl Stateless for Hanging {}

impl Device for Hanging {
    fn read(&mut self, _: u64, _: &mut [u8]) {}
    fn write(&mut self, _: u64, _: &[u8]) -> Effect {
        Effect::None
    }
    fn pause(&mut self, _: Instant) -> Result<(), Busy> {
        self.pauses += 1;
        if self.free { Ok(()) } else { Err(Busy("1 request is unfinished".to_owned())) }
    }
    fn resume(&mut self) {
        self.resumes += 1;
    }
}

/// A machine of one such device and no vCPU.
fn machine() -> (Handle, Arc<Mutex<Hanging>>, Receiver<Event>) {
    let (events, ended) = channel();
    let device = Arc::new(Mutex::new(Hanging::default()));
    let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap());
    let interrupt = FakeVm::default().irq_line(9).unwrap();
    let shared = Shared {
        vcpus: Arc::new(vcpu::Shared {
            buses: Buses::new(Bus::default(), Bus::default()),
            gate: Gate::new(0),
            ram: ram.clone(),
            recorder: Arc::default(),
            observed: vcpu::Observed::default(),
            reset_flag: true,
            holds_on_panic: false,
            debugger: std::sync::OnceLock::new(),
        }),
        memory: Memory::new(&"2M".parse().unwrap()).unwrap(),
        threads: Mutex::default(),
        inventory: Mutex::default(),
        devices: Mutex::new(vec![("disk".to_owned(), device.clone())]),
        networks: Mutex::default(),
        pci: None,
        plugboard: Plugboard::new(&VmConfig::default(), &Arc::default(), &Changes::default()),
        power: Arc::new(Mutex::new(AcpiPm::new(interrupt))),
        fw_cfg: Arc::new(Mutex::new(FwCfg::new(Items::default(), ram.clone()))),
        ready: Arc::default(),
        phase: Mutex::new(Phase::Running),
        events,
        killed: AtomicBool::new(false),
        vm: Weak::new(),
    };
    (Handle(Arc::new(shared)), device, ended)
}

/// Waits until the device was asked to pause.
fn await_pause(device: &Mutex<Hanging>) {
    let end = Instant::now() + Duration::from_secs(10);
    while lock(device).pauses == 0 {
        assert!(Instant::now() < end, "nobody pauses the device");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_kill_ends_a_pause_that_waits_for_a_device_and_the_machine_is_as_it_was() {
    let (handle, device, ended) = machine();
    thread::scope(|scope| {
        let pause = scope.spawn(|| handle.pause().map(drop));
        await_pause(&device);
        assert!(!handle.0.start_devices(), "who serves devices does not wait for the pause");
        handle.kill();
        let error = pause.join().unwrap().unwrap_err();
        assert_eq!(error.to_string(), "disk does not come to rest: 1 request is unfinished");
    });
    assert_eq!((handle.phase(), lock(&device).resumes), (Phase::Running, 1));
    assert!(matches!(ended.try_recv(), Ok(Event::Kill)));
    // What is left of the run's end does not wait, either.
    assert!(handle.0.pause_devices(Duration::from_secs(600)).is_err());
}

#[test]
fn a_pause_waits_for_a_device_that_is_only_slow() {
    let (handle, device, _ended) = machine();
    thread::scope(|scope| {
        let pause = scope.spawn(|| handle.pause().map(drop));
        await_pause(&device);
        lock(&device).free = true;
        pause.join().unwrap().unwrap();
    });
    assert_eq!(handle.phase(), Phase::Paused);
    assert!(handle.0.start_devices(), "which does nothing now");
    assert_eq!(lock(&device).resumes, 0);
    handle.resume().unwrap();
    assert_eq!((handle.phase(), lock(&device).resumes), (Phase::Running, 1));
}

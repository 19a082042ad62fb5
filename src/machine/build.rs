//! The assembly: from a configuration to a machine, read top to bottom.
//!
//! The order is that of the ioctls' cost: memory slots, then interrupt controllers, then interrupts and doorbells, then
//! vCPUs. A kernel of some size is loaded by a thread of its own while KVM sets up, because it needs only the memory and the
//! plan.

use std::fs;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread;
use std::time::Instant;

use super::{Error, Handle, Machine, Phase, Shared, kvm_path};
use crate::boot::tables::{Platform, VirtioMmio};
use crate::boot::{self, Payload, firmware};
use crate::bus::{Bus, Device, Hypercalls, SharedDevice};
use crate::chardev::{Ends, Escape};
use crate::config::{Kernel, VmConfig, Where};
use crate::kvm::regs::Entry;
use crate::kvm::{self, Kvm};
use crate::legacy::acpi_pm::AcpiPm;
use crate::legacy::boot_marks::BootMarks;
use crate::legacy::crtc::{self, Crtc};
use crate::legacy::debug_exit::{self, DebugExit};
use crate::legacy::debug_port::DebugPort;
use crate::legacy::fw_cfg::{self, FwCfg};
use crate::legacy::hyperv_testdev::{self, HypervTestDevice};
use crate::legacy::i8042::I8042;
use crate::legacy::rom::Rom;
use crate::legacy::rtc_cmos::{self, RtcCmos};
use crate::legacy::serial::SerialPort;
use crate::legacy::testdev;
use crate::memory::{Memory, layout};
use crate::recorder::{Recorder, Step, Steps};
use crate::vcpu;
use crate::vcpu::dispatch::Buses;
use crate::vcpu::gate::Gate;
use crate::virtio;
use crate::virtio::mmio::Mmio;
use crate::vm::{Interrupt, Vm};

/// Builds the machine that `config` describes. `ends` keeps the host ends of its consoles over resets of the guest: those
/// that are not open yet are opened here, last of all that can fail for want of something that the user named. `recorder` is
/// told of what the machine does.
///
/// # Errors
/// [`Error`]. Nothing on the host was created or changed, unless it was opening a later one of several `ends` that failed.
pub fn build(config: &VmConfig, ends: &mut Ends, recorder: &Arc<Recorder>) -> Result<Machine, Error> {
    let start = Instant::now();
    let mut steps = Steps::begin(recorder, "monitor");
    config.validate()?;
    let payload = payload(config)?;
    let platform = platform(config)?;

    let kvm = Kvm::open(&kvm_path())?;
    let cpus = config.cpus.0;
    if cpus as usize > kvm.max_vcpus() {
        return Err(Error::TooManyCpus { wanted: cpus, possible: kvm.max_vcpus() });
    }
    steps.done(Step::Open);
    let mut memory = Memory::new(&config.mem)?;
    steps.done(Step::Memory);
    // A ROM is a memory slot, too, so it is there before the VM. What it boots it reads itself.
    let fw_cfg = config.firmware.as_ref().map(|firmware| {
        let (payload, option_roms) = (payload.as_ref(), &config.option_rom);
        firmware::load(&mut memory, &firmware::Start { firmware, option_roms, payload }, &platform)
    });
    let fw_cfg = fw_cfg.transpose()?;
    let mut create_vm = || kvm.create_vm(&memory).inspect(|_| steps.done(Step::Vm));
    let (vm, entry) = match &payload {
        Some(payload) if fw_cfg.is_none() => {
            if loads_at_once(payload) {
                let vm = create_vm()?;
                (Arc::new(vm), load(&memory, payload, &platform, recorder)?)
            } else {
                load_meanwhile(&memory, payload, &platform, recorder, create_vm)?
            }
        }
        _ => (Arc::new(create_vm()?), Entry::Reset),
    };
    // Until the loader is done, which has told of that itself.
    steps.skip();

    let mut board = Board::new(vm.clone());
    let power = Arc::new(Mutex::new(AcpiPm::new(board.interrupt("power button", layout::ACPI_GSI)?)));
    board.port("acpi-pm", layout::ACPI_PM, layout::ACPI_PM_SIZE, power.clone())?;
    board.port("i8042", layout::I8042, layout::I8042_SIZE, shared(I8042))?;
    if let Some(port) = config.debug_exit {
        board.port("debug-exit", u64::from(port), debug_exit::SIZE, shared(DebugExit))?;
    }
    if config.pit {
        vm.create_pit()?;
    }
    if config.rtc || config.firmware.is_some() {
        let rtc = RtcCmos::new(memory.size(), cpus);
        board.port("rtc-cmos", layout::CMOS, rtc_cmos::SIZE, shared(rtc))?;
    }
    if config.text_screen {
        board.port("text-screen", layout::CRTC, crtc::SIZE, shared(Crtc::default()))?;
    }
    if config.test_device {
        board.test_device(config, &memory)?;
    }
    if config.boot_marks {
        board.port("boot-marks", layout::POST, 1, shared(BootMarks::new(start)))?;
    }
    if let Some(items) = fw_cfg {
        board.firmware_devices(items, &memory)?;
    }
    if let Some((base, _, size)) = memory.rom_slot() {
        board.memory("rom", base, size, shared(Rom))?;
    }
    for (device, at) in virtio::Device::list(config).iter().zip(&platform.virtio_mmio) {
        let (name, base) = (device.name(), u64::from(at.base));
        let mmio = Mmio::new(&*vm, memory.ram(), base, at.gsi, &name, device.build(ends)?, recorder)?;
        board.memory(&name, base, layout::VIRTIO_MMIO_SIZE, shared(mmio))?;
    }
    if config.serial != Where::Off {
        let interrupt = board.interrupt("serial port", layout::COM1_GSI)?;
        let serial = SerialPort::new(ends.get("serial", &config.serial)?, interrupt);
        board.port("serial", layout::COM1, 8, shared(serial))?;
    }
    steps.done(Step::Devices);

    vm.deny_msrs(&config.cpu.denied_msrs())?;
    let vcpus = (0..cpus).map(|id| vm.create_vcpu(id, cpus, &config.cpu)).collect::<Result<Vec<_>, _>>()?;
    if entry != Entry::Reset {
        vcpus.iter().try_for_each(|vcpu| vcpu.set_boot_msrs())?;
    }
    if let [_, .., last] = vcpus.as_slice() {
        last.join_apic_map()?;
    }
    vcpus[0].enter_at(entry)?;
    steps.done(Step::Vcpus);

    let mut buses = Buses::new(board.pio, board.mmio);
    buses.hypercalls = board.hypercalls;
    let (events, ended) = channel();
    let shared = Arc::new(Shared {
        vcpus: Arc::new(vcpu::Shared {
            buses,
            gate: Gate::new(vcpus.len()),
            ram: memory.all(),
            recorder: recorder.clone(),
            observed: vcpu::Observed::default(),
            debugger: OnceLock::new(),
        }),
        threads: Mutex::default(),
        devices: board.devices,
        power,
        phase: Mutex::new(Phase::Running),
        events,
        vm: Arc::downgrade(&vm),
    });
    // Weak, because the ends outlive the machine, and its devices hold locks on their images.
    let machine = Arc::downgrade(&shared);
    ends.on_escape(move |escape| {
        let Some(handle) = machine.upgrade().map(Handle) else { return };
        match escape {
            Escape::Quit => handle.kill(),
            Escape::PowerButton => handle.power_button(),
        }
    });
    Ok(Machine { shared, vcpus, events: ended, built: start, later: None, vm })
}

/// Whether the files are so small that reading them takes less than starting a thread for it: test guests, unikernels.
fn loads_at_once(payload: &Payload) -> bool {
    const SMALL: u64 = 256 << 10;
    // The built-in one is small, and no initrd belongs to it.
    let Kernel::File(kernel) = &payload.kernel else { return true };
    let files = [Some(kernel), payload.initrd.as_ref()];
    // What is wrong with a file is told by who loads it.
    let size = |path| fs::metadata(path).map_or(0, |metadata| metadata.len());
    files.into_iter().flatten().map(size).sum::<u64>() <= SMALL
}

fn load(
    memory: &Memory,
    payload: &Payload,
    platform: &Platform,
    recorder: &Recorder,
) -> Result<Entry, Error> {
    let mut steps = Steps::begin(recorder, "loader");
    let entry = boot::load(memory, payload, platform)?;
    steps.done(Step::Load);
    Ok(entry)
}

/// Loads the kernel in a thread of its own while this one sets KVM up.
fn load_meanwhile(
    memory: &Memory,
    payload: &Payload,
    platform: &Platform,
    recorder: &Recorder,
    create_vm: impl FnOnce() -> Result<kvm::Vm, kvm::Error>,
) -> Result<(Arc<kvm::Vm>, Entry), Error> {
    thread::scope(|scope| {
        let loader = thread::Builder::new().name("loader".to_owned());
        let loaded = loader.spawn_scoped(scope, || load(memory, payload, platform, recorder));
        let vm = create_vm()?;
        let loaded =
            loaded.map_err(|source| Error::Host { what: "the loader's thread".to_owned(), source })?;
        // A panic there is a defect of ours, and goes on as one.
        let entry = loaded.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok((Arc::new(vm), entry))
    })
}

/// None where there is firmware that can do without.
fn payload(config: &VmConfig) -> Result<Option<Payload>, Error> {
    let payload = |kernel| Payload {
        kernel,
        initrd: config.initrd.clone(),
        cmdline: config.cmdline.clone().unwrap_or_else(|| boot::cmdline::default_for(config)),
        protocol: config.boot,
    };
    Ok(config.to_boot()?.map(payload))
}

/// What the guest's tables say of the machine: where each device of `config` is, before any is built.
///
/// # Errors
/// [`Error::TooManyDevices`].
pub fn platform(config: &VmConfig) -> Result<Platform, Error> {
    let wanted = virtio::Device::list(config).len();
    let possible = layout::VIRTIO_GSIS.len();
    if wanted > possible {
        return Err(Error::TooManyDevices { wanted, possible });
    }
    let slot = |(index, gsi)| VirtioMmio {
        base: (layout::VIRTIO_MMIO + index as u64 * layout::VIRTIO_MMIO_SIZE) as u32,
        gsi,
    };
    let virtio_mmio = layout::VIRTIO_GSIS.into_iter().take(wanted).enumerate().map(slot).collect();
    Ok(Platform { cpus: config.cpus.0, virtio_mmio, com1: config.serial != Where::Off })
}

fn shared(device: impl Device + 'static) -> SharedDevice {
    Arc::new(Mutex::new(device))
}

/// What devices are put on.
struct Board {
    vm: Arc<kvm::Vm>,
    pio: Bus,
    mmio: Bus,
    hypercalls: Option<Arc<Mutex<dyn Hypercalls>>>,
    devices: Vec<(String, SharedDevice)>,
}

impl Board {
    fn new(vm: Arc<kvm::Vm>) -> Self {
        let (pio, mmio) = Default::default();
        Self { vm, pio, mmio, hypercalls: None, devices: Vec::new() }
    }

    fn interrupt(&self, what: &str, gsi: u32) -> Result<Arc<dyn Interrupt>, Error> {
        let failed = |source| Error::Host { what: format!("the interrupt of the {what}"), source };
        self.vm.irq_line(gsi).map_err(failed)
    }

    /// What kvm-unit-tests ask for.
    fn test_device(&mut self, config: &VmConfig, memory: &Memory) -> Result<(), Error> {
        // Real-mode tests wait for line 11 as a BIOS has left it.
        self.vm.set_up_pic(1 << 3)?;
        let ports = testdev::Ports::new(memory.ram().clone());
        self.port("test-device", layout::TEST_PORTS, testdev::PORTS, shared(ports))?;
        let vm: Weak<kvm::Vm> = Arc::downgrade(&self.vm);
        let lines = testdev::IrqLines::new(vm.clone());
        self.port("test-irqs", layout::TEST_IRQS, testdev::LINES, shared(lines))?;
        let ram = shared(testdev::IoRam::default());
        self.memory("test-memory", layout::TEST_MEMORY, testdev::MEMORY, ram)?;
        if config.cpu.hyperv {
            let device = HypervTestDevice::new(vm, memory.ram().clone(), config.cpus.0);
            let device =
                device.map_err(|source| Error::Host { what: "the test device".to_owned(), source })?;
            self.hypercalls = Some(device.clone());
            self.port("hyperv-test", layout::HYPERV_TEST, hyperv_testdev::SIZE, device)?;
        }
        Ok(())
    }

    /// What firmware asks for beside a clock: `items`, and a place for messages.
    fn firmware_devices(&mut self, items: fw_cfg::Items, memory: &Memory) -> Result<(), Error> {
        let fw_cfg = FwCfg::new(items, memory.ram().clone());
        self.port("fw-cfg", layout::FW_CFG, fw_cfg::SIZE, shared(fw_cfg))?;
        self.port("debug-port", layout::DEBUG_PORT, 1, shared(DebugPort::default()))
    }

    fn port(&mut self, name: &str, base: u64, size: u64, device: SharedDevice) -> Result<(), Error> {
        self.pio.insert(name, base, size, device.clone())?;
        self.devices.push((name.to_owned(), device));
        Ok(())
    }

    fn memory(&mut self, name: &str, base: u64, size: u64, device: SharedDevice) -> Result<(), Error> {
        self.mmio.insert(name, base, size, device.clone())?;
        self.devices.push((name.to_owned(), device));
        Ok(())
    }
}

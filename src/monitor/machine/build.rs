//! The assembly: from a configuration to a machine, read top to bottom.
//!
//! The order is that of the ioctls' cost: memory slots, then interrupt controllers, then interrupts and doorbells, then
//! vCPUs. The first two are the [`Shell`]'s.

use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Instant;

use super::inventory::{inventory, io_apic_pins, platform};
use super::origin::{Contents, Origin};
use super::plug::{self, PciBus, Plugboard};
use super::shell::{Made, Shell};
use super::{Error, Event, Handle, Machine, Phase, Shared};
use crate::backends::{Backends, Changes};
use crate::boot::{self, Payload};
use crate::bus::{Bus, Device, Kind, Place, SharedDevice, Slot, lock};
use crate::chardev::Escape;
use crate::config::{Firmware, OnPanic, Transport, VmConfig};
use crate::hyperv::Hypercalls;
use crate::kvm::{self, Processor};
use crate::legacy::acpi_pm::AcpiPm;
use crate::legacy::boot_marks::{BootMarks, Ready};
use crate::legacy::crtc::Crtc;
use crate::legacy::debug_exit::DebugExit;
use crate::legacy::debug_port::DebugPort;
use crate::legacy::fw_cfg::{FwCfg, Items};
use crate::legacy::i8042::I8042;
use crate::legacy::io_apic::IoApic;
use crate::legacy::pvpanic::PvPanic;
use crate::legacy::reset_control::ResetControl;
use crate::legacy::rom::Rom;
use crate::legacy::rtc_cmos::RtcCmos;
use crate::legacy::serial::SerialPort;
use crate::legacy::testdev::{hyperv::HypervTestDevice, pc};
use crate::memory::{Memory, layout};
use crate::pci;
use crate::recorder::{Recorder, Step, Steps};
use crate::vcpu;
use crate::vcpu::dispatch::Buses;
use crate::vcpu::gate::Gate;
use crate::virtio;
use crate::virtio::mmio::Mmio;
use crate::vm::{Interrupt, Pins, Vm};

/// Loads the machine that `config` describes into `shell`, with what it starts from, `origin`: ready to run.
/// `backends` keeps what its devices have on the host over resets of the guest: what is not open yet is opened here, the ends of
/// consoles last of all that can fail for want of something that the user named. `recorder` is told of what the machine does.
///
/// # Errors
/// [`Error`]. Nothing on the host was created or changed, unless it was opening a later one of several ends that failed.
pub fn load(
    config: &VmConfig,
    origin: &Origin,
    shell: Shell,
    backends: &mut Backends,
    recorder: &Arc<Recorder>,
) -> Result<Machine, Error> {
    let start = Instant::now();
    let memory = shell.memory.clone();
    let changes = plug::begin(&backends.pluggable, config);
    let list = inventory(config, &changes, memory.rom_slot().map(|(_, _, size)| size))?;
    let platform = platform(config.cpus.0, &list);
    let mut steps = Steps::begin(recorder, "monitor");
    let contents = origin.fill(&memory, &platform);
    steps.done(Step::Load);
    // Without KVM nothing else matters.
    let (Made { vm, processor }, mut seat) = shell.finish()?;
    // It has nothing else to do until the guest runs, and has all open that it needs.
    seat.enter();
    let contents = contents?;
    steps.skip();
    let mut machine =
        build(config, list, &changes, &memory, vm, &processor, backends, recorder, &mut steps, start)?;
    machine.seats.push_back(seat);
    if let Some(payload) = origin.payload() {
        machine.warn_of_missing_clock(payload, processor.is_intels());
    }
    machine.begin_with(contents)?;
    steps.done(Step::Vcpus);
    if let Origin::Saved { machine: saved, .. } = origin {
        machine.restore(saved)?;
        steps.done(Step::State);
    }
    Ok(machine)
}

/// Builds what is on the `list` around `vm`, whose memory is `memory`. The vCPUs are in the state after a reset.
#[allow(clippy::too_many_arguments, reason = "called once; a struct would only repeat the names")]
fn build(
    config: &VmConfig,
    list: Vec<Slot>,
    changes: &Changes,
    memory: &Memory,
    vm: kvm::Vm,
    processor: &Processor,
    backends: &mut Backends,
    recorder: &Arc<Recorder>,
    steps: &mut Steps,
    start: Instant,
) -> Result<Machine, Error> {
    let vm = Arc::new(vm);
    if config.has_pit() {
        vm.create_pit()?;
    }
    if config.test_device {
        // Real-mode tests wait for line 11 as a BIOS has left it.
        vm.set_up_pic(1 << 3)?;
    }
    let power = Arc::new(Mutex::new(AcpiPm::new(interrupt(&vm, "power button", layout::ACPI_GSI)?)));
    let fw_cfg = Arc::new(Mutex::new(FwCfg::new(Items::default(), memory.ram().clone())));
    let mut virtio = virtio::Device::list(config);
    let name = config.name.as_deref();
    virtio.extend(changes.added.iter().map(|added| virtio::Device::added(added, name)));
    if config.net_dump.is_some() {
        lock(&backends.pluggable).ports.note_frames();
    }
    let ready = Arc::<Ready>::default();
    let mut board = Board::default();
    let dynamic: Arc<dyn Vm> = vm.clone();
    let pci =
        (config.transport == Transport::Pci).then(|| PciBus::new(&list, weak(&vm), memory.ram(), recorder));
    if let Some(PciBus { segment, .. }) = &pci {
        let bridge = Arc::new(Mutex::new(pci::HostBridge::default()));
        board.devices.push(("pci-host-bridge".to_owned(), bridge.clone()));
        // It has no doorbells that could be refused.
        let _ = segment.insert(0, bridge, 0..0);
    }
    for slot in &list {
        let device: SharedDevice = match slot.kind {
            Kind::AcpiPm => power.clone(),
            Kind::I8042 => shared(I8042),
            Kind::ResetControl => shared(ResetControl::default()),
            Kind::PvPanic => shared(PvPanic),
            Kind::Serial => {
                let interrupt = interrupt(&vm, "serial port", layout::COM1_GSI)?;
                let end = backends.ends.get("serial", &config.serial)?;
                shared(SerialPort::new(end, interrupt, backends.ends.events().clone()))
            }
            Kind::DebugExit => shared(DebugExit),
            Kind::RtcCmos => shared(RtcCmos::new(memory.size(), config.cpus.0)),
            Kind::TextScreen => shared(Crtc::default()),
            Kind::BootMarks => shared(BootMarks::new(start, ready.clone())),
            Kind::Rom => shared(Rom),
            Kind::FwCfg => fw_cfg.clone(),
            Kind::DebugPort => shared(DebugPort::default()),
            Kind::TestPorts => shared(pc::Ports::new(memory.ram().clone())),
            Kind::TestLines => shared(pc::IrqLines::new(weak(&vm))),
            Kind::TestMemory => shared(pc::IoRam::default()),
            Kind::HypervTest => {
                let vm: Weak<kvm::Vm> = Arc::downgrade(&vm);
                let device = HypervTestDevice::new(vm, memory.ram().clone(), config.cpus.0);
                let failed = |source| Error::Host { what: "the test device".to_owned(), source };
                let device = device.map_err(failed)?;
                board.hypercalls = Some(device.clone());
                device
            }
            Kind::Virtio(index) => {
                let device = virtio[index].build(backends, recorder)?;
                match (slot.place, &pci) {
                    (Place::Pci(number), Some(pci)) => {
                        let function = pci.function(slot, number, device)?;
                        let at = slot.base..slot.base + slot.size;
                        pci.segment.insert(number, function.clone(), at).map_err(|source| Error::Host {
                            what: format!("the doorbells of {}", slot.name),
                            source,
                        })?;
                        function
                    }
                    _ => {
                        let gsi = slot.gsi.unwrap_or_default();
                        shared(Mmio::new(
                            &dynamic,
                            memory.ram(),
                            slot.base,
                            gsi,
                            &slot.name,
                            device,
                            recorder,
                        )?)
                    }
                }
            }
            Kind::PciPorts | Kind::PciEcam | Kind::PciMemory | Kind::PciHotPlug => {
                let Some(PciBus { segment, hot_plug, .. }) = &pci else { continue };
                let segment = segment.clone();
                match slot.kind {
                    Kind::PciPorts => {
                        shared(pci::ConfigPorts::new(segment, Box::new(ResetControl::default())))
                    }
                    Kind::PciEcam => shared(pci::Ecam(segment)),
                    Kind::PciMemory => shared(pci::Memory { segment, base: slot.base }),
                    _ => hot_plug.clone(),
                }
            }
            Kind::IoApic => {
                let io_apic = Arc::new(Mutex::new(IoApic::new(weak(&vm), io_apic_pins(&list))));
                let pins: Arc<Mutex<dyn Pins>> = io_apic.clone();
                vm.set_pins(Arc::downgrade(&pins));
                board.pins = Some(pins);
                io_apic
            }
            Kind::InKernel => continue,
        };
        board.put(slot, device)?;
    }
    steps.done(Step::Devices);

    vm.deny_msrs(&config.cpu.denied_msrs())?;
    let cpus = config.cpus.0;
    let vcpus = (0..cpus).map(|id| vm.create_vcpu(id, cpus, &config.cpu, processor));
    let vcpus = vcpus.collect::<Result<Vec<_>, _>>()?;
    if let [_, .., last] = vcpus.as_slice() {
        last.join_apic_map()?;
    }
    let mut buses = Buses::new(board.pio, board.mmio);
    buses.hypercalls = board.hypercalls;
    buses.pins = board.pins;
    let mut host = lock(&backends.pluggable);
    let here =
        list.iter().filter_map(|slot| if let Kind::Virtio(index) = slot.kind { Some(index) } else { None });
    let networks = here.filter_map(|index| virtio[index].network(&mut host.ports).transpose());
    let networks = networks.collect::<Result<Vec<_>, _>>()?;
    if let Some(file) = &config.net_dump {
        host.ports.start_dump(file, &networks).map_err(virtio::Error::Net)?;
    }
    drop(host);
    let (events, ended) = channel();
    let serve = events.clone();
    // The receiver is gone only when the run is over.
    buses.serve = Some(Box::new(move || drop(serve.send(Event::Serve))));
    let shared = Arc::new(Shared {
        vcpus: Arc::new(vcpu::Shared {
            buses,
            gate: Gate::new(vcpus.len()),
            ram: memory.all(),
            recorder: recorder.clone(),
            observed: vcpu::Observed::default(),
            reset_flag: !matches!(config.firmware, Some(Firmware::File(_))),
            holds_on_panic: config.on_panic() == OnPanic::Pause,
            debugger: OnceLock::new(),
        }),
        memory: memory.clone(),
        threads: Mutex::default(),
        plugboard: Plugboard::new(config, &backends.pluggable, changes),
        inventory: Mutex::new(list),
        devices: Mutex::new(board.devices),
        networks: Mutex::new(networks),
        pci,
        power,
        fw_cfg,
        ready,
        phase: Mutex::new(Phase::Running),
        events,
        killed: AtomicBool::new(false),
        vm: Arc::downgrade(&vm),
    });
    // Weak, because the ends outlive the machine, and its devices hold locks on their images.
    let machine = Arc::downgrade(&shared);
    backends.ends.on_escape(move |escape| {
        let Some(handle) = machine.upgrade().map(Handle) else { return };
        match escape {
            Escape::Quit => handle.kill(),
            Escape::PowerButton => handle.power_button(),
        }
    });
    let last_words = backends.ends.last_words();
    Ok(Machine {
        shared,
        vcpus,
        seats: VecDeque::new(),
        clocks: None,
        started: None,
        events: ended,
        last_words,
        later: None,
        vm,
    })
}

impl Machine {
    fn warn_of_missing_clock(&self, payload: &Payload, is_intels: bool) {
        let khz = self.vcpus[0].tsc_khz();
        if let Some(word) = boot::missing_clock(&payload.cmdline, is_intels, khz) {
            log::warn!(
                "a Linux with no-kvmclock may find no clock on this processor: add {word} to its command line"
            );
        }
    }

    /// Gives the machine what it starts with.
    fn begin_with(&mut self, contents: Contents) -> Result<(), Error> {
        lock(&self.shared.fw_cfg).set_items(contents.items);
        if let Some(entry) = contents.entry {
            self.vcpus.iter().try_for_each(|vcpu| vcpu.enter_at(&entry))?;
        }
        Ok(())
    }
}

fn shared(device: impl Device + 'static) -> SharedDevice {
    Arc::new(Mutex::new(device))
}

fn weak(vm: &Arc<kvm::Vm>) -> Weak<dyn Vm> {
    let weak: Weak<kvm::Vm> = Arc::downgrade(vm);
    weak
}

fn interrupt(vm: &kvm::Vm, what: &str, gsi: u32) -> Result<Arc<dyn Interrupt>, Error> {
    let failed = |source| Error::Host { what: format!("the interrupt of the {what}"), source };
    vm.irq_line(gsi).map_err(failed)
}

/// What devices are put on.
#[derive(Default)]
struct Board {
    pio: Bus,
    mmio: Bus,
    hypercalls: Option<Arc<Mutex<dyn Hypercalls>>>,
    pins: Option<Arc<Mutex<dyn Pins>>>,
    devices: Vec<(String, SharedDevice)>,
}

impl Board {
    fn put(&mut self, slot: &Slot, device: SharedDevice) -> Result<(), Error> {
        let bus = match slot.place {
            Place::Pio => &mut self.pio,
            Place::Mmio => &mut self.mmio,
            // Behind its window.
            Place::Pci(_) => {
                self.devices.push((slot.name.clone(), device));
                return Ok(());
            }
        };
        bus.insert(&slot.name, slot.base, slot.size, device.clone())?;
        self.devices.push((slot.name.clone(), device));
        Ok(())
    }
}

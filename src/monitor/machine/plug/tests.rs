//! A machine whose devices come and go, without KVM and vCPUs: its guest is the test.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;
use std::sync::{OnceLock, Weak};
use std::thread;

use vm_memory::GuestAddress;

use super::*;
use crate::bus::{Bus, Device, Effect};
use crate::config::Transport;
use crate::error_chain;
use crate::legacy::acpi_pm::{AcpiPm, EVENT, EVENT_PCI};
use crate::legacy::fw_cfg::{FwCfg, Items};
use crate::machine::inventory;
use crate::pci::Ecam;
use crate::pci::hot_plug::{ARRIVED, EJECT, WANTED};
use crate::vcpu;
use crate::vcpu::dispatch::Buses;
use crate::vcpu::gate::Gate;
use crate::vm::fake::{FakeInterrupt, FakeVm};

/// What outlives machines, and a folder for disks.
struct Session {
    config: VmConfig,
    host: SharedPluggable,
    folder: tempfile::TempDir,
}

/// One machine of it.
struct Scene {
    handle: Handle,
    vm: Arc<FakeVm>,
    interrupt: Arc<FakeInterrupt>,
}

impl Session {
    fn new(transport: Transport, rng: bool) -> Self {
        let config = VmConfig { transport, rng, ..VmConfig::default() };
        Self { config, host: SharedPluggable::default(), folder: tempfile::tempdir().unwrap() }
    }

    fn disk(&self, name: &str) -> (Plug, PathBuf) {
        let path = self.folder.path().join(name);
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        (plug(&format!("disk={}", path.display())), path)
    }

    /// A machine that has no devices but those that were added: those of the configuration are only on its list.
    fn machine(&self) -> Scene {
        let changes = begin(&self.host, &self.config);
        let list = inventory(&self.config, &changes, None).unwrap();
        let (vm, interrupt) = (Arc::new(FakeVm::default()), Arc::new(FakeInterrupt::default()));
        let weak: Weak<FakeVm> = Arc::downgrade(&vm);
        let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap());
        let pci = PciBus::new(&list, weak, &ram, &Arc::default());
        let shared = Shared {
            vcpus: Arc::new(vcpu::Shared {
                buses: Buses::new(Bus::default(), Bus::default()),
                gate: Gate::new(0),
                ram: ram.clone(),
                recorder: Arc::default(),
                observed: vcpu::Observed::default(),
                reset_flag: true,
                holds_on_panic: false,
                debugger: OnceLock::new(),
            }),
            memory: crate::memory::Memory::new(&"2M".parse().unwrap()).unwrap(),
            threads: Mutex::default(),
            plugboard: Plugboard::new(&self.config, &self.host, &changes),
            inventory: Mutex::new(list),
            devices: Mutex::default(),
            networks: Mutex::default(),
            pci: (self.config.transport == Transport::Pci).then_some(pci),
            power: Arc::new(Mutex::new(AcpiPm::new(interrupt.clone()))),
            fw_cfg: Arc::new(Mutex::new(FwCfg::new(Items::default(), ram.clone()))),
            ready: Arc::default(),
            phase: Mutex::new(Phase::Running),
            events: channel().0,
            killed: AtomicBool::new(false),
            vm: Weak::new(),
        };
        Scene { handle: Handle(Arc::new(shared)), vm, interrupt }
    }
}

fn plug(text: &str) -> Plug {
    OsStr::new(text).try_into().unwrap()
}

/// Whether somebody holds the image.
fn is_free(path: &Path) -> bool {
    File::open(path).unwrap().try_lock().is_ok()
}

/// Waits until nobody holds it: a child that another test is starting does so till then.
fn await_free(path: &Path) {
    let end = Instant::now() + Duration::from_secs(10);
    while !is_free(path) {
        assert!(Instant::now() < end, "{} is held", path.display());
        thread::sleep(Duration::from_millis(1));
    }
}

impl Scene {
    /// Adds what whoever asks for it has opened.
    fn add(&self, plug: Plug) -> Result<Attached, PlugError> {
        self.handle.can_add(&plug)?;
        let files = match &plug {
            Plug::Disk(disk) => disk::Files::open(disk).map_err(virtio::Error::from)?.into_descriptors(),
            Plug::Net(_) => Vec::new(),
        };
        self.handle.add_device(plug, files)
    }

    fn bus(&self) -> &PciBus {
        self.handle.0.pci.as_ref().unwrap()
    }

    /// The guest takes its interrupt and reads what has come and what is to go.
    fn told(&self) -> (u32, u32) {
        let mut event = [0xff];
        lock(&self.handle.0.power).read(EVENT, &mut event);
        assert_eq!((self.interrupt.count() > 0, event[0]), (event[0] != 0, event[0] & EVENT_PCI));
        let read = |register| {
            let mut data = [0xff; 4];
            lock(&self.bus().hot_plug).read(register, &mut data);
            u32::from_le_bytes(data)
        };
        (read(ARRIVED), read(WANTED))
    }

    /// The guest lets devices go.
    fn eject(&self, devices: u32) -> Effect {
        let effect = lock(&self.bus().hot_plug).write(EJECT, &devices.to_le_bytes());
        if effect == Effect::Serve {
            self.handle.0.let_go_ejected();
        }
        effect
    }

    fn vendor(&self, number: u64) -> u16 {
        let mut data = [0xff; 2];
        Ecam(self.bus().segment.clone()).read(number << 15, &mut data);
        u16::from_le_bytes(data)
    }

    fn names(&self) -> Vec<String> {
        self.handle.devices().into_iter().map(|device| device.name).collect()
    }

    fn await_names(&self, names: &[&str]) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.names() != names {
            assert!(Instant::now() < end, "{:?}", self.names());
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn refused(&self, text: &str) -> String {
        told(&self.add(plug(text)).unwrap_err())
    }
}

fn told(error: &PlugError) -> String {
    format!("{}; {}", error_chain(error), error.hint().unwrap_or_default())
}

const ALL: u32 = u32::MAX;

#[test]
fn a_disk_comes_is_asked_for_and_goes_and_leaves_nothing_behind() {
    let session = Session::new(Transport::Pci, true);
    let scene = session.machine();
    let (disk, image) = session.disk("image");
    let before = (scene.handle.inventory().len(), scene.vm.doorbells(), scene.vm.vectors_in_use());
    for _ in 0..50 {
        let added = scene.add(disk.clone()).unwrap();
        let told = (added.name.as_str(), added.place.as_deref(), added.state);
        assert_eq!(told, ("virtio-blk0", Some("00:03.0"), Attachment::Present));
        assert_eq!((scene.vendor(3), scene.told()), (0x1af4, (1 << 3, 0)));
        assert!(!is_free(&image));
        assert_eq!(scene.eject(ALL), Effect::None, "nobody has asked for it");
        assert_eq!(scene.vendor(3), 0x1af4);
        // Asked for twice: the guest is told twice.
        for _ in 0..2 {
            let asked = scene.handle.remove_device("virtio-blk0", false).unwrap();
            assert_eq!((asked.id, asked.state, scene.told()), (added.id, Attachment::Ejecting, (0, 1 << 3)));
        }
        assert_eq!(scene.names(), ["virtio-rng", "virtio-console", "virtio-blk0"]);
        assert_eq!((scene.eject(ALL), scene.vendor(3)), (Effect::Serve, 0xffff));
        assert_eq!(scene.eject(ALL), Effect::None, "it is gone");
        scene.await_names(&["virtio-rng", "virtio-console"]);
        await_free(&image);
        // Somebody may have asked once more meanwhile.
        lock(&scene.bus().hot_plug).ask_for(3);
        let gone = scene.handle.remove_device("virtio-blk0", false).unwrap_err();
        assert!(gone.to_string().contains("no device called \"virtio-blk0\""), "{gone}");
        let after = (scene.handle.inventory().len(), scene.vm.doorbells(), scene.vm.vectors_in_use());
        assert_eq!(after, before);
    }
    assert!(lock(&scene.handle.0.devices).is_empty());
}

#[test]
fn a_device_that_is_taken_away_is_gone_at_once_without_a_word() {
    let session = Session::new(Transport::Pci, false);
    let scene = session.machine();
    let (disk, image) = session.disk("image");
    let added = scene.add(disk).unwrap();
    let gone = scene.handle.remove_device(&added.name, true).unwrap();
    assert_eq!((gone.state, scene.vendor(2)), (Attachment::Gone, 0xffff));
    await_free(&image);
    assert_eq!((scene.names(), scene.told()), (vec!["virtio-console".to_owned()], (0, 0)));
}

#[test]
fn what_was_added_survives_a_reboot_and_what_was_asked_for_does_not() {
    let session = Session::new(Transport::Pci, false);
    let scene = session.machine();
    let (images, names): (Vec<_>, Vec<_>) = ["a", "b", "c"]
        .iter()
        .map(|name| session.disk(name))
        .map(|(disk, path)| (path, scene.add(disk).unwrap().name))
        .unzip();
    assert_eq!(names, ["virtio-blk0", "virtio-blk1", "virtio-blk2"]);
    scene.handle.remove_device("virtio-blk1", false).unwrap();
    scene.handle.remove_device("virtio-blk0", true).unwrap();
    let next = session.machine();
    assert_eq!(next.names(), ["virtio-console", "virtio-blk2"]);
    // The machine before has nothing to say any more, whatever its guest still writes.
    assert!(matches!(scene.add(session.disk("d").0), Err(PlugError::Ended)));
    assert!(matches!(scene.handle.remove_device("virtio-blk2", true), Err(PlugError::Ended)));
    scene.eject(ALL);
    drop(scene);
    images[..2].iter().for_each(|image| await_free(image));
    assert!(!is_free(&images[2]));
    assert_eq!(next.add(session.disk("d").0).unwrap().name, "virtio-blk0");
    assert_eq!(session.machine().names(), ["virtio-console", "virtio-blk2", "virtio-blk0"]);
}

#[test]
fn what_cannot_come_or_go_is_refused_with_what_to_try() {
    let session = Session::new(Transport::Pci, true);
    let scene = session.machine();
    let (disk, image) = session.disk("image");
    for (text, words) in [
        ("disk=/no/such/file", "No such file or directory (os error 2); check the path"),
        ("net=fd=3", "name a tap, a switch or a socket"),
        ("net=vhost-user=/no/such/socket", "start it with `mem=SIZE,backing=memfd`"),
        ("net=tap=tap0,vhost=on,mtu=20", "mtu"),
    ] {
        let refused = scene.refused(text);
        assert!(refused.contains(words), "{refused}");
    }
    let fixed = scene.handle.remove_device("virtio-rng", true).unwrap_err();
    assert!(fixed.to_string().contains("virtio-rng is there for good"), "{fixed}");
    scene.add(disk.clone()).unwrap();
    let taken = told(&scene.add(disk.clone()).unwrap_err());
    assert!(taken.contains("in use by another process"), "{taken}");
    // Eight places are there, and one is taken.
    for name in 'a'..'h' {
        scene.add(session.disk(&name.to_string()).0).unwrap();
    }
    assert!(matches!(scene.add(session.disk("h").0), Err(PlugError::Full)));
    await_free(&session.disk("h").1);

    let names = scene.names();
    drop(scene.handle.pause().unwrap());
    for error in [
        scene.add(session.disk("h").0).unwrap_err(),
        scene.handle.remove_device("virtio-blk0", false).unwrap_err(),
        scene.handle.remove_device("virtio-blk0", true).unwrap_err(),
    ] {
        assert!(matches!(error, PlugError::Paused), "{error}");
    }
    assert_eq!((scene.names(), is_free(&image)), (names, false));
    scene.handle.resume().unwrap();
    assert_eq!(scene.told().1, 0, "nobody was asked for");

    let mmio = Session::new(Transport::Mmio, true).machine();
    assert_eq!(mmio.names(), ["virtio-rng", "virtio-console"]);
    for error in [mmio.add(disk).unwrap_err(), mmio.handle.remove_device("virtio-rng", false).unwrap_err()] {
        assert!(told(&error).contains("start it with `transport=pci`"), "{error}");
    }
}

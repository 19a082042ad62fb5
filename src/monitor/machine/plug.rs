//! Devices that come and go while the machine runs: disks and network devices on the PCI bus.
//!
//! A device that comes is complete before the guest can find it. One that goes is first out of the guest's sight, with its doorbells and
//! messages; then what it has in flight comes to its end; then the host's side is closed, and last its name is free. The guest is
//! asked for it (`pci::hot_plug`), unless it is taken away. What has changed is kept for the machine's successor after a reboot, and
//! a device that the guest was asked for and rebooted without is gone then.
//!
//! Locks, in this order: [`Pluggable`], the machine's phase, the others one at a time. The threads of vCPUs take none of these two.

mod error;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::inventory::{function, spare_numbers, windows};
use super::{Handle, Phase, Shared};
use crate::backends::{Added, Changes, Pluggable, SharedPluggable};
use crate::bus::{Kind, Place, SharedDevice, Slot, lock};
use crate::config::{Backing, NetTarget, Plug, VmConfig};
use crate::disk;
use crate::machine::outputs;
use crate::memory::GuestRam;
use crate::pci::{HotPlug, Line, Segment};
use crate::recorder::Recorder;
use crate::sandbox::{self, Needs};
use crate::threads::{self, Role};
use crate::virtio::device::VirtioDevice;
use crate::virtio::{self, pci::Pci};
use crate::vm::Vm;

pub use error::PlugError;

/// What a device that goes has in flight is waited for this long.
const REST_LIMIT: Duration = Duration::from_secs(5);

/// A virtio device of a machine, for those who look.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// A number that no other device of the session ever has.
    pub id: u64,
    /// Its name in the machine.
    pub name: String,
    /// What it is: `disk=PATH`, `net=user`, `rng` and so on.
    pub device: String,
    /// Where the guest finds it on the PCI bus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
    /// Whether it is to stay.
    pub state: Attachment,
}

/// Whether a device is to stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Attachment {
    /// It is there.
    Present,
    /// The guest was asked to let it go.
    Ejecting,
    /// It is not there any more.
    Gone,
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Present => "present",
            Self::Ejecting => "ejecting",
            Self::Gone => "gone",
        })
    }
}

/// What is needed beside a configuration to build a function on the bus.
pub(super) struct PciBus {
    pub segment: Arc<Segment>,
    pub hot_plug: Arc<Mutex<HotPlug>>,
    vm: Weak<dyn Vm>,
    ram: Arc<GuestRam>,
    recorder: Arc<Recorder>,
    /// Of the INTA# pins, by their interrupt.
    lines: Mutex<BTreeMap<u32, Arc<Line>>>,
}

impl PciBus {
    /// An empty one in the machine that has what is on the `list`.
    pub fn new(list: &[Slot], vm: Weak<dyn Vm>, ram: &Arc<GuestRam>, recorder: &Arc<Recorder>) -> Self {
        let segment = Arc::new(Segment::new(windows(list)));
        let hot_plug = Arc::new(Mutex::new(HotPlug::new(segment.clone())));
        Self { segment, hot_plug, vm, ram: ram.clone(), recorder: recorder.clone(), lines: Mutex::default() }
    }

    /// `device` as the function in `slot`, not yet on the bus.
    pub fn function(
        &self,
        slot: &Slot,
        number: u8,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Arc<Mutex<Pci>>, virtio::transport::Error> {
        let gsi = slot.gsi.unwrap_or_default();
        let mut lines = lock(&self.lines);
        let line = lines.entry(gsi).or_insert_with(|| Arc::new(Line::new(self.vm.clone(), gsi))).clone();
        let place = virtio::pci::Place { number, base: slot.base, line };
        let function = Pci::new(self.vm.clone(), &self.ram, place, &slot.name, device, &self.recorder)?;
        Ok(Arc::new(Mutex::new(function)))
    }
}

/// What it takes to change a machine's devices.
pub(super) struct Plugboard {
    host: SharedPluggable,
    /// Which machine of the session it is.
    machine: u64,
    /// What the session was started with.
    config: VmConfig,
    /// What had changed when the machine was built.
    changes: Changes,
    /// Made when somebody asks first: most machines are never asked.
    attachments: OnceLock<Attachments>,
}

/// What a machine's devices are.
struct Attachments {
    /// The numbers on the bus that the guest looks at.
    numbers: Vec<u8>,
    list: Mutex<Vec<Entry>>,
}

struct Entry {
    attached: Attached,
    number: Option<u8>,
    removable: bool,
}

impl Attachments {
    /// Of the machine of `config` that had what is on the `list` when it was built.
    fn new(config: &VmConfig, changes: &Changes, list: &[Slot]) -> Self {
        let devices = devices(config, changes);
        let entry = |slot: &Slot| match slot.kind {
            Kind::Virtio(index) => devices.get(index).map(|(id, device)| Entry::new(*id, device, slot)),
            _ => None,
        };
        let taken = |slot: &Slot| match slot.place {
            Place::Pci(number) => Some(number),
            _ => None,
        };
        let mut numbers: Vec<_> = list.iter().filter_map(taken).chain(spare_numbers(list)).collect();
        numbers.sort_unstable();
        Self { numbers, list: Mutex::new(list.iter().filter_map(entry).collect()) }
    }
}

impl Plugboard {
    /// For the machine of `config` after `changes`.
    pub fn new(config: &VmConfig, host: &SharedPluggable, changes: &Changes) -> Self {
        let machine = lock(host).machines;
        let (config, changes) = (config.clone(), changes.clone());
        Self { host: host.clone(), machine, config, changes, attachments: OnceLock::new() }
    }

    /// What the host has of it, if this is the machine that can be changed.
    fn host(&self) -> Result<MutexGuard<'_, Pluggable>, PlugError> {
        let host = lock(&self.host);
        if host.machines == self.machine { Ok(host) } else { Err(PlugError::Ended) }
    }

    /// Copies what the configuration's disk `index` has now to `to`.
    pub fn save_disk(&self, index: usize, to: &File) -> io::Result<()> {
        // It may take its time, and nobody is to wait for the lock meanwhile.
        let image = self.host().map_err(io::Error::other)?.images.get(index);
        image.ok_or(io::ErrorKind::NotFound)?.save(to)
    }

    /// Checks what can be checked of `plug` without opening anything.
    fn check(&self, plug: &Plug, changes: &Changes) -> Result<(), PlugError> {
        let mut config = VmConfig { disk: Vec::new(), net: Vec::new(), ..self.config.clone() };
        let present = devices(&self.config, changes).into_iter();
        let present = present.filter(|(id, _)| !changes.removed.iter().any(|removed| *removed as u64 == *id));
        for plug in present.filter_map(|(_, device)| device.plug()).chain([plug.clone()]) {
            config = plug.added_to(&config);
        }
        config.validate()?;
        outputs::check(&config, &[], &[])?;
        if !sandbox::allows(Needs::of_plug(plug)) {
            return Err(PlugError::Sandbox);
        }
        match plug {
            Plug::Net(net) => match net.to {
                NetTarget::Fd(fd) => Err(PlugError::Fd(fd)),
                _ if config.net_dump.is_some() => Err(PlugError::Dump),
                NetTarget::VhostUser(_) if self.config.memory().backing() != Backing::Memfd => {
                    Err(PlugError::NotShared)
                }
                _ => Ok(()),
            },
            Plug::Disk(_) => Ok(()),
        }
    }
}

impl Entry {
    fn new(id: u64, device: &virtio::Device<'_>, slot: &Slot) -> Self {
        let (plug, name) = (device.plug(), device.name());
        let text = || name.strip_prefix("virtio-").unwrap_or(&name).to_owned();
        let number = if let Place::Pci(number) = slot.place { Some(number) } else { None };
        let attached = Attached {
            id,
            device: plug.as_ref().map_or_else(text, Plug::to_string),
            place: number.map(|number| format!("00:{number:02x}.0")),
            state: Attachment::Present,
            name,
        };
        Self { attached, number, removable: plug.is_some() }
    }
}

/// The devices of `config` with their numbers, those that were removed as well, and those that were added.
fn devices<'a>(config: &'a VmConfig, changes: &'a Changes) -> Vec<(u64, virtio::Device<'a>)> {
    let name = config.name.as_deref();
    let added = changes.added.iter().map(|added| (added.id, virtio::Device::added(added, name)));
    (0..).zip(virtio::Device::list(config)).chain(added).collect()
}

/// Device `id` is gone: the host's side of it is closed, and machines that are built from now on do not have it.
fn forget(host: &mut Pluggable, config: &VmConfig, id: u64) {
    let list = virtio::Device::list(config);
    let (images, ports) = (&mut host.images, &mut host.ports);
    let mut close = |device: &virtio::Device<'_>| match device {
        virtio::Device::Block(index, _) => images.close(*index),
        virtio::Device::Net(index, ..) => ports.close(*index),
        _ => {}
    };
    if let Some(at) = host.changes.added.iter().position(|added| added.id == id) {
        close(&virtio::Device::added(&host.changes.added.remove(at), None));
    } else if let Some((at, device)) = (0..).zip(&list).find(|(at, _)| *at as u64 == id) {
        close(device);
        host.changes.removed.push(at);
    }
    host.changes.asked.retain(|asked| *asked != id);
}

/// A machine of `config` begins: what its predecessor's guest was asked for and rebooted without is gone. What else has changed.
pub(super) fn begin(host: &SharedPluggable, config: &VmConfig) -> Changes {
    let mut host = lock(host);
    host.machines += 1;
    for id in host.changes.asked.clone() {
        log::info!("device {id} is gone: the guest was asked for it, and rebooted");
        forget(&mut host, config, id);
    }
    host.changes.clone()
}

impl Handle {
    /// Whether it has other devices than its configuration says: some came or went while it, or an earlier machine of its
    /// session, ran.
    pub fn has_other_devices(&self) -> bool {
        let changes = &lock(&self.0.plugboard.host).changes;
        !changes.added.is_empty() || !changes.removed.is_empty()
    }

    /// Its virtio devices.
    pub fn devices(&self) -> Vec<Attached> {
        lock(&self.0.attachments().list).iter().map(|entry| entry.attached.clone()).collect()
    }

    /// Whether there is a place for `plug`, and nothing but the host against it.
    ///
    /// # Errors
    /// [`PlugError`]
    pub fn can_add(&self, plug: &Plug) -> Result<(), PlugError> {
        let _ = self.0.pci.as_ref().ok_or(PlugError::NoPci)?;
        self.place_for(plug, &*self.0.plugboard.host()?).map(drop)
    }

    /// A number on the bus for `plug`, and one among the devices of its kind.
    fn place_for(&self, plug: &Plug, host: &Pluggable) -> Result<(u8, usize), PlugError> {
        let shared = &self.0;
        let (board, attachments) = (&shared.plugboard, shared.attachments());
        if *lock(&shared.phase) == Phase::Paused {
            return Err(PlugError::Paused);
        }
        board.check(plug, &host.changes)?;
        let list = lock(&attachments.list);
        let taken = |number: &u8| list.iter().any(|entry| entry.number == Some(*number));
        let free = attachments.numbers.iter().copied().find(|number| !taken(number));
        let named = |index| {
            virtio::Device::added(&Added { id: 0, index, number: 0, plug: plug.clone() }, None).name()
        };
        let index = (0..).find(|index| {
            let name = named(*index);
            list.iter().all(|entry| entry.attached.name != name)
        });
        Ok((free.ok_or(PlugError::Full)?, index.unwrap_or_default()))
    }

    /// Builds the device and puts it on the bus; the guest is told of it. A disk is in the open `files` that whoever asks for it has passed:
    /// a machine that runs opens none.
    ///
    /// # Errors
    /// [`PlugError`]; nothing has changed.
    pub fn add_device(&self, plug: Plug, files: Vec<OwnedFd>) -> Result<Attached, PlugError> {
        let shared = &self.0;
        let (board, attachments) = (&shared.plugboard, shared.attachments());
        let bus = shared.pci.as_ref().ok_or(PlugError::NoPci)?;
        let mut host = board.host()?;
        let (number, index) = self.place_for(&plug, &host)?;
        let first = virtio::Device::list(&board.config).len();
        let id = first as u64 + host.changes.count;
        let added = Added { id, index, number, plug };
        let device = virtio::Device::added(&added, board.config.name.as_deref());
        let slot = function(device.name(), Kind::Virtio(first + host.changes.added.len()), number);
        let entry = Entry::new(id, &device, &slot);

        if let Plug::Disk(disk) = &added.plug {
            let put = disk::Files::of_descriptors(disk, files);
            put.and_then(|files| host.images.put(index, disk, files)).map_err(virtio::Error::from)?;
        }
        let built =
            virtio::Device::build_added(&added, board.config.name.as_deref(), &mut host, &bus.recorder);
        let built = built.and_then(|built| Ok((built, device.network(&mut host.ports)?)));
        let wired = built.map_err(PlugError::from).and_then(|(built, network)| {
            let function = bus.function(&slot, number, built)?;
            // A pause takes all devices or none.
            let phase = lock(&shared.phase);
            match *phase {
                Phase::Running => Ok((function, network, phase)),
                Phase::Paused => Err(PlugError::Paused),
                Phase::Ended => Err(PlugError::Ended),
            }
        });
        let (function, network, phase) = match wired {
            Ok(wired) => wired,
            Err(error) => {
                match &added.plug {
                    Plug::Disk(_) => host.images.close(index),
                    Plug::Net(_) => host.ports.close(index),
                }
                return Err(error);
            }
        };
        let attached = entry.attached.clone();
        host.changes.count += 1;
        host.changes.added.push(added);
        lock(&shared.networks).extend(network);
        lock(&shared.inventory).push(slot);
        lock(&shared.devices).push((attached.name.clone(), function.clone()));
        lock(&attachments.list).push(entry);
        // It has no place in memory before the guest gives it one, and so no doorbells that could be refused.
        let _ = bus.segment.insert(number, function, 0..0);
        lock(&bus.hot_plug).announce(number);
        drop(phase);
        lock(&shared.power).announce_pci();
        log::info!("{} ({}) added as PCI device 00:{number:02x}.0", attached.name, attached.device);
        Ok(attached)
    }

    /// Asks the guest to let the device `name` go: again, if it was asked already. It is gone when it is no longer on the list of
    /// [`Handle::devices`]. With `force` it is gone at once, and the guest hears nothing of it.
    ///
    /// # Errors
    /// [`PlugError`]; nothing has changed.
    pub fn remove_device(&self, name: &str, force: bool) -> Result<Attached, PlugError> {
        let shared = &self.0;
        let (board, attachments) = (&shared.plugboard, shared.attachments());
        let bus = shared.pci.as_ref().ok_or(PlugError::NoPci)?;
        let mut host = board.host()?;
        let phase = lock(&shared.phase);
        match *phase {
            Phase::Running => {}
            Phase::Paused => return Err(PlugError::Paused),
            Phase::Ended => return Err(PlugError::Ended),
        }
        let mut list = lock(&attachments.list);
        let entry = list.iter_mut().find(|entry| entry.attached.name == name);
        let entry = entry.ok_or_else(|| PlugError::Unknown(name.to_owned()))?;
        let Some(number) = entry.number.filter(|_| entry.removable) else {
            return Err(PlugError::Fixed(name.to_owned()));
        };
        entry.attached.state = Attachment::Ejecting;
        let mut attached = entry.attached.clone();
        drop(list);
        if !host.changes.asked.contains(&attached.id) {
            host.changes.asked.push(attached.id);
        }
        if force {
            lock(&bus.hot_plug).take_away(number);
            drop((phase, host));
            shared.let_go(number);
            attached.state = Attachment::Gone;
        } else {
            lock(&bus.hot_plug).ask_for(number);
            lock(&shared.power).announce_pci();
            log::info!("{name}: the guest is asked to let it go");
        }
        Ok(attached)
    }
}

impl Shared {
    /// Its devices. They change by this alone, so that the inventory is as it was when this is called first.
    fn attachments(&self) -> &Attachments {
        let Plugboard { config, changes, attachments, .. } = &self.plugboard;
        attachments.get_or_init(|| Attachments::new(config, changes, &lock(&self.inventory)))
    }

    /// Takes apart what the guest has let go, on a thread of its own: it may have something in flight.
    pub(super) fn let_go_ejected(self: &Arc<Self>) {
        let Some(bus) = &self.pci else { return };
        for number in lock(&bus.hot_plug).take_ejected() {
            let shared = self.clone();
            if let Err(error) = threads::spawn(Role::Errand, move || shared.let_go(number)) {
                log::error!("start a thread for PCI device {number}, which is to go: {error}");
            }
        }
    }

    /// Takes apart the device that was `number` on the bus, where nothing leads to it any more.
    fn let_go(&self, number: u8) {
        let (board, attachments) = (&self.plugboard, self.attachments());
        let Ok(mut host) = board.host() else { return };
        // Who pauses waits meanwhile.
        let _phase = lock(&self.phase);
        let here = |entry: &&Entry| entry.number == Some(number);
        let Some(Attached { id, name, .. }) =
            lock(&attachments.list).iter().find(here).map(|entry| entry.attached.clone())
        else {
            return;
        };
        let device: Option<SharedDevice> = {
            let mut devices = lock(&self.devices);
            let at = devices.iter().position(|(other, _)| *other == name);
            at.map(|at| devices.remove(at).1)
        };
        if let Some(device) = device
            && let Err(busy) =
                self.one_device(&name, &device, Instant::now() + REST_LIMIT, |device, until| {
                    device.pause(until)
                })
        {
            log::warn!("{busy}: it goes all the same, and its image stays in use until then");
        }
        lock(&self.networks).retain(|network| network.device != name);
        lock(&self.inventory).retain(|slot| slot.name != name);
        forget(&mut host, &board.config, id);
        lock(&attachments.list).retain(|entry| entry.attached.id != id);
        log::info!("{name} removed");
    }
}

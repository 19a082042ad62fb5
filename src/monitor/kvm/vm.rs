//! A VM descriptor: memory slots, interrupts and doorbells.
//!
//! The order of the ioctls is that of their cost: memory slots wait for readers of the interrupt routing once
//! there are interrupt controllers, so they come first.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::x86_64::{Arch, Controllers, Route};
use super::{Error, Kvm, ioctl};
use crate::bus::lock;
use crate::memory::dirty::DirtyPages;
use crate::memory::{self, GuestRam, Memory};
use crate::vm::{Interrupt, IoEventAddress, Msi, Vector};

/// A virtual machine in the kernel.
#[derive(Debug)]
pub struct Vm {
    pub(super) fd: VmFd,
    pub(super) arch: Arch,
    kvm: Kvm,
    /// The slots refer to this memory: it must outlive `fd`, which is dropped first.
    ram: Arc<GuestRam>,
    /// Likewise: memory with the ROM, if there is one.
    #[expect(dead_code, reason = "it keeps the mapping")]
    all: Arc<GuestRam>,
}

impl Vm {
    pub(super) fn new(kvm: &Kvm, memory: &Memory, controllers: Controllers) -> Result<Self, Error> {
        let fd = ioctl("KVM_CREATE_VM", kvm.fd.create_vm())?;
        set_slots(&fd, memory.ram(), 0)?;
        for (number, region) in (memory::slots(memory.ram()).count()..).zip(memory.read_only()) {
            if !kvm.fd.check_extension(Cap::ReadonlyMem) {
                return Err(Error::Missing("KVM_CAP_READONLY_MEM"));
            }
            set_slot(&fd, number, region, KVM_MEM_READONLY)?;
        }
        let arch = Arch::set_up(&fd, controllers)?;
        let (ram, all) = (memory.ram().clone(), memory.all());
        Ok(Self { fd, arch, kvm: kvm.clone(), ram, all })
    }

    /// What made it.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Has KVM note which pages the guest writes to, from now on; or no longer, and then it forgets them. The first write to
    /// a page costs an exit inside KVM then, unless hardware keeps the log.
    ///
    /// # Errors
    /// The ioctl that failed.
    pub fn log_dirty(&self, on: bool) -> Result<(), Error> {
        set_slots(&self.fd, &self.ram, if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
    }

    /// The pages that the guest has written to since the log was begun or last taken. To have all of them, park the vCPUs first.
    ///
    /// # Errors
    /// The ioctl failed: there is no log, most of all.
    pub fn take_dirty(&self) -> Result<DirtyPages, Error> {
        let mut dirty = DirtyPages::default();
        for (slot, (guest, _, size)) in memory::slots(&self.ram).enumerate() {
            let bitmap = self.fd.get_dirty_log(slot as u32, size as usize);
            dirty.add(guest, ioctl("KVM_GET_DIRTY_LOG", bitmap)?);
        }
        Ok(dirty)
    }
}

/// Gives KVM the slots of `ram`, or changes their flags. It must live longer than `fd`.
fn set_slots(fd: &VmFd, ram: &GuestRam, flags: u32) -> Result<(), Error> {
    memory::slots(ram).enumerate().try_for_each(|(slot, range)| set_slot(fd, slot, range, flags))
}

/// Gives KVM a slot: guest address, host address and size of memory that lives longer than `fd`.
fn set_slot(fd: &VmFd, slot: usize, range: (u64, *mut u8, u64), flags: u32) -> Result<(), Error> {
    let (guest_phys_addr, host, memory_size) = range;
    let (slot, userspace_addr) = (slot as u32, host as u64);
    let region = kvm_userspace_memory_region { slot, guest_phys_addr, memory_size, userspace_addr, flags };
    // SAFETY: the range is a mapping that `Vm::ram` or `Vm::all` keeps for as long as `fd` lives, and nothing in this
    // process holds references into it: all access is volatile.
    ioctl("KVM_SET_USER_MEMORY_REGION", unsafe { fd.set_user_memory_region(region) })
}

/// An irqfd: a write to it is an edge on the interrupt line.
pub(super) struct IrqFd(pub(super) EventFd);

impl Interrupt for IrqFd {
    fn trigger(&self) {
        // Only a counter at its maximum refuses, and then an interrupt is pending anyway.
        let _ = self.0.write(1);
    }

    fn as_eventfd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: borrowed for no longer than the EventFd lives, which closes it.
        Some(unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) })
    }
}

/// The descriptor in the type that kvm-ioctls wants. The kernel knows a doorbell by its eventfd, not by its descriptor,
/// and keeps it alive, so a duplicate that goes again does for both calls below.
pub(super) fn eventfd(event: BorrowedFd<'_>) -> io::Result<EventFd> {
    let own = event.try_clone_to_owned()?;
    // SAFETY: the descriptor was just made, and its ownership goes into the EventFd.
    Ok(unsafe { EventFd::from_raw_fd(own.into_raw_fd()) })
}

pub(super) fn errno(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

impl crate::vm::Vm for Vm {
    fn irq_line(&self, gsi: u32) -> io::Result<Arc<dyn Interrupt>> {
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        self.fd.register_irqfd(&event, gsi).map_err(errno)?;
        Ok(Arc::new(IrqFd(event)))
    }

    fn set_irq_level(&self, gsi: u32, high: bool) -> io::Result<()> {
        match self.arch.pins.get() {
            Some(pins) => {
                if let Some(pins) = pins.upgrade() {
                    lock(&pins).set_level(gsi, high);
                }
                Ok(())
            }
            None => self.fd.set_irq_line(gsi, high).map_err(errno),
        }
    }

    fn route_pins(&self, messages: &[Option<Msi>]) -> io::Result<()> {
        Self::route_pins(self, messages)
    }

    fn send(&self, message: Msi) -> io::Result<bool> {
        self.send_message(message)
    }

    fn vectors(&self, count: usize) -> io::Result<Vec<Vector>> {
        self.new_routes(count).into_iter().map(Vector::new).collect()
    }

    fn route(&self, routes: &[(&Vector, Msi)]) -> io::Result<()> {
        self.change_routes(|all| {
            for (vector, message) in routes {
                all.set(vector.gsi(), Route::Msi(*message));
            }
        })
    }

    fn open(&self, vector: &Vector) -> io::Result<()> {
        self.fd.register_irqfd(&eventfd(vector.event())?, vector.gsi()).map_err(errno)
    }

    fn close(&self, vector: &Vector) {
        let undone = eventfd(vector.event())
            .and_then(|event| self.fd.unregister_irqfd(&event, vector.gsi()).map_err(errno));
        if let Err(error) = undone {
            log::error!("interrupt {}: {error}", vector.gsi());
        }
    }

    fn release(&self, vectors: &[Vector]) {
        let removed = self.change_routes(|all| vectors.iter().for_each(|vector| all.remove(vector.gsi())));
        if let Err(error) = removed {
            log::error!("routes of message-signalled interrupts: {error}");
        }
    }

    fn ioeventfd(&self, at: IoEventAddress, event: BorrowedFd<'_>) -> io::Result<()> {
        let IoEventAddress::Mmio { address, value } = at;
        let address = kvm_ioctls::IoEventAddress::Mmio(address);
        match value {
            Some(value) => self.fd.register_ioevent(&eventfd(event)?, &address, value),
            None => self.fd.register_ioevent(&eventfd(event)?, &address, NoDatamatch),
        }
        .map_err(errno)
    }

    fn remove_ioeventfd(&self, at: IoEventAddress, event: BorrowedFd<'_>) -> io::Result<()> {
        let IoEventAddress::Mmio { address, value } = at;
        let address = kvm_ioctls::IoEventAddress::Mmio(address);
        match value {
            Some(value) => self.fd.unregister_ioevent(&eventfd(event)?, &address, value),
            None => self.fd.unregister_ioevent(&eventfd(event)?, &address, NoDatamatch),
        }
        .map_err(errno)
    }
}

//! A VM descriptor: memory slots, interrupt controllers, interrupts and doorbells.
//!
//! The order of the ioctls is that of their cost: memory slots wait for readers of the interrupt routing once
//! there are interrupt controllers, so they come first.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd};
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY, KVM_MSR_EXIT_REASON_FILTER, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_irqchip,
    kvm_irqchip__bindgen_ty_1, kvm_pic_state, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::x86_64::testdev::Routes;
use super::x86_64::{cpu_model, cpuid, hyperv};
use super::{Error, Vcpu, ioctl};
use crate::config::Cpu;
use crate::config::msr::Window;
use crate::memory::dirty::DirtyPages;
use crate::memory::{self, GuestRam, Memory, layout};
use crate::vm::{Interrupt, IoEventAddress};

/// A virtual machine in the kernel.
#[derive(Debug)]
pub struct Vm {
    pub(super) fd: VmFd,
    supported: kvm_bindings::CpuId,
    tsc_deadline: bool,
    sync_registers: bool,
    pub(super) routes: Mutex<Routes>,
    /// The slots refer to this memory: it must outlive `fd`, which is dropped first.
    ram: Arc<GuestRam>,
    /// Likewise: memory with the ROM, if there is one.
    #[expect(dead_code, reason = "it keeps the mapping")]
    all: Arc<GuestRam>,
}

impl Vm {
    pub(super) fn new(kvm: &kvm_ioctls::Kvm, memory: &Memory) -> Result<Self, Error> {
        let fd = ioctl("KVM_CREATE_VM", kvm.create_vm())?;
        set_slots(&fd, memory.ram(), 0)?;
        if let Some(rom) = memory.rom_slot() {
            if !kvm.check_extension(Cap::ReadonlyMem) {
                return Err(Error::Missing("KVM_CAP_READONLY_MEM"));
            }
            set_slot(&fd, memory::slots(memory.ram()).count(), rom, KVM_MEM_READONLY)?;
        }
        ioctl("KVM_SET_IDENTITY_MAP_ADDR", fd.set_identity_map_address(layout::KVM_IDENTITY_MAP))?;
        ioctl("KVM_SET_TSS_ADDR", fd.set_tss_address(layout::KVM_TSS as usize))?;
        ioctl("KVM_CREATE_IRQCHIP", fd.create_irq_chip())?;
        set_up_pics(&fd, [0xff; 2])?;
        let max = kvm_bindings::KVM_MAX_CPUID_ENTRIES;
        let supported = ioctl("KVM_GET_SUPPORTED_CPUID", kvm.get_supported_cpuid(max))?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let sync_registers = kvm.check_extension(Cap::SyncRegs);
        let (ram, all) = (memory.ram().clone(), memory.all());
        let routes = Mutex::default();
        Ok(Self { fd, supported, tsc_deadline, sync_registers, routes, ram, all })
    }

    /// Adds an 8254 timer in the kernel, at its ports 0x40 to 0x43 and on interrupt 0. Before the vCPUs.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn create_pit(&self) -> Result<(), Error> {
        // Port 0x61 too: its bits gate the timer's channel 2 and tell its output.
        let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        ioctl("KVM_CREATE_PIT2", self.fd.create_pit2(config))
    }

    /// Whether the processor is Intel's.
    pub fn is_intels(&self) -> bool {
        cpuid::is_intels(self.supported.as_slice())
    }

    /// Has the guest's uses of the MSRs that `denied` has come out as exits ([`Exit::MsrRead`](super::exit::Exit::MsrRead)),
    /// which end in #GP.
    ///
    /// # Errors
    /// This KVM cannot (before Linux 5.10); the ioctl that failed.
    pub fn deny_msrs(&self, denied: &[Window]) -> Result<(), Error> {
        if denied.is_empty() {
            return Ok(());
        }
        if !self.fd.check_extension(Cap::X86MsrFilter) {
            return Err(Error::Missing(
                "KVM_CAP_X86_MSR_FILTER, which baseline CPU models and msr-deny need",
            ));
        }
        let args = [KVM_MSR_EXIT_REASON_FILTER.into(), 0, 0, 0];
        let exits = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, args, ..Default::default() };
        ioctl("KVM_ENABLE_CAP (KVM_CAP_X86_USER_SPACE_MSR)", self.fd.enable_cap(&exits))?;
        let ranges: Vec<_> = denied.iter().map(range).collect();
        let filter = self.fd.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges);
        ioctl("KVM_X86_SET_MSR_FILTER", filter)
    }

    /// Adds vCPU `id` of `count`. vCPU 0 is runnable; the others wait for INIT and SIPI.
    ///
    /// # Errors
    /// The ioctl that failed; [`Error::CpuFeature`].
    pub fn create_vcpu(&self, id: u32, count: u32, cpu: &Cpu) -> Result<Vcpu, Error> {
        let fd = ioctl("KVM_CREATE_VCPU", self.fd.create_vcpu(u64::from(id)))?;
        let frequency = cpuid::Frequencies {
            // 0 where the host's counter is not stable: the guest then finds out by itself.
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
        };
        let topology = cpuid::Topology { id, count };
        let mut table =
            cpuid::table(self.supported.as_slice(), topology, frequency, self.tsc_deadline, cpu.nested);
        if cpu.hyperv {
            hyperv::show(&mut table, &hyperv::enable(&self.fd, &fd, cpu)?);
        }
        cpu_model::apply(&mut table, cpu)?;
        let table =
            kvm_bindings::CpuId::from_entries(&table).map_err(|_| Error::Missing("room for CPUID"))?;
        ioctl("KVM_SET_CPUID2", fd.set_cpuid2(&table))?;
        Ok(Vcpu::new(fd, id, self.sync_registers))
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

/// Sets the pair of 8259s up as a PC's firmware leaves them, vectors 0x08 and 0x70, with these pins masked. As KVM makes them all are
/// open: a guest that believes ACPI, which says that there are none, gets interrupts of theirs as soon as it takes any.
pub(super) fn set_up_pics(fd: &VmFd, masks: [u8; 2]) -> Result<(), Error> {
    // The pins that can be level-triggered are part of the state (elcr_mask), and not the guest's to change.
    let chips = [(KVM_IRQCHIP_PIC_MASTER, 0x08, 0xf8), (KVM_IRQCHIP_PIC_SLAVE, 0x70, 0xde)];
    for ((chip_id, irq_base, elcr_mask), imr) in chips.into_iter().zip(masks) {
        let pic = kvm_pic_state { irq_base, imr, elcr_mask, init4: 1, ..Default::default() };
        let chip = kvm_irqchip { chip_id, pad: 0, chip: kvm_irqchip__bindgen_ty_1 { pic } };
        ioctl("KVM_SET_IRQCHIP", fd.set_irqchip(&chip))?;
    }
    Ok(())
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

/// As KVM's filter takes it.
fn range(window: &Window) -> MsrFilterRange<'_> {
    MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base: window.first,
        msr_count: window.count,
        bitmap: &window.allowed,
    }
}

/// An irqfd: a write to it is an edge on the interrupt line.
pub(super) struct IrqFd(pub(super) EventFd);

impl Interrupt for IrqFd {
    fn trigger(&self) {
        // Only a counter at its maximum refuses, and then an interrupt is pending anyway.
        let _ = self.0.write(1);
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

//! A PC's share of a VM descriptor: interrupt controllers, timer, MSRs, and vCPUs with their CPUID.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, OnceLock, Weak};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_USER_SPACE_MSR, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MSR_EXIT_REASON_FILTER, KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting, kvm_enable_cap, kvm_irqchip,
    kvm_irqchip__bindgen_ty_1, kvm_msi, kvm_pic_state, kvm_pit_config,
};
use kvm_ioctls::{Cap, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::routes::{PINS, Route, Routes};
use super::{Processor, cpu_model, cpuid, hyperv};
use crate::bus::lock;
use crate::config::Cpu;
use crate::config::msr::Window;
use crate::kvm::vm::errno;
use crate::kvm::{Error, Vcpu, Vm, ioctl};
use crate::memory::layout;
use crate::vm::{Msi, Pins};

/// The interrupt controllers that KVM has. The rest is the machine's, or is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Controllers {
    /// All of a PC's: local APICs, an I/O APIC and two 8259s.
    All,
    /// The local APICs alone: nothing is registered on KVM's I/O bus, so that a VM that is a moment old closes at once.
    LocalApics,
}

/// What a [`Vm`] keeps for this architecture.
#[derive(Debug)]
pub(in crate::kvm) struct Arch {
    routes: Mutex<Routes>,
    /// The pins that KVM has not, once there are some.
    pub(in crate::kvm) pins: OnceLock<Weak<Mutex<dyn Pins>>>,
    /// Synthetic interrupts by vCPU and source: their numbers, and what raises them.
    pub(super) sints: Mutex<BTreeMap<(u32, u32), (u32, EventFd)>>,
}

impl Arch {
    /// Sets up what all of a PC's VMs have. The memory slots are there, and no vCPU is.
    pub(in crate::kvm) fn set_up(fd: &VmFd, controllers: Controllers) -> Result<Self, Error> {
        ioctl("KVM_SET_IDENTITY_MAP_ADDR", fd.set_identity_map_address(layout::KVM_IDENTITY_MAP))?;
        ioctl("KVM_SET_TSS_ADDR", fd.set_tss_address(layout::KVM_TSS as usize))?;
        match controllers {
            Controllers::All => {
                ioctl("KVM_CREATE_IRQCHIP", fd.create_irq_chip())?;
                set_up_pics(fd, [0xff; 2])?;
            }
            Controllers::LocalApics => {
                let args = [PINS.into(), 0, 0, 0];
                let split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args, ..Default::default() };
                ioctl("KVM_ENABLE_CAP (KVM_CAP_SPLIT_IRQCHIP)", fd.enable_cap(&split))?;
            }
        }
        Ok(Self {
            routes: Mutex::new(Routes::new(controllers == Controllers::LocalApics)),
            pins: OnceLock::new(),
            sints: Mutex::default(),
        })
    }
}

impl Arch {
    /// Whether all of a PC's controllers are KVM's.
    pub(super) fn has_pics(&self) -> bool {
        !lock(&self.routes).is_split()
    }
}

impl Vm {
    /// Adds an 8254 timer in the kernel, at its ports 0x40 to 0x43 and on interrupt 0. Before the vCPUs.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn create_pit(&self) -> Result<(), Error> {
        // Port 0x61 too: its bits gate the timer's channel 2 and tell its output.
        let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        ioctl("KVM_CREATE_PIT2", self.fd.create_pit2(config))
    }

    /// Changes the interrupt routes, all at once or, if KVM refuses, not at all.
    pub(in crate::kvm) fn change_routes(&self, change: impl FnOnce(&mut Routes)) -> io::Result<()> {
        let mut routes = lock(&self.arch.routes);
        let mut new = routes.clone();
        change(&mut new);
        let table = KvmIrqRouting::from_entries(&new.table()).map_err(|_| io::ErrorKind::StorageFull)?;
        self.fd.set_gsi_routing(&table).map_err(errno)?;
        *routes = new;
        Ok(())
    }

    /// Changes the routes of the pins that KVM has not.
    pub(in crate::kvm) fn route_pins(&self, messages: &[Option<Msi>]) -> io::Result<()> {
        if !lock(&self.arch.routes).is_split() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.change_routes(|all| {
            for (gsi, message) in (0..PINS).zip(messages) {
                all.set(gsi, message.map_or(Route::Nowhere, Route::Msi));
            }
        })
    }

    /// Sends a message. False if no vCPU takes it.
    pub(in crate::kvm) fn send_message(&self, message: Msi) -> io::Result<bool> {
        let Msi { address, data } = message;
        let (address_lo, address_hi) = (address as u32, (address >> 32) as u32);
        let message = kvm_msi { address_lo, address_hi, data, ..Default::default() };
        self.fd.signal_msi(message).map(|taken| taken > 0).map_err(errno)
    }

    /// Who has the pins of a VM with [`Controllers::LocalApics`]. To be called once.
    pub fn set_pins(&self, pins: Weak<Mutex<dyn Pins>>) {
        // A second one would have none.
        let _ = self.arch.pins.set(pins);
    }

    /// Numbers for `count` interrupts that go nowhere yet.
    pub(in crate::kvm) fn new_routes(&self, count: usize) -> Vec<u32> {
        let mut routes = lock(&self.arch.routes);
        (0..count).map(|_| routes.add(Route::Nowhere)).collect()
    }

    /// Has the guest's uses of the MSRs that `denied` has come out as exits ([`Exit::MsrRead`](crate::kvm::exit::Exit::MsrRead)),
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

    /// Adds vCPU `id` of `count` with what `cpu` wants of the `processor`, or without a CPUID, if that is another's. vCPU 0 is runnable;
    /// the others wait for INIT and SIPI.
    ///
    /// # Errors
    /// The ioctl that failed; [`Error::CpuFeature`].
    pub fn create_vcpu(&self, id: u32, count: u32, cpu: &Cpu, processor: &Processor) -> Result<Vcpu, Error> {
        let fd = ioctl("KVM_CREATE_VCPU", self.fd.create_vcpu(u64::from(id)))?;
        let Some(supported) = &processor.supported else {
            if cpu.hyperv {
                hyperv::enable(&self.fd, &fd, cpu)?;
            }
            return Ok(Vcpu::new(fd, id, processor.sync_registers));
        };
        let frequency = cpuid::Frequencies {
            // 0 where the host's counter is not stable: the guest then finds out by itself.
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
        };
        let topology = cpuid::Topology { id, count };
        let mut table =
            cpuid::table(supported.as_slice(), topology, frequency, processor.tsc_deadline, cpu.nested);
        if cpu.hyperv {
            hyperv::show(&mut table, &hyperv::enable(&self.fd, &fd, cpu)?);
        }
        cpu_model::apply(&mut table, cpu)?;
        let table =
            kvm_bindings::CpuId::from_entries(&table).map_err(|_| Error::Missing("room for CPUID"))?;
        ioctl("KVM_SET_CPUID2", fd.set_cpuid2(&table))?;
        Ok(Vcpu::new(fd, id, processor.sync_registers))
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

/// As KVM's filter takes it.
fn range(window: &Window) -> MsrFilterRange<'_> {
    MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base: window.first,
        msr_count: window.count,
        bitmap: &window.allowed,
    }
}

//! What KVM does for the devices of test suites alone ([`TestVm`]).

mod routes;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use kvm_bindings::KvmIrqRouting;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::lock;
use crate::kvm::vm::{IrqFd, errno, eventfd};
use crate::kvm::x86_64::vm::set_up_pics;
use crate::kvm::{Error, Vm};
use crate::vm::Interrupt;
use crate::vm::testdev::TestVm;

pub(super) use routes::Routes;

impl Vm {
    /// Opens the `open` pins of the second 8259, and the cascade that leads to it.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn set_up_pic(&self, open: u8) -> Result<(), Error> {
        set_up_pics(&self.fd, [!(1 << 2), !open])
    }

    /// Gives KVM the table of interrupt routes.
    fn set_routes(&self, routes: &Routes) -> io::Result<()> {
        let table = KvmIrqRouting::from_entries(&routes.table()).map_err(|_| io::ErrorKind::StorageFull)?;
        self.fd.set_gsi_routing(&table).map_err(errno)
    }
}

impl TestVm for Vm {
    fn set_irq_level(&self, gsi: u32, high: bool) -> io::Result<()> {
        self.fd.set_irq_line(gsi, high).map_err(errno)
    }

    fn sint(&self, vcpu: u32, sint: u32, eoi: BorrowedFd<'_>) -> io::Result<Arc<dyn Interrupt>> {
        let mut routes = lock(&self.arch.routes);
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let gsi = routes.add((vcpu, sint), event.try_clone()?).ok_or(io::ErrorKind::AlreadyExists)?;
        let set = self
            .set_routes(&routes)
            .and_then(|()| self.fd.register_irqfd_with_resample(&event, &eventfd(eoi)?, gsi).map_err(errno));
        if let Err(error) = set {
            routes.remove((vcpu, sint));
            return Err(error);
        }
        Ok(Arc::new(IrqFd(event)))
    }

    fn remove_sint(&self, vcpu: u32, sint: u32) -> io::Result<()> {
        let mut routes = lock(&self.arch.routes);
        let (gsi, event) = routes.remove((vcpu, sint)).ok_or(io::ErrorKind::NotFound)?;
        self.fd.unregister_irqfd(&event, gsi).map_err(errno)?;
        self.set_routes(&routes)
    }
}

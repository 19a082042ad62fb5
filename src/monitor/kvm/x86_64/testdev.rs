//! What KVM does for the devices of test suites alone ([`TestVm`]).

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::lock;
use crate::kvm::vm::{IrqFd, errno, eventfd};
use crate::kvm::x86_64::routes::Route;
use crate::kvm::x86_64::vm::set_up_pics;
use crate::kvm::{Error, Vm};
use crate::vm::Interrupt;
use crate::vm::testdev::TestVm;

impl Vm {
    /// Opens the `open` pins of the second 8259, and the cascade that leads to it.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn set_up_pic(&self, open: u8) -> Result<(), Error> {
        set_up_pics(&self.fd, [!(1 << 2), !open])
    }
}

impl TestVm for Vm {
    fn sint(&self, vcpu: u32, sint: u32, eoi: BorrowedFd<'_>) -> io::Result<Arc<dyn Interrupt>> {
        let mut sints = lock(&self.arch.sints);
        if sints.contains_key(&(vcpu, sint)) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let mut gsi = 0;
        self.change_routes(|routes| gsi = routes.add(Route::Sint { vcpu, sint }))?;
        if let Err(error) = self.fd.register_irqfd_with_resample(&event, &eventfd(eoi)?, gsi) {
            self.change_routes(|routes| routes.remove(gsi))?;
            return Err(errno(error));
        }
        sints.insert((vcpu, sint), (gsi, event.try_clone()?));
        Ok(Arc::new(IrqFd(event)))
    }

    fn remove_sint(&self, vcpu: u32, sint: u32) -> io::Result<()> {
        let (gsi, event) = lock(&self.arch.sints).remove(&(vcpu, sint)).ok_or(io::ErrorKind::NotFound)?;
        self.fd.unregister_irqfd(&event, gsi).map_err(errno)?;
        self.change_routes(|routes| routes.remove(gsi))
    }
}

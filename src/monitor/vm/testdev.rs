//! What the devices of test suites ask of the hypervisor beside what all may: Hyper-V's synthetic interrupts.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::Interrupt;

/// `kvm::Vm` for [`legacy::testdev`](crate::legacy::testdev). Thread-safe; called by vCPU threads.
pub trait TestVm: Send + Sync {
    /// Interrupt source `sint` of vCPU `vcpu`'s interrupt controller of Hyper-V's (TLFS, SynIC): the guest gives it a vector.
    /// `eoi`, an eventfd, is signalled when the guest has ended the interrupt, or says that it has read its messages.
    ///
    /// # Errors
    /// The hypervisor refused, or it was asked for before and not removed.
    fn sint(&self, vcpu: u32, sint: u32, eoi: BorrowedFd<'_>) -> io::Result<Arc<dyn Interrupt>>;
    /// Undoes [`TestVm::sint`].
    ///
    /// # Errors
    /// There is none such.
    fn remove_sint(&self, vcpu: u32, sint: u32) -> io::Result<()>;
}

/// A [`TestVm`] that only takes notes.
#[cfg(test)]
pub mod fake {
    use super::*;
    use crate::vm::fake::FakeInterrupt;
    use std::collections::BTreeMap;
    use std::collections::btree_map::Entry;
    use std::sync::Mutex;

    /// Hands out [`FakeInterrupt`]s.
    #[derive(Debug, Default)]
    pub struct FakeTestVm {
        sints: Mutex<BTreeMap<(u32, u32), Arc<FakeInterrupt>>>,
    }

    impl FakeTestVm {
        /// The interrupt that [`TestVm::sint`] gave out, until it is removed.
        pub fn synthetic(&self, vcpu: u32, sint: u32) -> Option<Arc<FakeInterrupt>> {
            self.sints.lock().expect("not poisoned").get(&(vcpu, sint)).cloned()
        }
    }

    impl TestVm for FakeTestVm {
        fn sint(&self, vcpu: u32, sint: u32, _: BorrowedFd<'_>) -> io::Result<Arc<dyn Interrupt>> {
            match self.sints.lock().expect("not poisoned").entry((vcpu, sint)) {
                Entry::Occupied(_) => Err(io::ErrorKind::AlreadyExists.into()),
                Entry::Vacant(entry) => Ok(entry.insert(Arc::default()).clone()),
            }
        }

        fn remove_sint(&self, vcpu: u32, sint: u32) -> io::Result<()> {
            let removed = self.sints.lock().expect("not poisoned").remove(&(vcpu, sint));
            removed.map(|_| ()).ok_or(io::ErrorKind::NotFound.into())
        }
    }
}

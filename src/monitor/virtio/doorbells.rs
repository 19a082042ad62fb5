//! [`Doorbells`]: which of a device's kicks KVM turns into signals of an eventfd, and which come to the monitor as register writes.
//!
//! An eventfd on KVM's I/O bus (ioeventfd) is quick to ring and slow to put there: a memory slot, and the end of the VM, wait for a
//! grace period if they come within 15 ms of that. So kicks begin as exits, and a queue that is busy earns its ioeventfd.

use std::os::fd::AsFd;
use std::sync::Weak;

use super::core::Core;
use crate::vm::{IoEventAddress, Vm};

/// So many kicks of a queue come as exits. Together they take some 0.3 ms longer than they would by an ioeventfd, and a grace period
/// takes 13: a VM that lives for less than that rarely kicks a queue so often.
pub const EXITS: u32 = 64;

/// The kicks of a device's queues.
pub struct Doorbells {
    vm: Weak<dyn Vm>,
    /// Of each queue, those that came as exits; `None` if all are to, because the vCPU serves it.
    kicks: Vec<Option<u32>>,
}

impl Doorbells {
    /// For the queues of `core`, all of whose kicks come as exits until [`Doorbells::kicked`] has heard of enough.
    pub fn new(vm: Weak<dyn Vm>, core: &Core) -> Self {
        let queues = 0..core.doorbells().len();
        Self { vm, kicks: queues.map(|queue| (!core.served_by_vcpu(queue)).then_some(0)).collect() }
    }

    /// A kick of `queue` came as a register write, at `at`, where its doorbell is.
    pub fn kicked(&mut self, core: &Core, queue: usize, at: IoEventAddress) {
        let Some(Some(kicks)) = self.kicks.get_mut(queue) else { return };
        *kicks = kicks.saturating_add(1);
        if *kicks == EXITS
            && let (Some(vm), Some(doorbell)) = (self.vm.upgrade(), core.doorbells().get(queue))
            && let Err(error) = vm.ioeventfd(at, doorbell.as_fd())
        {
            // Slower, and no less right; it may do the next time.
            log::debug!("doorbell at {at:x?}: {error}");
            *kicks = 0;
        }
    }

    /// The queues that have an ioeventfd.
    pub fn earned(&self) -> impl Iterator<Item = usize> {
        let queues = self.kicks.iter().enumerate();
        queues.filter(|(_, kicks)| kicks.is_some_and(|kicks| kicks >= EXITS)).map(|(queue, _)| queue)
    }

    /// The hypervisor, if it is there still.
    pub fn vm(&self) -> Option<std::sync::Arc<dyn Vm>> {
        self.vm.upgrade()
    }
}

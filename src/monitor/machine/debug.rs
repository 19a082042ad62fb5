//! [`Debug`]: what a debugger needs: hold vCPUs, inspect those that wait, let them run on.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::channel;

use super::{AlreadyEnded, Error, Handle, Machine, Shared};
use crate::kvm::Vcpu;
use crate::memory::GuestRam;
use crate::vcpu::gate::VcpuRequest;
use crate::vcpu::{Listener, Stop};

/// A debugger's hold on a machine. Its devices go on while vCPUs wait.
#[derive(Clone)]
pub struct Debug {
    shared: Arc<Shared>,
    cpus: u32,
    /// Interrupts can be left pending during a step.
    pub blocks_interrupts: bool,
}

impl fmt::Debug for Debug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Debug").field("cpus", &self.cpus).finish_non_exhaustive()
    }
}

/// The machine has ended, or KVM said no.
pub type Result<T, E = AlreadyEnded> = std::result::Result<T, E>;

impl Machine {
    /// Puts the machine under a debugger, once and before it runs: each vCPU waits before its first instruction. `stopped` is
    /// told of every breakpoint and step, on the thread of the vCPU, which then waits.
    ///
    /// # Errors
    /// This host's KVM cannot debug guests.
    pub fn debug(&self, stopped: impl Fn(Stop) + Send + Sync + 'static) -> Result<Debug, Error> {
        let blocks_interrupts = self.vm.debugging()?;
        let _ = self.shared.vcpus.debugger.set(Listener(Box::new(stopped)));
        (0..self.vcpus.len()).for_each(|vcpu| self.shared.vcpus.gate.hold(vcpu));
        Ok(Debug { shared: self.shared.clone(), cpus: self.vcpus.len() as u32, blocks_interrupts })
    }
}

impl Debug {
    /// How many vCPUs there are: 0 and up.
    pub fn cpus(&self) -> u32 {
        self.cpus
    }

    /// Guest RAM.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.shared.vcpus.ram
    }

    /// Has every vCPU wait. Returns when all stand still.
    ///
    /// # Errors
    /// [`AlreadyEnded`]
    pub fn hold(&self) -> Result<()> {
        let held = self.shared.vcpus.gate.hold_all(|| self.shared.kick_all());
        if held { Ok(()) } else { Err(AlreadyEnded) }
    }

    /// Lets a vCPU run on.
    pub fn release(&self, vcpu: u32) {
        self.shared.vcpus.gate.release(vcpu as usize);
    }

    /// Calls `request` with a vCPU that waits (or will soon: it has stopped), on its own thread, and waits for the result.
    ///
    /// # Errors
    /// [`AlreadyEnded`], before or meanwhile.
    pub fn with<R: Send + 'static>(
        &self,
        vcpu: u32,
        request: impl FnOnce(&mut Vcpu, &GuestRam) -> R + Send + 'static,
    ) -> Result<R> {
        let (answer, answered) = channel();
        let ram = self.ram().clone();
        let request = move |vcpu: &mut Vcpu| {
            // Who asked waits below.
            let _ = answer.send(request(vcpu, &ram));
        };
        self.shared.vcpus.gate.send(vcpu as usize, VcpuRequest(Box::new(request)));
        answered.recv().map_err(|_| AlreadyEnded)
    }

    /// The means to end the machine.
    pub fn handle(&self) -> Handle {
        Handle(self.shared.clone())
    }
}

//! What this host's KVM offers guests of its processor: asked once for all vCPUs, and of no VM.

use kvm_ioctls::Cap;

use super::cpuid;
use crate::kvm::{Error, Kvm, ioctl};

/// The host's processor, as KVM offers it.
#[derive(Debug)]
pub struct Processor {
    /// None if the vCPUs are given another's.
    pub(super) supported: Option<kvm_bindings::CpuId>,
    pub(super) tsc_deadline: bool,
    pub(super) sync_registers: bool,
}

impl Processor {
    /// Whether it is Intel's, as far as is known.
    pub fn is_intels(&self) -> bool {
        self.supported.as_ref().is_some_and(|supported| cpuid::is_intels(supported.as_slice()))
    }
}

impl Kvm {
    /// Asks. On a host that is a guest itself, each of the hundred CPUIDs that KVM executes for that goes to its own host: 0.3 ms
    /// have been seen.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn processor(&self) -> Result<Processor, Error> {
        let max = kvm_bindings::KVM_MAX_CPUID_ENTRIES;
        let supported = ioctl("KVM_GET_SUPPORTED_CPUID", self.fd.get_supported_cpuid(max))?;
        Ok(Processor { supported: Some(supported), ..self.processor_of_others() })
    }

    /// For vCPUs that are given the CPUID of others: does not ask what this one has.
    pub fn processor_of_others(&self) -> Processor {
        Processor {
            supported: None,
            tsc_deadline: self.fd.check_extension(Cap::TscDeadlineTimer),
            sync_registers: self.fd.check_extension(Cap::SyncRegs),
        }
    }
}

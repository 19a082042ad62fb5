//! What this host's KVM offers guests of its processor: asked once for all vCPUs, and of no VM.

use std::arch::x86_64::__cpuid_count;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Cap;
use serde::{Deserialize, Serialize};

use super::{SavedVcpu, cpu_model, cpuid};
use crate::kvm::{Error, Kvm, Vcpu, ioctl};

/// The host's processor, as KVM offers it.
#[derive(Debug)]
pub struct Processor {
    /// None if the vCPUs are given another's.
    pub(super) supported: Option<CpuId>,
    pub(super) tsc_deadline: bool,
    pub(super) sync_registers: bool,
}

impl Processor {
    /// Whether it is Intel's, as far as is known.
    pub fn is_intels(&self) -> bool {
        self.supported.as_ref().is_some_and(|supported| cpuid::is_intels(supported.as_slice()))
    }
}

/// What a host is known by, as far as its guests' processors depend on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// The release of its kernel, with its KVM.
    kernel: String,
    /// Of CPUID: the vendor; what processor it is, and its features (leaves 0, 1 and 7).
    leaves: [u32; 9],
}

impl Signature {
    /// That of this host.
    pub fn of_host() -> Self {
        let [vendor, first, features] = [0, 1, 7].map(|leaf| __cpuid_count(leaf, 0));
        Self {
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            leaves: [
                vendor.ebx,
                vendor.ecx,
                vendor.edx,
                first.eax,
                first.ecx,
                first.edx,
                features.ebx,
                features.ecx,
                features.edx,
            ],
        }
    }
}

impl Vcpu {
    /// The features of the vCPU that was `saved`, by name, that none can have of `processor`. This one, which has not run, is one of
    /// its own afterwards.
    ///
    /// # Errors
    /// The ioctl that failed.
    pub fn lacks(&self, processor: &Processor, saved: &SavedVcpu) -> Result<Vec<&'static str>, Error> {
        self.lacks_of(processor, saved.cpuid())
    }

    fn lacks_of(
        &self,
        processor: &Processor,
        cpuid: &[kvm_cpuid_entry2],
    ) -> Result<Vec<&'static str>, Error> {
        let supported = processor.supported.as_ref().map_or(&[][..], |supported| supported.as_slice());
        let many = cpuid::Topology { id: 0, count: 2 };
        let frequencies = cpuid::Frequencies { tsc_khz: 0 };
        let table = cpuid::table(supported, many, frequencies, processor.tsc_deadline, true);
        let table = CpuId::from_entries(&table).map_err(|_| Error::Missing("room for CPUID"))?;
        ioctl("KVM_SET_CPUID2", self.fd.set_cpuid2(&table))?;
        // As KVM tells of what it was told: so was what is compared.
        let here = ioctl("KVM_GET_CPUID2", self.fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES))?;
        let has = cpu_model::names(here.as_slice());
        // The guest's own doing, by its control registers.
        let of_guest = ["osxsave", "ospke"];
        let names = cpu_model::names(cpuid).into_iter();
        Ok(names.filter(|name| !has.contains(name) && !of_guest.contains(name)).collect())
    }
}

impl Kvm {
    /// Asks. On a host that is a guest itself, each of the hundred CPUIDs that KVM executes for that goes to its own host: 0.3 ms
    /// have been seen.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn processor(&self) -> Result<Processor, Error> {
        let supported = ioctl("KVM_GET_SUPPORTED_CPUID", self.fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))?;
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Cpu;
    use crate::kvm::Controllers;
    use crate::memory::Memory;

    #[test]
    fn a_feature_that_no_processor_of_today_has_is_missed_and_no_other() {
        let Ok(kvm) = Kvm::open(Path::new("/dev/kvm")) else {
            eprintln!(
                "SKIP: a_feature_that_no_processor_of_today_has_is_missed_and_no_other: /dev/kvm does not open"
            );
            return;
        };
        let memory = Memory::new(&"16M".parse().unwrap()).unwrap();
        let vm = kvm.create_vm(&memory, Controllers::LocalApics).unwrap();
        let processor = kvm.processor().unwrap();
        let vcpu = vm.create_vcpu(0, 1, &Cpu::default(), &processor).unwrap();
        let mut table = vcpu.fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap().as_slice().to_vec();
        assert_eq!(vcpu.lacks_of(&processor, &table).unwrap(), Vec::<&str>::new());
        let leaf = table.iter_mut().find(|leaf| leaf.function == 1).unwrap();
        // The guest sets the one, and the other is of another architecture.
        leaf.ecx |= 1 << 27;
        leaf.edx |= 1 << 30;
        assert_eq!(vcpu.lacks_of(&processor, &table).unwrap(), ["ia64"]);
    }
}

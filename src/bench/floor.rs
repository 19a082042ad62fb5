//! The bare calls of a start: what the kernel takes for the least VM that runs an instruction, call by call, with no monitor
//! around it. A start of vmm is held against them.

use std::ptr::NonNull;
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// A call, or the calls that only come together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// open(2) of the device.
    Open,
    /// mmap(2) of guest memory, and its first page.
    Memory,
    /// KVM_CREATE_VM.
    Vm,
    /// KVM_SET_USER_MEMORY_REGION: one slot with all of it.
    Slot,
    /// KVM_CAP_SPLIT_IRQCHIP: the local APICs alone, as vmm has it.
    Irqchip,
    /// KVM_GET_SUPPORTED_CPUID.
    Supported,
    /// KVM_CREATE_VCPU, and the mapping of its kvm_run.
    Vcpu,
    /// KVM_SET_CPUID2, with all that is supported.
    Cpuid,
    /// KVM_GET_SREGS, KVM_SET_SREGS, KVM_SET_REGS.
    Registers,
    /// The first KVM_RUN, until it is back with the guest's OUT.
    Run,
    /// close(2) of the vCPU and the VM, whose last reference that is.
    Close,
}

impl Call {
    /// All of them, in the order in which they are made.
    pub const ALL: [Self; 11] = [
        Self::Open,
        Self::Memory,
        Self::Vm,
        Self::Slot,
        Self::Irqchip,
        Self::Supported,
        Self::Vcpu,
        Self::Cpuid,
        Self::Registers,
        Self::Run,
        Self::Close,
    ];
}

/// Where the guest's code is, in its first page but one.
const CODE: usize = 0x1000;
/// `out 0xf4, al`, a port that no interrupt controller has.
const OUT: [u8; 2] = [0xe6, 0xf4];

/// Anonymous memory.
struct Mapping(NonNull<u8>, usize);

impl Mapping {
    fn new(size: usize) -> rustix::io::Result<Self> {
        // SAFETY: a new mapping at a place of the kernel's choice: it replaces none.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        NonNull::new(start.cast()).map(|start| Self(start, size)).ok_or(rustix::io::Errno::NOMEM)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it is this mapping, whole, and nothing refers to it any more.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), self.1) };
    }
}

/// Makes all the calls once, for a guest with `mib` of memory; what each took, in the order of [`Call::ALL`].
///
/// # Errors
/// The call that failed, or what the guest did in place of its OUT.
pub fn sample(mib: u64) -> Result<[Duration; Call::ALL.len()], String> {
    let size = usize::try_from(mib << 20).map_err(|_| "too much memory")?;
    let failed = |call: &'static str| move |error: kvm_ioctls::Error| format!("{call}: {error}");
    let mut spans = [Duration::ZERO; Call::ALL.len()];
    let mut since = Instant::now();
    let mut done = |call: Call| {
        let now = Instant::now();
        spans[call as usize] = now - since;
        since = now;
    };

    let kvm = Kvm::new().map_err(failed("open /dev/kvm"))?;
    done(Call::Open);
    let memory = Mapping::new(size).map_err(|error| format!("map {mib} MiB: {error}"))?;
    assert!(size >= CODE + OUT.len(), "room for the code");
    // SAFETY: within the mapping, which nothing else knows of yet.
    unsafe { std::ptr::copy_nonoverlapping(OUT.as_ptr(), memory.0.as_ptr().add(CODE), OUT.len()) };
    done(Call::Memory);
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    done(Call::Vm);
    let region = kvm_userspace_memory_region {
        memory_size: size as u64,
        userspace_addr: memory.0.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the mapping outlives the VM: both are closed below, or dropped in the reverse order of their making.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    done(Call::Slot);
    // So many pins has the I/O APIC that KVM is told of and does not have.
    let split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: [24, 0, 0, 0], ..Default::default() };
    vm.enable_cap(&split).map_err(failed("KVM_CAP_SPLIT_IRQCHIP"))?;
    done(Call::Irqchip);
    let supported =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    done(Call::Supported);
    let mut vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
    done(Call::Vcpu);
    vcpu.set_cpuid2(&supported).map_err(failed("KVM_SET_CPUID2"))?;
    done(Call::Cpuid);
    let mut special = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    // Flat 32-bit protected mode, as PVH's entry has it: code, and data that may be written to.
    let (code, data) = (segment(8, 11), segment(16, 3));
    (special.cs, special.ds, special.es, special.ss) = (code, data, data, data);
    special.cr0 |= 1;
    vcpu.set_sregs(&special).map_err(failed("KVM_SET_SREGS"))?;
    let general = kvm_bindings::kvm_regs { rip: CODE as u64, rflags: 2, ..Default::default() };
    vcpu.set_regs(&general).map_err(failed("KVM_SET_REGS"))?;
    done(Call::Registers);
    match vcpu.run().map_err(failed("KVM_RUN"))? {
        VcpuExit::IoOut(0xf4, _) => {}
        other => return Err(format!("the guest did not write to its port: {other:?}")),
    }
    done(Call::Run);
    drop((vcpu, vm));
    done(Call::Close);
    Ok(spans)
}

/// All 4 GiB, 32-bit, present, of a type as descriptors have it (SDM vol. 3, 3.4.5.1).
fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment { limit: u32::MAX, selector, type_, present: 1, db: 1, s: 1, g: 1, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_is_made_and_takes_time() {
        if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
            eprintln!("SKIP: bare calls: this machine lacks /dev/kvm");
            return;
        }
        let spans = sample(32).unwrap();
        assert!(spans.iter().all(|span| *span > Duration::ZERO), "{spans:?}");
        // The guest has run: an entry and an exit take no less than a microsecond anywhere.
        assert!(spans[Call::Run as usize] > Duration::from_micros(1), "{spans:?}");
    }

    #[test]
    fn what_fails_is_named() {
        if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
            eprintln!("SKIP: bare calls: this machine lacks /dev/kvm");
            return;
        }
        // More than any address space has.
        let error = sample(1 << 40).unwrap_err();
        assert!(error.contains("map 1099511627776 MiB"), "{error}");
    }
}

//! Microsoft's hypervisor interface, as far as KVM speaks it: its leaves of CPUID, and what a vCPU needs for it.
//!
//! Source: Hypervisor Top-Level Functional Specification (TLFS), Feature Discovery for the leaves; Documentation/virt/kvm/api.rst, 4.118.

use kvm_bindings::{
    CpuId, KVM_CAP_HYPERV_CPUID, KVM_CAP_HYPERV_ENFORCE_CPUID, KVM_CAP_HYPERV_SYNIC2, KVM_MAX_CPUID_ENTRIES,
    KVMIO, kvm_cpuid_entry2 as Leaf, kvm_cpuid2, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_mut_ptr;
use vmm_sys_util::ioctl_iowr_nr;

use crate::config::Cpu;
use crate::kvm::{Error, ioctl};

ioctl_iowr_nr!(KVM_GET_SUPPORTED_HV_CPUID, KVMIO, 0xc1, kvm_cpuid2);

/// The leaf that names the interface: here the vendor, as the guests look for it.
const VENDOR: u32 = 0x4000_0000;
const FEATURES: u32 = 0x4000_0003;
const RECOMMENDATIONS: u32 = 0x4000_0004;
/// The last leaf that is shown: hardware features. Behind it are those of nested virtualization and of the debugger, whose
/// other halves would be the monitor's.
const LAST: u32 = 0x4000_0006;
/// Where KVM's own leaves go, as guests that know both look for them in steps of 0x100.
const KVM_LEAVES: u32 = 0x4000_0100;

/// What `FEATURES` has that needs a monitor's help, which there is none of: EBX Debugging, EnableExtendedHypercalls; EDX
/// GuestDebugging, DebugMsrs.
const UNANSWERED: (u32, u32) = (1 << 11 | 1 << 20, 1 << 1 | 1 << 11);
/// EAX of `RECOMMENDATIONS`: an enlightened VMCS, which is not switched on.
const ENLIGHTENED_VMCS: u32 = 1 << 14;

/// Switches the interface on for a vCPU that was just created, and gives KVM's leaves of it.
///
/// # Errors
/// [`Error::CpuFeature`] if this KVM has not the interface; the ioctl that failed.
pub(super) fn enable(vm: &VmFd, vcpu: &VcpuFd, cpu: &Cpu) -> Result<Vec<Leaf>, Error> {
    let has = |cap: u32| vm.check_extension_raw(cap.into()) > 0;
    if !has(KVM_CAP_HYPERV_CPUID) || !has(KVM_CAP_HYPERV_SYNIC2) {
        return Err(Error::CpuFeature { name: "hyperv".to_owned(), cpu: cpu.to_string() });
    }
    let enable = |cap, name| ioctl(name, vcpu.enable_cap(&kvm_enable_cap { cap, ..Default::default() }));
    enable(KVM_CAP_HYPERV_SYNIC2, "KVM_ENABLE_CAP (KVM_CAP_HYPERV_SYNIC2)")?;
    if has(KVM_CAP_HYPERV_ENFORCE_CPUID) {
        // What the leaves do not show the guest cannot use either.
        let args = [1, 0, 0, 0];
        let cap = kvm_enable_cap { cap: KVM_CAP_HYPERV_ENFORCE_CPUID, args, ..Default::default() };
        ioctl("KVM_ENABLE_CAP (KVM_CAP_HYPERV_ENFORCE_CPUID)", vcpu.enable_cap(&cap))?;
    }
    let mut leaves = CpuId::new(KVM_MAX_CPUID_ENTRIES).map_err(|_| Error::Missing("room for CPUID"))?;
    // SAFETY: the ioctl writes at most `nent` entries behind the header, for which the wrapper has room.
    let result =
        unsafe { ioctl_with_mut_ptr(vcpu, KVM_GET_SUPPORTED_HV_CPUID(), leaves.as_mut_fam_struct_ptr()) };
    if result < 0 {
        let source = std::io::Error::last_os_error();
        return Err(Error::Ioctl { ioctl: "KVM_GET_SUPPORTED_HV_CPUID", source });
    }
    Ok(leaves.as_slice().to_vec())
}

/// Puts KVM's `leaves` of the interface into `table`, in place of KVM's own, which move up.
pub(super) fn show(table: &mut Vec<Leaf>, leaves: &[Leaf]) {
    // The vendors' common leaf of frequencies is one of KVM's interface only; here there are MSRs for them.
    table.retain(|leaf| !(VENDOR + 2..KVM_LEAVES).contains(&leaf.function));
    for leaf in table.iter_mut().filter(|leaf| [VENDOR, VENDOR + 1].contains(&leaf.function)) {
        leaf.function += KVM_LEAVES - VENDOR;
        if leaf.function == KVM_LEAVES {
            leaf.eax = KVM_LEAVES + 1;
        }
    }
    for leaf in leaves.iter().filter(|leaf| (VENDOR..=LAST).contains(&leaf.function)) {
        let mut leaf = *leaf;
        match leaf.function {
            VENDOR => {
                let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| b"Microsoft Hv"[at + i]));
                (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (LAST, word(0), word(4), word(8));
            }
            FEATURES => {
                leaf.ebx &= !UNANSWERED.0;
                leaf.edx &= !UNANSWERED.1;
            }
            RECOMMENDATIONS => leaf.eax &= !ENLIGHTENED_VMCS,
            _ => {}
        }
        table.push(leaf);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvms_own_leaves_move_up_and_what_nobody_answers_is_hidden() {
        let leaf = |function| Leaf {
            function,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let mut table: Vec<_> = [0, 1, VENDOR, VENDOR + 1, VENDOR + 0x10, 0x8000_0000].map(leaf).to_vec();
        let theirs: Vec<_> = (VENDOR..=VENDOR + 6).chain([VENDOR + 0xa, VENDOR + 0x80]).map(leaf).collect();
        show(&mut table, &theirs);
        let functions: Vec<_> = table.iter().map(|leaf| leaf.function).collect();
        let expected = [0, 1, KVM_LEAVES, KVM_LEAVES + 1, 0x8000_0000].into_iter().chain(VENDOR..=VENDOR + 6);
        assert_eq!(functions, expected.collect::<Vec<_>>());
        let find = |function| table.iter().find(|leaf| leaf.function == function).unwrap();
        assert_eq!(find(KVM_LEAVES).eax, KVM_LEAVES + 1);
        assert_eq!((find(VENDOR).eax, find(VENDOR).ecx), (LAST, u32::from_le_bytes(*b"osof")));
        assert_eq!((find(FEATURES).ebx >> 11 & 1, find(FEATURES).edx >> 19 & 1), (0, 1));
        assert_eq!(find(RECOMMENDATIONS).eax >> 13 & 3, 1);
    }
}

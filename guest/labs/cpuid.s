# cpuid: which processor is this?
#
# CPUID always leaves the guest on VT-x, and on AMD-V when the hypervisor asks for it: so the hypervisor decides what the guest
# sees. The monitor gave KVM a table for each vCPU before it first ran (KVM_SET_CPUID2), and KVM answers from it alone.
#
# The guest asks three times, and notes the answers on a port that nobody answers: those exits are the ones that you see.
.include "lab.inc"

start:
    mov eax, 1
    cpuid
    shr ecx, 31                 # leaf 1, ECX bit 31: a hypervisor is present
    mov eax, ecx
    out NOTE, eax
    mov eax, 0x40000000         # the hypervisor's own leaves: who is it?
    cpuid
    mov eax, ebx                # "KVMK", of "KVMKVMKVM"
    out NOTE, eax
    mov eax, 0xb                # the extended topology
    cpuid
    mov eax, edx                # the x2APIC identifier: our number
    out NOTE, eax
    end

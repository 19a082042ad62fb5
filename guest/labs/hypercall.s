# hypercall: a guest that knows that it is one
#
# VMCALL (Intel) and VMMCALL (AMD) do nothing but leave the guest: a call to the hypervisor, as SYSCALL is one to a kernel. The
# number is in EAX, the answer comes back there. KVM has a few: to wake another vCPU, to send interrupts to many. Linux uses
# them where CPUID says that KVM is there. The monitor is asked for none of those that are tried here.
.include "lab.inc"

.macro hypercall number
    mov eax, \number
    cmp edi, 0x6c65746e         # "ntel": which of the two instructions is this processor's?
    je 1f
    vmmcall
    jmp 2f
1:  vmcall
2:  out NOTE, eax
.endm

start:
    xor eax, eax
    cpuid
    mov edi, ecx                # the end of the vendor's name
    hypercall 1                 # KVM_HC_VAPIC_POLL_IRQ: does nothing, and says 0
    hypercall 0x7fffffff        # nobody's number: -KVM_ENOSYS, -1000
    end

# msr: model-specific registers
#
# RDMSR and WRMSR reach registers by number. A bitmap says which of them the guest may use without leaving; KVM guards nearly
# all, keeps their values for each vCPU, and answers by itself. One that KVM does not know raises a general protection fault
# (#GP) in the guest, as a real processor would.
.include "lab.inc"

start:
    lidt idtr
    mov esp, 0x300000           # an exception pushes where it came from
    mov ecx, 0x1b               # IA32_APIC_BASE
    rdmsr
    out NOTE, eax               # 0xfee00900: the APIC's address, enabled, this is the boot processor
    mov ecx, 0x3b               # IA32_TSC_ADJUST
    mov eax, 0x1000
    xor edx, edx
    wrmsr                       # the time-stamp counter goes forward a little
    rdmsr
    out NOTE, eax               # KVM kept it: 0x1000
    mov ecx, 0xdead
    rdmsr                       # there is no such register: to the handler
    end

protection:
    mov al, 0x0d                # vector 13, #GP: the handler goes on from here, and not back
    out NOTE, al
    end

idt:
    .fill 13, 8, 0
    gate protection
idtr:
    .word . - idt - 1
    .long idt

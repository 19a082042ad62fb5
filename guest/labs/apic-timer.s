# apic-timer: a processor's alarm clock
#
# Each local APIC has a timer. KVM plays it with a timer of the host's kernel (or, on VT-x, with the preemption timer, which
# counts in the guest), and injects its interrupt. The guest sets 20 ms and halts: its thread sleeps for that long, and the
# host's processor is free.
.include "lab.inc"

start:
    lidt idtr
    mov esp, 0x300000           # an interrupt pushes where it came from
    mov eax, APIC
    mov dword ptr [eax + 0xf0], 0x1ff   # spurious vector; bit 8: the local APIC is on
    mov dword ptr [eax + 0x3e0], 0x0b   # count at the full rate: KVM's APIC has one tick a nanosecond
    mov dword ptr [eax + 0x320], 0x40   # the timer's vector, once
    mov dword ptr [eax + 0x380], 20000000   # initial count: go
    out NOTE, al
    sti
    hlt
    end                         # not reached: the handler goes on from there, and not back

handler:
    mov ebx, [eax + 0x390]      # current count: 0, it has run down
    mov dword ptr [eax + 0xb0], 0       # EOI
    mov eax, ebx
    out NOTE, eax
    end

idt:
    .fill 0x40, 8, 0
    gate handler
idtr:
    .word . - idt - 1
    .long idt

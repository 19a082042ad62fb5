# interrupt: a device wants something
#
# The host presses the machine's power button: it writes to an eventfd (irqfd), KVM raises pin 9 of its I/O APIC, the I/O APIC
# sends vector 0x30 to the local APIC, and KVM gives that to the processor with the next entry into the guest (injection). The
# guest's handler runs, and ends the interrupt with a write to the EOI register. All of that is KVM's: the monitor only wrote
# to the eventfd.
.include "lab.inc"

start:
    lidt idtr
    mov esp, 0x300000           # an interrupt pushes where it came from
    mov al, 0xff
    out 0x21, al                # the old interrupt controllers hear of the pin too: masked
    out 0xa1, al
    mov eax, APIC
    mov dword ptr [eax + 0xf0], 0x1ff   # spurious vector; bit 8: the local APIC is on
    mov ebx, IOAPIC
    mov dword ptr [ebx], 0x10 + 2 * 9 + 1       # pin 9, upper half:
    mov dword ptr [ebx + 0x10], 0               # to APIC 0
    mov dword ptr [ebx], 0x10 + 2 * 9           # lower half:
    mov dword ptr [ebx + 0x10], 0x30            # as vector 0x30, an edge
    mov dx, SERIAL
    mov al, 'r'
    out dx, al                  # ready: this is when the host presses the button
    mov ecx, 1
    mov eax, APIC
    sti                         # takes effect behind the next instruction, so that nothing is missed between the two
    hlt
    end                         # not reached: the handler goes on from there, and not back

handler:
    mov dword ptr [eax + 0xb0], 0       # EOI: done with it
    mov al, 0x30
    out NOTE, al
    end

idt:
    .fill 0x30, 8, 0
    gate handler
idtr:
    .word . - idt - 1
    .long idt

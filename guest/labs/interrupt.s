# interrupt: a device wants something
#
# The guest tells the I/O APIC what pin 5 means: vector 0x30, for APIC 0. The I/O APIC is the monitor's, which gives KVM that as
# a route. Then the host presses the machine's power button: it writes to an eventfd (irqfd), KVM sends the route's message to the
# local APIC, and gives the vector to the processor with the next entry into the guest (injection). The guest's handler runs, and
# ends the interrupt with a write to the EOI register. All of that is KVM's: the monitor only wrote to the eventfd.
.include "lab.inc"

start:
    lidt idtr
    mov esp, 0x300000           # an interrupt pushes where it came from
    mov eax, APIC
    mov dword ptr [eax + 0xf0], 0x1ff   # spurious vector; bit 8: the local APIC is on
    mov ebx, IOAPIC
    mov dword ptr [ebx], 0x10 + 2 * 5 + 1       # pin 5, upper half:
    mov dword ptr [ebx + 0x10], 0               # to APIC 0
    mov dword ptr [ebx], 0x10 + 2 * 5           # lower half:
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

# msix: from a device's place on the PCI bus to its vector
#
# The guest finds function 00:01.0 by the ports of configuration space, then uses the same registers by memory: it asks the
# base address register how large the function's memory is, switches its decoding on, and MSI-X, with a message for the queue in
# the table. A message is a write to a local APIC: its address says which processor, its data which vector. The monitor gives it
# to KVM as a route, behind an eventfd. Then the driver kicks, and spins. The device's worker fills the buffer and writes to the
# eventfd, and KVM delivers the vector: to a running processor by itself, where hardware posts interrupts, else by an exit.
.include "lab.inc"
.equ ECAM, 0xf8000000 + (1 << 15)   # 4 KiB of registers per function, 8 functions per device

.macro set size, at, value      # a register in the function's memory, which is at ESI
    mov \size ptr [esi + \at], offset \value
.endm

start:
    lidt idtr
    mov esp, 0x300000           # an interrupt pushes where it came from
    mov eax, APIC
    mov dword ptr [eax + 0xf0], 0x1ff   # spurious vector; bit 8: the local APIC is on
    mov eax, 0x80000800         # bus 0, device 1, function 0, register 0
    mov dx, 0xcf8
    out dx, eax
    mov dx, 0xcfc
    in eax, dx                  # who is there? A virtio device (1af4), of type 4
    mov edi, ECAM
    mov esi, [edi + 0x10]       # where is its memory?
    mov dword ptr [edi + 0x10], -1
    mov eax, [edi + 0x10]       # how large? Address bits that stay 0 are within it
    mov [edi + 0x10], esi
    and esi, -16                # the lowest bits are no address
    mov byte ptr [edi + 4], 6   # it answers, and may write to memory: messages are writes
    mov word ptr [edi + 0x42], 0x8000   # MSI-X is on. It is the function's first capability, at 0x40
    set dword, 0x4010, APIC     # the table's entry 1: to APIC 0,
    set dword, 0x4018, 0x31     # as vector 0x31,
    set dword, 0x401c, 0        # not masked
    set byte, 0x14, 3           # virtio 1.3, 4.1.4.3: ACKNOWLEDGE, DRIVER
    set dword, 0x08, 1; set dword, 0x0c, 1      # VIRTIO_F_VERSION_1, nothing else
    set byte, 0x14, 11          # FEATURES_OK
    set word, 0x18, 2; set word, 0x1a, 1        # queue 0 has two entries, and message 1
    set dword, 0x20, ring
    set dword, 0x28, ring+0x40
    set dword, 0x30, ring+0x80
    set word, 0x1c, 1; set byte, 0x14, 15       # the queue is ready, and DRIVER_OK
    sti
    set word, 0x3000, 0         # the doorbell of queue 0
1:  pause; jmp 1b               # until the vector comes

handler:
    mov dword ptr [APIC + 0xb0], 0      # EOI
    mov al, 0x31; out NOTE, al
    end

.balign 64
ring: .quad ring + 0x100, 2 << 32 | 8, 0, 0, 0, 0, 0, 0    # a buffer of 8 bytes to write to
    .quad 1 << 16; .fill 27, 8, 0   # one request is available, in entry 0
idt: .fill 0x31, 8, 0
    gate handler
idtr: .word . - idt - 1
    .long idt

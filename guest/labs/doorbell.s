# doorbell: the exit that does not reach the monitor
#
# A virtio driver puts a request into a ring in memory, and rings the doorbell: it writes to QueueNotify. That goes to the
# monitor as any other register, and always does so for the console's transmit queue, which its vCPU serves itself. A busy queue
# is another thing: at the 64th kick vmm tells KVM to turn just that write into a signal of an eventfd (ioeventfd). From then on
# KVM answers it by itself, the guest goes on at once, and another thread, the device's worker, takes the queue up meanwhile.
.include "lab.inc"

.macro register number, value   # virtio 1.3, 4.2.2; the device is at ESI
    mov dword ptr [esi + \number], offset \value
.endm

.macro driver queue, ring       # brings the device to DRIVER_OK with one queue of two entries
    register 0x70, 3            # Status: ACKNOWLEDGE, DRIVER
    register 0x24, 1
    register 0x20, 1            # VIRTIO_F_VERSION_1, nothing else
    register 0x70, 11           # FEATURES_OK
    register 0x30, \queue       # QueueSel
    register 0x38, 2            # QueueSize
    register 0x80, \ring        # descriptors,
    register 0x90, \ring+0x40 # available ring, used ring
    register 0xa0, \ring+0x80
    register 0x44, 1            # QueueReady
    register 0x70, 15           # DRIVER_OK
.endm

.macro ring buffer, flags       # a descriptor; the available ring: no interrupts, please
    .quad \buffer, \flags << 32 | 8
    .fill 6, 8, 0
    .quad 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
.endm

.macro kick queue, ring, count   # so many requests are available; waits until so many are used
    mov word ptr [\ring + 0x42], \count
    register 0x50, \queue       # QueueNotify
1:  pause
    cmp word ptr [\ring + 0x82], \count
    jne 1b
.endm

start:
    mov esi, 0xfe000000         # the entropy source
    driver 0, random
    mov ecx, 64                 # busy, if in vain: there is no request yet
2:  register 0x50, 0            # QueueNotify
    dec ecx
    jnz 2b
    kick 0, random, 1           # perhaps the worker finds this by itself: it looks when it starts
    kick 0, random, 2           # by now it sleeps, as a rule, until the doorbell rings
    mov esi, 0xfe001000         # the console, and its transmit queue
    driver 1, text
    kick 1, text, 1
    kick 1, text, 2
    end

.balign 64
random: ring bytes, 2           # 2: the device writes
text:   ring letters, 0
bytes:  .quad 0; letters: .ascii "doorbell"

# pio: port I/O, the oldest way to a device
#
# IN and OUT reach an address space of their own: 65536 ports. A guest's ports are guarded by a bitmap that the processor looks
# at (the I/O bitmaps on VT-x, the IOPM on AMD-V); all bits are set, so that every access leaves the guest. The processor says
# which port, how wide, and which direction; KVM hands that to the monitor, and the monitor asks its devices.
.include "lab.inc"

start:
    mov dx, SERIAL
    mov al, 'H'
    out dx, al                  # THR: the serial port sends this byte
    mov al, 'i'
    out dx, al
    add dx, 5
    in al, dx                   # LSR: may I send more?
    mov dx, 0x1234
    in eax, dx                  # no device is there: all ones, as on an idle bus
    end

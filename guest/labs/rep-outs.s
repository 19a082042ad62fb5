# rep-outs: one instruction, many bytes
#
# REP OUTSB sends a string to a port, REP INSB fills one from a port. Hardware tells a string from a single byte, and the exit
# says so. How many round trips a string takes is then the hypervisor's doing: KVM reads ahead for INS, and asks the monitor
# once for all elements; for OUTS it asks for each.
.include "lab.inc"

start:
    cld
    mov esi, offset text
    mov ecx, 6
    mov dx, SERIAL
    rep outsb                   # six bytes out of memory, to one port
    mov edi, 0x200000
    mov ecx, 6
    mov dx, SERIAL + 5
    rep insb                    # and six into memory
    end

text:
    .ascii "string"

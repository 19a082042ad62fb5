# triple-fault: when nobody is left to ask
#
# An exception calls its handler. If that fails, a double fault calls another; if that fails too, the processor gives up and
# shuts down, and a PC's board resets it. In a guest, that leaves to the hypervisor, which decides what it means: KVM tells the
# monitor (KVM_EXIT_SHUTDOWN), and vmm takes it for a crash, and reports where it was. (A kernel that wants a reset and has no
# other way takes its interrupt table away, limit and all, and does the same: that vmm can tell, on VT-x, where the registers are
# left as they were.)
#
# This guest says that it has an interrupt table too short for any entry, and executes an instruction that there is not.
.include "lab.inc"

start:
    lidt none
    mov al, 1
    out NOTE, al
    ud2                         # #UD, then #GP for want of a gate, then #DF, then the end

none:
    .word 1                     # the limit: the last byte of the table
    .long 0

# triple-fault: when nobody is left to ask
#
# An exception calls its handler. If that fails, a double fault calls another; if that fails too, the processor gives up and
# shuts down, and a PC's board resets it. In a guest, that leaves to the hypervisor, which decides what it means: KVM tells the
# monitor (KVM_EXIT_SHUTDOWN), and vmm takes it for a crash, and reports where it was.
#
# This guest says that it has an interrupt table of length zero, and executes an instruction that there is not.
.include "lab.inc"

start:
    lidt none
    mov al, 1
    out NOTE, al
    ud2                         # #UD, then #GP for want of a gate, then #DF, then the end

none:
    .word 0
    .long 0

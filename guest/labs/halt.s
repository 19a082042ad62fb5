# halt: a processor that has nothing to do
#
# HLT stops a processor until an interrupt comes. A hypervisor cannot let a guest stop the host's processor, so HLT leaves the
# guest. With its interrupt controllers in the kernel, KVM knows by itself when to go on: it puts the vCPU's thread to sleep,
# and the monitor hears nothing of it.
#
# This guest turns interrupts off first, so nothing will ever wake it. The lab lets it sleep for a moment, and ends it.
.include "lab.inc"

start:
    cli                         # no interrupt from here on
    hlt                         # sleep; nobody will wake it
    jmp start                   # where it would go on

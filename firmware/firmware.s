# The built-in firmware: from the reset vector to a kernel's first instruction. Read top to bottom, it is the order in which it
# runs; only the reset vector stands at the end, because there the processor starts: 16 bytes below 4 GiB.
#
# What it knows of the machine it asks fw_cfg for. Its memory is all below 640 KiB (memory.inc); it writes progress to port
# 0x80, and why it gave up to port 0x402.
.intel_syntax noprefix
.include "memory.inc"

.section .text, "ax"
.include "modes.s"      # real mode, protected mode, long mode
.include "main.s"       # what is done there, in order
.include "cpus.s"       # the other processors: started, set up, parked
.include "fw_cfg.s"     # asking the monitor
.include "acpi.s"       # the ACPI tables and the memory map
.include "linux.s"      # the kernel: Linux's boot protocol
.include "pvh.s"        # or PVH's

.section .reset, "ax"
.code16
reset:                  # CS = 0xf000 with base 0xffff0000, IP = 0xfff0: the only place where the two are so far apart
    jmp real

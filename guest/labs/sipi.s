# sipi: waking the second processor
#
# A PC's processors wait for INIT and a start-up IPI (SIPI), except for one. The SIPI carries a page number: 8 means "start at
# 0x8000, in real mode". The guest sends both through the interrupt command register of its local APIC. KVM keeps vCPU 1's
# thread asleep in KVM_RUN until then; sending is a write to KVM's own APIC, and the monitor sees nothing of it.
.include "lab.inc"

start:
    mov esi, offset low_load    # what the second processor will run, to the page where it starts
    mov edi, 0x8000
    mov ecx, offset low_size
    rep movsb
    mov eax, APIC
    mov dword ptr [eax + 0xf0], 0x1ff       # the local APIC is on
    mov dword ptr [eax + 0x310], 1 << 24    # to APIC 1:
    mov dword ptr [eax + 0x300], 0x4500     # INIT
    mov dword ptr [eax + 0x310], 1 << 24
    mov dword ptr [eax + 0x300], 0x4608     # SIPI, page 8
wait:
    pause
    cmp byte ptr [awake], 0
    je wait
    mov al, 2
    out NOTE, al                # there are two of us
    end

.section .low, "ax"
.code16
second:
    jmp 0:here                  # CS is 0x0800 yet; let it be 0, as the linker believes
here:
    mov al, 1
    out NOTE, al                # 16-bit code, on vcpu1
    mov byte ptr [awake], 1
    cli
1:  hlt
    jmp 1b
awake:
    .byte 0

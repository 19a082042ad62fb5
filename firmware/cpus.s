# The other processors wait for INIT and a start-up IPI, where reset has put them. A kernel could start them itself, and will: what
# it cannot know is what this firmware has set in its own processor's MSRs. Memory types that differ between processors are an error
# that Linux warns of. So they are all started once, set up alike, and parked: halted with interrupts off, they cost nothing,
# and INIT gets them out again.
park_others:
    mov dword ptr [PARKED], 0
    mov eax, FW_CFG_CPUS
    call fw_cfg_number
    movzx ebx, ax               # the item has two bytes
    dec ebx
    jle 2f

    lea rsi, [rip + trampoline]
    mov edi, TRAMPOLINE         # a start-up IPI names a page below 1 MiB
    mov ecx, offset trampoline_end - trampoline
    rep movsb
    mov edi, 0xfee00300         # the local APIC's interrupt command
    mov dword ptr [rdi], 0xc4500                    # to all but me: INIT
    mov dword ptr [rdi], 0xc4600 | TRAMPOLINE >> 12 # start at that page
    mov dword ptr [rdi], 0xc4600 | TRAMPOLINE >> 12 # and again, as the manual says, for who did not hear
    mov ecx, 1 << 26
1:  cmp [PARKED], ebx
    je 2f
    pause
    loop 1b
    lea rsi, [rip + no_others]
    jmp give_up
2:  ret

# In real mode, at TRAMPOLINE. DS has base 0.
.code16
trampoline:
    cli
    processor_msrs
    lock inc dword ptr [PARKED]
1:  hlt
    jmp 1b
trampoline_end:
.code64

# longmode: from real mode to protected mode to long mode
#
# Every PC's processor starts in the mode of 1978 and is led up by its firmware. The loader has spared this guest that, so it
# goes down to real mode first, and then up the whole way. After each step it notes 16, 32 or 64. What a step costs depends on
# the hypervisor: which control registers it guards, and whether hardware has a real mode for guests (Intel since Westmere).
.include "lab.inc"

start:
    mov esi, offset low_load
    mov edi, 0x8000             # real mode reaches the first MiB only: go there
    mov ecx, offset low_size
    rep movsb
    lgdt gdtr
    jmp 0x18:down               # 16-bit code, still in protected mode

.section .low, "ax"
.code16
down:
    mov eax, cr0
    and al, 0xfe                # PE off: real mode
    mov cr0, eax
    jmp 0:real                  # CS is a paragraph number again
real:
    mov al, 16
    out NOTE, al
    mov eax, cr0
    or al, 1                    # PE on: protected mode
    mov cr0, eax
    jmp 0x08:protected          # from here CS is a line of the GDT
.code32
protected:
    mov al, 32
    out NOTE, al
    mov dword ptr [0x9000], 0xa003  # one entry on each level, and a page of 2 MiB: address = address
    mov dword ptr [0xa000], 0xb003
    mov dword ptr [0xb000], 0x83
    mov eax, 0x9000
    mov cr3, eax
    mov eax, 0x20               # PAE
    mov cr4, eax
    mov ecx, 0xc0000080         # EFER
    mov eax, 0x100              # LME: long mode, once there is paging
    xor edx, edx
    wrmsr
    mov eax, 0x80000011         # PG: paging
    mov cr0, eax
    jmp 0x20:long
.code64
long:
    mov al, 64
    out NOTE, al
    end

gdt:
    .quad 0, 0xcf9b000000ffff, 0xcf93000000ffff, 0x9b000000ffff, 0xaf9b000000ffff   # -, 32-bit code, data, 16, 64
gdtr:
    .word . - gdt - 1
    .long gdt

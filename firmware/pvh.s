# PVH (Xen's x86/HVM direct boot ABI). The monitor has put an ELF kernel in its place already. It is entered in 32-bit protected
# mode without paging, EBX = start_info: the way back from long mode is the way there, backwards.
enter_pvh:
    xor eax, eax
    mov edi, PVH_TABLES
    mov ecx, 0x2000 / 4                 # the tables' page, and start_info's
    rep stosd
    mov eax, FW_CFG_INITRD_ADDR
    call fw_cfg_number
    mov [PVH_TABLES], eax               # the only module: the initrd
    mov eax, FW_CFG_INITRD_SIZE
    call fw_cfg_number
    mov [PVH_TABLES + 8], eax
    xor edx, edx
    test eax, eax
    setnz dl
    mov [BOOT_PARAMS + 12], edx         # nr_modules
    mov dword ptr [BOOT_PARAMS + 16], PVH_TABLES
    mov dword ptr [BOOT_PARAMS], 0x336ec578 # magic; version 1 has a memory map
    mov dword ptr [BOOT_PARAMS + 4], 1
    mov dword ptr [BOOT_PARAMS + 24], CMDLINE
    mov rax, [RSDP]
    mov [BOOT_PARAMS + 32], rax
    mov qword ptr [BOOT_PARAMS + 40], PVH_TABLES + 32
    mov ebx, [MAP_COUNT]
    mov [BOOT_PARAMS + 48], ebx
    mov esi, MAP
    mov edi, PVH_TABLES + 32
1:  mov ecx, 20                         # as in e820, and 4 bytes more
    rep movsb
    add edi, 4
    dec ebx
    jnz 1b
    mov eax, FW_CFG_KERNEL_ENTRY
    call fw_cfg_number
    mov ebp, eax
    lea rsi, [rip + gdt]                # a copy in RAM: a descriptor that LTR loads becomes busy
    mov edi, GDT
    mov ecx, offset gdt_end - gdt
    rep movsb
    lgdt [rip + ram_gdtr]
    mark 0x70
    push CODE32
    lea rax, [rip + compatible]
    push rax
    retfq                               # to compatibility mode: 32-bit code, by its descriptor
.code32
compatible:
    mov eax, 0x11
    mov cr0, eax                        # paging off, and with it long mode
    mov ecx, 0xc0000080
    xor eax, eax
    xor edx, edx
    wrmsr
    mov cr4, eax
    mov al, TASK
    ltr ax
    mov ebx, BOOT_PARAMS
    jmp ebp
.code64
ram_gdtr:
    .word gdt_end - gdt - 1
    .quad GDT

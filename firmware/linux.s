# Reads what is to be booted. A kernel comes as setup code, which has the header that tells of it, and as what is to run. Where the
# initrd goes the monitor says; command line and setup code are small, and their places are ours.
read_kernel:
    mov eax, FW_CFG_SETUP_SIZE
    call fw_cfg_number
    lea rsi, [rip + no_kernel]
    dec eax
    cmp eax, CMDLINE - SETUP    # none at all is also more than that
    jae give_up
    lea ecx, [rax + 1]
    mov eax, FW_CFG_SETUP_DATA
    mov edi, SETUP
    call fw_cfg_read
    mov eax, FW_CFG_CMDLINE_SIZE
    call fw_cfg_number
    movzx ecx, ax
    mov eax, FW_CFG_CMDLINE_DATA
    mov edi, CMDLINE
    call fw_cfg_read
    mov ebx, FW_CFG_INITRD_ADDR | FW_CFG_INITRD_SIZE << 8 | FW_CFG_INITRD_DATA << 16
    # falls through

# Reads an item whose address and size are items, too: their three numbers are the bytes of EBX. Its address in RAX.
fw_cfg_load:
    movzx eax, bl
    call fw_cfg_number
    push rax
    movzx eax, bh
    call fw_cfg_number
    mov ecx, eax
    mov rdi, [rsp]
    shr ebx, 16
    mov eax, ebx
    test ecx, ecx
    jz 1f
    call fw_cfg_read
1:  pop rax
    ret

# Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst). The setup code's header goes into an otherwise empty zero page; the
# monitor has filled in where the initrd is.
enter_linux:
    xor eax, eax
    mov edi, BOOT_PARAMS
    mov ecx, 0x1000 / 4
    rep stosd
    mov esi, SETUP + 0x1f1
    mov edi, BOOT_PARAMS + 0x1f1
    movzx ecx, byte ptr [SETUP + 0x201]    # the header ends where its first jump goes
    add ecx, 0x202 - 0x1f1
    rep movsb
    mov dword ptr [BOOT_PARAMS + 0x228], CMDLINE # cmd_line_ptr
    mov rax, [RSDP]
    mov [BOOT_PARAMS + 0x70], rax       # acpi_rsdp_addr
    mov eax, [MAP_COUNT]
    mov [BOOT_PARAMS + 0x1e8], al       # e820_entries
    imul ecx, eax, 20
    mov esi, MAP
    mov edi, BOOT_PARAMS + 0x2d0        # e820_table
    rep movsb
    mov ebx, FW_CFG_KERNEL_ADDR | FW_CFG_KERNEL_SIZE << 8 | FW_CFG_KERNEL_DATA << 16
    call fw_cfg_load
    mov rdi, rax
    mark 0x70
    mov esi, BOOT_PARAMS                # RSI: the zero page; paging on, identity; interrupts off
    add rdi, 0x200                      # the 64-bit entry
    jmp rdi

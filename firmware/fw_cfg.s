# fw_cfg, by DMA: 16 bytes in memory say what is wanted (control, length, address, all big-endian); their address goes to port 0x518,
# and when that instruction is done, the bytes are there.

# Is it there? Where nobody answers, a port reads as ones. Then the list of files, which is longer than that in no monitor.
find_fw_cfg:
    mov dx, 0x514
    in eax, dx
    cmp eax, 0x554d4551         # "QEMU", of "QEMU CFG"
    lea rsi, [rip + no_fw_cfg]
    jne give_up
    mov eax, FW_CFG_FILE_DIR
    mov edi, DIRECTORY
    mov ecx, DIRECTORY_SIZE
    # falls through

# Reads ECX bytes of item EAX to address RDI; zeroes behind the item's end. Changes RAX and RDX only.
fw_cfg_read:
    shl eax, 16
    or eax, 0b1010              # select that item, read
    bswap eax
    mov [REQUEST], eax
    mov eax, ecx
    bswap eax
    mov [REQUEST + 4], eax
    mov rax, rdi
    bswap rax
    mov [REQUEST + 8], rax
    mov eax, REQUEST
    bswap eax
    mov dx, 0x518
    out dx, eax
1:  mov eax, [REQUEST]          # becomes zero when it is done, or 1 (big-endian)
    test eax, eax
    jz 2f
    pause
    bt eax, 24
    jnc 1b
    lea rsi, [rip + refused]
    jmp give_up
2:  ret

# The number that item EAX holds, in EAX. Changes RCX, RDX, RDI.
fw_cfg_number:
    mov edi, NUMBER
    mov ecx, 4
    call fw_cfg_read
    mov eax, [NUMBER]
    ret

# The file with the name at RSI: its item in EAX, its size in ECX; EAX = 0 if there is none. Changes RDX, RDI.
fw_cfg_file:
    push rbx
    mov ebx, [DIRECTORY]
    bswap ebx                   # how many
    mov edx, DIRECTORY + 4
1:  xor eax, eax
    dec ebx
    js 3f
    lea rdi, [rdx + 8]
    call same_name
    lea rdx, [rdx + 64]
    jne 1b
    mov ecx, [rdx - 64]
    bswap ecx
    movzx eax, word ptr [rdx - 60]
    xchg al, ah
3:  pop rbx
    ret

# Whether the names at RSI and RDI are the same: ZF. They end in a zero, within 56 bytes. Changes RAX and RCX.
same_name:
    xor ecx, ecx
1:  mov al, [rsi + rcx]
    cmp al, [rdi + rcx]
    jne 2f
    inc ecx
    test al, al
    jz 2f
    cmp ecx, 56
    jb 1b
2:  ret

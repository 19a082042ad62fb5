# The monitor knows what to say in ACPI tables, the firmware knows where there is room: so the tables come as files, and a script
# tells how to link them. Its commands have 128 bytes each: a number, then fields.
#   1: put a file somewhere: name (at 4), alignment (60), zone (64)
#   2: add the address of a file to a field of another: names (4 and 60), offset (116), bytes of the field (120)
#   3: make the sum of some bytes of a file zero: name (4), offset of the byte to set (60), start (64), length (68)
# Everything goes below 1 MiB, where the copy of this ROM was; the memory map calls that range reserved.
place_acpi_tables:
    mov qword ptr [RSDP], 0
    lea rsi, [rip + script_name]
    call fw_cfg_file
    test eax, eax
    jz 9f                       # no tables: a kernel can do without
    cmp ecx, SCRIPT_SIZE
    ja bad_tables
    mov edi, SCRIPT
    call fw_cfg_read
    mov ebx, SCRIPT             # RBX: the command
    lea r14, [rbx + rcx]        # R14: the end of them
    mov r12d, ACPI_TABLES       # R12: free memory
    mov r13d, FILES             # R13: the end of the list of files that are placed
1:  cmp rbx, r14
    jae 9f
    mov eax, [rbx]
    dec eax
    jz place
    dec eax
    jz link
    dec eax
    jz checksum
next:
    sub rbx, -128
    jmp 1b
9:  ret

place:
    lea rsi, [rbx + 4]
    call fw_cfg_file
    test eax, eax
    jz bad_tables
    mov edx, [rbx + 60]         # up to a multiple of the alignment, which is a power of two
    dec edx
    add r12, rdx
    not rdx
    and r12, rdx
    mov rdi, r12
    add r12, rcx
    cmp r12, ONE_MIB
    ja bad_tables
    call fw_cfg_read
    cmp byte ptr [rbx + 64], 2  # the zone where a kernel searches: it is the root pointer
    jne 2f
    mov [RSDP], rdi
2:  mov rdx, rdi
    mov rdi, r13
    mov ecx, 56
    rep movsb                   # RSI is still the name
    mov [rdi], rdx
    add r13, 64
    jmp next

link:
    lea rsi, [rbx + 60]
    call placed
    mov r8, rax
    lea rsi, [rbx + 4]
    call placed
    mov edx, [rbx + 116]
    add rdx, rax
    mov al, [rbx + 120]
    cmp al, 8
    jne 1f
    add [rdx], r8
    jmp next
1:  cmp al, 4
    jne bad_tables
    add [rdx], r8d
    jmp next

checksum:
    lea rsi, [rbx + 4]
    call placed
    mov edx, [rbx + 60]
    add rdx, rax                # the byte
    mov esi, [rbx + 64]
    add rsi, rax
    mov ecx, [rbx + 68]
    xor edi, edi
1:  lodsb
    sub dil, al
    loop 1b
    add [rdx], dil
    jmp next

# The address of the file with the name at RSI, in RAX. Changes RCX, RDI.
placed:
    mov edi, FILES
1:  cmp rdi, r13
    jae bad_tables
    call same_name
    lea rdi, [rdi + 64]
    jne 1b
    mov rax, [rdi - 8]
    ret

bad_tables:
    lea rsi, [rip + no_tables]
    jmp give_up

# The memory map. etc/e820 says where there is RAM; a PC's hole below 1 MiB is cut out of the range from 0 on here, because what lies there
# is the firmware's business.
read_memory_map:
    lea rsi, [rip + map_name]
    call fw_cfg_file
    lea rsi, [rip + no_map]
    test eax, eax
    jz give_up
    cmp ecx, 20 * 60            # what the zero page holds, less ours
    ja give_up
    mov edi, MAP + 40           # two more will stand before them
    call fw_cfg_read
    xchg eax, ecx
    xor edx, edx
    mov ecx, 20
    div ecx
    mov ecx, eax
    add eax, 2
    mov [MAP_COUNT], eax
    mov ebx, MAP + 20
    xor eax, eax
1:  add rbx, 20                 # RAM from address 0 on: as a rule the first
    dec ecx
    js give_up
    cmp [rbx], rax
    jne 1b
    mov qword ptr [rbx], ONE_MIB
    sub qword ptr [rbx + 8], ONE_MIB
    mov [MAP], rax
    mov qword ptr [MAP + 8], LEGACY_HOLE
    mov dword ptr [MAP + 16], 1
    mov qword ptr [MAP + 20], ACPI_TABLES
    mov qword ptr [MAP + 28], ONE_MIB - ACPI_TABLES
    mov dword ptr [MAP + 36], 2 # reserved
    ret

script_name: .asciz "etc/table-loader"
map_name:    .asciz "etc/e820"

# Step 1: real mode, the processor of 1978. Segments are base addresses divided by 16, but for CS, which still has the base that
# reset gave it: this code is at the end of 4 GiB, where no segment reaches. The next far jump ends that, so it must be the last one
# in this mode.
.code16
real:
    cli                         # no interrupts: there is nobody to take them
    cld
    mark 0x10
    # DS has base 0 and cannot see this ROM; CS can. The 32-bit form loads all of GDTR's base, not 24 bits of it.
    data32 lgdt cs:[gdtr - 0xffff0000]

    # CR0.PE: from the next jump on, a selector is an index into the GDT. CR0 also loses CD and NW, with which reset had turned
    # the caches off; ET has been fixed since the 486.
    mov eax, 0x00000011
    mov cr0, eax
    .byte 0x66, 0xea            # jmp CODE32:protected, with a 32-bit offset
    .long protected
    .word CODE32

# Step 2: protected mode, 32 bits. Flat segments: an address is an address.
.code32
protected:
    mov eax, DATA
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov ss, eax
    mov esp, STACK
    mark 0x20

    # Long mode needs page tables. Here the least that the next steps stand on: addresses that mean themselves in the first 2 MiB,
    # where the tables and the stack are, and in the last 2 MiB below 4 GiB, where this ROM is. Bits: present, writable, large.
    mov edi, PAGE_TABLES
    xor eax, eax
    mov ecx, 0x6000 / 4
    rep stosd
    mov dword ptr [PAGE_TABLES], PAGE_TABLES + 0x1003           # PML4: the PDPT
    mov dword ptr [PAGE_TABLES + 0x1000], PAGE_TABLES + 0x2003  # PDPT: a directory for each GiB
    mov dword ptr [PAGE_TABLES + 0x1008], PAGE_TABLES + 0x3003
    mov dword ptr [PAGE_TABLES + 0x1010], PAGE_TABLES + 0x4003
    mov dword ptr [PAGE_TABLES + 0x1018], PAGE_TABLES + 0x5003
    mov dword ptr [PAGE_TABLES + 0x2000], 0x83
    mov dword ptr [PAGE_TABLES + 0x5ff8], 0xffe00083

    # Step 3: long mode, in the four steps of AMD's and Intel's manuals.
    mov eax, PAGE_TABLES
    mov cr3, eax                # 1. the tables
    mov eax, 1 << 5
    mov cr4, eax                # 2. CR4.PAE: entries have 8 bytes
    mov ecx, 0xc0000080
    xor edx, edx
    mov eax, 1 << 8
    wrmsr                       # 3. EFER.LME: with paging, long mode
    mov eax, 0x80000011
    mov cr0, eax                # 4. CR0.PG. Now EFER.LMA is set, and this is its compatibility mode: 32-bit code still
    .byte 0xea                  # jmp CODE64:long: CS.L is what makes code 64-bit
    .long long
    .word CODE64

.balign 8
# In ROM, so the processor must not want to mark a descriptor as accessed (bit 40): it is already, in each.
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    # CODE32: base 0, 4 GiB, 32-bit
    .quad 0x00af9b000000ffff    # CODE64: L in place of D
    .quad 0x00cf93000000ffff    # DATA
    .quad 0x0000890000000067    # TASK: PVH wants a task register with something in it
gdt_end:
gdtr:
    .word gdt_end - gdt - 1
    .long gdt
    .long 0                     # the 64-bit form's upper half

# Long mode. What there is to do, in order.
.code64
long:
    lgdt [rip + gdtr]           # the same table, by its 64-bit address
    mark 0x30
    call map_four_gib
    call set_up_processor
    call find_fw_cfg
    call park_others
    mark 0x40
    call place_acpi_tables
    call read_memory_map
    mark 0x50
    call read_kernel            # and its command line and initrd
    mark 0x60
    cmp dword ptr [SETUP], 0x464c457f # "\x7fELF"
    je enter_pvh
    jmp enter_linux

# The rest of the first 4 GiB. The directories follow one another, so their 2048 entries do. No entry that was there changes, and one
# that was absent is in no cache of the processor's: nothing to flush.
map_four_gib:
    mov edi, PAGE_TABLES + 0x2000
    mov eax, 0x83
    mov ecx, 2048
1:  stosq
    add rax, 0x200000
    loop 1b
    ret

# What a kernel expects firmware to have set on every processor. Also run by the others, in real mode: it is the same code there,
# for none of it depends on the mode.
.macro processor_msrs
    mov ecx, 0x2ff              # MTRR default type: memory is write-back where no MTRR says otherwise
    mov eax, 0x806              # E, type 6
    xor edx, edx
    wrmsr
    mov ecx, 0x1a0              # IA32_MISC_ENABLE
    rdmsr
    or al, 1                    # fast string operations
    wrmsr
.endm

set_up_processor:
    processor_msrs
    ret

# Says why at port 0x402, and ends the run: without an IDT, an invalid instruction is a triple fault.
# RSI: the reason, zero-terminated.
give_up:
    mov dx, 0x402
1:  lodsb
    out dx, al
    test al, al
    jnz 1b
    mov al, '\n'
    out dx, al
    ud2

no_fw_cfg:  .asciz "no fw_cfg with DMA"
no_tables:  .asciz "ACPI tables: not all there, or too large"
no_map:     .asciz "no memory map: etc/e820"
no_kernel:  .asciz "there is no kernel to boot"
no_others:  .asciz "the other processors do not start"
refused:    .asciz "fw_cfg could not read that"

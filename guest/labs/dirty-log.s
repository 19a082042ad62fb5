# dirty-log: which pages has the guest written to?
#
# To move a running machine, or to save only what changed, the monitor must know which pages the guest wrote to. It asks KVM
# for a log. KVM takes the right to write away in the second page table, so that the first write to each page leaves the guest:
# KVM sets the page's bit and gives the right back (or hardware writes a log by itself: PML on VT-x). Each time the monitor
# fetches the log, it begins anew. Nothing of this reaches the monitor, nor the guest.
#
# After each round the guest writes a byte to the serial port, and the host fetches the log before it goes on.
.include "lab.inc"

start:
    mov dx, SERIAL
    mov ebx, 0x200000
    mov dword ptr [ebx], 1          # round 1: two pages
    mov dword ptr [ebx + 0x3000], 1
    mov al, '1'
    out dx, al
    mov eax, [ebx]                  # round 2: a read leaves no trace,
    mov dword ptr [ebx + 0x5000], 1 # and a page that is written to twice
    mov dword ptr [ebx + 0x5ff0], 1 # is one page
    mov al, '2'
    out dx, al
    mov eax, [ebx + 0x5000]         # round 3: nothing
    mov al, '3'
    out dx, al
    end

# mmio: an address without memory, and the second page table
#
# Most devices are reached by ordinary loads and stores. The guest's physical addresses go through a second page table that is
# the hypervisor's (EPT on VT-x, nested paging on AMD-V). Where a device is, it maps nothing: the access faults, and the
# processor says at which address. What was to be read or written it does not say: KVM decodes the instruction to find out.
#
# At 0xfe000000 this machine has a virtio device (an entropy source), with its registers as virtio 1.3, 4.2.2 has them.
.include "lab.inc"

start:
    mov ebx, 0xfe000000
    mov eax, [ebx]              # MagicValue: "virt"
    mov ecx, [ebx + 8]          # DeviceID: 4, an entropy source
    mov dword ptr [ebx + 0x14], 1   # DeviceFeaturesSel: the upper half, please
    mov edx, [ebx + 0x10]       # DeviceFeatures: bit 0 is VIRTIO_F_VERSION_1
    mov esi, [0x200000]         # the same instruction where there is memory
    mov ebx, 0xd0000000
    mov edi, [ebx]              # neither memory nor a device
    end

//! A PC's guest physical addresses and interrupt lines.
//!
//! ```text
//! 0x0000_0000  RAM  boot_params, page tables, GDT, command line (below 640 KiB)
//! 0x000a_0000  ---  legacy video and option ROM hole (nothing there)
//! 0x000e_0000  RAM  ACPI tables, then MP tables (reserved in the memory map; where the specs let a guest search), and in the
//!                   last 16 bytes the reset vector as 16-bit code jumps to it
//! 0x0010_0000  RAM  kernel, then free memory, initrd as high as it may be
//! 0xc000_0000  ---  the hole below 4 GiB: devices, no RAM
//!   0xe000_0000  memory of PCI functions    384 MiB; only with `transport=pci`, as the next
//!   0xf800_0000  PCI configuration space    1 MiB
//!   0xfe00_0000  virtio-mmio slots          4 KiB each; with `transport=pci` memory of functions that firmware moves there
//!   0xfec0_0000  I/O APIC                   (in the kernel where there are 8259s)
//!   0xfee0_0000  local APIC                 (in the kernel)
//!   0xfeff_b000  VM generation ID           with firmware, read-only
//!   0xfeff_c000  KVM's identity map and TSS (16 KiB, Intel without unrestricted guest)
//!   0xff00_0000  firmware, ends at 4 GiB    16 MiB at most, read-only (the test device's memory, if asked for, at its start)
//! 0x1_0000_0000 RAM the rest of it
//! the next GiB  --- memory of PCI functions, for guests that move it there: 1 GiB
//! ```
//!
//! Ports: 0x3f8 COM1, 0x60/0x64 i8042, 0x505 pvpanic, 0x600 ACPI sleep, reset and event registers, 0xcf9 reset control; optional 0x80 and 0xf4, and
//! 0x40 PIT, 0x3d4 text screen, 0xe0, 0x2000 and 0x3000 for the test device; with firmware 0x510 fw_cfg, 0x402 its messages;
//! with firmware or if asked for 0x70 RTC and CMOS.

use std::ops::Range;

/// End of conventional memory: above it a PC has its legacy hole.
pub const LOW_END: u64 = 0xa_0000;
/// The BIOS data area's word with the KiB of conventional memory: before they look for MP tables, kernels look here.
pub const BASE_MEMORY: u64 = 0x413;
/// Where boot_params (the zero page) or PVH's start_info goes. 4 KiB.
pub const BOOT_PARAMS: u64 = 0x7000;
/// PVH start_info's modules and memory map. 4 KiB.
pub const PVH_TABLES: u64 = 0x6000;
/// The boot GDT (a handful of entries).
pub const GDT: u64 = 0x500;
/// PML4, then PDPT and four page directories: the first 4 GiB, identity-mapped by 2 MiB pages. 24 KiB.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line, its NUL included. Linux takes at most 2048 (COMMAND_LINE_SIZE) on x86.
pub const CMDLINE_SIZE: u64 = 0x1_0000;
/// ACPI tables; the RSDP is first, in the range that ACPI 6.5, 5.2.5.1 lets a guest search.
pub const ACPI: u64 = 0xe_0000;
/// The VM generation ID, 16 bytes: between the RSDP, which has 36 bytes, and the tables, which are aligned to 64. It needs no page of
/// its own there, and is out of what a guest uses as RAM.
pub const GENERATION: u64 = ACPI + 48;
/// Room for the ACPI tables.
pub const ACPI_SIZE: u64 = 0x1_e000;
/// The MultiProcessor Specification's tables end here at the latest: in the last range that it (1.4, 4) lets a guest search.
pub const MP_TABLES_END: u64 = RESET_VECTOR;
/// Room for them.
pub const MP_TABLES_SIZE: u64 = MP_TABLES_END - (ACPI + ACPI_SIZE);
/// F000:FFF0. A PC's firmware is here, too, and software jumps to it for a reset.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// The BIOS data area's word in which software leaves word for the firmware before a reset: 0x1234 for a warm one.
pub const RESET_FLAG: u64 = 0x472;
/// What is there, and in the word behind it, until software writes to it: neither of the values that mean something.
pub const RESET_FLAG_UNTOUCHED: u16 = 0xffff;
/// Where a kernel's protected-mode part goes, and the start of ordinary memory.
pub const HIGH_RAM: u64 = 0x10_0000;

/// The hole below 4 GiB in which there is no RAM.
pub const HOLE: Range<u64> = 0xc000_0000..0x1_0000_0000;
/// Where PCI functions' memory is.
pub const PCI_MEMORY: Range<u64> = 0xe000_0000..0xf800_0000;
/// Where SeaBIOS, which does not know this host bridge, moves it: as high as may be below the I/O APIC. Virtio-mmio's slots are there
/// where there is no PCI bus.
pub const PCI_MEMORY_FIRMWARE: Range<u64> = VIRTIO_MMIO..IO_APIC;
/// Alignment and bytes of the other place where it may be, above 4 GiB. Functions take up to 1 MiB: there is room to move all of them at once.
const PCI_MEMORY_HIGH: u64 = 1 << 30;
/// Physical addresses that each processor with 64-bit code has, in bits (Intel SDM vol. 3, 4.1.4).
const ADDRESS_BITS: u32 = 36;
/// PCI configuration space by memory (ECAM), for bus 0.
pub const PCI_ECAM: u64 = 0xf800_0000;
/// First virtio-mmio slot.
pub const VIRTIO_MMIO: u64 = 0xfe00_0000;
/// The I/O APIC's base; its identifier is 0 and its first interrupt GSI 0.
pub const IO_APIC: u64 = 0xfec0_0000;
/// Pins of KVM's own, and the most that the machine's has: how many it has the inventory says.
pub const IO_APIC_PINS: u32 = 24;
/// The local APICs' base.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Bytes of registers of either APIC.
pub const APIC_SIZE: u64 = 0x1000;
/// The page of the VM generation ID where firmware puts the ACPI tables where it likes.
pub const GENERATION_BY_FIRMWARE: u64 = 0xfeff_b000;
/// KVM's identity-map page.
pub const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
/// KVM's three TSS pages.
pub const KVM_TSS: u64 = 0xfeff_d000;
/// Bytes that KVM has from [`KVM_IDENTITY_MAP`] on.
pub const KVM_SIZE: u64 = 0x4000;

/// Where firmware ends. The reset vector is 16 bytes before it.
pub const ROM_END: u64 = 0x1_0000_0000;
/// Room for firmware.
pub const ROM_MAX: u64 = 16 << 20;
/// As much of the firmware's end lies below 1 MiB, too, where 16-bit code reaches it: a copy in RAM.
pub const ROM_SHADOW_MAX: u64 = 128 << 10;

/// PCI's CONFIG_ADDRESS; CONFIG_DATA follows at 0xcfc.
pub const PCI_CONFIG: u64 = 0xcf8;
/// The chipset's reset control register.
pub const RESET_CONTROL: u64 = 0xcf9;
/// Where a guest says that its kernel panicked.
pub const PVPANIC: u64 = 0x505;
/// COM1's first port.
pub const COM1: u64 = 0x3f8;
/// Ports at [`COM1`].
pub const COM1_SIZE: u64 = 8;
/// COM1's interrupt.
pub const COM1_GSI: u32 = 4;
/// The 8254 timer's ports, in the kernel.
pub const PIT: u64 = 0x40;
/// Ports at [`PIT`].
pub const PIT_SIZE: u64 = 4;
/// i8042 data port; the command port is 0x64.
pub const I8042: u64 = 0x60;
/// Ports from [`I8042`] to its command port.
pub const I8042_SIZE: u64 = 5;
/// ACPI sleep control, sleep status, reset and event registers (see `legacy::acpi_pm`).
pub const ACPI_PM: u64 = 0x600;
/// Ports at [`ACPI_PM`].
pub const ACPI_PM_SIZE: u64 = 8;
/// The registers by which PCI functions come and go (`pci::hot_plug`).
pub const PCI_HOT_PLUG: u64 = 0x610;
/// The Generic Event Device's interrupt (power button, generation ID, PCI functions that come and go).
pub const ACPI_GSI: u32 = 5;
/// Port of the POST code, used for boot marks when asked for.
pub const POST: u64 = 0x80;
/// The test device's register and page port (`legacy::testdev::pc`).
pub const TEST_PORTS: u64 = 0xe0;
/// The test device's interrupt lines, a port each.
pub const TEST_IRQS: u64 = 0x2000;
/// The test device for Hyper-V's interrupt controller (`legacy::testdev::hyperv`).
pub const HYPERV_TEST: u64 = 0x3000;
/// The test device's memory.
pub const TEST_MEMORY: u64 = 0xff00_0000;
/// fw_cfg's selector; its data and DMA registers follow.
pub const FW_CFG: u64 = 0x510;
/// Index of the CMOS; its data port follows.
pub const CMOS: u64 = 0x70;
/// Index of the text screen's controller; its data port follows.
pub const CRTC: u64 = 0x3d4;
/// Where firmware writes its messages.
pub const DEBUG_PORT: u64 = 0x402;
/// Default port of the debug-exit device.
pub const DEBUG_EXIT: u64 = 0xf4;

/// The interrupts that virtio-mmio devices get, in order: the lowest that are free, because a guest programs every pin up to the
/// highest. An RTC's (8) is the last.
pub const VIRTIO_GSIS: [u32; 18] = [6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 8];
/// Likewise where there are 8259s: those that do not reach these first.
pub const VIRTIO_GSIS_BESIDE_PICS: [u32; 18] =
    [16, 17, 18, 19, 20, 21, 22, 23, 6, 7, 9, 10, 11, 12, 13, 14, 15, 8];

/// The interrupts that the INTA# pins of PCI functions are wired to, in turn by their device number.
pub const PCI_GSIS: [u32; 8] = [16, 17, 18, 19, 20, 21, 22, 23];

/// Where `size` bytes of RAM lie: below the hole, and above 4 GiB if they do not fit there.
pub fn ram(size: u64) -> Vec<Range<u64>> {
    let low = size.min(HOLE.start);
    let mut ranges = vec![0..low];
    if size > low {
        ranges.push(HOLE.end..HOLE.end + (size - low));
    }
    ranges
}

/// Where PCI functions' memory may be above `size` bytes of RAM, too. `None` where that takes an address bit more than RAM and
/// every processor have: the guest might not reach it.
pub fn pci_memory_high(size: u64) -> Option<Range<u64>> {
    let ram_end = ram(size).last()?.end;
    let start = ram_end.max(HOLE.end).next_multiple_of(PCI_MEMORY_HIGH);
    let end = start + PCI_MEMORY_HIGH;
    let bits = |end: u64| (end - 1).ilog2() + 1;
    (bits(end) <= ADDRESS_BITS.max(bits(ram_end))).then_some(start..end)
}

#[cfg(test)]
mod tests {
    use super::super::{MAX_RAM, VIRTIO_MMIO_SIZE};
    use super::*;

    #[test]
    fn ram_goes_around_the_hole() {
        const GIB: u64 = 1 << 30;
        assert_eq!(ram(128 << 20), [0..128 << 20]);
        assert_eq!(ram(3 * GIB), [0..3 * GIB]);
        assert_eq!(ram(5 * GIB), [0..3 * GIB, 4 * GIB..6 * GIB]);
        for size in [1024 * GIB, MAX_RAM] {
            assert_eq!(ram(size).iter().map(|r| r.end - r.start).sum::<u64>(), size);
        }
    }

    #[test]
    fn pci_memory_above_ram_takes_no_address_bit_that_a_processor_may_lack() {
        const GIB: u64 = 1 << 30;
        for (size, start) in [
            (2 << 20, Some(4)),
            (3 * GIB, Some(4)),
            (3 * GIB + 4096, Some(5)),
            (62 * GIB, Some(63)),
            (62 * GIB + 4096, None),
            (63 * GIB, None),
            (63 * GIB + 4096, Some(65)),
            (1022 * GIB, Some(1023)),
            (1023 * GIB, None),
            (MAX_RAM, Some((MAX_RAM >> 30) + 1)),
        ] {
            let window = pci_memory_high(size);
            assert_eq!(window, start.map(|start| start * GIB..(start + 1) * GIB), "{size:#x}");
        }
    }

    #[test]
    fn the_table_does_not_overlap() {
        let table = [
            GDT..GDT + 0x100,
            PVH_TABLES..PVH_TABLES + 0x1000,
            BOOT_PARAMS..BOOT_PARAMS + 0x1000,
            PAGE_TABLES..PAGE_TABLES + 0x6000,
            CMDLINE..CMDLINE + CMDLINE_SIZE,
            LOW_END..ACPI,
            ACPI..ACPI + ACPI_SIZE,
            MP_TABLES_END - MP_TABLES_SIZE..MP_TABLES_END,
            RESET_VECTOR..HIGH_RAM,
            HIGH_RAM..HOLE.start,
            PCI_MEMORY,
            PCI_ECAM..PCI_ECAM + 0x10_0000,
            VIRTIO_MMIO..VIRTIO_MMIO + VIRTIO_MMIO_SIZE * VIRTIO_GSIS.len() as u64,
            IO_APIC..IO_APIC + 0x1000,
            LOCAL_APIC..LOCAL_APIC + 0x10_0000 - 0x5000,
            GENERATION_BY_FIRMWARE..GENERATION_BY_FIRMWARE + 0x1000,
            KVM_IDENTITY_MAP..KVM_TSS,
            KVM_TSS..KVM_TSS + 0x3000,
            ROM_END - ROM_MAX..ROM_END,
            HOLE.end..MAX_RAM,
        ];
        assert!(table.windows(2).all(|w| w[0].end <= w[1].start));
        for gsis in [VIRTIO_GSIS, VIRTIO_GSIS_BESIDE_PICS] {
            assert!(gsis.iter().all(|gsi| *gsi < IO_APIC_PINS && ![COM1_GSI, ACPI_GSI].contains(gsi)));
        }
    }
}

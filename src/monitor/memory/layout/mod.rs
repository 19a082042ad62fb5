//! Every guest physical address and interrupt line that the monitor decides: one table per architecture, and here what
//! they have in common.

mod x86_64;

pub use x86_64::*;

/// Size of a virtio-mmio slot.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;

/// The most guest RAM: KVM takes fewer than 2^31 pages in a memory slot (KVM_MEM_MAX_NR_PAGES), and what is above the hole is one
/// slot. The physical addresses of the host's processor end it sooner on most.
pub const MAX_RAM: u64 = 8 << 40;

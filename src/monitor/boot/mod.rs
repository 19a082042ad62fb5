//! Loading a kernel: from files to guest memory and the state in which vCPU 0 enters it.
//!
//! The machine calls [`load`] once per start, after guest memory is there and before the vCPUs run. Protocols, formats and
//! tables are the architecture's, in `x86_64`. Kernels and initrds are untrusted input: whatever they hold, loading ends in
//! an [`Entry`] or an [`Error`], reads no more than the file, writes nothing outside guest RAM and
//! allocates no more than a few KiB. Knows nothing of KVM's ioctls or devices.

pub mod cmdline;
pub mod console;
mod error;
mod image;
mod initrd;
mod x86_64;

use std::path::Path;

use crate::config::{BootProtocol, Kernel};
use crate::memory::Memory;

pub use error::{Error, Role};
pub use image::Input;
pub use x86_64::{Entry, firmware, load, missing_clock, tables};

use image::Image;

/// The program that finds a kernel on a disk, built from `firmware/disk`: a PVH kernel.
pub const BOOT_DISK: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/bootdisk"));

/// What to boot.
#[derive(Debug, Clone)]
pub struct Payload {
    /// The kernel: bzImage, x86-64 ELF or Multiboot image, told apart by content.
    pub kernel: Input,
    /// Initial RAM disk.
    pub initrd: Option<Input>,
    /// Kernel command line.
    pub cmdline: String,
    /// The way into the kernel.
    pub protocol: BootProtocol,
}

impl Payload {
    /// Opens `kernel` and `initrd`. They stay open for as long as the guest may want to start again.
    ///
    /// # Errors
    /// [`Error`], which names the file and has a hint.
    pub fn open(
        kernel: &Kernel,
        initrd: Option<&Path>,
        cmdline: String,
        protocol: BootProtocol,
    ) -> Result<Self, Error> {
        let kernel = Input::kernel(kernel)?;
        let initrd = initrd.map(|path| Input::open(path, Role::Initrd)).transpose()?;
        Ok(Self { kernel, initrd, cmdline, protocol })
    }
}

/// What each loader gets.
struct Boot<'a> {
    memory: &'a Memory,
    kernel: &'a Image,
    initrd: Option<&'a Image>,
    cmdline: &'a str,
    /// Guest physical address of the ACPI root pointer.
    rsdp: u64,
}

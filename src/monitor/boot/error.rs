//! Why a kernel cannot be booted: each variant names the file, and [`Error::hint`] says what to do about it.
//!
//! Made by the loaders of this module; shown by the command line.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::config::host_path::quoted;

/// What a file was given as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The kernel.
    Kernel,
    /// The initial RAM disk.
    Initrd,
    /// What starts at the reset vector.
    Firmware,
    /// A program for firmware to run.
    OptionRom,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
            Self::Firmware => "firmware",
            Self::OptionRom => "option ROM",
        })
    }
}

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be opened.
    #[error("cannot open {role} {}", path.display())]
    Open {
        /// What it was given as.
        role: Role,
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The file could not be read.
    #[error("cannot read {role} {}", path.display())]
    Read {
        /// What it was given as.
        role: Role,
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The path is a directory, a pipe, a device ...
    #[error("{role} {} is {kind}", path.display())]
    NotAFile {
        /// What it was given as.
        role: Role,
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The file has no bytes.
    #[error("{role} {} is empty", path.display())]
    Empty {
        /// What it was given as.
        role: Role,
        /// The file.
        path: PathBuf,
    },
    /// The file ends before a part that its own headers announce.
    #[error("{role} {} is cut short: {part} ends at byte {end}, the file at byte {len}", path.display())]
    Truncated {
        /// What it was given as.
        role: Role,
        /// The file.
        path: PathBuf,
        /// The part that is missing, or a piece of it.
        part: &'static str,
        /// Where in the file the part ends by the headers.
        end: u64,
        /// Length of the file.
        len: u64,
    },
    /// The content is something else altogether.
    #[error("kernel {} is {what}, not a kernel", path.display())]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What the content looks like.
        what: &'static str,
        /// What to do about it.
        hint: &'static str,
    },
    /// A kernel for other CPUs.
    #[error("kernel {} is for {machine}; this machine's CPUs are x86-64", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is made for.
        machine: String,
    },
    /// A kernel without the 64-bit entry point.
    #[error("kernel {} is for 32-bit x86 only", path.display())]
    Only32Bit {
        /// The file.
        path: PathBuf,
    },
    /// A bzImage from before the 64-bit boot protocol was marked in the header.
    #[error("kernel {} has boot protocol {}.{:02}, which is too old", path.display(),
        version >> 8, version & 0xff)]
    OldProtocol {
        /// The file.
        path: PathBuf,
        /// Its boot protocol, as in the setup header.
        version: u16,
    },
    /// PVH was asked for and the kernel has no such entry.
    #[error("kernel {} has no PVH entry point: {why}", path.display())]
    NoPvh {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: &'static str,
        /// What to do about it.
        hint: &'static str,
    },
    /// Multiboot was asked for, or is the only way, and the kernel cannot be booted so.
    #[error("kernel {} cannot be booted by Multiboot: {why}", path.display())]
    NoMultiboot {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: &'static str,
        /// What to do about it.
        hint: &'static str,
    },
    /// The headers contradict themselves or the layout of memory.
    #[error("kernel {} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The contradiction.
        what: String,
    },
    /// The kernel does not fit into the guest's memory.
    #[error("kernel {} needs memory up to {end:#x} ({}), and the guest has {}", path.display(),
        Mib(*end), Mib(*have))]
    KernelTooBig {
        /// The file.
        path: PathBuf,
        /// First byte after the kernel.
        end: u64,
        /// Memory that the guest has below the hole, in bytes.
        have: u64,
        /// Memory that would do, in bytes; none if no amount does.
        needed: Option<u64>,
    },
    /// The initial RAM disk does not fit beside the kernel.
    #[error("initrd {} ({}) does not fit into the guest's memory beside the kernel", path.display(), Mib(*size))]
    InitrdTooBig {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// Memory that would do, in bytes; none if no amount does.
        needed: Option<u64>,
    },
    /// The kernel would cut the command line off.
    #[error("command line too long: {len} bytes, and kernel {} takes {max}", path.display())]
    CmdlineTooLong {
        /// The kernel.
        path: PathBuf,
        /// Bytes of the command line.
        len: usize,
        /// Bytes that the kernel takes.
        max: usize,
    },
    /// The command line has a character that no kernel takes.
    #[error("command line for kernel {}: {what} at byte {at}", path.display())]
    CmdlineCharacter {
        /// The kernel.
        path: PathBuf,
        /// What stands there.
        what: &'static str,
        /// Where.
        at: usize,
    },
    /// The boot structures themselves could not be written to guest memory.
    #[error("cannot write {what} for kernel {} to guest memory at {address:#x}", path.display())]
    Write {
        /// The kernel.
        path: PathBuf,
        /// Which structure.
        what: &'static str,
        /// Guest physical address.
        address: u64,
        /// What guest memory said.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// The firmware cannot be put in its place.
    #[error("firmware {}: {what}", path.display())]
    Firmware {
        /// The file.
        path: PathBuf,
        /// Why not.
        what: String,
    },
    /// The ACPI tables do not fit into their place.
    #[error("cannot make the ACPI tables for kernel {}", path.display())]
    Tables {
        /// The kernel.
        path: PathBuf,
        /// Why.
        #[source]
        source: super::tables::Error,
    },
}

impl Error {
    /// What the user can do about it: one sentence.
    pub fn hint(&self) -> Cow<'static, str> {
        Cow::Borrowed(match self {
            Self::Open { role: Role::Firmware, source, .. } if source.kind() == io::ErrorKind::NotFound => {
                "check the path; `firmware=built-in` needs no file"
            }
            Self::Open { role: Role::Kernel, source, .. } if source.kind() == io::ErrorKind::NotFound => {
                "check the path; this host's own kernel is `kernel=/boot/vmlinuz-$(uname -r)`"
            }
            Self::Open { path, source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                return Cow::Owned(format!("it must be readable by you: ls -l {}", quoted(path)));
            }
            Self::Open { path, .. } => return Cow::Owned(format!("check the path: ls -l {}", quoted(path))),
            Self::Read { .. } => "check the disk that it is on: dmesg | tail",
            Self::NotAFile { .. } => "use a regular file: a loader must be able to seek in it",
            Self::Empty { .. } => "build or fetch the file again",
            Self::Truncated { .. } => "a download or copy may have been cut off: fetch the file again",
            Self::NotAKernel { hint, .. } | Self::NoPvh { hint, .. } | Self::NoMultiboot { hint, .. } => hint,
            Self::Foreign { .. } => "fetch or build the kernel for x86-64 (amd64)",
            Self::Only32Bit { .. } => {
                "use a 64-bit kernel: fetch one for amd64, or build it with CONFIG_64BIT=y"
            }
            Self::OldProtocol { .. } => {
                "use a kernel with protocol 2.12 (Linux 3.8) or later; iPXE and its like start by SeaBIOS: \
                 `firmware=/usr/share/seabios/bios-microvm.bin` `option_rom=/usr/share/qemu/linuxboot_dma.bin`"
            }
            Self::Damaged { .. } => "fetch or build the kernel again",
            Self::KernelTooBig { needed: None, .. } | Self::InitrdTooBig { needed: None, .. } => {
                "no amount of memory makes room: it would reach into the device hole below 4 GiB"
            }
            Self::KernelTooBig { needed: Some(needed), .. }
            | Self::InitrdTooBig { needed: Some(needed), .. } => {
                return Cow::Owned(format!("use at least `mem={}M`", needed.div_ceil(1 << 20)));
            }
            Self::CmdlineTooLong { .. } => "shorten it: `cmdline='console=hvc0 root=/dev/vda'`",
            Self::CmdlineCharacter { .. } => {
                "write it in plain ASCII: `cmdline='console=hvc0 root=/dev/vda'`"
            }
            Self::Write { .. } => "the guest has less memory than any kernel can use: try `mem=128M`",
            Self::Firmware { .. } => {
                "use a ROM that ends with the reset vector, as qboot.rom and SeaBIOS's bios-microvm.bin do, or `firmware=built-in`"
            }
            Self::Tables { .. } => "use fewer CPUs or devices: `cpus=64`",
        })
    }
}

/// A number of bytes as MiB, rounded up: for messages.
struct Mib(u64);

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0.div_ceil(1 << 20))
    }
}

//! Recognizes a kernel file by its content: the formats that boot, and a name for the ones that do not.
//!
//! Called by [`load`](super::load) and by `firmware`; by `boot::console` before there is a machine.

use super::multiboot::Header;
use std::path::Path;

use crate::boot::error::{Error, Role};
use crate::boot::image::{Image, Input};

/// A format that can be booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Linux's bzImage: setup header "HdrS" at 0x202 (Documentation/arch/x86/boot.rst).
    BzImage,
    /// ELF of 64 bits.
    Elf,
    /// ELF of 32 bits.
    Elf32,
    /// Some other file whose Multiboot header says where it goes.
    Flat,
}

/// Offset and value of the signatures of what people give for a kernel by mistake.
const OTHERS: &[(usize, &[u8], &str, &str)] = &[
    (0, b"\x1f\x8b", "a gzip file", "unpack it with gunzip first"),
    (0, b"\xfd7zXZ\0", "an xz file", "unpack it with unxz first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it with unzstd first"),
    (0, b"BZh", "a bzip2 file", "unpack it with bunzip2 first"),
    (0, b"\x02\x21\x4c\x18", "an lz4 file", "unpack it with unlz4 first"),
    (0, b"\x04\x22\x4d\x18", "an lz4 file", "unpack it with unlz4 first"),
    (0, b"\x5d\0\0", "an lzma file", "unpack it with unlzma first"),
    (0, b"\x89LZO", "an lzop file", "unpack it with lzop -d first"),
    (
        0,
        b"!<arch>\n",
        "an archive (a .deb, perhaps)",
        "unpack it: dpkg-deb -x FILE DIR, then boot DIR/boot/vmlinuz-*",
    ),
    (
        0,
        b"\xed\xab\xee\xdb",
        "an RPM package",
        "unpack it: rpm2cpio FILE | cpio -id, then boot the vmlinuz inside",
    ),
    (
        0,
        b"07070",
        "a cpio archive (an initramfs)",
        "pass it as `initrd=FILE`, with its kernel as `kernel=FILE`",
    ),
    (0, b"QFI\xfb", "a qcow2 disk image", "pass disks as `disk=FILE`, and a kernel as `kernel=FILE`"),
    (0, b"#!", "a script", "use a bzImage or a vmlinux"),
    (0x38, b"ARMd", "an arm64 kernel", "fetch or build the kernel for x86-64 (amd64)"),
    (0x438, b"\x53\xef", "an ext4 file system", "pass disks as `disk=FILE`, and a kernel as `kernel=FILE`"),
    (0x8001, b"CD001", "a CD image", "pass disks as `disk=FILE`, and a kernel as `kernel=FILE`"),
    (
        0,
        b"MZ",
        "an EFI program",
        "boot the bzImage inside it; of a unified image: objcopy -O binary -j .linux IMAGE bzImage",
    ),
];

/// Looks at the content of `kernel`: its format, and its Multiboot header unless it is a bzImage.
///
/// # Errors
/// [`Error::NotAKernel`] saying what it is instead; [`Error::Read`].
pub fn kernel(kernel: &Image) -> Result<(Format, Option<Header>), Error> {
    let mut buf = [0; 0x8006];
    let bytes = kernel.start(&mut buf)?;
    let has = |at: usize, signature: &[u8]| bytes.get(at..).is_some_and(|rest| rest.starts_with(signature));
    if has(0x202, b"HdrS") && has(0x1fe, b"\x55\xaa") {
        return Ok((Format::BzImage, None));
    }
    let multiboot = Header::find(bytes);
    if has(0, b"\x7fELF") {
        return Ok((if has(4, &[1]) { Format::Elf32 } else { Format::Elf }, multiboot));
    }
    if multiboot.is_some_and(|header| header.has_addresses()) {
        return Ok((Format::Flat, multiboot));
    }
    let hit = OTHERS.iter().find(|(at, signature, ..)| has(*at, signature));
    let (what, hint) = match hit {
        Some((_, _, what, hint)) => (*what, *hint),
        None if bytes.len() < 0x206 => ("too short for a kernel", "use a bzImage or a vmlinux"),
        None if bytes.iter().all(|b| *b == 0) => ("all zeroes", "fetch or build it again"),
        None => ("neither a bzImage nor an ELF file", "use a bzImage or a vmlinux"),
    };
    Err(Error::NotAKernel { path: kernel.path().to_owned(), what, hint })
}

/// Whether the kernel at `path` is a bzImage. What cannot be read is none: whoever loads it says why.
pub fn is_compressed(path: &Path) -> bool {
    let mut magic = [0; 4];
    let image = Input::open(path, Role::Kernel).and_then(|file| file.image());
    let read = image.and_then(|image| image.bytes(0x202, &mut magic, "the setup header"));
    read.is_ok() && magic == *b"HdrS"
}

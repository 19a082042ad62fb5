//! Image formats that are not raw, by their marks: to be refused, and never to be interpreted. A guest can
//! write any of these into the first sector of a raw disk; whoever says that a disk is raw is believed. An overlay of ours alone
//! is none either.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::overlay;

/// What an image is, where it is not raw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Foreign {
    /// Its name.
    pub name: &'static str,
    how: How,
}

/// How a raw image is made of it, by a command that can be pasted into a shell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// qemu-img knows it.
    Convert,
    /// It is compressed: the command that unpacks its standard input.
    Stream(&'static str),
    /// It is an archive: the command that unpacks it and keeps what was packed.
    Unpack(&'static str),
    /// By itself it is no disk.
    Over,
}

/// Offset of a mark (counted from the end if negative), the mark, and what has it.
const MARKS: [(i64, &[u8], Foreign); 21] = [
    (0, &overlay::MAGIC, Foreign { name: "an overlay", how: How::Over }),
    (0, b"QFI\xfb", convert("qcow2")),
    (0, b"QED\0", convert("qed")),
    (0, b"KDMV", convert("vmdk")),
    (0, b"COWD", convert("vmdk")),
    (0, b"# Disk DescriptorFile", convert("vmdk")),
    (0, b"vhdxfile", convert("vhdx")),
    (0, b"conectix", convert("vhd")),
    (-512, b"conectix", convert("vhd")),
    (0x40, b"\x7f\x10\xda\xbe", convert("vdi")),
    (0, b"WithoutFreeSpace", convert("parallels")),
    (0, b"WithouFreSpacExt", convert("parallels")),
    (-512, b"koly", convert("dmg")),
    (0, b"\x1f\x8b\x08", stream("gzip", "gzip -dc")),
    (0, b"\xfd7zXZ\0", stream("xz", "xz -dc")),
    (0, b"\x28\xb5\x2f\xfd", stream("zstd", "zstd -dc")),
    (4, b"1AY&SY", stream("bzip2", "bzip2 -dc")),
    (0, b"\x04\x22\x4d\x18", stream("lz4", "lz4 -dc")),
    (0, b"7z\xbc\xaf\x27\x1c", unpack("a 7z archive", "7z x")),
    (0, b"PK\x03\x04", unpack("a zip archive", "unzip")),
    (257, b"ustar", unpack("a tar archive", "tar -xvf")),
];

const fn convert(name: &'static str) -> Foreign {
    Foreign { name, how: How::Convert }
}

const fn stream(name: &'static str, command: &'static str) -> Foreign {
    Foreign { name, how: How::Stream(command) }
}

const fn unpack(name: &'static str, command: &'static str) -> Foreign {
    Foreign { name, how: How::Unpack(command) }
}

impl Foreign {
    /// Looks for a mark in an image of `size` bytes. None: it may be raw, or cannot be read, which its user
    /// will hear.
    pub fn find(image: &File, size: u64) -> Option<Self> {
        let is = |(offset, mark, _): &&(i64, &[u8], Self)| {
            let mut bytes = [0; 24];
            let at = if *offset < 0 { size.checked_add_signed(*offset) } else { Some(offset.unsigned_abs()) };
            at.is_some_and(|at| {
                let bytes = &mut bytes[..mark.len()];
                image.read_exact_at(bytes, at).is_ok() && bytes == *mark
            })
        };
        MARKS.iter().find(is).map(|(_, _, found)| *found)
    }

    /// What to do with it.
    pub fn advice(&self, path: &Path) -> String {
        let path = path.display().to_string();
        let plain = |c: char| c.is_ascii_alphanumeric() || "/._+-".contains(c);
        let quoted = |path: &str| match path.chars().all(plain) {
            true => path.to_owned(),
            false => format!("'{}'", path.replace('\'', r"'\''")),
        };
        match self.how {
            How::Convert => {
                format!(
                    "convert it: qemu-img convert -O raw {} {}",
                    quoted(&path),
                    quoted(&format!("{path}.raw"))
                )
            }
            // By its standard input: not every tool takes a name that it would not have given.
            How::Stream(command) => {
                format!("convert it: {command} <{} >{}", quoted(&path), quoted(&format!("{path}.raw")))
            }
            How::Unpack(command) => format!("convert it: {command} {}", quoted(&path)),
            How::Over => {
                format!("name it with the image that it is over: path=IMAGE,overlay={}", quoted(&path))
            }
        }
    }
}

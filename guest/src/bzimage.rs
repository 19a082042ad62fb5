//! Takes the vmlinux out of a bzImage: symbols and the PVH entry are only there. Called by `stock`. The setup header's
//! fields are those of the Linux x86 boot protocol 2.08 and later.

use crate::run::Tool;
use anyhow::{Context, Result, bail};
use std::ops::Range;

/// What is wrong with a file that should be a bzImage.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// No "HdrS".
    #[error("no Linux setup header (\"HdrS\" at 0x202)")]
    NoHeader,
    /// The payload fields are newer than this kernel.
    #[error("boot protocol {}.{:02} has no payload offset (2.08 has)", .0 >> 8, .0 & 0xff)]
    OldProtocol(u16),
    /// The payload does not lie inside of the file.
    #[error("the compressed kernel lies outside of the file")]
    Truncated,
    /// Not one of those that the kernel's build offers and we know.
    #[error("unknown compression (first bytes {0:02x?})")]
    Compression([u8; 4]),
}

/// How the payload is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// `gzip`
    Gzip,
    /// `xz`
    Xz,
    /// `lz4`, the legacy frame
    Lz4,
    /// `zstd`
    Zstd,
    /// An ELF file as it is.
    None,
}

/// Where the payload lies in `image`, and how it is compressed. The range is without the four bytes of unpacked length
/// that the build appends to formats which do not carry it (all but gzip, whose own end is just that).
pub fn payload(image: &[u8]) -> Result<(Range<usize>, Compression), Error> {
    let field = |at: usize| -> Result<usize, Error> {
        let bytes = image.get(at..at + 4).ok_or(Error::NoHeader)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize)
    };
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err(Error::NoHeader);
    }
    let version = (field(0x206)? & 0xffff) as u16;
    if version < 0x208 {
        return Err(Error::OldProtocol(version));
    }
    // 0 means 4 setup sectors, for the sake of very old boot loaders.
    let setup_sectors = match image[0x1f1] {
        0 => 4,
        count => usize::from(count),
    };
    let start = (setup_sectors + 1) * 512 + field(0x248)?;
    let end = start + field(0x24c)?;
    let bytes = image.get(start..end).ok_or(Error::Truncated)?;
    let magic = *bytes.first_chunk::<4>().ok_or(Error::Truncated)?;
    let compression = match magic {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0xfd, b'7', b'z', b'X'] => Compression::Xz,
        [0x02, 0x21, 0x4c, 0x18] => Compression::Lz4,
        [0x28, 0xb5, 0x2f, 0xfd] => Compression::Zstd,
        [0x7f, b'E', b'L', b'F'] => Compression::None,
        other => return Err(Error::Compression(other)),
    };
    let trailer = if matches!(compression, Compression::Gzip | Compression::None) { 0 } else { 4 };
    Ok((start..end - trailer, compression))
}

/// The vmlinux inside of `image`.
pub fn vmlinux(image: &[u8]) -> Result<Vec<u8>> {
    let (range, compression) = payload(image)?;
    let packed = &image[range];
    let (program, package) = match compression {
        Compression::Gzip => ("gzip", "gzip"),
        Compression::Xz => ("xz", "xz-utils"),
        Compression::Lz4 => ("lz4", "lz4"),
        Compression::Zstd => ("zstd", "zstd"),
        Compression::None => return Ok(packed.to_vec()),
    };
    crate::debian::ensure_installed(&[package])?;
    let vmlinux = Tool::new(program)
        .args(["-d", "-c"])
        .filter(packed)
        .context("unpack the kernel inside of a bzImage")?;
    if !vmlinux.starts_with(b"\x7fELF") {
        bail!("what a bzImage holds is not an ELF file");
    }
    Ok(vmlinux)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 512 * 3];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&0x10_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image[0x410..0x410 + payload.len()].copy_from_slice(payload);
        image
    }

    #[test]
    fn the_payload_is_found_without_its_trailing_length() {
        let image = image(b"\x02\x21\x4c\x18data\x08\0\0\0");
        assert_eq!(payload(&image), Ok((0x410..0x418, Compression::Lz4)));
    }

    #[test]
    fn a_stored_elf_comes_out_as_it_is() {
        assert_eq!(vmlinux(&image(b"\x7fELF...")).unwrap(), b"\x7fELF...");
    }

    #[test]
    fn damage_is_told_apart() {
        assert_eq!(payload(b"MZ"), Err(Error::NoHeader));
        assert_eq!(payload(&[0; 4096]), Err(Error::NoHeader));
        let mut old = image(b"\x1f\x8b\0\0");
        old[0x206] = 7;
        assert_eq!(payload(&old), Err(Error::OldProtocol(0x207)));
        let mut short = image(b"\x1f\x8b\0\0");
        short.truncate(0x412);
        assert_eq!(payload(&short), Err(Error::Truncated));
        assert_eq!(payload(&image(b"abcd")), Err(Error::Compression(*b"abcd")));
    }
}

//! Unified kernel images (UAPI specification; Boot Loader Specification, type 2): a PE file in /EFI/Linux of
//! the ESP whose sections hold kernel, initrd and command line. UEFI would start its stub; here they are
//! taken out of it.

use crate::bls::counting;
use crate::bytes::{lines, u16_at, u32_at};
use crate::entries::{Entries, Entry, order};
use crate::text::Text;
use crate::volume::{Kind, Node, Volume};
use crate::{Error, Result};

/// Where they are, and the one that UEFI starts if nothing else is said: it may be such an image.
const FOLDER: &[u8] = b"/EFI/Linux";
const FALLBACK: &[u8] = b"/EFI/BOOT/BOOTX64.EFI";
/// The most files that are looked at.
const MAX_FILES: usize = 64;
/// The most bytes up to the end of the section table.
const HEAD: usize = 4096;
/// IMAGE_FILE_MACHINE_AMD64
const AMD64: u16 = 0x8664;
/// The size of the COFF header, with its signature, and of a section's.
const COFF: usize = 24;
const SECTION: usize = 40;

/// A part of a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Part {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub size: u64,
}

/// Where the parts lie in the image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unified {
    /// The kernel: a bzImage.
    pub linux: Part,
    /// The initrd; empty if there is none.
    pub initrd: Part,
    cmdline: Part,
    osrel: Part,
    uname: Part,
}

impl Unified {
    /// Reads the section table out of the first bytes of a file of `size` bytes.
    ///
    /// # Errors
    /// [`Error::Missing`]: it is no unified image for x86-64.
    pub fn parse(head: &[u8], size: u64) -> Result<Self> {
        let coff = u32_at(head, 0x3c) as usize;
        let pe = coff.checked_add(4).and_then(|end| head.get(coff..end)) == Some(b"PE\0\0");
        if !head.starts_with(b"MZ") || !pe || u16_at(head, coff + 4) != AMD64 {
            return Err(Error::Missing);
        }
        let (count, optional) = (u16_at(head, coff + 6), u16_at(head, coff + 20));
        let table = head.get(coff + COFF + usize::from(optional)..).unwrap_or_default();
        let mut found = Self::default();
        for section in table.chunks_exact(SECTION).take(count.into()) {
            let part = match section.get(..8) {
                Some(b".linux\0\0") => &mut found.linux,
                Some(b".initrd\0") => &mut found.initrd,
                Some(b".cmdline") => &mut found.cmdline,
                Some(b".osrel\0\0") => &mut found.osrel,
                Some(b".uname\0\0") => &mut found.uname,
                // What follows belongs to other profiles than the first.
                Some(b".profile") if found.linux.size > 0 => break,
                _ => continue,
            };
            let (length, on_disk) = (u32_at(section, 8), u32_at(section, 16));
            // The rest of the last block is padding.
            let here = Part { offset: u32_at(section, 20).into(), size: length.min(on_disk).into() };
            if here.offset + here.size > size {
                return Err(Error::Damaged("a unified kernel image"));
            }
            if part.size == 0 {
                *part = here;
            }
        }
        if found.linux.size == 0 { Err(Error::Missing) } else { Ok(found) }
    }
}

/// Adds the images of a volume, sorted.
///
/// # Errors
/// [`Error::Missing`]: there are none.
pub fn read(volume: &Volume, scratch: &mut [u8], entries: &mut Entries) -> Result<()> {
    let (mut found, mut files) = (false, 0);
    let mut add = |folder: &[u8], name: &[u8], node: &Node| {
        let stem = name.get(..name.len().saturating_sub(4)).unwrap_or_default();
        let efi = name.get(stem.len()..).is_some_and(|end| end.eq_ignore_ascii_case(b".efi"));
        let entry = entry(volume, folder, name, stem, node, scratch).ok().filter(|_| efi);
        entry.map(|entry| entries.insert(entry, order)).is_some()
    };
    if let Ok(folder) = volume.find(FOLDER) {
        volume.list(&folder, &mut |name, handle| {
            if let Ok(node) = volume.node(handle)
                && node.kind == Kind::File
            {
                found |= add(FOLDER, name, &node);
            }
            files += 1;
            files >= MAX_FILES
        })?;
    }
    if !found && let Ok(node) = volume.find(FALLBACK) {
        let (folder, name) = FALLBACK.split_at(FALLBACK.len() - b"/BOOTX64.EFI".len());
        found = add(folder, name.get(1..).unwrap_or_default(), &node);
    }
    if found { Ok(()) } else { Err(Error::Missing) }
}

fn entry(
    volume: &Volume,
    folder: &[u8],
    name: &[u8],
    stem: &[u8],
    node: &Node,
    scratch: &mut [u8],
) -> Result<Entry> {
    let mut head = [0; HEAD];
    let count = volume.read(node, 0, &mut head)?;
    let unified = Unified::parse(head.get(..count).unwrap_or_default(), node.size)?;
    let (id, left) = counting(stem);
    let mut entry = Entry { unified: Some(unified), exhausted: left == Some(0), ..Entry::default() };
    entry.volume = usize::MAX;
    entry.id = Text::clipped(id);
    entry.linux = Text::whole(folder)?;
    entry.linux.push(b"/")?;
    entry.linux.push(name)?;
    for word in text(volume, node, unified.cmdline, scratch)?.split(u8::is_ascii_whitespace) {
        entry.options.push_word(word)?;
    }
    entry.version = Text::clipped(text(volume, node, unified.uname, scratch)?);
    // As the specification says: sorted by what the system is, told by its pretty name.
    for line in lines(text(volume, node, unified.osrel, scratch)?) {
        let Some(at) = line.iter().position(|byte| *byte == b'=') else { continue };
        let (key, value) = line.split_at(at);
        let value = value.get(1..).unwrap_or_default();
        let value = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value);
        match key {
            b"PRETTY_NAME" => entry.title = Text::clipped(value),
            b"IMAGE_ID" => entry.sort_key = Text::clipped(value),
            b"ID" if entry.sort_key.is_empty() => entry.sort_key = Text::clipped(value),
            b"IMAGE_VERSION" if entry.version.is_empty() => entry.version = Text::clipped(value),
            _ => {}
        }
    }
    Ok(entry)
}

/// A section that is text, without what ends it.
fn text<'s>(volume: &Volume, node: &Node, part: Part, scratch: &'s mut [u8]) -> Result<&'s [u8]> {
    let into = usize::try_from(part.size).ok().and_then(|size| scratch.get_mut(..size));
    let into = into.ok_or(Error::TooLarge("a text in a unified kernel image"))?;
    if volume.read(node, part.offset, into)? < into.len() {
        return Err(Error::Read);
    }
    let end = into.iter().position(|byte| *byte == 0).unwrap_or(into.len());
    Ok(into.get(..end).unwrap_or_default().trim_ascii())
}

//! From guest addresses to names: out of an ELF vmlinux, or a list as System.map and /proc/kallsyms have it.

use std::fs;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection, ObjectSymbol, SectionKind, SymbolKind};

/// A file's size at most: a vmlinux with debug information stays below.
const MAX_FILE: u64 = 2 << 30;

/// Why there are no symbols.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("read symbols from {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// Nothing in it is a symbol.
    #[error("{} has no symbols: it must be an ELF vmlinux, a System.map, or a copy of /proc/kallsyms", path.display())]
    None {
        /// Which file.
        path: PathBuf,
    },
}

/// Names by address.
#[derive(Debug, Default)]
pub struct Symbols {
    /// Sorted by address.
    table: Vec<(u64, String)>,
    /// Where they are from.
    pub source: Option<PathBuf>,
    /// What is added to the table's addresses in the guest (KASLR).
    shift: u64,
    /// Code by its address as linked, where the file has it.
    code: Vec<(u64, Vec<u8>)>,
}

impl Symbols {
    /// From `path`.
    ///
    /// # Errors
    /// [`Error`]
    pub fn read(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Read { path: path.to_owned(), source };
        let size = fs::metadata(path).map_err(failed)?.len();
        if size > MAX_FILE {
            return Err(failed(std::io::Error::other("it is too large")));
        }
        let bytes = fs::read(path).map_err(failed)?;
        let (mut table, code) = match object::File::parse(&*bytes) {
            Ok(file) => (from_elf(&file), code(&file)),
            Err(_) => (from_list(&bytes), Vec::new()),
        };
        if table.is_empty() {
            return Err(Error::None { path: path.to_owned() });
        }
        table.sort_by_key(|(address, _)| *address);
        table.dedup_by_key(|(address, _)| *address);
        Ok(Self { table, source: Some(path.to_owned()), shift: 0, code })
    }

    /// Looks at `kernel` itself and at what lies beside it: a vmlinux or System.map of the same name in its place.
    pub fn beside(kernel: &Path) -> Option<Self> {
        let name = kernel.file_name()?.to_str()?;
        let mut names = vec![name.to_owned()];
        for (from, to) in [
            ("bzImage", "vmlinux"),
            ("vmlinuz", "vmlinux"),
            ("bzImage", "System.map"),
            ("vmlinuz", "System.map"),
        ] {
            if name.contains(from) {
                names.push(name.replace(from, to));
            }
        }
        names.extend([name.replace("vmlinux", "System.map"), "System.map".to_owned()]);
        let beside = names.into_iter().map(|name| kernel.with_file_name(name));
        beside.filter(|path| path.is_file()).find_map(|path| Self::read(&path).ok())
    }

    /// The guest runs its kernel this far from where it was linked.
    pub fn set_shift(&mut self, shift: u64) {
        self.shift = shift;
    }

    /// Finds out how far the guest's kernel runs from where it was linked, from code that was seen in it: `seen` are addresses
    /// and the bytes there. Changes nothing where that cannot be told: no code in the file, none seen, no agreement.
    ///
    /// Linux chooses multiples of CONFIG_PHYSICAL_ALIGN, 2 MiB, below 1 GiB (Documentation/arch/x86/boot.rst, mm.rst); and it
    /// patches its code a little as it runs, so not every place has to agree.
    pub fn find_shift<'b>(&mut self, seen: impl Iterator<Item = (u64, &'b [u8])>) -> Option<u64> {
        const STEP: u64 = 2 << 20;
        const STEPS: u64 = 512;
        /// Where Linux maps its own image.
        const IMAGE: u64 = 0xffff_ffff_8000_0000;
        let seen: Vec<_> =
            seen.filter(|(address, bytes)| *address >= IMAGE && bytes.len() >= 8).take(200).collect();
        let agree = |shift: u64| {
            let same = |(address, bytes): &&(u64, &[u8])| {
                self.code_at(address.wrapping_sub(shift), 8) == Some(&bytes[..8])
            };
            seen.iter().filter(same).count()
        };
        let best = (0..STEPS)
            .map(|step| step * STEP)
            .max_by_key(|shift| (agree(*shift), std::cmp::Reverse(*shift)))?;
        if agree(best) * 2 <= seen.len() {
            return None;
        }
        self.shift = best;
        Some(best)
    }

    fn code_at(&self, address: u64, len: usize) -> Option<&[u8]> {
        self.code.iter().find_map(|(start, bytes)| {
            let at = usize::try_from(address.checked_sub(*start)?).ok()?;
            bytes.get(at..at.checked_add(len)?)
        })
    }

    /// The symbol that `address` lies in, and how far. `None` outside the kernel.
    pub fn find(&self, address: u64) -> Option<(&str, u64)> {
        /// A function or the padding behind it is not longer.
        const FAR: u64 = 1 << 20;
        let address = address.wrapping_sub(self.shift);
        let at = self.table.partition_point(|(start, _)| *start <= address).checked_sub(1)?;
        let (start, name) = &self.table[at];
        (address - start < FAR).then_some((name, address - start))
    }

    /// Where the symbol called `name` is in the guest.
    pub fn address(&self, name: &str) -> Option<u64> {
        let (address, _) = self.table.iter().find(|(_, known)| known == name)?;
        Some(address.wrapping_add(self.shift))
    }

    /// `symbol+0x12`, or the plain number.
    pub fn name(&self, address: u64) -> String {
        match self.find(address) {
            Some((name, 0)) => name.to_owned(),
            Some((name, offset)) => format!("{name}+{offset:#x}"),
            None => format!("{address:#x}"),
        }
    }
}

fn from_elf(file: &object::File<'_>) -> Vec<(u64, String)> {
    let code = file.symbols().filter(|symbol| {
        symbol.is_definition() && matches!(symbol.kind(), SymbolKind::Text | SymbolKind::Unknown)
    });
    let named = code.filter_map(|symbol| Some((symbol.address(), symbol.name().ok()?.to_owned())));
    named.filter(|(address, name)| *address != 0 && !name.is_empty()).collect()
}

fn code(file: &object::File<'_>) -> Vec<(u64, Vec<u8>)> {
    let sections = file.sections().filter(|section| section.kind() == SectionKind::Text);
    sections.filter_map(|section| Some((section.address(), section.data().ok()?.to_vec()))).collect()
}

/// Lines of address, type, name: `ffffffff81000000 T _stext`.
fn from_list(bytes: &[u8]) -> Vec<(u64, String)> {
    let text = String::from_utf8_lossy(bytes);
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let address = u64::from_str_radix(words.next()?, 16).ok()?;
        let code = matches!(words.next()?, "t" | "T" | "w" | "W");
        (code && address != 0).then_some((address, words.next()?.to_owned()))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_gives_names_with_offsets() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let list =
            "ffffffff81000100 t second\nffffffff81000000 T _stext\nnonsense\nffffffff81000200 D data\n";
        fs::write(file.path(), list).unwrap();
        let mut symbols = Symbols::read(file.path()).unwrap();
        assert_eq!(symbols.name(0xffff_ffff_8100_0000), "_stext");
        assert_eq!(symbols.name(0xffff_ffff_8100_0215), "second+0x115");
        assert_eq!(symbols.name(0x10), "0x10");
        assert_eq!(symbols.name(0xffff_ffff_9000_0000), "0xffffffff90000000");
        symbols.set_shift(0x100_0000);
        assert_eq!(symbols.name(0xffff_ffff_8200_0100), "second");
        assert_eq!(symbols.address("second"), Some(0xffff_ffff_8200_0100));
        assert_eq!(symbols.address("data"), None);
    }

    #[test]
    fn the_shift_is_found_from_code_that_was_seen() {
        let code: Vec<u8> =
            (0..40_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let linked = 0xffff_ffff_8100_0000;
        let mut symbols = Symbols {
            table: vec![(linked, "start".to_owned())],
            code: vec![(linked, code.clone())],
            ..Symbols::default()
        };
        let shift = 37 * (2 << 20);
        let seen = |at: usize| (linked + shift + at as u64, &code[at..at + 15]);
        let patched = [0x90; 15];
        let places =
            [seen(100), seen(5000), (linked + shift + 7, &patched[..]), seen(9999), (0x1000, &patched[..])];
        assert_eq!(symbols.find_shift(places.into_iter()), Some(shift));
        assert_eq!(symbols.name(linked + shift + 3), "start+0x3");
        assert_eq!(symbols.find_shift([(linked, &patched[..])].into_iter()), None);
        assert_eq!(Symbols::default().find_shift(places.into_iter()), None);
    }

    #[test]
    fn what_has_no_symbols_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "hello").unwrap();
        assert!(matches!(Symbols::read(file.path()), Err(Error::None { .. })));
        assert!(matches!(Symbols::read(Path::new("/no/such")), Err(Error::Read { .. })));
    }

    #[test]
    fn this_program_has_symbols() {
        let symbols = Symbols::read(&std::env::current_exe().unwrap()).unwrap();
        assert!(symbols.table.len() > 1000);
    }
}

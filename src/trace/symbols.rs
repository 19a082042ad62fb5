//! From guest addresses to names: out of an ELF vmlinux, or a list as System.map and /proc/kallsyms have it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::demangle::demangled;
use super::kallsyms::{END, IMAGE};
use object::{Object, ObjectSection, ObjectSymbol, SectionKind, SymbolKind};

/// A file's size at most: a vmlinux with debug information stays below.
const MAX_FILE: u64 = 2 << 30;

/// Linux moves by multiples of CONFIG_PHYSICAL_ALIGN, which is this (Documentation/arch/x86/boot.rst, mm.rst).
const ALIGN: u64 = 2 << 20;

/// Why there are no symbols.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read symbols from {}", path.display())]
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
    /// They are another kernel's.
    #[error("the symbols in {path} are not those of the kernel that ran: {why}")]
    OtherKernel {
        /// Which file.
        path: String,
        /// What does not agree.
        why: &'static str,
    },
}

/// Names by address.
#[derive(Debug, Default)]
pub struct Symbols {
    /// Sorted by address.
    table: Vec<(u64, String)>,
    /// Where they are from.
    pub source: Option<String>,
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
            Ok(file) => {
                let functions = from_elf(&file);
                (if functions.is_empty() { labels(&file) } else { functions }, code(&file))
            }
            Err(_) => (from_list(&bytes), Vec::new()),
        };
        if table.is_empty() {
            return Err(Error::None { path: path.to_owned() });
        }
        sort(&mut table);
        Ok(Self { table, source: Some(path.display().to_string()), shift: 0, code })
    }

    /// Those that the guest's own (kallsyms) had, as a trace keeps them: at the addresses where it ran. None if there are none.
    pub fn of_guest(list: &str) -> Option<Self> {
        let mut table = from_list(list.as_bytes());
        sort(&mut table);
        let source = Some("the guest's own (kallsyms)".to_owned());
        (!table.is_empty()).then_some(Self { table, source, ..Self::default() })
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

    /// Finds out how far the guest's kernel runs from where it was linked: from where `guest`'s own symbols are, if it has told
    /// them, else from code that was seen in it: `seen` are addresses and the bytes there. Changes nothing where that cannot be
    /// told: no code in the file, or none seen.
    ///
    /// # Errors
    /// [`Error::OtherKernel`]: they cannot be its symbols, wherever it runs.
    pub fn find_shift<'b>(
        &mut self,
        guest: Option<&Self>,
        seen: impl Iterator<Item = (u64, &'b [u8])>,
    ) -> Result<Option<u64>, Error> {
        let other = |why| Error::OtherKernel { path: self.source.clone().unwrap_or_default(), why };
        self.shift = match guest {
            Some(guest) => self.shift_to(guest).ok_or_else(|| other("its own symbols lie elsewhere"))?,
            None => match self.shift_by_code(seen) {
                Some(Ok(shift)) => shift,
                Some(Err(())) => return Err(other("its code is not that of the file, wherever it was put")),
                None => return Ok(None),
            },
        };
        Ok(Some(self.shift))
    }

    /// Most functions that both name are as far apart.
    fn shift_to(&self, guest: &Self) -> Option<u64> {
        let mut ours: HashMap<&str, Option<u64>> = HashMap::new();
        for (address, name) in &self.table {
            // Static functions of the same name are not told apart.
            ours.entry(name).and_modify(|known| *known = None).or_insert(Some(*address));
        }
        let mut shifts: HashMap<u64, usize> = HashMap::new();
        let mut all = 0;
        for (address, name) in &guest.table {
            if let Some(Some(own)) = ours.get(name.as_str()) {
                *shifts.entry(address.wrapping_sub(*own)).or_default() += 1;
                all += 1;
            }
        }
        let (shift, count) =
            shifts.into_iter().max_by_key(|(shift, count)| (*count, std::cmp::Reverse(*shift)))?;
        // Names that the guest has twice agree by chance only.
        (count * 2 > all && shift.is_multiple_of(ALIGN)).then_some(shift)
    }

    /// The image is no larger than 1 GiB; and Linux patches its code a little as it runs, so not every place has to agree.
    fn shift_by_code<'b>(&self, seen: impl Iterator<Item = (u64, &'b [u8])>) -> Option<Result<u64, ()>> {
        const STEPS: u64 = 512;
        /// With fewer places than this nothing is ruled out.
        const ENOUGH: usize = 6;
        let seen: Vec<_> =
            seen.filter(|(address, bytes)| IMAGE.contains(address) && bytes.len() >= 8).take(200).collect();
        if self.code.is_empty() || seen.is_empty() {
            return None;
        }
        let agree = |shift: u64| {
            let same = |(address, bytes): &&(u64, &[u8])| {
                self.code_at(address.wrapping_sub(shift), 8) == Some(&bytes[..8])
            };
            seen.iter().filter(same).count()
        };
        let best = (0..STEPS)
            .map(|step| step * ALIGN)
            .max_by_key(|shift| (agree(*shift), std::cmp::Reverse(*shift)))?;
        match agree(best) {
            count if count * 2 > seen.len() => Some(Ok(best)),
            _ if seen.len() >= ENOUGH => Some(Err(())),
            _ => None,
        }
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
        (address - start < FAR && name != END).then_some((name, address - start))
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

fn sort(table: &mut Vec<(u64, String)>) {
    // Where one ends and the next begins, it is the next that counts.
    table.sort_by_key(|(address, name)| (*address, name == END));
    table.dedup_by_key(|(address, _)| *address);
}

fn from_elf(file: &object::File<'_>) -> Vec<(u64, String)> {
    let code = file.symbols().filter(|symbol| {
        symbol.is_definition() && matches!(symbol.kind(), SymbolKind::Text | SymbolKind::Unknown)
    });
    let named = code.filter_map(|symbol| Some((symbol.address(), demangled(symbol.name().ok()?))));
    named.filter(|(address, name)| *address != 0 && !name.is_empty()).collect()
}

/// Plain labels in a section: all that is there where somebody wrote in assembly and gave no types.
fn labels(file: &object::File<'_>) -> Vec<(u64, String)> {
    let labels = file
        .symbols()
        .filter(|symbol| symbol.kind() == SymbolKind::Unknown && symbol.section_index().is_some());
    let named = labels.filter_map(|symbol| Some((symbol.address(), symbol.name().ok()?.to_owned())));
    named.filter(|(_, name)| !name.is_empty()).collect()
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
        (code && address != 0).then_some((address, demangled(words.next()?)))
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
        assert_eq!(symbols.find_shift(None, places.into_iter()).unwrap(), Some(shift));
        assert_eq!(symbols.name(linked + shift + 3), "start+0x3");
        assert_eq!(
            symbols.find_shift(None, [(linked, &patched[..])].into_iter()).unwrap(),
            None,
            "one place"
        );
        let others = (0..10).map(|at| (linked + at, &patched[..]));
        assert!(matches!(symbols.find_shift(None, others), Err(Error::OtherKernel { .. })));
        assert_eq!(Symbols::default().find_shift(None, places.into_iter()).unwrap(), None, "no code");
    }

    #[test]
    fn the_shift_is_found_from_the_guests_own_symbols() {
        let list = |shift: u64, names: &[&str]| {
            let line =
                |(at, name): (u64, &&str)| format!("{:x} t {name}\n", 0x8100_0000 + shift + at * 0x100);
            (0..).zip(names).map(line).collect::<String>()
        };
        let ours = ["a", "b", "twice", "c", "twice", "_RNvCs1_3abc3def"];
        let guest = Symbols::of_guest(&list(0x60_0000, &ours)).unwrap();
        let mut symbols = Symbols::of_guest(&list(0, &ours)).unwrap();
        assert_eq!(symbols.find_shift(Some(&guest), std::iter::empty()).unwrap(), Some(0x60_0000));
        assert_eq!(symbols.name(0x8160_0304), "c+0x4");
        assert_eq!(symbols.name(0x8160_0500), "abc::def");
        for other in [&["c", "b", "a", "x", "y"][..], &["x"]] {
            let other = Symbols::of_guest(&list(0, other)).unwrap();
            assert!(symbols.find_shift(Some(&other), std::iter::empty()).is_err());
        }
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

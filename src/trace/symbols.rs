//! From guest addresses to names: out of an ELF vmlinux, or a list as System.map and /proc/kallsyms have it.

//!
//! Files may be anybody's, and lists a guest's: what is kept of them grows with their size and no faster, and names are read
//! (demangled) only when they are shown, for as long as that takes no longer than a moment.

use std::cell::{Cell, OnceCell};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::demangle::{demangled, is_mangled};
use super::kallsyms::{END, IMAGE};
use object::{Object, ObjectSection, ObjectSymbol, SectionKind, SymbolKind};
use rustix::fs::{SeekFrom, seek};
use vmm_monitor::printable;

/// A file's size at most: a vmlinux with debug information stays below.
const MAX_FILE: u64 = 2 << 30;
/// What is no regular file (a pipe, /proc/kallsyms) has as many bytes at most.
const MAX_STREAM: u64 = 256 << 20;
/// Symbols at most; a large program has a million.
const MAX_SYMBOLS: usize = 4 << 20;
/// Sections whose code is kept at most; a kernel has a handful.
const MAX_SECTIONS: usize = 64;
/// Bytes of a name at most; the rest of a longer one is cut off.
const MAX_NAME: usize = 2048;
/// All names are read within this time; those that would come after it are shown mangled.
const READING: Duration = Duration::from_secs(2);

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

/// A name and where it begins.
#[derive(Debug)]
struct Symbol {
    address: u64,
    /// Where its name is in all names, and how long it is.
    name: (u32, u16),
    /// The name as its author wrote it, once it was asked for; of those that are mangled.
    shown: OnceCell<Box<str>>,
}

/// Symbols while they are read: no more of them than their file can hold.
#[derive(Debug)]
struct Table {
    symbols: Vec<Symbol>,
    names: String,
    /// Bytes of names at most.
    most: usize,
}

impl Table {
    /// For what is read from `len` bytes. Names may overlap in a file, but only a forger's do so often.
    fn of(len: usize) -> Self {
        Self { symbols: Vec::new(), names: String::new(), most: len.saturating_mul(2).clamp(4096, 1 << 30) }
    }

    /// One more; false if there is no room for it.
    fn add(&mut self, address: u64, name: &str) -> bool {
        // What acts on a terminal would be no part of a mangled name either.
        let name = printable::text(name);
        let mut end = name.len().min(MAX_NAME);
        while !name.is_char_boundary(end) {
            end -= 1;
        }
        if self.symbols.len() >= MAX_SYMBOLS || self.names.len() + end > self.most {
            return false;
        }
        // Both fit, as there are at most 1 GiB of them, and 2 KiB of one.
        self.symbols.push(Symbol {
            address,
            name: (self.names.len() as u32, end as u16),
            shown: OnceCell::new(),
        });
        self.names.push_str(&name[..end]);
        true
    }

    fn is_empty(&self) -> bool {
        self.symbols.is_empty()
    }
}

/// Names by address.
#[derive(Debug, Default)]
pub struct Symbols {
    /// Sorted by address.
    table: Vec<Symbol>,
    /// One behind the other.
    names: String,
    /// Time that names were read in.
    reading: Cell<Duration>,
    /// Where they are from.
    pub source: Option<String>,
    /// What is added to the table's addresses in the guest (KASLR).
    shift: u64,
    /// Code by its address as linked, where the file has it.
    code: Vec<(u64, Vec<u8>)>,
}

impl Symbols {
    /// From `path`, which the user named: whatever that is is read.
    ///
    /// # Errors
    /// [`Error`]
    pub fn read(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let bytes = contents(file).map_err(failed)?;
        Self::parse(&bytes, path)
    }

    fn parse(bytes: &[u8], path: &Path) -> Result<Self, Error> {
        let (table, code) = match object::File::parse(bytes) {
            Ok(file) => {
                let functions = from_elf(&file, bytes.len());
                let table = if functions.is_empty() { labels(&file, bytes.len()) } else { functions };
                (table, code(&file, bytes.len()))
            }
            Err(_) => (from_list(bytes), Vec::new()),
        };
        if table.is_empty() {
            return Err(Error::None { path: path.to_owned() });
        }
        let source = printable::text(&path.display().to_string()).into_owned();
        Ok(Self { code, ..Self::sorted(table, source) })
    }

    /// Those that the guest's own (kallsyms) had, as a trace keeps them: at the addresses where it ran. None if there are none.
    pub fn of_guest(list: &str) -> Option<Self> {
        let table = from_list(list.as_bytes());
        (!table.is_empty()).then(|| Self::sorted(table, "the guest's own (kallsyms)".to_owned()))
    }

    fn sorted(Table { symbols: mut table, names, .. }: Table, source: String) -> Self {
        // Where one ends and the next begins, it is the next that counts.
        table.sort_by_key(|symbol| (symbol.address, name_in(&names, symbol) == END));
        table.dedup_by_key(|symbol| symbol.address);
        table.shrink_to_fit();
        Self { table, names, source: Some(source), ..Self::default() }
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
        names.into_iter().map(|name| kernel.with_file_name(name)).find_map(|path| {
            // Nobody asked for just this file: a pipe is not waited for, and what the kernel makes up (/proc/kmsg) not read.
            let file = File::options()
                .read(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(&path)
                .ok()?;
            file.metadata().is_ok_and(|meta| meta.is_file() && meta.len() > 0).then_some(())?;
            Self::parse(&contents(file).ok()?, &path).ok()
        })
    }

    fn raw(&self, symbol: &Symbol) -> &str {
        name_in(&self.names, symbol)
    }

    /// As its author wrote it.
    fn shown<'a>(&'a self, symbol: &'a Symbol) -> &'a str {
        let raw = self.raw(symbol);
        if !is_mangled(raw) {
            return raw;
        }
        let read = || {
            let start = Instant::now();
            if self.reading.get() > READING {
                return raw.into();
            }
            let name = demangled(raw);
            self.reading.set(self.reading.get() + start.elapsed());
            printable::text(&name).into()
        };
        symbol.shown.get_or_init(read)
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
        for symbol in &self.table {
            // Static functions of the same name are not told apart.
            let address = Some(symbol.address);
            ours.entry(self.raw(symbol)).and_modify(|known| *known = None).or_insert(address);
        }
        let mut shifts: HashMap<u64, usize> = HashMap::new();
        let mut all = 0;
        for symbol in &guest.table {
            if let Some(Some(own)) = ours.get(guest.raw(symbol)) {
                *shifts.entry(symbol.address.wrapping_sub(*own)).or_default() += 1;
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
        let at = self.table.partition_point(|symbol| symbol.address <= address).checked_sub(1)?;
        let symbol = &self.table[at];
        let offset = address - symbol.address;
        (offset < FAR && self.raw(symbol) != END).then(|| (self.shown(symbol), offset))
    }

    /// Where the symbol called `name` is in the guest.
    pub fn address(&self, name: &str) -> Option<u64> {
        let known = |symbol: &&Symbol| self.raw(symbol) == name || self.shown(symbol) == name;
        Some(self.table.iter().find(known)?.address.wrapping_add(self.shift))
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

fn name_in<'a>(names: &'a str, symbol: &Symbol) -> &'a str {
    let (at, len) = (symbol.name.0 as usize, usize::from(symbol.name.1));
    names.get(at..at + len).unwrap_or_default()
}

/// All that is in `file`. What is mostly holes has less to say than it takes: no compiler makes such a file.
fn contents(file: File) -> io::Result<Vec<u8>> {
    let meta = file.metadata()?;
    let (len, most) = match meta.is_file() && meta.len() > 0 {
        true => (meta.len(), MAX_FILE),
        false => (0, MAX_STREAM),
    };
    if len > most {
        return Err(io::Error::other(format!("it is larger than {} MiB", most >> 20)));
    }
    if data(&file, len)? < len / 2 {
        return Err(io::Error::other("most of it is a hole (a sparse file)"));
    }
    let mut bytes = Vec::with_capacity(len as usize);
    (&file).take(most + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > most {
        true => Err(io::Error::other(format!("it is larger than {} MiB", most >> 20))),
        false => Ok(bytes),
    }
}

/// Bytes of `file` that are no holes, as far as its file system tells; counted up to half of `len`.
fn data(file: &File, len: u64) -> io::Result<u64> {
    let (mut sum, mut at) = (0, 0);
    while at < len && sum < len / 2 {
        // None behind this: ENXIO. A file system without holes says that all is data.
        let Ok(start) = seek(file, SeekFrom::Data(at)) else { break };
        let end = seek(file, SeekFrom::Hole(start)).unwrap_or(len);
        (sum, at) = (sum + end.saturating_sub(start), end.max(at + 1));
    }
    if len > 0 {
        seek(file, SeekFrom::Start(0))?;
    }
    Ok(sum)
}

fn from_elf(file: &object::File<'_>, len: usize) -> Table {
    named(file, len, |symbol| {
        symbol.is_definition()
            && matches!(symbol.kind(), SymbolKind::Text | SymbolKind::Unknown)
            && symbol.address() != 0
    })
}

/// Plain labels in a section: all that is there where somebody wrote in assembly and gave no types.
fn labels(file: &object::File<'_>, len: usize) -> Table {
    named(file, len, |symbol| symbol.kind() == SymbolKind::Unknown && symbol.section_index().is_some())
}

/// Those symbols that are `wanted` of a file of `len` bytes.
fn named(file: &object::File<'_>, len: usize, wanted: impl Fn(&object::Symbol<'_, '_>) -> bool) -> Table {
    let mut table = Table::of(len);
    // Many names can be ends of one long string, each of which is searched for its end.
    let mut searched = len.saturating_mul(16);
    for symbol in file.symbols().filter(wanted) {
        let name = symbol.name_bytes();
        // One without an end was searched for it to the end of all names.
        let Some(left) = searched.checked_sub(name.map_or(len, <[u8]>::len)) else { break };
        searched = left;
        let name = name.unwrap_or_default();
        let name = String::from_utf8_lossy(&name[..name.len().min(MAX_NAME)]);
        if !name.is_empty() && !table.add(symbol.address(), &name) {
            break;
        }
    }
    table
}

/// The code of a file of `len` bytes: sections may overlap, but together they are no more than it.
fn code(file: &object::File<'_>, len: usize) -> Vec<(u64, Vec<u8>)> {
    let mut left = len;
    let sections = file.sections().filter(|section| section.kind() == SectionKind::Text).take(MAX_SECTIONS);
    let code = sections.map_while(|section| {
        let bytes = section.data().unwrap_or_default();
        left = left.checked_sub(bytes.len())?;
        Some((section.address(), bytes.to_vec()))
    });
    code.collect()
}

/// Lines of address, type, name: `ffffffff81000000 T _stext`.
fn from_list(bytes: &[u8]) -> Table {
    let mut table = Table::of(bytes.len());
    for line in bytes.split(|byte| *byte == b'\n') {
        // A longer line is none of a list.
        let line = String::from_utf8_lossy(&line[..line.len().min(2 * MAX_NAME)]);
        let mut words = line.split_whitespace();
        let address = words.next().and_then(|word| u64::from_str_radix(word, 16).ok());
        let code = matches!(words.next(), Some("t" | "T" | "w" | "W"));
        let (Some(address @ 1..), true, Some(name)) = (address, code, words.next()) else { continue };
        if !table.add(address, name) {
            break;
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use std::fs;

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
    fn what_is_shown_is_printable_also_after_demangling() {
        // "a", U+202E, "b" in punycode; and a name that is cut off.
        let long = "x".repeat(5000);
        let list = format!("10 t _RNvC7mycrateu6ab_g4t\n20 t \u{9b}2J\u{1b}c\n30 t {long}\n");
        let symbols = Symbols::of_guest(&list).unwrap();
        assert_eq!(symbols.name(0x10), "mycrate::a\\u{202e}b");
        assert_eq!(symbols.name(0x20), "\\u{9b}2J\\u{1b}c");
        assert_eq!(symbols.name(0x30), long[..MAX_NAME]);
    }

    #[test]
    fn the_shift_is_found_from_code_that_was_seen() {
        let code: Vec<u8> =
            (0..40_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let linked = 0xffff_ffff_8100_0000;
        let mut table = Table::of(0);
        table.add(linked, "start");
        let mut symbols = Symbols::sorted(table, String::new());
        symbols.code = vec![(linked, code.clone())];
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

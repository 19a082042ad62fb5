//! grub.cfg, as far as generated ones need it: menu entries and submenus, variables, `if`, and which entry is the default.
//!
//! Commands that change nothing here are passed over; a condition that cannot be known is false.

use crate::entries::{Entries, Entry};
use crate::text::Text;
use crate::variables::{self, Variables};
use crate::volume::{Kind, Volume};
use crate::{Error, Result};

/// The deepest nesting of blocks.
const MAX_DEPTH: usize = 16;
/// The most words of a command.
const MAX_WORDS: usize = 128;
/// The size of an environment block.
const ENVIRONMENT: usize = 1024;
/// The most folders of an ESP's /EFI that are looked at.
const MAX_VENDORS: usize = 16;

/// Adds the entries of a volume's grub.cfg in its order.
///
/// # Errors
/// There is none, or it could not be read.
pub fn read(volumes: &[Option<Volume>], at: usize, scratch: &mut [u8], entries: &mut Entries) -> Result<()> {
    let Some(Some(volume)) = volumes.get(at) else { return Err(Error::Missing) };
    on(volume, scratch, Some(entries)).map(drop)
}

/// What variables are after the grub.cfg that goes with volume `at`: its own, else the first of another. Boot
/// Loader Specification entries of the Fedora family are written in terms of them. None if no volume has a
/// GRUB.
pub fn variables(volumes: &[Option<Volume>], at: usize, scratch: &mut [u8]) -> Option<Variables> {
    let own = volumes.get(at).into_iter();
    own.chain(volumes).flatten().find_map(|volume| on(volume, scratch, None).ok())
}

/// Reads a volume's grub.cfg, or grubenv alone.
fn on(volume: &Volume, scratch: &mut [u8], mut entries: Option<&mut Entries>) -> Result<Variables> {
    for folder in [&b"/boot/grub"[..], b"/grub", b"/boot/grub2", b"/grub2"] {
        match folder_of(volume, folder, scratch, entries.as_deref_mut()) {
            Err(Error::Missing) => {}
            other => return other,
        }
    }
    // On an ESP, below the distribution's name. What lies there has no menu, but for some that have all of
    // it.
    let mut vendors = [Text::<64>::EMPTY; MAX_VENDORS];
    let mut count = 0;
    volume.list(&volume.find(b"/EFI")?, &mut |name, handle| {
        let folder = volume.node(handle).is_ok_and(|node| node.kind == Kind::Folder);
        let mut path = Text::clipped(b"/EFI/");
        if let (true, Ok(()), Some(slot)) = (folder, path.push(name), vendors.get_mut(count)) {
            *slot = path;
            count += 1;
        }
        count >= MAX_VENDORS
    })?;
    for folder in vendors.get(..count).unwrap_or_default() {
        match folder_of(volume, folder.bytes(), scratch, entries.as_deref_mut()) {
            Err(Error::Missing) => {}
            other => return other,
        }
    }
    Err(Error::Missing)
}

fn folder_of(
    volume: &Volume,
    folder: &[u8],
    scratch: &mut [u8],
    entries: Option<&mut Entries>,
) -> Result<Variables> {
    let path = |name: &[u8]| -> Result<Text<80>> {
        let mut path = Text::whole(folder)?;
        path.push(name).map(|()| path)
    };
    let mut environment = [0; ENVIRONMENT];
    let environment = volume.read_file(path(b"/grubenv")?.bytes(), &mut environment).unwrap_or_default();
    match volume.read_file(path(b"/grub.cfg")?.bytes(), scratch) {
        Err(Error::Missing) if !environment.is_empty() => run(&[], environment, entries),
        other => run(other?, environment, entries),
    }
}

/// Parses a grub.cfg; `environment` is grubenv's content.
///
/// # Errors
/// Blocks nested too deep.
pub fn parse(text: &[u8], environment: &[u8], entries: &mut Entries) -> Result<()> {
    run(text, environment, Some(entries)).map(drop)
}

/// As [`parse`], for what the variables are afterwards. Without a text, they are the environment's.
fn run(text: &[u8], environment: &[u8], entries: Option<&mut Entries>) -> Result<Variables> {
    let mut reader = Reader {
        variables: Variables::NONE,
        environment,
        blocks: [Block::Skipped; MAX_DEPTH],
        depth: 0,
        counters: [0; MAX_DEPTH],
        entry: None,
        entries,
    };
    if text.is_empty() {
        reader.variables.load(environment);
    }
    let (mut rest, mut words) = (text, Words::default());
    while !rest.is_empty() {
        rest = reader.command(rest, &mut words);
        reader.run(&words)?;
    }
    Ok(reader.variables)
}

/// A command's words, variables put in.
struct Words {
    text: Text<3072>,
    ends: [usize; MAX_WORDS],
    count: usize,
    /// There was no room for all of it.
    cut: bool,
}

impl Default for Words {
    fn default() -> Self {
        Self { text: Text::EMPTY, ends: [0; MAX_WORDS], count: 0, cut: false }
    }
}

impl Words {
    fn get(&self, index: usize) -> &[u8] {
        let end_of = |index: usize| self.ends.get(index).copied().filter(|_| index < self.count).unwrap_or(0);
        let start = index.checked_sub(1).map_or(0, end_of);
        self.text.bytes().get(start..end_of(index)).unwrap_or_default()
    }

    /// Adds to the word at the end.
    fn push(&mut self, bytes: &[u8]) {
        self.cut |= self.text.push(bytes).is_err();
    }

    /// Ends a word.
    fn end(&mut self) {
        match self.ends.get_mut(self.count) {
            Some(end) => {
                *end = self.text.bytes().len();
                self.count += 1;
            }
            None => self.cut = true,
        }
    }

    fn from(&self, first: usize) -> impl Iterator<Item = &[u8]> {
        (first..self.count).map(|index| self.get(index))
    }
}

/// What a block's commands are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    /// Nothing: functions, loops, and what lies in another branch.
    Skipped,
    /// Between `if` and `fi`: whether this branch counts, and whether one has been found that does.
    If { counts: bool, found: bool },
    /// A menu entry.
    Entry,
    /// A submenu, and whether the default lies in it.
    Submenu { default: bool },
}

struct Reader<'a> {
    variables: Variables,
    environment: &'a [u8],
    blocks: [Block; MAX_DEPTH],
    depth: usize,
    /// Entries and submenus so far, by submenu depth.
    counters: [usize; MAX_DEPTH],
    /// The entry that is being read, and whether it is the default.
    entry: Option<(Entry, bool)>,
    /// None: only the variables are wanted.
    entries: Option<&'a mut Entries>,
}

impl Reader<'_> {
    fn open(&self) -> &[Block] {
        self.blocks.get(..self.depth).unwrap_or_default()
    }

    fn counts(&self) -> bool {
        self.open().iter().all(|block| !matches!(block, Block::Skipped | Block::If { counts: false, .. }))
    }

    fn push(&mut self, block: Block) -> Result<()> {
        *self.blocks.get_mut(self.depth).ok_or(Error::TooLarge("grub.cfg's nesting"))? = block;
        self.depth += 1;
        Ok(())
    }

    /// Reads one command's words, and returns the text behind it.
    fn command<'t>(&self, text: &'t [u8], words: &mut Words) -> &'t [u8] {
        *words = Words::default();
        let (mut at, mut inside, mut quote) = (0, false, 0u8);
        let byte_at = |at: usize| text.get(at).copied().unwrap_or(b'\n');
        while at < text.len() {
            let byte = byte_at(at);
            at += 1;
            match byte {
                _ if quote == b'\'' && byte != b'\'' => words.push(&[byte]),
                b'\'' | b'"' if quote == byte || quote == 0 => {
                    quote = if quote == 0 { byte } else { 0 };
                    inside = true;
                }
                b'\\' => {
                    if byte_at(at) != b'\n' {
                        words.push(&[byte_at(at)]);
                        inside = true;
                    }
                    at += 1;
                }
                b'$' => {
                    let (name, length) = variables::name(text.get(at..).unwrap_or_default());
                    at += length;
                    let value = self.variables.get(name);
                    if quote != 0 {
                        words.push(value);
                        continue;
                    }
                    // Outside of quotes a value is as many words as it has, be that none.
                    for byte in value {
                        if byte.is_ascii_whitespace() {
                            if core::mem::take(&mut inside) {
                                words.end();
                            }
                        } else {
                            words.push(&[*byte]);
                            inside = true;
                        }
                    }
                }
                _ if quote != 0 => words.push(&[byte]),
                b' ' | b'\t' | b'\r' | b'\n' | b';' => {
                    if core::mem::take(&mut inside) {
                        words.end();
                    }
                    if byte == b'\n' || byte == b';' {
                        break;
                    }
                    // A block's commands may begin in the same line.
                    if words.count > 1 && words.get(words.count - 1) == b"{" {
                        break;
                    }
                }
                b'#' if !inside => {
                    let rest = text.get(at..).unwrap_or_default();
                    at += rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
                }
                _ => {
                    words.push(&[byte]);
                    inside = true;
                }
            }
        }
        if inside {
            words.end();
        }
        text.get(at..).unwrap_or_default()
    }

    fn run(&mut self, words: &Words) -> Result<()> {
        // These are no commands, but stand before one.
        let mut first = 0;
        while matches!(words.get(first), b"then" | b"else" | b"do") {
            if words.get(first) == b"else" {
                self.branch(true);
            }
            first += 1;
        }
        match words.get(first) {
            b"if" => {
                let counts = self.condition(words, first + 1);
                self.push(Block::If { counts, found: counts })?;
            }
            b"elif" => {
                let condition = self.condition(words, first + 1);
                self.branch(condition);
            }
            b"fi" => {
                self.close(|block| matches!(block, Block::If { .. }));
                if words.get(first + 1) == b"}" {
                    self.close(|block| block == Block::Skipped);
                }
            }
            b"for" | b"while" | b"until" | b"function" => self.push(Block::Skipped)?,
            b"done" => self.close(|block| block == Block::Skipped),
            b"}" => self.close(|block| !matches!(block, Block::If { .. })),
            b"menuentry" | b"submenu" => self.item(words, first)?,
            _ if self.counts() => self.plain(words, first),
            _ => {}
        }
        Ok(())
    }

    fn branch(&mut self, condition: bool) {
        let last = self.depth.checked_sub(1).and_then(|last| self.blocks.get_mut(last));
        if let Some(Block::If { counts, found }) = last {
            *counts = condition && !*found;
            *found |= condition;
        }
    }

    fn close(&mut self, fits: fn(Block) -> bool) {
        let Some(block) = self.open().last().copied().filter(|block| fits(*block)) else { return };
        self.depth -= 1;
        if block == Block::Entry
            && let Some((entry, default)) = self.entry.take()
            && !entry.linux.is_empty()
            && let Some(entries) = &mut self.entries
            && entries.push(entry)
            && default
        {
            entries.default = entries.all().len() - 1;
        }
    }

    /// `menuentry` or `submenu`.
    fn item(&mut self, words: &Words, first: usize) -> Result<()> {
        if words.get(words.count.saturating_sub(1)) != b"{" {
            return Ok(());
        }
        if !self.counts() || self.entry.is_some() {
            return self.push(Block::Skipped);
        }
        let title = words.get(first + 1);
        let named = |word: &[u8]| word == b"--id" || word == b"$menuentry_id_option";
        // The variable is grub's own and empty here, so an id without option is the word before the brace.
        let after = (first + 2..words.count).find(|index| named(words.get(*index))).map(|index| index + 1);
        let id = words.get(after.unwrap_or(words.count.saturating_sub(2)));
        let level = self.open().iter().filter(|block| matches!(block, Block::Submenu { .. })).count();
        let inside = self.open().iter().all(|block| *block != Block::Submenu { default: false });
        let wanted = self.variables.get(b"default");
        let counter = self.counters.get(level).copied().unwrap_or(0);
        let default = inside
            && match wanted.split(|byte| *byte == b'>').nth(level) {
                Some(part) if !part.is_empty() => is_number(part, counter) || part == id || part == title,
                // Nothing said at this level: the first.
                _ => counter == 0,
            };
        if let Some(counter) = self.counters.get_mut(level) {
            *counter += 1;
        }
        if words.get(first) == b"submenu" {
            if let Some(counter) = self.counters.get_mut(level + 1) {
                *counter = 0;
            }
            return self.push(Block::Submenu { default });
        }
        let entry = Entry {
            id: Text::clipped(id),
            title: Text::clipped(title),
            filesystem: Text::clipped(self.variables.get(b"root_by_search")),
            volume: usize::MAX,
            ..Entry::default()
        };
        self.entry = Some((entry, default));
        self.push(Block::Entry)
    }

    /// A command that is none of the language's own.
    fn plain(&mut self, words: &Words, first: usize) {
        match words.get(first) {
            b"set" => self.variables.assign(words.get(first + 1)),
            b"unset" => words.from(first + 1).for_each(|name| self.variables.set(name, b"")),
            b"load_env" => self.variables.load(self.environment),
            b"search" | b"search.fs_uuid" => {
                let Some(what) = words.from(first + 1).filter(|word| !word.starts_with(b"-")).last() else {
                    return;
                };
                match &mut self.entry {
                    Some((entry, _)) => entry.filesystem = Text::clipped(what),
                    None => self.variables.set(b"root_by_search", what),
                }
            }
            b"linux" | b"linux16" | b"linuxefi" => {
                let Some((entry, _)) = &mut self.entry else { return };
                let mut options = Text::EMPTY;
                let whole = words.from(first + 2).try_for_each(|word| push_argument(&mut options, word));
                // An entry that does not fit is left out, not cut.
                let path = whole.and_then(|()| Text::whole(without_device(words.get(first + 1))));
                entry.options = options;
                entry.linux = path.ok().filter(|_| !words.cut).unwrap_or_default();
            }
            b"initrd" | b"initrd16" | b"initrdefi" => {
                let Some((entry, _)) = &mut self.entry else { return };
                let added = words.from(first + 1).try_for_each(|word| entry.add_initrd(without_device(word)));
                if added.is_err() || words.cut {
                    entry.linux = Text::EMPTY;
                }
            }
            word => self.variables.assign(word),
        }
    }

    /// `[ ... ]`, `test ...` or `true`; what else is run as a condition is taken to fail.
    fn condition(&self, words: &Words, first: usize) -> bool {
        let end = match (words.get(first), words.get(words.count.saturating_sub(1))) {
            (b"true", _) => return true,
            (b"[", b"]") => words.count - 1,
            (b"test", _) => words.count,
            _ => return false,
        };
        let not = words.get(first + 1) == b"!";
        let start = first + 1 + usize::from(not);
        let word = |index: usize| words.get(start + index);
        let value = match (end.saturating_sub(start), word(0)) {
            (1, word) => !word.is_empty(),
            (2, b"-n") => !word(1).is_empty(),
            (2, b"-z") => word(1).is_empty(),
            (2, b"-s" | b"-f" | b"-e") => word(1).ends_with(b"grubenv") && !self.environment.is_empty(),
            (3, left) => match word(1) {
                b"=" | b"==" => left == word(2),
                b"!=" => left != word(2),
                _ => return false,
            },
            _ => return false,
        };
        value != not
    }
}

/// Appends a word to a kernel's command line as GRUB does (`grub_create_loader_cmdline`): in quotes if it has
/// a space, with a backslash before quotes and backslashes, `\xHH` as that byte.
fn push_argument<const N: usize>(options: &mut Text<N>, word: &[u8]) -> Result<()> {
    let quote: &[u8] = if word.contains(&b' ') { b"\"" } else { b"" };
    if !options.is_empty() {
        options.push(b" ")?;
    }
    options.push(quote)?;
    let mut rest = word;
    while let Some((byte, after)) = rest.split_first() {
        let digit = |at: usize| after.get(at).and_then(|byte| char::from(*byte).to_digit(16));
        if let (b"\\x", Some(high), Some(low)) = (rest.get(..2).unwrap_or_default(), digit(1), digit(2)) {
            options.push(&[(high << 4 | low) as u8])?;
            rest = after.get(3..).unwrap_or_default();
            continue;
        }
        if b"\\'\"".contains(byte) {
            options.push(b"\\")?;
        }
        options.push(&[*byte])?;
        rest = after;
    }
    options.push(quote)
}

fn is_number(text: &[u8], number: usize) -> bool {
    let digits = text.iter().all(u8::is_ascii_digit) && text.len() < 6;
    digits && text.iter().fold(0, |sum, digit| sum * 10 + usize::from(digit - b'0')) == number
}

/// A path without grub's device before it: `(hd0,gpt1)/vmlinuz`.
fn without_device(path: &[u8]) -> &[u8] {
    let end = path.iter().position(|byte| *byte == b')').filter(|_| path.starts_with(b"("));
    end.and_then(|end| path.get(end + 1..)).unwrap_or(path)
}

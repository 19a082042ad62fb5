//! grub.cfg, as far as generated ones need it: menu entries and submenus, variables, `if`, and which entry is the default.
//!
//! Commands that change nothing here are passed over; a condition that cannot be known is false.

use crate::entries::{Entries, Entry};
use crate::text::Text;
use crate::volume::Volume;
use crate::{Error, Result};

/// The deepest nesting of blocks.
const MAX_DEPTH: usize = 16;
/// The most words of a command, and of variables.
const MAX_WORDS: usize = 48;
const MAX_VARIABLES: usize = 32;

/// Adds the entries of a volume's grub.cfg in its order.
///
/// # Errors
/// There is none, or it could not be read.
pub fn read(volume: &Volume, scratch: &mut [u8], entries: &mut Entries) -> Result<()> {
    for folder in [&b"/boot/grub"[..], b"/grub", b"/boot/grub2", b"/grub2"] {
        let path = |name: &[u8]| -> Result<Text<64>> {
            let mut path = Text::whole(folder)?;
            path.push(name).map(|()| path)
        };
        let mut environment = [0; 1024];
        let environment = volume.read_file(path(b"/grubenv")?.bytes(), &mut environment).unwrap_or_default();
        match volume.read_file(path(b"/grub.cfg")?.bytes(), scratch) {
            Err(Error::Missing) => {}
            Ok(text) => return parse(text, environment, entries),
            Err(error) => return Err(error),
        }
    }
    Err(Error::Missing)
}

/// Parses a grub.cfg; `environment` is grubenv's content.
///
/// # Errors
/// Blocks nested too deep.
pub fn parse(text: &[u8], environment: &[u8], entries: &mut Entries) -> Result<()> {
    let mut reader = Reader {
        variables: [(Text::EMPTY, Text::EMPTY); MAX_VARIABLES],
        environment,
        blocks: [Block::Skipped; MAX_DEPTH],
        depth: 0,
        counters: [0; MAX_DEPTH],
        entry: None,
        entries,
    };
    let (mut rest, mut words) = (text, Words::default());
    while !rest.is_empty() {
        rest = reader.command(rest, &mut words);
        reader.run(&words)?;
    }
    Ok(())
}

/// A command's words, variables put in.
struct Words {
    text: Text<3072>,
    ends: [usize; MAX_WORDS],
    count: usize,
}

impl Default for Words {
    fn default() -> Self {
        Self { text: Text::EMPTY, ends: [0; MAX_WORDS], count: 0 }
    }
}

impl Words {
    fn get(&self, index: usize) -> &[u8] {
        let end_of = |index: usize| self.ends.get(index).copied().filter(|_| index < self.count).unwrap_or(0);
        let start = index.checked_sub(1).map_or(0, end_of);
        self.text.bytes().get(start..end_of(index)).unwrap_or_default()
    }

    /// Ends a word. Those for which there is no room are lost.
    fn end(&mut self) {
        if let Some(end) = self.ends.get_mut(self.count) {
            *end = self.text.bytes().len();
            self.count += 1;
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
    variables: [(Text<32>, Text<192>); MAX_VARIABLES],
    environment: &'a [u8],
    blocks: [Block; MAX_DEPTH],
    depth: usize,
    /// Entries and submenus so far, by submenu depth.
    counters: [usize; MAX_DEPTH],
    /// The entry that is being read, and whether it is the default.
    entry: Option<(Entry, bool)>,
    entries: &'a mut Entries,
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

    fn variable(&self, name: &[u8]) -> &[u8] {
        let known = self.variables.iter().find(|(known, _)| !name.is_empty() && known.bytes() == name);
        known.map_or(&[], |(_, value)| value.bytes())
    }

    fn set(&mut self, name: &[u8], value: &[u8]) {
        let slot = self.variables.iter().position(|(known, _)| known.bytes() == name || known.is_empty());
        if let (Some(slot), Ok(name)) =
            (slot.and_then(|slot| self.variables.get_mut(slot)), Text::whole(name))
        {
            *slot = (name, Text::clipped(value));
        }
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
                _ if quote == b'\'' && byte != b'\'' => drop(words.text.push(&[byte])),
                b'\'' | b'"' if quote == byte || quote == 0 => {
                    quote = if quote == 0 { byte } else { 0 };
                    inside = true;
                }
                b'\\' => {
                    if byte_at(at) != b'\n' {
                        let _ = words.text.push(&[byte_at(at)]);
                        inside = true;
                    }
                    at += 1;
                }
                b'$' => {
                    let braced = byte_at(at) == b'{';
                    let start = at + usize::from(braced);
                    let part_of_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"_?".contains(byte);
                    let rest = text.get(start..).unwrap_or_default();
                    let end = start + rest.iter().position(|byte| !part_of_name(byte)).unwrap_or(rest.len());
                    let _ = words.text.push(self.variable(text.get(start..end).unwrap_or_default()));
                    at = end + usize::from(braced && byte_at(end) == b'}');
                    inside = true;
                }
                _ if quote != 0 => drop(words.text.push(&[byte])),
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
                    let _ = words.text.push(&[byte]);
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
            && self.entries.push(entry)
            && default
        {
            self.entries.default = self.entries.all().len() - 1;
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
        let wanted = self.variable(b"default");
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
            filesystem: Text::clipped(self.variable(b"root_by_search")),
            volume: usize::MAX,
            ..Entry::default()
        };
        self.entry = Some((entry, default));
        self.push(Block::Entry)
    }

    /// A command that is none of the language's own.
    fn plain(&mut self, words: &Words, first: usize) {
        let assignment = |word: &[u8]| word.iter().position(|byte| *byte == b'=');
        match words.get(first) {
            b"set" => {
                let word = words.get(first + 1);
                if let Some((name, value)) = assignment(word).and_then(|at| word.split_at_checked(at)) {
                    self.set(name, value.get(1..).unwrap_or_default());
                }
            }
            b"load_env" => {
                // What grub would boot only once cannot be crossed out on a disk that is only read: so, never.
                for line in self.environment.split(|byte| *byte == b'\n').take(MAX_VARIABLES) {
                    if let Some((name, value)) = assignment(line).and_then(|at| line.split_at_checked(at))
                        && name != b"next_entry"
                        && !name.starts_with(b"#")
                    {
                        self.set(name, value.get(1..).unwrap_or_default());
                    }
                }
            }
            b"search" | b"search.fs_uuid" => {
                let Some(what) = words.from(first + 1).filter(|word| !word.starts_with(b"-")).last() else {
                    return;
                };
                match &mut self.entry {
                    Some((entry, _)) => entry.filesystem = Text::clipped(what),
                    None => self.set(b"root_by_search", what),
                }
            }
            b"linux" | b"linux16" | b"linuxefi" => {
                let Some((entry, _)) = &mut self.entry else { return };
                let mut options = Text::EMPTY;
                let whole = words.from(first + 2).try_for_each(|word| options.push_word(word));
                // An entry that does not fit is left out, not cut.
                let path = whole.and_then(|()| Text::whole(without_device(words.get(first + 1))));
                entry.options = options;
                entry.linux = path.unwrap_or_default();
            }
            b"initrd" | b"initrd16" | b"initrdefi" => {
                let Some((entry, _)) = &mut self.entry else { return };
                if words.from(first + 1).try_for_each(|word| entry.add_initrd(without_device(word))).is_err()
                {
                    entry.linux = Text::EMPTY;
                }
            }
            _ => {}
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

fn is_number(text: &[u8], number: usize) -> bool {
    let digits = text.iter().all(u8::is_ascii_digit) && text.len() < 6;
    digits && text.iter().fold(0, |sum, digit| sum * 10 + usize::from(digit - b'0')) == number
}

/// A path without grub's device before it: `(hd0,gpt1)/vmlinuz`.
fn without_device(path: &[u8]) -> &[u8] {
    let end = path.iter().position(|byte| *byte == b')').filter(|_| path.starts_with(b"("));
    end.and_then(|end| path.get(end + 1..)).unwrap_or(path)
}

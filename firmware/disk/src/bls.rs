//! Boot Loader Specification: a file per entry in /loader/entries, on the ESP or in /boot (type 1), and
//! unified kernel images beside them (type 2).
//!
//! GRUB of the Fedora family reads type 1, too: there an entry may be written in terms of GRUB's variables,
//! and grubenv says the default.

use crate::bytes::{lines, word};
use crate::entries::{Entries, Entry, order};
use crate::text::Text;
use crate::variables::Variables;
use crate::volume::{Kind, Volume};
use crate::{Error, Result, grub, unified};

/// The most files that are looked at.
const MAX_FILES: usize = 256;

/// Adds the entries of a volume, sorted, and sets the default if loader.conf or GRUB names one of them.
///
/// # Errors
/// There is none, or the folder could not be read. An entry that is wrong is left out.
pub fn read(volumes: &[Option<Volume>], at: usize, scratch: &mut [u8], entries: &mut Entries) -> Result<()> {
    let Some(Some(volume)) = volumes.get(at) else { return Err(Error::Missing) };
    let mut found = unified::read(volume, scratch, entries).is_ok();
    let mut variables = None;
    let mut default = Text::<96>::EMPTY;
    for (folder, settings) in [
        (&b"/loader/entries"[..], &b"/loader/loader.conf"[..]),
        (b"/boot/loader/entries", b"/boot/loader/loader.conf"),
    ] {
        if let Ok(text) = volume.read_file(settings, scratch)
            && let Some((_, pattern)) = lines(text).map(word).find(|(key, _)| *key == b"default")
            && default.is_empty()
        {
            default = Text::clipped(pattern);
        }
        let node = match volume.find(folder) {
            Err(Error::Missing) => continue,
            other => other?,
        };
        variables = grub::variables(volumes, at, scratch);
        let mut files = 0;
        volume.list(&node, &mut |name, handle| {
            let stem = name.strip_suffix(b".conf").or_else(|| name.strip_suffix(b".CONF"));
            if let (Some(stem), Ok(node)) = (stem, volume.node(handle))
                && node.kind == Kind::File
                && node.size <= scratch.len() as u64
                && let Ok(count) = volume.read(&node, 0, scratch)
                && let Ok(entry) = parse(stem, scratch.get(..count).unwrap_or_default(), variables.as_ref())
            {
                entries.insert(entry, order);
            }
            files += 1;
            files >= MAX_FILES
        })?;
        found = true;
        break;
    }
    let said =
        variables.iter().flat_map(|variables| [variables.get(b"default"), variables.get(b"saved_entry")]);
    if let Some(wanted) = [default.bytes()].into_iter().chain(said).find(|wanted| !wanted.is_empty()) {
        let is = |(index, entry): (usize, &Entry)| {
            matches(wanted, entry.id.bytes())
                || wanted == entry.title.bytes()
                || core::str::from_utf8(wanted).is_ok_and(|number| number.parse() == Ok(index))
        };
        entries.default = entries.all().iter().enumerate().position(is).unwrap_or(0);
    }
    if found { Ok(()) } else { Err(Error::Missing) }
}

/// Parses one entry, whose file is `stem`.conf. GRUB's `variables` are put in, where there is a GRUB: then an
/// `initrd` line may hold any number of files, too.
///
/// # Errors
/// It names no Linux kernel, is for another architecture, or does not fit.
pub fn parse(stem: &[u8], text: &[u8], variables: Option<&Variables>) -> Result<Entry> {
    let expand = |value: &[u8]| match variables {
        Some(variables) => variables.expand::<1024>(value),
        None => Text::whole(value),
    };
    let (id, left) = counting(stem);
    let mut entry =
        Entry { id: Text::clipped(id), exhausted: left == Some(0), volume: usize::MAX, ..Entry::default() };
    for (key, value) in lines(text).map(word) {
        match key {
            b"title" => entry.title = Text::clipped(value),
            b"version" => entry.version = Text::clipped(value),
            b"machine-id" => entry.machine = Text::clipped(value),
            b"sort-key" => entry.sort_key = Text::clipped(value),
            b"linux" => entry.linux = Text::whole(expand(value)?.bytes())?,
            b"initrd" if variables.is_some() => expand(value)?
                .bytes()
                .split(u8::is_ascii_whitespace)
                .filter(|path| !path.is_empty())
                .try_for_each(|path| entry.add_initrd(path))?,
            b"initrd" => entry.add_initrd(value)?,
            b"options" => entry.options.push_word(expand(value)?.bytes().trim_ascii())?,
            b"architecture" if !value.eq_ignore_ascii_case(b"x64") => {
                return Err(Error::Unsupported("an entry for another architecture"));
            }
            _ => {}
        }
    }
    if entry.linux.is_empty() { Err(Error::Unsupported("an entry without linux")) } else { Ok(entry) }
}

/// Splits boot counting off a file's name: NAME+LEFT or NAME+LEFT-DONE.
pub fn counting(stem: &[u8]) -> (&[u8], Option<u32>) {
    let number = |digits: &[u8]| {
        let good = !digits.is_empty() && digits.len() < 9 && digits.iter().all(u8::is_ascii_digit);
        good.then(|| digits.iter().fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0')))
    };
    let split = stem.iter().rposition(|byte| *byte == b'+').and_then(|at| {
        let mut parts = stem.get(at + 1..)?.splitn(2, |byte| *byte == b'-');
        let left = number(parts.next()?)?;
        if let Some(done) = parts.next() {
            number(done)?;
        }
        Some((stem.get(..at)?, Some(left)))
    });
    split.unwrap_or((stem, None))
}

/// loader.conf's patterns: an id, perhaps with `.conf` or `.efi`, perhaps with a star at its end.
fn matches(pattern: &[u8], id: &[u8]) -> bool {
    let pattern = pattern.strip_suffix(b".conf").or_else(|| pattern.strip_suffix(b".efi")).unwrap_or(pattern);
    pattern.strip_suffix(b"*").map_or(pattern == id, |start| id.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_parsed_and_its_counter_taken_off() {
        let text =
            b"# made by a package\ntitle  Debian 12\nversion 6.1.0-9\nlinux /m/6.1/linux\ninitrd /m/6.1/a\n\
            initrd /m/6.1/b\noptions root=UUID=x  ro\noptions quiet\nunknown yes\n";
        let entry = parse(b"m-6.1.0-9+0-3", text, None).unwrap();
        assert_eq!(entry.id.bytes(), b"m-6.1.0-9");
        assert!(entry.exhausted);
        assert_eq!(entry.options.bytes(), b"root=UUID=x  ro quiet");
        assert_eq!(entry.initrds().iter().map(Text::bytes).collect::<Vec<_>>(), [b"/m/6.1/a", b"/m/6.1/b"]);
        assert_eq!(
            parse(b"x", b"title only", None).unwrap_err(),
            Error::Unsupported("an entry without linux")
        );
        assert!(parse(b"x", b"linux /a\narchitecture aa64", None).is_err());
        assert_eq!(counting(b"a+b"), (&b"a+b"[..], None));
    }

    #[test]
    fn entries_are_ordered_as_the_specification_orders_them() {
        let mut entries = Entries::new();
        for (stem, text) in [
            ("old", "linux /k"),
            ("m-6.1.9", "linux /k\nsort-key debian\nversion 6.1.9"),
            ("m-6.1.10+0", "linux /k\nsort-key debian\nversion 6.1.11"),
            ("m-6.1.10", "linux /k\nsort-key debian\nversion 6.1.10"),
            ("new-2", "linux /k"),
            ("a", "linux /k\nsort-key arch\nversion 1"),
        ] {
            entries.insert(parse(stem.as_bytes(), text.as_bytes(), None).unwrap(), order);
        }
        let ids: Vec<_> = entries.all().iter().map(|entry| entry.id.to_string()).collect();
        // Same id as a sound one, but its tries are used up: last.
        assert_eq!(ids, ["a", "m-6.1.10", "m-6.1.9", "old", "new-2", "m-6.1.10"]);
    }
}

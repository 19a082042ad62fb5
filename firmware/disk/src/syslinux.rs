//! extlinux.conf and syslinux.cfg (the Syslinux project's doc/syslinux.txt): Alpine, Arch, and what U-Boot
//! reads.

use crate::bytes::{lines, word};
use crate::entries::{Entries, Entry, Path};
use crate::text::Text;
use crate::volume::Volume;
use crate::{Error, Result};

/// Where it may be. Paths in it begin at its own folder.
const FILES: [(&[u8], &[u8]); 10] = [
    (b"/boot", b"/boot/extlinux.conf"),
    (b"/", b"/extlinux.conf"),
    (b"/boot/extlinux", b"/boot/extlinux/extlinux.conf"),
    (b"/extlinux", b"/extlinux/extlinux.conf"),
    (b"/boot/syslinux", b"/boot/syslinux/syslinux.cfg"),
    (b"/boot/syslinux", b"/boot/syslinux/extlinux.conf"),
    (b"/syslinux", b"/syslinux/syslinux.cfg"),
    (b"/syslinux", b"/syslinux/extlinux.conf"),
    (b"/EFI/syslinux", b"/EFI/syslinux/syslinux.cfg"),
    (b"/", b"/syslinux.cfg"),
];

/// Adds the entries of a volume's configuration in its order.
///
/// # Errors
/// There is none, or it could not be read. A label that is no Linux, or does not fit, is left out.
pub fn read(volumes: &[Option<Volume>], at: usize, scratch: &mut [u8], entries: &mut Entries) -> Result<()> {
    let Some(Some(volume)) = volumes.get(at) else { return Err(Error::Missing) };
    for (folder, path) in FILES {
        match volume.read_file(path, scratch) {
            Err(Error::Missing) => {}
            Err(error) => return Err(error),
            Ok(text) => {
                parse(text, folder, entries);
                return Ok(());
            }
        }
    }
    Err(Error::Missing)
}

/// Parses a configuration that lies in `folder`.
pub fn parse(text: &[u8], folder: &[u8], entries: &mut Entries) {
    let before = entries.all().len();
    let mut reader = Reader { folder, label: None, global: Text::EMPTY, chosen: None, entries };
    let mut default = Text::<96>::EMPTY;
    for (key, value) in lines(text).map(word) {
        match upper(key).bytes() {
            b"DEFAULT" => default = Text::clipped(value),
            b"LABEL" => reader.begin(value),
            b"MENU" => reader.menu(value),
            b"LINUX" | b"KERNEL" => reader.with(|entry, folder| {
                entry.linux = path(folder, value)?;
                Ok(())
            }),
            b"INITRD" => reader.with(|entry, folder| initrds(entry, folder, value)),
            b"APPEND" => reader.append(value),
            _ => {}
        }
    }
    reader.end();
    let chosen = reader.chosen;
    let named = entries.since(before).iter().position(|entry| entry.id.bytes() == default.bytes());
    // MENU DEFAULT has the menu begin there. Without it DEFAULT says what is booted, unless it names the menu
    // itself.
    entries.default = chosen.or(named.map(|at| before + at)).unwrap_or(entries.default);
}

struct Reader<'a> {
    folder: &'a [u8],
    label: Option<Label>,
    /// What is appended where a label says nothing.
    global: Text<1024>,
    /// Which one has MENU DEFAULT.
    chosen: Option<usize>,
    entries: &'a mut Entries,
}

struct Label {
    entry: Entry,
    appends: bool,
    default: bool,
    /// It does not fit.
    wrong: bool,
}

impl Reader<'_> {
    fn begin(&mut self, name: &[u8]) {
        self.end();
        let entry = Entry { id: Text::clipped(name), volume: usize::MAX, ..Entry::default() };
        self.label = Some(Label { entry, appends: false, default: false, wrong: false });
    }

    fn end(&mut self) {
        let Some(Label { mut entry, appends, default, wrong }) = self.label.take() else { return };
        if !appends {
            entry.options = self.global;
        }
        // Modules of Syslinux itself (menu.c32, memdisk) are no kernels.
        let module = entry.linux.bytes().rsplit(|byte| *byte == b'.').next().unwrap_or_default();
        let module =
            [&b"c32"[..], b"com", b"bin", b"bss", b"img"].iter().any(|end| module.eq_ignore_ascii_case(end));
        let good = !wrong && !module && !entry.linux.is_empty() && finish(&mut entry, self.folder).is_ok();
        if good && self.entries.push(entry) && default {
            self.chosen = Some(self.entries.all().len() - 1);
        }
    }

    /// Has `change` change the label's entry, which is left out if that fails.
    fn with(&mut self, change: impl FnOnce(&mut Entry, &[u8]) -> Result<()>) {
        if let Some(label) = &mut self.label {
            label.wrong |= change(&mut label.entry, self.folder).is_err();
        }
    }

    fn menu(&mut self, value: &[u8]) {
        let Some(label) = &mut self.label else { return };
        let (key, value) = word(value);
        match upper(key).bytes() {
            b"DEFAULT" => label.default = true,
            b"LABEL" => {
                let mut title = Text::EMPTY;
                // A circumflex marks the hot key.
                for byte in value.iter().filter(|byte| **byte != b'^') {
                    let _ = title.push(&[*byte]);
                }
                label.entry.title = title;
            }
            _ => {}
        }
    }

    fn append(&mut self, value: &[u8]) {
        // A hyphen alone: nothing, also not what all others have.
        let value: &[u8] = if value == b"-" { b"" } else { value };
        match &mut self.label {
            Some(label) => {
                label.appends = true;
                match Text::whole(value) {
                    Ok(options) => label.entry.options = options,
                    Err(_) => label.wrong = true,
                }
            }
            None => self.global = Text::whole(value).unwrap_or_default(),
        }
    }
}

/// `initrd=` among the options is Syslinux's, as INITRD is.
fn finish(entry: &mut Entry, folder: &[u8]) -> Result<()> {
    let options = entry.options;
    if entry.initrds == 0 {
        let mut given =
            options.bytes().split(|byte| *byte == b' ').filter_map(|word| word.strip_prefix(b"initrd="));
        if let Some(list) = given.next_back() {
            initrds(entry, folder, list)?;
        }
    }
    Ok(())
}

fn initrds(entry: &mut Entry, folder: &[u8], list: &[u8]) -> Result<()> {
    entry.initrds = 0;
    let mut paths = list.split(|byte| *byte == b',').filter(|path| !path.is_empty());
    paths.try_for_each(|name| entry.add_initrd(path(folder, name)?.bytes()))
}

fn path(folder: &[u8], name: &[u8]) -> Result<Path> {
    if name.starts_with(b"/") {
        return Text::whole(name);
    }
    let mut path = Text::whole(folder)?;
    path.push(b"/")?;
    path.push(name).map(|()| path)
}

/// A keyword in capitals; keywords know no case.
fn upper(key: &[u8]) -> Text<16> {
    let mut upper = Text::EMPTY;
    for byte in key {
        let _ = upper.push(&[byte.to_ascii_uppercase()]);
    }
    upper
}

//! What the kernel command line asks of init: the `vmm.*` parameters and the words after ` -- `. `guest-init` parses
//! /proc/cmdline with it once; nothing here touches the system, so that it can be tested anywhere.

use interface::Ip;

/// Where the exit code of the command goes before the machine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report<'a> {
    /// `vmm.exit=ioport:0xf4`: one byte to an I/O port, as QEMU's isa-debug-exit takes it.
    IoPort(u16),
    /// `vmm.exit=port:NAME`: decimal text and a newline to the virtio console port of that name.
    VirtioPort(&'a [u8]),
}

/// How the machine ends (`vmm.end=`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum End {
    /// ACPI S5; the default.
    #[default]
    PowerOff,
    /// A reset.
    Reboot,
    /// The CPUs stop, the machine stays on.
    Halt,
}

/// The command line, understood. Slices borrow from it; quotes around a value are gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Orders<'a> {
    /// What `/bin/sh -c` runs: all after ` -- ` as it stands, else `vmm.run=`. `None`: an interactive shell.
    pub command: Option<&'a [u8]>,
    /// `vmm.root=`: mounted and switched to before the command runs (a device, or the tag of a virtiofs).
    pub root: Option<&'a [u8]>,
    /// `vmm.rootfstype=`; ext4 unless said.
    pub root_type: Option<&'a [u8]>,
    /// `vmm.rootflags=`: `ro` and `rw` are understood here, the rest goes to the file system.
    pub root_flags: Option<&'a [u8]>,
    /// `vmm.exit=`.
    pub report: Option<Report<'a>>,
    /// `vmm.end=`.
    pub end: End,
    /// `vmm.marker`: say "guest: init" on the console first of all.
    pub marker: bool,
    /// `vmm.mark=0x80`: write a byte to this boot-mark port first of all.
    pub mark: Option<u16>,
    /// `vmm.ready=0x80`: say on this boot-mark port that the guest is ready, when its command is what comes next.
    pub ready: Option<u16>,
    /// `ip=`, if it has an address: the kernel's own parameter, for kernels that leave it to others.
    pub ip: Option<Ip<'a>>,
    /// The last `console=`, without its options: the kernel's own choice for /dev/console.
    pub console: Option<&'a [u8]>,
    /// The first `vmm.` parameter that was not understood.
    pub unknown: Option<&'a [u8]>,
}

impl<'a> Orders<'a> {
    /// Parses `line`, the text of /proc/cmdline, by the kernel's own quoting rules: a `"` keeps spaces together and is
    /// not part of the value. The last of two equal parameters counts.
    pub fn parse(line: &'a [u8]) -> Self {
        let mut orders = Self::default();
        let mut run = None;
        let mut tail = None;
        let mut rest = line;
        while let Some((word, after)) = next_word(rest) {
            if word == b"--" {
                let text = after.trim_ascii();
                tail = (!text.is_empty()).then_some(text);
                break;
            }
            rest = after;
            orders.take(word, &mut run);
        }
        orders.command = tail.or(run);
        orders
    }

    fn take(&mut self, word: &'a [u8], run: &mut Option<&'a [u8]>) {
        let word = unquote(word);
        let (name, value) = match word.iter().position(|&b| b == b'=') {
            Some(at) => (&word[..at], Some(unquote(&word[at + 1..]))),
            None => (word, None),
        };
        match (name, value) {
            (b"console", Some(value)) => {
                self.console = value.split(|&b| b == b',').next();
            }
            (b"ip", Some(value)) => self.ip = Ip::parse(value),
            (b"vmm.run", Some(value)) => *run = Some(value),
            (b"vmm.root", Some(value)) => self.root = Some(value),
            (b"vmm.rootfstype", Some(value)) => self.root_type = Some(value),
            (b"vmm.rootflags", Some(value)) => self.root_flags = Some(value),
            (b"vmm.marker", None) => self.marker = true,
            (b"vmm.mark", Some(value)) if number(value).is_some() => self.mark = number(value),
            (b"vmm.ready", Some(value)) if number(value).is_some() => self.ready = number(value),
            (b"vmm.end", Some(b"poweroff")) => self.end = End::PowerOff,
            (b"vmm.end", Some(b"reboot")) => self.end = End::Reboot,
            (b"vmm.end", Some(b"halt")) => self.end = End::Halt,
            (b"vmm.exit", Some(value)) if report(value).is_some() => self.report = report(value),
            // `interface::share` reads them.
            (b"vmm.share", Some(_)) => {}
            _ if name.starts_with(b"vmm.") => self.unknown = self.unknown.or(Some(word)),
            _ => {}
        }
    }
}

fn report(value: &[u8]) -> Option<Report<'_>> {
    if let Some(port) = value.strip_prefix(b"ioport:") {
        number(port).map(Report::IoPort)
    } else {
        let name = value.strip_prefix(b"port:")?;
        (!name.is_empty()).then_some(Report::VirtioPort(name))
    }
}

/// A port number, decimal or `0x` hexadecimal.
fn number(text: &[u8]) -> Option<u16> {
    let text = core::str::from_utf8(text).ok()?;
    match text.strip_prefix("0x") {
        Some(hex) => u16::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// The next word of `text` and what follows it: spaces end a word unless a `"` is open.
fn next_word(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let text = text.trim_ascii_start();
    if text.is_empty() {
        return None;
    }
    let mut quoted = false;
    let end = text
        .iter()
        .position(|&b| {
            quoted ^= b == b'"';
            b.is_ascii_whitespace() && !quoted
        })
        .unwrap_or(text.len());
    Some(text.split_at(end))
}

/// Without one leading and one trailing quote, as the kernel does it.
fn unquote(text: &[u8]) -> &[u8] {
    match text.strip_prefix(b"\"") {
        Some(text) => text.strip_suffix(b"\"").unwrap_or(text),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_asked_is_a_shell_and_power_off() {
        let orders = Orders::parse(b"reboot=k panic=-1\n");
        assert_eq!(orders, Orders::default());
    }

    #[test]
    fn a_quoted_command_keeps_its_spaces_and_loses_its_quotes() {
        let orders = Orders::parse(b"quiet vmm.run=\"echo  hello; exit 3\" vmm.marker\n");
        assert_eq!(orders.command, Some(&b"echo  hello; exit 3"[..]));
        assert!(orders.marker);
        let orders = Orders::parse(b"\"vmm.run=echo hi\" x");
        assert_eq!(orders.command, Some(&b"echo hi"[..]));
    }

    #[test]
    fn an_open_quote_runs_to_the_end() {
        assert_eq!(Orders::parse(b"vmm.run=\"echo a").command, Some(&b"echo a"[..]));
    }

    #[test]
    fn words_after_two_dashes_are_the_command_as_they_stand() {
        let orders = Orders::parse(b"vmm.run=no console=ttyS0 -- echo \"a  b\" console=x -- c\n");
        assert_eq!(orders.command, Some(&b"echo \"a  b\" console=x -- c"[..]));
        assert_eq!(orders.console, Some(&b"ttyS0"[..]));
        assert_eq!(Orders::parse(b"vmm.run=yes -- \n").command, Some(&b"yes"[..]));
        assert_eq!(Orders::parse(b"vmm.run=\"a -- b\"").command, Some(&b"a -- b"[..]));
    }

    #[test]
    fn the_last_console_counts_and_loses_its_options() {
        let orders = Orders::parse(b"console=hvc0 console=ttyS0,115200n8");
        assert_eq!(orders.console, Some(&b"ttyS0"[..]));
    }

    #[test]
    fn exit_reports() {
        let report = |line: &'static str| Orders::parse(line.as_bytes()).report;
        assert_eq!(report("vmm.exit=ioport:0xf4"), Some(Report::IoPort(0xf4)));
        assert_eq!(report("vmm.exit=ioport:128"), Some(Report::IoPort(128)));
        assert_eq!(report("vmm.exit=port:exit"), Some(Report::VirtioPort(b"exit")));
        for bad in
            ["vmm.exit=ioport:", "vmm.exit=ioport:0x10000", "vmm.exit=port:", "vmm.exit=f4", "vmm.exit"]
        {
            let orders = Orders::parse(bad.as_bytes());
            assert_eq!((orders.report, orders.unknown), (None, Some(bad.as_bytes())), "{bad}");
        }
    }

    #[test]
    fn root_end_and_mark() {
        let orders = Orders::parse(
            b"vmm.root=/dev/vda vmm.rootfstype=erofs vmm.rootflags=ro,noatime vmm.end=reboot vmm.mark=0x80 vmm.ready=128",
        );
        assert_eq!(orders.root, Some(&b"/dev/vda"[..]));
        assert_eq!(orders.root_type, Some(&b"erofs"[..]));
        assert_eq!(orders.root_flags, Some(&b"ro,noatime"[..]));
        assert_eq!(orders.end, End::Reboot);
        assert_eq!((orders.mark, orders.ready), (Some(0x80), Some(0x80)));
        assert_eq!(Orders::parse(b"vmm.end=never").unknown, Some(&b"vmm.end=never"[..]));
    }
}

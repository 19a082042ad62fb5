//! The kernel command line: its limits, its place in guest memory, and the default when the user gives none.
//!
//! The loaders call `write`; the machine calls [`of`].

use std::path::Path;

use super::error::Error;
use super::image::Image;
use crate::config::{CharTarget, Share, ShareFrom, VmConfig};
use crate::memory::{GuestRam, layout};

/// Checks `cmdline` against the kernel's limit `max` and writes it to [`layout::CMDLINE`], NUL-terminated.
///
/// # Errors
/// As [`check`].
pub(super) fn write(kernel: &Image, ram: &GuestRam, cmdline: &str, max: usize) -> Result<(), Error> {
    write_to(kernel, ram, layout::CMDLINE, cmdline, max)
}

/// Checks `cmdline` against the limit `max` and writes it to guest physical address `to`, NUL-terminated.
///
/// # Errors
/// As [`check`].
pub(super) fn write_to(
    kernel: &Image,
    ram: &GuestRam,
    to: u64,
    cmdline: &str,
    max: usize,
) -> Result<(), Error> {
    check(kernel.path(), cmdline, max)?;
    kernel.write_bytes(ram, to, cmdline.as_bytes(), "the command line")?;
    kernel.write(ram, to + cmdline.len() as u64, &0u8, "the command line")
}

/// Checks `cmdline` against the limit `max` of the kernel at `path`.
///
/// # Errors
/// [`Error::CmdlineTooLong`], [`Error::CmdlineCharacter`].
pub(super) fn check(path: &Path, cmdline: &str, max: usize) -> Result<(), Error> {
    let path = || path.to_owned();
    // The room in the layout is far more than any known kernel takes, so that one limit is enough to report.
    let max = max.min(layout::CMDLINE_SIZE as usize - 1);
    if cmdline.len() > max {
        return Err(Error::CmdlineTooLong { path: path(), len: cmdline.len(), max });
    }
    if let Some(at) = cmdline.bytes().position(|b| b == 0 || !b.is_ascii()) {
        let what = if cmdline.as_bytes()[at] == 0 { "a NUL" } else { "a character that is not ASCII" };
        return Err(Error::CmdlineCharacter { path: path(), what, at });
    }
    Ok(())
}

/// The command line of the machine that `config` describes: what the user gives, or the [default](default_for), behind what says where
/// shared folders and files are mounted.
pub fn of(config: &VmConfig) -> String {
    let line = config.cmdline.clone().unwrap_or_else(|| default_for(config));
    let shares = config.share.iter().enumerate();
    let is_file = |share: &Share| matches!(&share.from, ShareFrom::Path(path) if path.is_file());
    let orders = shares.filter_map(|(index, share)| share.order(index, is_file(share)));
    orders.chain([line]).collect::<Vec<_>>().join(" ")
}

/// The command line for a user who gives none. It says what is there and nothing else:
///
/// - `console=` each console that is not off; the last one, hvc0 before ttyS0, is /dev/console. Without a serial port,
///   `8250.nr_uarts=0` saves the kernel the search for one.
/// - `root=/dev/vda` with `rw`, or `ro` if that disk is read-only, when there is a disk and no initrd (an initrd finds
///   its root itself), and the kernel is not the disk's own (where its root is, the disk says).
/// - `panic=-1`: a panic restarts at once, which ends the run, instead of hanging for ever.
///
/// No `reboot=`: a kernel with ACPI uses the reset register of the FADT, which is there; others the i8042, which is too.
pub fn default_for(config: &VmConfig) -> String {
    let mut words = Vec::new();
    match config.serial {
        CharTarget::Off => words.push("8250.nr_uarts=0"),
        _ => words.push("console=ttyS0"),
    }
    if config.console() != CharTarget::Off {
        words.push("console=hvc0");
    }
    if let (Some(disk), None, Some(_)) = (config.disk.first(), &config.initrd, &config.kernel) {
        words.push("root=/dev/vda");
        words.push(if disk.readonly { "ro" } else { "rw" });
    }
    words.push("panic=-1");
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn default(json: &str) -> String {
        default_for(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn the_default_says_what_is_there() {
        assert_eq!(default("{}"), "8250.nr_uarts=0 console=hvc0 panic=-1");
        assert_eq!(default(r#"{"serial": "stdio"}"#), "console=ttyS0 panic=-1");
        assert_eq!(
            default(r#"{"serial": "pty", "disk": ["/d"], "kernel": "/k"}"#),
            "console=ttyS0 console=hvc0 root=/dev/vda rw panic=-1"
        );
        assert_eq!(
            default(r#"{"console": "off", "disk": ["/d,readonly", "/e"], "kernel": "/k"}"#),
            "8250.nr_uarts=0 root=/dev/vda ro panic=-1"
        );
        let no_root = "8250.nr_uarts=0 console=hvc0 panic=-1";
        assert_eq!(default(r#"{"disk": ["/d"], "initrd": "/i", "kernel": "/k"}"#), no_root);
        assert_eq!(default(r#"{"disk": ["/d"]}"#), no_root, "the disk knows");
    }

    #[test]
    fn shares_are_told_before_all_else() {
        let line = |json: &str| of(&serde_json::from_str(json).unwrap());
        let shares = r#""share": ["a:/a", "b", "c:/c:ro,tag=t"]"#;
        let given = line(&format!(r#"{{{shares}, "cmdline": "quiet -- ls"}}"#));
        assert_eq!(given, "vmm.share=share0:/a vmm.share=t:/c:ro quiet -- ls");
        assert!(line(&format!("{{{shares}}}")).ends_with("/c:ro 8250.nr_uarts=0 console=hvc0 panic=-1"));
        assert_eq!(line(r#"{"cmdline": "quiet"}"#), "quiet");
    }
}

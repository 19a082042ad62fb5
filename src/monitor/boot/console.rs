//! The default console: one that the kernel at hand is sure to have.
//!
//! A distribution's kernel has its virtio console in a module, which its initrd need not have; the driver of
//! the serial port is built into each of them. Both at once, and one terminal for the two, would be no way
//! out: every message of the kernel comes twice, each of the two gets a login prompt of its own, and
//! /dev/console moves from one to the other in the middle of a boot, away from whoever reads there. So it is
//! one, from the first message to the last.

use super::x86_64::is_compressed;
use crate::config::{CharTarget, Kernel, VmConfig};

/// Gives the terminal to the serial port (ttyS0) in place of the virtio console (hvc0), where the
/// configuration says nothing of either and
///
/// - the last `console=` of the command line that is one of the two is a serial port, or
/// - it names neither, and the kernel is a disk's own, or a bzImage: most likely a distribution's. An ELF
///   vmlinux was most likely built for a monitor like this one: it has hvc0, which costs an exit per line and not
///   several per byte.
///
/// What a disk says of consoles is for the machine that it was made for. So the serial port is named there,
/// too, if a command line is given that has no `console=`.
pub fn settle(config: &mut VmConfig) {
    if config.console.0.is_some() || config.serial != CharTarget::Off {
        return;
    }
    // What is behind the hyphens is init's.
    let cmdline = config.cmdline.as_deref().unwrap_or_default().split(" -- ").next().unwrap_or_default();
    let consoles = cmdline.split_ascii_whitespace().filter_map(|word| word.strip_prefix("console="));
    let last = consoles.clone().rfind(|console| console.starts_with("ttyS") || console.starts_with("hvc"));
    let unnamed = consoles.count() == 0;
    let kernel = config.to_boot();
    let serial = match (last, &kernel) {
        (Some(console), _) => console.starts_with("ttyS"),
        (None, Ok(Some(Kernel::BootDisk))) => true,
        (None, Ok(Some(Kernel::File(path)))) => is_compressed(path),
        _ => false,
    };
    if !serial {
        return;
    }
    config.serial = CharTarget::Stdio;
    if let (Some(cmdline), true, Ok(Some(Kernel::BootDisk))) = (&mut config.cmdline, unnamed, kernel) {
        *cmdline = format!("console=ttyS0 {cmdline}").trim_end().to_owned();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_terminal_is_where_the_kernel_at_hand_speaks() {
        let dir = tempfile::tempdir().unwrap();
        let (bzimage, elf) = (dir.path().join("bzImage"), dir.path().join("vmlinux"));
        let mut image = vec![0; 1024];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        std::fs::write(&bzimage, image).unwrap();
        std::fs::write(&elf, b"\x7fELF").unwrap();
        let (serial, virtio) = ((CharTarget::Stdio, CharTarget::Off), (CharTarget::Off, CharTarget::Stdio));
        for (json, expected) in [
            (r#""disk": ["d"]"#, serial.clone()),
            (r#""disk": ["d"], "firmware": "built-in""#, serial.clone()),
            (r#""kernel": "BZIMAGE", "initrd": "i""#, serial.clone()),
            (r#""kernel": "ELF""#, virtio.clone()),
            (r#""kernel": "missing""#, virtio.clone()),
            (r#""firmware": "rom""#, virtio.clone()),
            (
                r#""kernel": "ELF", "cmdline": "console=hvc0 quiet console=ttyS0,115200 console=tty0""#,
                serial.clone(),
            ),
            (r#""kernel": "BZIMAGE", "cmdline": "console=ttyS0 console=hvc0""#, virtio.clone()),
            (r#""kernel": "BZIMAGE", "cmdline": "root=/dev/vda""#, serial),
            (r#""disk": ["d"], "console": "stdio""#, virtio),
            (r#""disk": ["d"], "console": "off""#, (CharTarget::Off, CharTarget::Off)),
            (r#""disk": ["d"], "serial": "pty""#, (CharTarget::Pty, CharTarget::Stdio)),
        ] {
            let json =
                json.replace("BZIMAGE", bzimage.to_str().unwrap()).replace("ELF", elf.to_str().unwrap());
            let mut config: VmConfig = serde_json::from_str(&format!("{{{json}}}")).unwrap();
            settle(&mut config);
            assert_eq!((config.serial.clone(), config.console()), expected, "{json}");
            config.validate().unwrap();
        }
        for (cmdline, expected) in [
            ("single", "console=ttyS0 single"),
            ("a -- console=hvc0", "console=ttyS0 a -- console=hvc0"),
            ("console=tty0 single", "console=tty0 single"),
            ("", "console=ttyS0"),
        ] {
            let mut config = VmConfig { cmdline: Some(cmdline.to_owned()), ..VmConfig::default() };
            config.disk = vec!["d".parse().unwrap()];
            settle(&mut config);
            assert_eq!((config.cmdline.as_deref(), config.serial), (Some(expected), CharTarget::Stdio));
        }
    }
}

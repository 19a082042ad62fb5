//! Which console a guest gets if nobody says: one that the kernel at hand is sure to have.
//!
//! A distribution's kernel has its virtio console in a module, which its initrd need not have; the driver of the serial port is
//! built into each of them. Both at once, and one terminal for the two, would be no way out: every message of the kernel comes
//! twice, each of the two gets a login prompt of its own, and /dev/console moves from one to the other in the middle of a
//! boot, away from whoever reads there. So it is one, from the first message to the last.

use std::path::Path;

use super::error::Role;
use super::image::Image;
use crate::config::{Kernel, VmConfig, Where};

/// Gives the terminal to the serial port (ttyS0) in place of the virtio console (hvc0), where the configuration says nothing
/// of either, and
///
/// - the command line's last `console=` is a serial port; or it names neither, and
/// - the kernel is a disk's own, or a bzImage: most likely a distribution's. Who has an ELF vmlinux has built it, and hvc0,
///   which costs an exit per line and not several per byte, is what a kernel for this monitor has.
pub fn settle(config: &mut VmConfig) {
    if config.console.0.is_some() || config.serial != Where::Off {
        return;
    }
    let said = config.cmdline.as_deref().unwrap_or_default().split_ascii_whitespace();
    let mut consoles = said.filter_map(|word| word.strip_prefix("console=")).rev();
    let said = consoles.find(|console| console.starts_with("ttyS") || console.starts_with("hvc"));
    let serial = match (said, config.to_boot()) {
        (Some(console), _) => console.starts_with("ttyS"),
        (None, Ok(Some(Kernel::BootDisk))) => true,
        (None, Ok(Some(Kernel::File(path)))) => is_bzimage(&path),
        _ => false,
    };
    if serial {
        config.serial = Where::Stdio;
    }
}

/// What cannot be read is none: whoever loads it says why.
fn is_bzimage(path: &Path) -> bool {
    let mut magic = [0; 4];
    let read =
        Image::open(path, Role::Kernel).and_then(|image| image.bytes(0x202, &mut magic, "the setup header"));
    read.is_ok() && magic == *b"HdrS"
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
        let (serial, virtio) = ((Where::Stdio, Where::Off), (Where::Off, Where::Stdio));
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
            (r#""disk": ["d"], "console": "off""#, (Where::Off, Where::Off)),
            (r#""disk": ["d"], "serial": "pty""#, (Where::Pty, Where::Stdio)),
        ] {
            let json =
                json.replace("BZIMAGE", bzimage.to_str().unwrap()).replace("ELF", elf.to_str().unwrap());
            let mut config: VmConfig = serde_json::from_str(&format!("{{{json}}}")).unwrap();
            settle(&mut config);
            assert_eq!((config.serial.clone(), config.console()), expected, "{json}");
            config.validate().unwrap();
        }
    }
}

//! alioth, by its command line. Its console on standard streams wants a terminal; one that is a log does not, and has no thread
//! that listens, so it gets that: the least that it can do.

use super::command::{found, words};
use super::fixed::Fixed;
use super::program::{BARE_MARKER, BY_PORT, Ending, Root};
use super::vmm::{bare_kernel, cmdline, end, kernel};
use super::{Found, RAM_MIB, Setting};

/// The kernel's file and the machine.
fn common(kernel: &str) -> Vec<String> {
    let memory = format!("size={RAM_MIB}M");
    words([
        "boot",
        "--pvh",
        kernel,
        "--cpu",
        "count=1",
        "--memory",
        &memory,
        "--console",
        "log,path=/dev/stdout",
    ])
}

/// PVH entry; no device but those of every such machine of alioth's.
pub fn linux(setting: &Setting, root: &Root) -> Found {
    let (program, there) = found(setting, "alioth");
    let (kernel, check) = kernel(setting.tuned_kernel(), "tuned-vmlinux");
    let initramfs = root.initramfs.to_string_lossy().into_owned();
    let mut rival = Fixed::new("alioth", program, move |life| {
        let mut arguments = common(&kernel.to_string_lossy());
        let cmdline = cmdline("8250.nr_uarts=0", 't', &format!("{BY_PORT}{}", end(life)));
        arguments.extend(words(["--initramfs", &initramfs, "--cmdline", &cmdline]));
        arguments
    });
    rival.guest_ram = true;
    rival.if_possible(there.and(check))
}

/// No Linux, beside vmm's.
pub fn bare_metal(setting: &Setting, _: &Root) -> Found {
    let (program, there) = found(setting, "alioth");
    let (kernel, made) = bare_kernel(setting, Ending::SleepControl);
    let mut rival = Fixed::new("alioth, no Linux: 6 instructions", program, move |life| {
        common(&kernel(life).to_string_lossy())
    });
    (rival.marker, rival.guest_ram) = (vec![BARE_MARKER], true);
    rival.if_possible(there.and(made).and_then(|()| setting.kvm()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::rivals::Life;

    #[test]
    fn it_is_given_by_path_and_gets_a_guest_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let given = folder.path().join("a-build");
        std::fs::write(&given, "#!/bin/sh\n[ \"$2\" = --pvh ] && exec cat \"$3\"\n").unwrap();
        std::fs::set_permissions(&given, std::fs::Permissions::from_mode(0o755)).unwrap();
        let setting = Setting {
            vmm: "vmm".into(),
            own: "vmm-bench".into(),
            with: [("alioth".to_owned(), given)].into(),
            kernel: None,
            bzimage: None,
            stock: None,
            agent: None,
            scratch: folder.path().to_owned(),
            instances: 1,
            repeatable_clock: false,
        };
        if let Err(why) = setting.kvm() {
            eprintln!("SKIP: alioth's guest: {why}");
            return;
        }
        let root = Root::make(folder.path()).unwrap();
        let mut rival = bare_metal(&setting, &root).map_err(|absent| absent.why).unwrap();
        let guest = rival.command(Life::Once).unwrap().output().unwrap().stdout;
        // mov dx, 0x600; mov al, 0x34; out dx, al
        let end = [0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee];
        assert!(guest.ends_with(&end), "{guest:x?}");
        let other = bare_kernel(&setting, Ending::DebugExit).0(Life::Once);
        assert!(!std::fs::read(other).is_ok_and(|bytes| bytes == guest), "vmm's guest");
    }
}

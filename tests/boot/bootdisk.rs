//! A disk that boots by itself, through the program of `firmware/disk`: its newest entry, also when the guest put that there.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::guest::{Guest, Kernel, available};

fn boot(disk: &Path) -> Vec<String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.arg("--kernel").arg(concat!(env!("OUT_DIR"), "/bootdisk"));
    command.arg("--disk").arg(disk).args(["--mem", "256M"]).stdin(Stdio::null());
    let ended = Guest::start(command).finish();
    ended.body().into_iter().map(|line| line.to_owned()).collect()
}

#[test]
fn a_disk_boots_its_newest_entry_also_after_an_update_in_the_guest() {
    if !available("disk boot") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (root, disk) = (dir.path().join("root"), dir.path().join("disk"));
    fs::create_dir_all(root.join("boot/loader/entries")).unwrap();
    fs::copy(Kernel::TunedBzImage.file(), root.join("boot/linux")).unwrap();
    fs::copy(Kernel::TunedBzImage.initramfs(), root.join("boot/initrd")).unwrap();
    let script = "echo BEGIN; tr ' ' '\\n' </proc/cmdline | grep ^mark; mkdir -p /m; mount -t ext4 /dev/vda /m; \
                  cd /m/boot/loader/entries; sed -e s/mark=1/mark=2/ -e s/6.9/6.10/ a-6.9.conf >a-6.10.conf; cd /; \
                  umount /m && echo written; echo END";
    let entry = format!(
        "title Linux\nsort-key linux\nversion 6.9\nlinux /linux\ninitrd /initrd\noptions quiet mark=1 vmm.run=\"{script}\"\n"
    );
    fs::write(root.join("boot/loader/entries/a-6.9.conf"), entry).unwrap();
    let made = Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(&root)
        .arg(&disk)
        .arg("96M")
        .status();
    assert!(made.unwrap().success());
    assert_eq!(boot(&disk), ["mark=1", "written"]);
    assert_eq!(boot(&disk), ["mark=2", "written"]);
}

//! A disk that boots by itself, `vmm --disk FILE` and nothing else: its newest entry, also when the guest put that there; another
//! by a key; by firmware of ours and of others; and a Debian with its own kernel.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::firmware::{QBOOT, packaged};
use crate::guest::{Ended, Guest, Kernel, available, bundle};

/// `vmm --disk DISK` with `options`, `keys` having been typed before it starts: the menu looks for them while it waits.
fn boot(disk: &Path, options: &[&str], keys: &str) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.arg("--disk").arg(disk).args(options).stdin(Stdio::piped());
    let mut guest = Guest::start(command);
    guest.stdin().write_all(keys.as_bytes()).unwrap();
    guest.finish()
}

/// A disk with an ext4 file system and nothing but these files below /boot.
fn disk(dir: &Path, files: &[(&str, &[u8])]) -> PathBuf {
    let (root, disk) = (dir.join("root"), dir.join("disk"));
    for (name, content) in files {
        let path = root.join("boot").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-d"]).arg(&root).arg(&disk).arg("96M");
    assert!(mke2fs.stdout(Stdio::null()).status().unwrap().success());
    disk
}

fn tuned() -> [(&'static str, Vec<u8>); 2] {
    let read = |path: PathBuf| fs::read(path).unwrap();
    [("linux", read(Kernel::TunedBzImage.file())), ("initrd", read(Kernel::TunedBzImage.initramfs()))]
}

fn entry(version: &str, options: &str) -> String {
    format!(
        "title Linux\nsort-key linux\nversion {version}\nlinux /linux\ninitrd /initrd\noptions quiet {options}\n"
    )
}

#[test]
fn a_disk_boots_its_newest_entry_also_after_an_update_in_the_guest() {
    if !available("disk boot") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let script = "echo BEGIN; tr ' ' '\\n' </proc/cmdline | grep ^mark; mkdir -p /m; mount -t ext4 /dev/vda /m; \
                  cd /m/boot/loader/entries; sed -e s/mark=1/mark=2/ -e s/6.9/6.10/ a-6.9.conf >a-6.10.conf; cd /; \
                  umount /m && echo written; echo END";
    let entry = entry("6.9", &format!("mark=1 vmm.run=\"{script}\""));
    let [(linux, kernel), (initrd, initramfs)] = tuned();
    let disk = disk(
        dir.path(),
        &[(linux, &kernel), (initrd, &initramfs), ("loader/entries/a-6.9.conf", entry.as_bytes())],
    );
    assert_eq!(boot(&disk, &[], "").body(), ["mark=1", "written"]);
    assert_eq!(boot(&disk, &[], "").body(), ["mark=2", "written"]);
}

/// The choice, and what the guest is told: that entry's options, then the monitor's, which say of no root.
#[test]
fn a_key_chooses_and_firmware_hands_over() {
    if !available("disk boot: menu, firmware") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let run = "vmm.run=\"echo BEGIN; cat /proc/cmdline; echo END\"";
    let entries = ["new", "old"].map(|mark| entry("1", &format!("mark={mark} {run}")));
    let [(linux, kernel), (initrd, initramfs)] = tuned();
    let disk = disk(
        dir.path(),
        &[
            (linux, &kernel),
            (initrd, &initramfs),
            ("loader/entries/a-2.conf", entries[0].replace("version 1", "version 2").as_bytes()),
            ("loader/entries/a-1.conf", entries[1].as_bytes()),
        ],
    );
    let qboot = packaged("disk boot by qboot", QBOOT, "qemu-system-data");
    for (options, keys, mark) in [
        (&[][..], "2", "old"),
        (&["--firmware"], "", "new"),
        (&["--firmware"], "\u{1b}[B\r", "old"),
        (&["--firmware", QBOOT], "", "new"),
    ] {
        if options.contains(&QBOOT) && !qboot {
            continue;
        }
        let ended = boot(&disk, options, keys);
        let expected = format!(" quiet mark={mark} {run} 8250.nr_uarts=0 console=hvc0 panic=-1");
        let [told] = ended.body()[..] else { panic!("{}", ended.text) };
        // The tuned kernel has words of its own, which come first.
        assert!(told.ends_with(&expected), "{options:?}: {told}");
    }
}

/// Debian as its packages install it, with its own kernel and initrd, to a shell.
#[test]
fn debian_boots_its_own_kernel() {
    if !available("Debian's disk") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    let copied = Command::new("cp").arg("--sparse=always").arg(bundle("debian.img")).arg(&disk).status();
    assert!(copied.unwrap().success(), "no disk to copy: cargo guest bundle --out target/guests makes it");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.arg("--disk").arg(&disk).args(["--mem", "1G"]).stdin(Stdio::piped());
    let mut guest = Guest::start(command);
    guest.wait_for("root@guest:/#", 1);
    // In two pieces, or the echo of what is typed would be taken for what is printed.
    let look = "echo BEG''IN; uname -r; ls /boot | grep vmlinuz; findmnt -no SOURCE /; echo E''ND; exit\n";
    guest.stdin().write_all(look.as_bytes()).unwrap();
    let ended = guest.finish();
    let text = ended.text.replace("\u{1b}[?2004l\r", "");
    let body = Ended { text, ..ended };
    let body = body.body();
    let [release, file, root] = body[..] else { panic!("{body:?}") };
    assert_eq!(file, format!("vmlinuz-{release}"));
    assert_eq!(root, "/dev/vda1");
}

//! A disk that boots by itself, `vmm --disk FILE` and nothing else: its newest entry, also when the guest put
//! that there; another by a key; by firmware of ours and of others; as distributions write it; and a Debian
//! with its own kernel, to its login.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::firmware::{QBOOT, packaged};
use crate::guest::{Ended, Guest, Kernel, available, copy_of_disk};

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
    disk_of("ext4", dir, files)
}

/// A disk with a file system of that kind.
fn disk_of(kind: &str, dir: &Path, files: &[(&str, &[u8])]) -> PathBuf {
    let (root, disk) = (dir.join("root"), dir.join("disk"));
    for (name, content) in files {
        let path = root.join("boot").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    let _ = fs::remove_file(&disk);
    tool(Command::new("mke2fs").args(["-q", "-F", "-t", kind, "-d"]).arg(&root).arg(&disk).arg("96M"));
    disk
}

fn tool(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
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
        let expected = format!(" quiet mark={mark} {run} console=ttyS0 panic=-1");
        let [told] = ended.body()[..] else { panic!("{}", ended.text) };
        // The tuned kernel has words of its own, which come first.
        assert!(told.ends_with(&expected), "{options:?}: {told}");
    }
}

/// Alpine's way on an ext2, and a unified image on a FAT. And disks with nothing that can be booted, which is
/// a failure.
#[test]
fn what_distributions_write_boots_and_what_cannot_be_read_is_named() {
    if !available("disk boot: extlinux.conf, unified image, nothing") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // What is behind the hyphens is init's: ours runs it.
    let run = |mark: &str| format!("quiet mark={mark} -- echo BEGIN; cat /proc/cmdline; seq 2000; echo END");
    let [(linux, kernel), (initrd, initramfs)] = tuned();
    let config = format!(
        "DEFAULT menu.c32\nLABEL other\n  LINUX missing\nLABEL virt\n  MENU DEFAULT\n  LINUX {linux}\n  INITRD {initrd}\n  APPEND {}\n",
        run("alpine")
    );
    let ext2 = disk_of(
        "ext2",
        dir.path(),
        &[(linux, &kernel), (initrd, &initramfs), ("extlinux.conf", config.as_bytes())],
    );
    let path = |name: &str| dir.path().join(name);
    fs::write(path("cmdline"), run("unified")).unwrap();
    fs::write(path("source"), ".globl _start\n_start: ret\n").unwrap();
    tool(Command::new("as").arg("-o").arg(path("object")).arg(path("source")));
    let mut ld = Command::new("ld");
    tool(
        ld.args(["-m", "i386pep", "--subsystem", "10", "-e", "_start", "-o"])
            .arg(path("stub"))
            .arg(path("object")),
    );
    let mut objcopy = Command::new("objcopy");
    for (section, file, at) in [
        (".cmdline", path("cmdline"), "0x150000000"),
        (".linux", Kernel::TunedBzImage.file(), "0x151000000"),
        (".initrd", Kernel::TunedBzImage.initramfs(), "0x156000000"),
    ] {
        objcopy.arg(format!("--add-section={section}={}", file.display()));
        objcopy.arg(format!("--change-section-vma={section}={at}"));
    }
    tool(objcopy.arg(path("stub")).arg(path("one.efi")));
    let esp = path("esp");
    fs::File::create(&esp).unwrap().set_len(64 << 20).unwrap();
    tool(Command::new("mkfs.vfat").args(["-F", "32"]).arg(&esp));
    tool(Command::new("mmd").arg("-i").arg(&esp).args(["::EFI", "::EFI/Linux"]));
    tool(Command::new("mcopy").arg("-i").arg(&esp).arg(path("one.efi")).arg("::EFI/Linux/"));
    for (disk, mark) in [(&ext2, "alpine"), (&esp, "unified")] {
        let ended = boot(disk, &[], "");
        let [told, .., last] = ended.body()[..] else { panic!("{}", ended.text) };
        let run = run(mark).replace(" -- ", " console=ttyS0 panic=-1 -- ");
        assert!(told.ends_with(&run), "{told}");
        // The serial port takes its time, and the shell has ended long before.
        assert!(last == "2000" && ended.text.contains("\nEND"), "{}", ended.text);
    }

    let (xfs, btrfs) = (path("xfs"), path("btrfs"));
    for (disk, mib, make) in [(&xfs, 300, "mkfs.xfs"), (&btrfs, 128, "mkfs.btrfs")] {
        fs::File::create(disk).unwrap().set_len(mib << 20).unwrap();
        tool(Command::new(make).arg("-q").arg(disk));
    }
    let ended = boot(&xfs, &["--disk", btrfs.to_str().unwrap()], "");
    assert_eq!(ended.code, Some(2), "{}", ended.text);
    for word in ["nothing to boot", "vda: XFS: cannot be read", "vdb: btrfs: cannot be read", "--kernel"] {
        assert!(ended.text.contains(word), "{word}: {}", ended.text);
    }
}

/// Debian as debootstrap alone installs it, with its own kernel, initrd and systemd, and no option that is
/// for it: nothing is said twice, there is one login, and what is typed gets there.
#[test]
fn a_stock_debian_comes_up_to_its_login() {
    if !available("Debian's disk") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = copy_of_disk("debian-stock.img", dir.path());
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.arg("--disk").arg(&disk).args(["--mem", "1G"]).stdin(Stdio::piped());
    let mut guest = Guest::start(command);
    // 75 seconds on an idle machine.
    guest.patience = Duration::from_secs(500);
    guest.wait_for("login: ", 1);
    guest.stdin().write_all(b"root\n").unwrap();
    guest.wait_for("Password: ", 1);
    let text = guest.text();
    for once in ["Linux version 6.1.", "login: ", "Command line: root=UUID="] {
        assert_eq!(text.matches(once).count(), 1, "{once}: {text}");
    }
    // The menu has found the installed kernel, and it is the one that runs.
    let release = |before: &str, end: char| text.split(before).nth(1).and_then(|rest| rest.split(end).next());
    assert_eq!(release("Linux (", ')'), release("Linux version ", ' '), "{text}");
}

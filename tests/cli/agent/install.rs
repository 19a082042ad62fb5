//! `vmm agent install`, into images and folders that look like guests. That a guest then starts it is tested by tests/boot/agent.rs.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::{Command, Output};

use rustix::fs::{FlockOperation, flock};

use super::program;
use crate::place::*;

const AGENT: &str = "/usr/local/sbin/vmm-agent";
const UNIT: &str = "/etc/systemd/system/vmm-agent.service";
const WANTED: &str = "/etc/systemd/system/multi-user.target.wants/vmm-agent.service";
const SYSTEMD: &str = "usr/lib/systemd/systemd";
const OPENRC: &str = "sbin/openrc-run";

fn tool(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(name).args(arguments).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").output();
    let output = output.unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(output.status.success(), "{name} {arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// A guest's root with `init`, in the folder `root`.
fn root(place: &Place, init: &str) {
    for file in [init, "etc/passwd"] {
        let path = place.path("root").join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }
}

/// A place with `disk`: an image of so many MiB with such a root, from byte `offset`.
fn disk(init: &str, mib: u64, offset: u64) -> Place {
    let place = Place::new();
    root(&place, init);
    let (from, to) = (place.path("root"), place.path("disk"));
    let offset = format!("offset={offset},root_owner=0:0");
    let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
    tool("mke2fs", &["-q", "-F", "-t", "ext4", "-E", &offset, "-d", from, to, &format!("{mib}M")]);
    place
}

fn install(place: &Place, options: &str) -> Output {
    let mut command = place.command(&format!("agent install {options} --agent"));
    finish(command.arg(program()).spawn().unwrap())
}

#[track_caller]
fn installed(place: &Place, options: &str) {
    let output = install(place, options);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("is installed"), "{}", text(&output.stdout));
}

/// What `request` to debugfs says of the file system at `offset` of the disk.
fn ask(place: &Place, offset: u64, request: &str) -> String {
    let disk = format!("{}?offset={offset}", place.path("disk").display());
    tool("debugfs", &["-R", request, &disk])
}

#[track_caller]
fn is_whole(place: &Place, offset: u64, enabled: &str, unit: &str) {
    let disk = format!("{}?offset={offset}", place.path("disk").display());
    tool("e2fsck", &["-fn", &disk]);
    let copy = place.path("copy");
    ask(place, offset, &format!("dump {AGENT} {}", copy.display()));
    assert!(fs::read(&copy).unwrap() == fs::read(program()).unwrap());
    let stat = ask(place, offset, &format!("stat {AGENT}"));
    assert!(stat.contains("Mode:  0755") && stat.contains("User:     0   Group:     0"), "{stat}");
    assert!(ask(place, offset, &format!("cat {unit}")).contains(AGENT));
    let link = ask(place, offset, &format!("stat {enabled}"));
    assert!(link.contains(&format!("Fast link dest: \"{unit}\"")), "{link}");
}

#[test]
fn an_agent_is_installed_into_a_disk_without_partitions_and_then_renewed() {
    let place = disk(SYSTEMD, 16, 0);
    for _ in 0..2 {
        installed(&place, "--disk disk");
        is_whole(&place, 0, WANTED, UNIT);
    }
    // An older one, half of it.
    let script = place.path("script");
    place.file("old", "old");
    let old = place.path("old");
    fs::write(&script, format!("rm {AGENT}\nwrite {} {AGENT}\nrm {WANTED}\n", old.display())).unwrap();
    tool("debugfs", &["-w", "-f", script.to_str().unwrap(), place.path("disk").to_str().unwrap()]);
    installed(&place, "--disk disk");
    is_whole(&place, 0, WANTED, UNIT);
}

#[test]
fn an_agent_is_installed_into_a_partition_for_openrc() {
    let offset = 1 << 20;
    let place = disk(OPENRC, 16, offset);
    let path = place.path("disk");
    File::options().write(true).open(&path).unwrap().set_len(18 << 20).unwrap();
    place.file("table", "label: gpt\nstart=1MiB,size=16MiB,type=L\n");
    let command = format!("sfdisk -q {} <{}", path.display(), place.path("table").display());
    tool("sh", &["-c", &command]);
    installed(&place, "--disk disk");
    is_whole(&place, offset, "/etc/runlevels/default/vmm-agent", "/etc/init.d/vmm-agent");
}

#[test]
fn an_image_that_cannot_be_installed_into_is_left_as_it_was() {
    let debugfs = |request: &str| {
        let place = disk(SYSTEMD, 16, 0);
        tool("debugfs", &["-w", "-R", request, place.path("disk").to_str().unwrap()]);
        place
    };
    let qcow2 = || {
        let place = Place::new();
        place.file("disk", [&b"QFI\xfb"[..], &[0; 4092]].concat());
        place
    };
    let empty = || {
        let place = Place::new();
        place.file("disk", vec![0; 1 << 20]);
        place
    };
    let text_file = || {
        let place = Place::new();
        place.file("disk", "root:x:0:0\n");
        place
    };
    for (place, words) in [
        (debugfs("feature needs_recovery"), ["not unmounted cleanly", "vmm stop"]),
        (debugfs("set_super_value state 0"), ["not unmounted cleanly", "vmm stop"]),
        (debugfs("set_super_value state 3"), ["not unmounted cleanly", "vmm stop"]),
        (debugfs("set_super_value free_blocks_count 100"), ["100 KiB are free", "resize2fs"]),
        (disk("sbin/runit", 16, 0), ["neither systemd nor OpenRC", "docs/agent.md"]),
        (qcow2(), ["qcow2", "qemu-img convert"]),
        (empty(), ["no ext2, ext3 or ext4", "--root DIR"]),
        (text_file(), ["not a whole number", "hint: name the raw disk image of a guest"]),
        (Place::new(), ["cannot open disk image disk", "hint: check the path\n"]),
    ] {
        let before = fs::read(place.path("disk")).unwrap_or_default();
        let output = install(&place, "--disk disk");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(BAD_ARGUMENT), "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
        assert!(fs::read(place.path("disk")).unwrap_or_default() == before, "{words:?}: it was written to");
    }
}

#[test]
fn an_image_that_is_in_use_is_left_alone() {
    let place = disk(SYSTEMD, 16, 0);
    let file = File::open(place.path("disk")).unwrap();
    flock(&file, FlockOperation::NonBlockingLockShared).unwrap();
    let output = install(&place, "--disk disk");
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(BAD_ARGUMENT));
    assert!(said.contains("in use by another process") && said.contains("vmm list"), "{said}");
}

/// A file system that says that it has room, and has none.
#[test]
fn nothing_is_left_of_an_installation_that_fails() {
    let place = disk(SYSTEMD, 1, 0);
    place.file("filler", vec![1; 500 << 10]);
    let script =
        format!("write {} /filler\nset_super_value free_blocks_count 8000\n", place.path("filler").display());
    place.file("script", script);
    let path = |name| place.path(name).display().to_string();
    tool("debugfs", &["-w", "-f", &path("script"), &path("disk")]);
    let output = install(&place, "--disk disk");
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(HOST), "{said}");
    assert!(said.contains(&format!("did not write {AGENT}")) && said.contains("e2fsck"), "{said}");
    for path in ["/usr/local", "/etc/systemd"] {
        let missing =
            Command::new("debugfs").args(["-R", &format!("stat {path}")]).arg(place.path("disk")).output();
        assert!(text(&missing.unwrap().stderr).contains("File not found"), "{path}");
    }
}

#[test]
fn an_agent_is_installed_into_a_folder_and_no_link_leads_out_of_it() {
    let place = Place::new();
    root(&place, SYSTEMD);
    fs::create_dir_all(place.path("root/opt/local")).unwrap();
    // In the guest these are its own folders.
    symlink("/opt/local", place.path("root/usr/local")).unwrap();
    fs::create_dir_all(place.path("root/etc/systemd")).unwrap();
    symlink("../../../../../elsewhere", place.path("root/etc/systemd/system")).unwrap();
    fs::create_dir(place.path("root/elsewhere")).unwrap();
    for _ in 0..2 {
        installed(&place, "--root root");
    }
    let agent = place.path("root/opt/local/sbin/vmm-agent");
    assert!(fs::read(&agent).unwrap() == fs::read(program()).unwrap());
    assert_eq!(fs::metadata(&agent).unwrap().mode() & 0o7777, 0o755);
    let wanted = place.path("root/elsewhere/multi-user.target.wants/vmm-agent.service");
    assert_eq!(fs::read_link(wanted).unwrap(), Path::new(UNIT));
    assert_eq!(fs::read_dir(agent.parent().unwrap()).unwrap().count(), 1, "nothing beside it");
}

#[test]
fn what_is_no_agent_or_no_folder_is_named() {
    let place = Place::new();
    root(&place, SYSTEMD);
    place.file("text", "no program");
    for (arguments, words) in [
        ("--root root --agent missing", "cargo guest -- agent"),
        ("--root root --agent text", "text is no agent"),
        ("--root root", "cargo guest -- agent"),
        ("--root root --disk disk", "cannot be used with"),
        ("", "required"),
    ] {
        let output = place.vmm(&format!("agent install {arguments}"));
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(BAD_ARGUMENT), "{arguments}: {said}");
        assert!(said.contains(words), "{arguments}: {said}");
    }
    let output = install(&place, "--root nowhere");
    assert!(text(&output.stderr).contains("nowhere"), "{}", text(&output.stderr));
    assert!(!place.path("root/usr/local").exists());
}

//! The disk that has a restored machine's memory cannot be read any more.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::guest::{Guest, Kernel, available, vmm};
use crate::snapshot::{await_running, exec};

/// A file system on a disk of its own, whose blocks are in a file, until this is dropped.
struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    fn new() -> Self {
        // In memory: what the host has of it is then all there is.
        let disk = Self { dir: tempfile::tempdir_in("/dev/shm").unwrap() };
        File::create(disk.blocks()).unwrap().set_len(256 << 20).unwrap();
        fs::create_dir(disk.root()).unwrap();
        done(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(disk.blocks()));
        done(Command::new("mount").args(["-o", "loop"]).arg(disk.blocks()).arg(disk.root()));
        disk
    }

    fn blocks(&self) -> PathBuf {
        self.dir.path().join("blocks")
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// What the host does not have in memory by now is an error to read (EIO).
    fn fail(&self) {
        rustix::fs::sync();
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        File::options().write(true).open(self.blocks()).unwrap().set_len(0).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.root()).status();
    }
}

#[track_caller]
fn done(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}

fn restore(any: &Guest, folder: &Path, name: &str, said: &Path) -> Guest {
    let mut command = any.command(&["restore", folder.to_str().unwrap(), "--name", name]);
    command.stdin(Stdio::null()).stderr(File::create(said).unwrap());
    let restored = Guest::start_in(command, any.runtime());
    await_running(any, &restored, name);
    restored
}

#[test]
fn memory_that_a_disk_does_not_give_any_more_ends_its_machine_with_one_error() {
    if !available("memory_that_a_disk_does_not_give_any_more_ends_its_machine_with_one_error") {
        return;
    }
    let disk = Disk::new();
    let mut command = vmm(Kernel::TunedPvh, "echo up; while :; do sleep 1; done");
    command.args(["--name", "g", "--vsock", "--mem", "128M"]);
    let first = Guest::start(command);
    first.wait_for("up", 1);
    exec(&first, "g", "dd if=/dev/urandom of=/tmp/file bs=64k count=512");
    let folder = disk.root().join("saved");
    assert_eq!(first.control(&["snapshot", "create", "g", folder.to_str().unwrap()]).0, Some(0));
    let said = disk.dir.path().join("said");
    let restored = restore(&first, &folder, "r", &said);
    disk.fail();
    let mut command = first.command(&["exec", "r", "cat", "/tmp/file"]);
    let code = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().code();
    assert_eq!(code, Some(125), "its machine is gone");
    assert_eq!(restored.finish().code, Some(4));
    let said = fs::read_to_string(said).unwrap();
    let lines: Vec<_> = said.lines().collect();
    let [error, hint] = lines[..] else { panic!("not one error and one hint: {said}") };
    assert!(error.contains("the guest's memory is lost: ") && error.contains("saved/memory"), "{said}");
    assert!(error.contains("Input/output error") && hint.contains("hint: "), "{said}");
    exec(&first, "g", "true");
}

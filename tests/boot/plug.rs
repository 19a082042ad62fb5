//! Disks and network devices that come and go while Debian's kernels run, on the PCI bus.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::guest::{Guest, Kernel, available, vmm};

/// What the guest does each time that a disk comes: it writes to it, reads it back, and says so; and when it has gone.
const EACH: &str = "while [ ! -b /dev/vda ]; do sleep 0.05; done; \
    dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | md5sum; dd if=/d of=/dev/vda bs=64k oflag=direct 2>/dev/null; sync; \
    echo written; while [ -b /dev/vda ]; do sleep 0.05; done; echo gone;";

fn start(script: &str, more: &[&str]) -> Guest {
    let mut command: Command = vmm(Kernel::Stock, script);
    command.args(["--mem", "512M", "--name", "v", "--transport", "pci"]).args(more);
    Guest::start(command)
}

/// A command that succeeds; what it printed.
fn done(guest: &Guest, arguments: &[&str]) -> String {
    let output = guest.command(arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}\n{}", guest.text());
    String::from_utf8(output.stdout).unwrap()
}

fn disk(path: &Path) -> String {
    fs::write(path, vec![7; 4 << 20]).unwrap();
    format!("disk={}", path.display())
}

#[test]
fn a_disk_comes_and_goes_while_a_stock_kernel_runs() {
    if !available("hot plug, disk") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let device = disk(&image);
    let rounds = 5;
    let script = format!(
        "dd if=/dev/urandom of=/d bs=1M count=4 2>/dev/null; echo up; for i in $(seq {rounds}); do {EACH} done; \
        dmesg | grep -E 'BUG:|Oops|WARN|pci .*(failed|error|no compatible|can.t)'; echo END; md5sum </d"
    );
    let guest = start(&script, &["--cpus", "2"]);
    guest.wait_for("up", 1);
    for round in 1..=rounds {
        assert_eq!(done(&guest, &["device", "add", "v", &device]), "virtio-blk0\n");
        assert!(done(&guest, &["device", "list", "v"]).contains("virtio-blk0"));
        guest.wait_for("written", round);
        done(&guest, &["device", "remove", "v", "virtio-blk0"]);
        guest.wait_for("gone", round);
        assert!(!done(&guest, &["device", "list", "v"]).contains("virtio-blk0"));
        // Its lock is free.
        let lock = fs::File::open(&image).unwrap();
        lock.try_lock().unwrap();
    }
    let ended = guest.finish();
    panic!("{}", ended.text);
}

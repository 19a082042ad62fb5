//! Disks and network devices that come and go while a Linux runs, on the PCI bus: Debian's kernels know ACPI hot plug, the tuned one
//! does not. `plug_whole` is the long version.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::guest::{Guest, available, bundle, ticking};

const PCI: [&str; 6] = ["--mem", "512M", "--name", "v", "--transport", "pci"];

/// What a guest does for each disk: it reads it, writes other data to it, and says when it has gone.
const EACH: &str = "while [ ! -b /dev/vda ]; do sleep 0.02; done; dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | md5sum; \
    dd if=/d of=/dev/vda bs=64k oflag=direct 2>/dev/null; echo written; while [ -b /dev/vda ]; do sleep 0.02; done; echo gone;";

/// `vmm` with the bundle's `kernel`, which runs `script`.
fn guest(kernel: &str, script: &str, more: &[&str]) -> Guest {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.args(["run", "--kernel"]).arg(bundle(&format!("{kernel}-vmlinux")));
    command.arg("--initrd").arg(bundle(&format!("{kernel}.cpio")));
    command.arg("--cmdline").arg(ticking(&format!("console=hvc0 quiet panic=-1 vmm.run=\"{script}\"")));
    command.args(PCI).args(more).stdin(Stdio::piped());
    Guest::start(command)
}

/// A command about the guest: whether it succeeded, and what it said.
fn told(guest: &Guest, arguments: &str) -> (bool, String) {
    let output = guest.command(&arguments.split_whitespace().collect::<Vec<_>>()).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

#[track_caller]
fn done(guest: &Guest, arguments: &str) -> String {
    let (success, text) = told(guest, arguments);
    assert!(success, "{arguments}: {text}\n{}", guest.text());
    text
}

/// The devices' names and states.
fn devices(guest: &Guest) -> Vec<(String, String)> {
    let list: Vec<Value> = serde_json::from_str(&done(guest, "device list v --json")).unwrap();
    let text = |device: &Value, key| device[key].as_str().unwrap().to_owned();
    list.iter().map(|device| (text(device, "name"), text(device, "state"))).collect()
}

fn disk(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, name.repeat(1 << 17)).unwrap();
    path
}

/// Nobody holds it: another VM could have it.
#[track_caller]
fn assert_free(image: &Path) {
    File::open(image).unwrap().try_lock().unwrap();
}

/// A disk comes and goes `rounds` times, after the one that was there from the start.
pub fn rounds(kernel: &str, rounds: usize) {
    let dir = tempfile::tempdir().unwrap();
    let (first, image) = (disk(dir.path(), "1234"), disk(dir.path(), "abcd"));
    let script = format!(
        "dd if=/dev/urandom of=/d bs=64k count=8 2>/dev/null; dmesg -c >/dev/null; echo up; \
         for i in $(seq {rounds}) last; do {EACH} done; md5sum </d; echo BEGIN; ls /sys/bus/pci/slots; \
         dmesg -r | grep '^<[0-4]>' | grep -iE 'pci|acpi|virtio|vda|bug|warn|hung'; grep -c vda /proc/partitions; echo END; read l"
    );
    let mut guest = guest(kernel, &script, &["--cpus", "2", "--disk", &format!("path={}", first.display())]);
    guest.wait_for("up", 1);
    for round in 0..=rounds {
        if round > 0 {
            assert_eq!(done(&guest, &format!("device add v disk={}", image.display())), "virtio-blk0\n");
        }
        let there = ("virtio-blk0".to_owned(), "present".to_owned());
        assert!(devices(&guest).contains(&there), "{round}");
        guest.wait_for("written", round + 1);
        done(&guest, "device remove v virtio-blk0");
        guest.wait_for("gone", round + 1);
        assert!(devices(&guest).iter().all(|(name, _)| name != "virtio-blk0"), "{round}");
        [&first, &image].into_iter().for_each(|image| assert_free(image));
    }
    guest.wait_for("END", 1);
    guest.stdin().write_all(b"\n").unwrap();
    let ended = guest.finish();
    // What one round wrote the next one has read: it is the same disk.
    let sums: Vec<_> = ended.text.lines().filter(|line| line.trim_end().ends_with("  -")).collect();
    assert_eq!(sums.len(), rounds + 2, "{}", ended.text);
    assert!(sums[2..].iter().all(|sum| *sum == sums[2]) && sums[0] != sums[1], "{sums:?}");
    // A slot for the two devices that it had, and for eight more; nothing that the kernel complains of.
    assert_eq!(ended.body(), ["1   10  2   3   4   5   6   7   8   9", "0"], "{}", ended.text);
}

#[test]
fn a_disk_comes_and_goes_again_and_again() {
    if available("hot plug, disk") {
        rounds("stock", 5);
    }
}

#[test]
fn a_network_device_comes_and_goes() {
    if !available("hot plug, network") {
        return;
    }
    let rounds = 3;
    let script = format!(
        "echo up; for i in $(seq {rounds}); do while [ ! -e /sys/class/net/eth0 ]; do sleep 0.02; done; \
         head -n 1 $(readlink -f /sys/class/net/eth0/device/..)/resource | cut -d ' ' -f 1; \
         ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0; ping -q -c 2 -W 20 10.0.2.2 | grep -o '2 packets received'; \
         while [ -e /sys/class/net/eth0 ]; do sleep 0.02; done; echo gone; done; read l"
    );
    // A sandbox has nothing for a network that the machine did not start with.
    let mut guest = guest("stock", &script, &["--cpus", "2", "--sandbox", "off"]);
    guest.wait_for("up", 1);
    for round in 1..=rounds {
        assert_eq!(done(&guest, "device add v net=user"), "virtio-net0\n");
        // Linux puts its memory above RAM.
        guest.wait_for("0x0000000100000000", round);
        guest.wait_for("2 packets received", round);
        assert!(done(&guest, "status v").contains("virtio-net0 (user): received "), "{round}");
        done(&guest, "device remove v virtio-net0");
        guest.wait_for("gone", round);
        assert!(!done(&guest, "status v").contains("virtio-net0"));
    }
    guest.stdin().write_all(b"\n").unwrap();
    assert_eq!(guest.finish().code, Some(0));
}

#[test]
fn a_guest_that_knows_no_hot_plug_keeps_a_disk_until_it_reboots_or_it_is_taken_away() {
    if !available("hot plug, ignored") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let images = ["abcd", "efgh"].map(|name| disk(dir.path(), name));
    let script = "echo up $(ls /dev | grep vd); while read line; do eval $line; done";
    let mut guest = guest("tuned", script, &["--on-reboot", "reset"]);
    guest.wait_for("up", 1);
    for image in &images {
        done(&guest, &format!("device add v disk={}", image.display()));
    }
    guest.stdin().write_all(b"echo 1 >/sys/bus/pci/rescan; echo scanned $(ls /dev | grep vd)\n").unwrap();
    guest.wait_for("scanned vda vdb", 1);
    let (success, text) = told(&guest, "device remove v virtio-blk0 --timeout 1");
    let why = "the guest of \"v\" has not let virtio-blk0 go within 1 seconds";
    assert!(!success && text.contains(why) && text.contains("/devices/0000:00:02.0/remove;"), "{text}");
    let there = |name: &str, state: &str| (name.to_owned(), state.to_owned());
    let console = there("virtio-console", "present");
    let asked = [console.clone(), there("virtio-blk0", "ejecting"), there("virtio-blk1", "present")];
    assert_eq!(devices(&guest), asked);
    // It is still there, and works.
    guest.stdin().write_all(b"dd if=/dev/vda iflag=direct bs=64k 2>/dev/null | wc -c\n").unwrap();
    guest.wait_for("524288", 1);
    guest.stdin().write_all(b"reboot -f\n").unwrap();
    guest.wait_for("up vda", 1);
    assert_eq!(devices(&guest), [console.clone(), there("virtio-blk1", "present")]);
    assert_free(&images[0]);
    guest
        .stdin()
        .write_all(
            b"echo 1 >/sys/bus/pci/devices/0000:00:03.0/remove; echo removed $(ls /dev | grep -c vd)\n",
        )
        .unwrap();
    guest.wait_for("removed 0", 1);
    done(&guest, "device remove v virtio-blk1 --force");
    assert_eq!(devices(&guest), [console]);
    assert_free(&images[1]);
    assert_eq!(guest.control(&["kill", "v"]).0, Some(0));
}

//! Disks under a real guest: a Debian root that is written, verified and checked; read-only; and a monitor that dies.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use crate::guest::{Guest, Kernel, available, bare, bundle, run, vmm};
use crate::snapshot::{await_running, exec, well};

fn tool(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {text}");
    text
}

fn ext4(path: &Path) {
    File::create(path).unwrap().set_len(64 << 20).unwrap();
    tool(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(path));
}

/// One boot of Debian from its disk: fio writes and verifies, lscpu and sysfs tell what the machine is; then the file
/// system is clean.
#[test]
fn debian_root_is_written_verified_and_clean() {
    if !available("Debian root") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("root.ext4");
    tool(Command::new("cp").arg("--sparse=always").arg(bundle("debian.ext4")).arg(&image));
    let fio = "fio --name=v --filename=/root/v --size=24M --rw=randrw --bsrange=4k-128k --ioengine=psync --direct=1 \
               --fsync=32 --verify=crc32c --verify_fatal=1 --do_verify=1 --minimal >/dev/null; echo fio=$?";
    let look = "cat /sys/block/vda/serial; echo; cat /sys/block/vda/queue/logical_block_size; fstrim /; echo trim=$?; \
                lscpu -p=cpu,core,socket | grep -v '#'";
    let script = format!("echo BEGIN; {fio}; {look}; sync; echo END");
    let cmdline = format!("console=hvc0 quiet root=/dev/vda rw init=/sbin/guest-init vmm.run=\"{script}\"");
    let mut command = bare(Kernel::TunedPvh, &cmdline);
    command
        .args(["--mem", "512M", "--cpus", "2", "--disk"])
        .arg(format!("{},serial=ROOT-1", image.display()));
    let ended = Guest::start(command).finish();
    let body = ended.body();
    assert_eq!(body, ["fio=0", "ROOT-1", "512", "trim=0", "0,0,0", "1,1,0"], "{}", ended.text);
    tool(Command::new("e2fsck").arg("-fn").arg(&image));
}

/// Two boots of Debian from an image that others may read meanwhile: the second finds what the first wrote, and a third, whose overlay
/// is thrown away, does not.
#[test]
fn debian_is_written_over_an_image_that_stays_as_it_is() {
    if !available("Debian over an image") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = bundle("debian.ext4");
    let sum = || tool(Command::new("cksum").arg(&image));
    let (before, overlay) = (sum(), dir.path().join("overlay"));
    let boot = |overlay: &str, script: &str| {
        let cmdline = format!(
            "console=hvc0 quiet root=/dev/vda rw init=/sbin/guest-init vmm.run=\"echo BEGIN; {script}; echo END\""
        );
        let mut command = bare(Kernel::TunedPvh, &cmdline);
        let disk = format!("{},overlay{overlay}", image.display());
        command.args(["--mem", "512M", "--cpus", "2", "--disk", &disk]);
        Guest::start(command).finish().body().join(" ")
    };
    let kept = format!("={}", overlay.display());
    let write = "fio --name=v --filename=/root/v --size=16M --rw=randrw --bsrange=512-64k --ioengine=psync --verify=crc32c \
                 --verify_fatal=1 --do_verify=1 --minimal >/dev/null; echo fio=$?; md5sum /root/v >/root/sum; fstrim /; sync";
    assert_eq!(boot(&kept, write), "fio=0");
    assert_eq!(boot(&kept, "md5sum -c /root/sum; rm /root/sum"), "/root/v: OK");
    assert_eq!(boot("", "ls /root/v 2>/dev/null || echo nothing"), "nothing");
    assert_eq!(sum(), before);
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    if !available("read-only disk") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("ro.img");
    fs::write(&image, vec![0x5a; 1 << 20]).unwrap();
    let script = "echo BEGIN; cat /sys/block/vda/ro; dd if=/dev/zero of=/dev/vda bs=4k count=4 conv=fsync 2>/dev/null \
                  && echo written; head -c 3 /dev/vda; echo; echo END";
    let disk = format!("{},readonly", image.display());
    let ended = run(Kernel::TunedPvh, &["--mem", "256M", "--disk", &disk], script);
    assert_eq!(ended.body(), ["1", "ZZZ"]);
    assert!(fs::read(&image).unwrap().iter().all(|byte| *byte == 0x5a));
}

#[test]
fn what_was_fsynced_outlives_a_killed_monitor() {
    if !available("kill -9") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("data.ext4");
    ext4(&image);
    let disk = image.display().to_string();
    let mount = "mkdir -p /m; mount -t ext4 /dev/vda /m";
    let script = format!(
        "{mount}; i=0; while true; do i=$((i+1)); echo v$i | dd of=/m/f$i conv=fsync 2>/dev/null; echo synced=$i.; done"
    );
    let mut command = vmm(Kernel::TunedPvh, &script);
    command.args(["--mem", "256M", "--disk", &disk]);
    let guest = Guest::start(command);
    guest.wait_for("synced=25.", 1);
    guest.signal(libc::SIGKILL);
    let text = guest.finish().text;
    let last: u32 = text.rsplit("synced=").find_map(|part| part.split_once('.')?.0.parse().ok()).unwrap();
    assert!(last >= 25);
    let check =
        format!("{mount}; echo BEGIN; for i in $(seq {last}); do cat /m/f$i; done; umount /m; echo END");
    let ended = run(Kernel::TunedPvh, &["--mem", "256M", "--disk", &disk], &check);
    let wanted: Vec<_> = (1..=last).map(|i| format!("v{i}")).collect();
    assert_eq!(ended.body(), wanted);
    tool(Command::new("e2fsck").arg("-fn").arg(&image));
}

/// A guest is saved while it writes to its disk; then it removes all that it wrote. Two restored ones have it all, and write more.
#[test]
fn restored_guests_have_the_file_system_that_was_saved_with_them() {
    if !available("restored disks") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("data.ext4");
    ext4(&image);
    let before = fs::read(&image).unwrap();
    let script = "mkdir -p /m; mount -t ext4 /dev/vda /m; echo up; i=0; while [ $i -lt 300 ]; do i=$((i+1)); \
                  head -c 20000 /dev/urandom >/m/d$i; md5sum /m/d$i >/m/s$i; sleep 0.2; done; while :; do sleep 1; done";
    let mut command = vmm(Kernel::TunedPvh, script);
    let disk = format!("{},overlay", image.display());
    command.args(["--mem", "256M", "--name", "saved", "--vsock", "--disk", &disk]);
    let guest = Guest::start(command);
    guest.wait_for("up", 1);
    let folder = dir.path().join("s");
    let folder = folder.to_str().unwrap();
    exec(&guest, "saved", "while [ $(ls /m | grep -c s) -lt 20 ]; do sleep 0.1; done");
    assert_eq!(guest.control(&["snapshot", "create", "saved", folder]).0, Some(0));
    exec(&guest, "saved", "rm /m/*; sync");
    let restored = ["one", "two"].map(|name| {
        let mut command = guest.command(&["restore", folder, "--name", name]);
        command.stdin(std::process::Stdio::null());
        Guest::start_in(command, guest.runtime())
    });
    for (name, process) in ["one", "two"].iter().zip(&restored) {
        await_running(&guest, process, name);
        // But for the last, which is being written, and from the disk.
        let check = "sync; echo 3 >/proc/sys/vm/drop_caches; n=$(ls /m | grep -c s); i=0; \
                     while [ $((i+=1)) -lt $n ]; do md5sum -c /m/s$i >/dev/null || echo $i is bad; done; echo $((n >= 20))";
        assert_eq!(exec(&guest, name, check), "1", "{name}");
        exec(&guest, name, &format!("echo {name} >/m/mine; sync; echo 3 >/proc/sys/vm/drop_caches"));
    }
    for name in ["one", "two"] {
        assert_eq!(
            exec(&guest, name, "cat /m/mine; dmesg | grep -c 'EXT4-fs error'; true"),
            format!("{name}\n0")
        );
        well(&guest, name);
    }
    assert_eq!(exec(&guest, "saved", "ls /m/mine 2>/dev/null || echo none"), "none");
    assert!(fs::read(&image).unwrap() == before, "and the image stays as it is");
}

//! Shared folders judged by pjdfstest (POSIX's rules for file systems) in a guest: `make share-whole`. In all ways, and by others, they are
//! judged where a host mounts them (tests/share).

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::guest::{Guest, Kernel, available, bundle, ticking};
use crate::share::Ext4;

/// Who shares the folder.
const USER: u32 = 1000;

/// The tests that failed, and how many passed, of a guest's root in a folder that is shared as `how` says, by an ordinary user or by root.
fn judged(how: &str, by_user: bool) -> (BTreeSet<String>, usize) {
    let host = Ext4::new();
    let (folder, tools) = (host.path().join("share"), host.path().join("tools"));
    [&folder, &tools].into_iter().for_each(|folder| fs::create_dir(folder).unwrap());
    let program = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/pjdfstest/bin/pjdfstest"));
    fs::copy(program, tools.join("pjdfstest")).expect("make share-whole installs it");
    fs::write(
        tools.join("settings"),
        "[features]\nposix_fallocate = {}\nrename_ctime = {}\nutimensat = {}\nutime_now = {}\n\
         [settings]\nnaptime = 0.001\nallow_remount = false\n\
         [dummy_auth]\nentries = [[\"nobody\", \"nogroup\"], [\"tests\", \"tests\"]]\n",
    )
    .unwrap();
    let script = "echo tests:x:1234:1234::/:/bin/sh >>/etc/passwd; echo tests:x:1234: >>/etc/group; cd /s; \
                  /t/pjdfstest -c /t/settings -p /s 2>&1 | cat";
    let cmdline =
        format!("console=hvc0 quiet panic=-1 root=/dev/vda rw init=/sbin/guest-init vmm.run=\"{script}\"");
    // The bundle's is a link into a folder of root's.
    let kernel = host.above().join("kernel");
    fs::copy(Kernel::TunedPvh.file(), &kernel).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.arg("--kernel").arg(kernel).args(["--cmdline", &ticking(&cmdline)]).stdin(Stdio::null());
    command.args(["--mem", "512M", "--cpus", "2", "--disk"]);
    command.arg(format!("{},overlay", bundle("debian.ext4").display()));
    command.arg("--share").arg(format!("{}:/s,{how}", folder.display()));
    command.arg("--share").arg(format!("{}:/t:ro", tools.display()));
    let runtime = tempfile::tempdir().unwrap();
    if by_user {
        fs::set_permissions("/dev/kvm", Permissions::from_mode(0o666)).unwrap();
        for own in [&folder, runtime.path()] {
            chown(own, Some(USER), Some(USER)).unwrap();
        }
        for shown in [host.above(), &host.path()] {
            fs::set_permissions(shown, Permissions::from_mode(0o755)).unwrap();
        }
        let vmm = std::mem::replace(&mut command, Command::new("setpriv"));
        command.args([&format!("--reuid={USER}"), &format!("--regid={USER}"), "--clear-groups"]);
        command.arg(vmm.get_program()).args(vmm.get_args());
        command.env("TMPDIR", runtime.path());
    }
    let mut guest = Guest::start_in(command, runtime.path());
    guest.patience = Duration::from_secs(3600);
    let text = guest.finish().text;
    let with = |word: &str| {
        let lines = text.lines().map(|line| line.trim_end_matches('\r'));
        let lines = lines.filter(|line| !line.starts_with(char::is_whitespace));
        let named = lines.filter_map(|line| line.strip_suffix(word)?.split_whitespace().next());
        named.map(str::to_owned).collect::<BTreeSet<_>>()
    };
    let (failed, passed) = (with("FAILED"), with(" ok").len());
    assert!(failed.len() + passed > 300, "{text}");
    println!("ok {how}: {passed} passed, {} failed", failed.len());
    (failed, passed)
}

/// Those that fail where owners are not kept: no more, and no fewer.
fn exceptions() -> BTreeSet<String> {
    let lines = include_str!("share/pjdfstest.list").lines();
    lines.filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
}

#[test]
#[ignore = "many minutes: make share-whole"]
fn whole_kept() {
    if available("pjdfstest, owners kept") {
        assert_eq!(judged("owners=xattr", false).0, BTreeSet::new());
    }
}

#[test]
#[ignore = "many minutes: make share-whole"]
fn whole_kept_by_a_user() {
    if available("pjdfstest, owners kept, by an ordinary user") {
        assert_eq!(judged("owners=xattr,cache=never", true).0, BTreeSet::new());
    }
}

#[test]
#[ignore = "many minutes: make share-whole"]
fn whole_mapped() {
    if available("pjdfstest, owners mapped") {
        assert_eq!(judged("cache=always", true).0, exceptions());
    }
}

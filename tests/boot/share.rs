//! Folders of the host's in a Linux guest: worked in from both sides, kept from being left, and there after a restore.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::mount::{UnmountFlags, unmount};

use crate::guest::{Guest, Kernel, available, run, vmm};
use crate::snapshot::{await_running, exec, well};

/// A folder beside one that is none of the guest's business.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["share", "beside"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    fs::write(dir.path().join("beside/secret"), "secret").unwrap();
    fs::write(dir.path().join("share/a"), "from the host\n").unwrap();
    dir
}

/// A file system of a disk's, whatever the machine's temporary folder is on.
pub struct Ext4(tempfile::TempDir);

impl Ext4 {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (image, at) = (dir.path().join("image"), dir.path().join("at"));
        File::create(&image).unwrap().set_len(400 << 20).unwrap();
        fs::create_dir(&at).unwrap();
        let run = |command: &mut Command| assert!(command.status().unwrap().success(), "{command:?}");
        run(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&image));
        run(Command::new("mount").args(["-o", "loop"]).args([&image, &at]));
        Self(dir)
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.above().join("at")
    }

    /// The folder around that.
    pub fn above(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        let _ = unmount(self.path(), UnmountFlags::DETACH);
    }
}

/// Runs `script`, with the folder at /s, and gives what it says.
fn within(kernel: Kernel, folder: &Path, how: &str, script: &str) -> Vec<String> {
    let share = format!("{}:/s{how}", folder.join("share").display());
    let script = format!("cd /s; echo BEGIN; {script}; echo END");
    let ended = run(kernel, &["--mem", "256M", "--cpus", "2", "--share", &share], &script);
    ended.body().into_iter().map(str::to_owned).collect()
}

#[test]
fn a_folder_is_worked_in_from_both_sides() {
    if !available("a_folder_is_worked_in_from_both_sides") {
        return;
    }
    for kernel in [Kernel::TunedPvh, Kernel::Stock] {
        let dir = folder();
        let script = "cat a; echo new >b; mkdir -p d/e; mv b d/e/c; ln d/e/c hard; ln -s d/e/c soft; cat soft; rm a; \
                      cp /bin/busybox d/; cmp /bin/busybox d/busybox && echo same; chmod 640 hard; mkfifo f; \
                      touch -d '2001-02-03 00:00:00' d/e; dd if=/dev/urandom of=big bs=1M count=9 2>/dev/null; md5sum big >sum; \
                      echo 3 >/proc/sys/vm/drop_caches; md5sum -c sum; stat -c '%a %u:%g %h' hard";
        let said = within(kernel, dir.path(), "", script);
        assert_eq!(said, ["from the host", "new", "same", "big: OK", "640 0:0 2"]);
        let at = |name: &str| dir.path().join("share").join(name);
        assert_eq!(fs::read_to_string(at("d/e/c")).unwrap(), "new\n");
        assert_eq!(fs::read_link(at("soft")).unwrap(), Path::new("d/e/c"));
        let hard = fs::metadata(at("hard")).unwrap();
        assert_eq!((hard.mode() & 0o7777, hard.uid(), hard.nlink()), (0o640, 0, 2));
        assert!(!at("a").exists() && fs::metadata(at("f")).unwrap().file_type().is_fifo());
        assert_eq!(fs::metadata(at("d/e")).unwrap().mtime(), 981_158_400);
        assert_eq!(fs::metadata(at("big")).unwrap().len(), 9 << 20);
    }
}

#[test]
fn what_is_not_the_guests_stays_as_it_is() {
    if !available("what_is_not_the_guests_stays_as_it_is") {
        return;
    }
    let dir = folder();
    let at = |name: &str| dir.path().join("share").join(name);
    symlink("../beside", at("out")).unwrap();
    fs::write(at("others"), "others").unwrap();
    chown(at("others"), Some(4321), Some(4321)).unwrap();
    fs::set_permissions(at("others"), Permissions::from_mode(0o600)).unwrap();
    fs::write(at("root"), "").unwrap();
    fs::set_permissions(at("root"), Permissions::from_mode(0o4755)).unwrap();
    let script = "cat out/secret ../beside/secret 2>&1 | grep -c 'No such'; mknod n c 1 3 2>/dev/null || echo no device; \
                  chown 5 a 2>/dev/null || echo no owner; cat others 2>/dev/null || echo not ours; stat -c %u others root; \
                  cp /bin/busybox s; chmod 4755 s; stat -c %a s root; echo x >>root; stat -c %a root";
    let said = within(Kernel::TunedPvh, dir.path(), "", script);
    let none = ["2", "no device", "no owner", "not ours", "65534", "0"];
    assert_eq!(said, [&none[..], &["755", "4755", "755"]].concat());
    assert_eq!(fs::metadata(at("s")).unwrap().mode() & 0o7777, 0o755, "nothing runs as its owner here");
    assert_eq!(fs::read_to_string(dir.path().join("beside/secret")).unwrap(), "secret");

    // Not by its own mounts, and not by those of the host.
    let script = "mount -o remount,rw /s; mount | grep -c ' /s .*(rw'; echo x >a; rm a; mkdir d; touch a; chmod 600 a; mv a b; \
                  ln a c; ln -s a c; cat a";
    let said = within(Kernel::TunedPvh, dir.path(), ":ro", &format!("({script}) 2>/dev/null"));
    assert_eq!(said, ["1", "from the host"]);
    let names = fs::read_dir(dir.path().join("share")).unwrap().count();
    assert_eq!(names, 5);
}

#[test]
fn a_file_is_at_its_place_and_nothing_that_lies_beside_it() {
    if !available("a_file_is_at_its_place_and_nothing_that_lies_beside_it") {
        return;
    }
    for kernel in [Kernel::TunedPvh, Kernel::Stock] {
        let dir = folder();
        fs::write(dir.path().join("key"), "key\n").unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let (file, key) = (format!("{}:/etc/a/config", path("share/a")), format!("{}:/key:ro", path("key")));
        let script = "echo BEGIN; cat /etc/a/config /key; ls /etc/a; echo more >>/etc/a/config; (echo x >/key) 2>/dev/null || echo no; \
                      rm /etc/a/config 2>/dev/null || echo busy; ls -d /dev/.vmm-share 2>/dev/null; mkdir m; mount -t virtiofs share1 m; \
                      ls m; touch m/x 2>/dev/null || echo no; cat m/key; echo END";
        let ended = run(kernel, &["--mem", "256M", "--share", &file, "--share", &key], script);
        let said = ["from the host", "key", "config", "no", "busy", "key", "no", "key"];
        assert_eq!(ended.body(), said);
        assert_eq!(fs::read_to_string(dir.path().join("share/a")).unwrap(), "from the host\nmore\n");
        assert_eq!(fs::read_dir(dir.path().join("share")).unwrap().count(), 1);
    }
}

/// A guest, its copy and the host: one of them at a time has a lock.
#[test]
fn a_guest_its_copy_and_the_host_wait_for_each_others_locks() {
    if !available("a_guest_its_copy_and_the_host_wait_for_each_others_locks") {
        return;
    }
    let dir = folder();
    let at = |name: &str| dir.path().join("share").join(name);
    let share = format!("{}:/s,locks=shared", dir.path().join("share").display());
    let mut command = vmm(Kernel::TunedPvh, "echo up; while :; do sleep 100; done");
    command.args(["--name", "one", "--vsock", "--rng", "--cpus", "2", "--share", &share]);
    let first = Guest::start(command);
    first.wait_for("up", 1);
    let state = dir.path().join("state");
    let copied = first.command(&["fork", "one"]).env("XDG_STATE_HOME", &state).output().unwrap();
    assert_eq!(copied.status.code(), Some(0), "{}", String::from_utf8_lossy(&copied.stderr));
    let copy = String::from_utf8(copied.stdout).unwrap().trim().to_owned();
    // busybox has no flock(1).
    for program in ["/usr/bin/flock", "/lib64/ld-linux-x86-64.so.2", "/lib/x86_64-linux-gnu/libc.so.6"] {
        fs::copy(program, at(Path::new(program).file_name().unwrap().to_str().unwrap())).unwrap();
    }
    const FLOCK: &str = "/s/ld-linux-x86-64.so.2 --library-path /s /s/flock";
    // Each adds 30 times, on its own, to a number of which each time there is another file.
    let add = &format!(
        "cd /s; touch lock; for i in $(seq 30); do {FLOCK} lock sh -c 'n=$(cat n.*); mv n.* n.$((n+1)) && \
         echo $((n+1)) >n.$((n+1))' || exit; done"
    );
    fs::write(at("n.0"), "0\n").unwrap();
    std::thread::scope(|scope| {
        let add = |name: &str| {
            let mut command = first.command(&["exec", name, "sh", "-c", add]);
            move || {
                let output = command.stderr(Stdio::piped()).output().unwrap();
                assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
            }
        };
        scope.spawn(add("one"));
        scope.spawn(add(&copy));
        scope.spawn(|| {
            fs::write(at("lock"), "").unwrap();
            for _ in 0..30 {
                let lock = fs::File::open(at("lock")).unwrap();
                flock(&lock, FlockOperation::LockExclusive).unwrap();
                let names = fs::read_dir(at(""))
                    .unwrap()
                    .map(|entry| entry.unwrap().file_name().into_string().unwrap());
                let old = names.filter(|name| name.starts_with("n.")).collect::<Vec<_>>();
                assert_eq!(old.len(), 1, "{old:?}");
                let number: u32 = fs::read_to_string(at(&old[0])).unwrap().trim().parse().unwrap();
                let new = at(&format!("n.{}", number + 1));
                fs::rename(at(&old[0]), &new).unwrap();
                fs::write(new, format!("{}\n", number + 1)).unwrap();
            }
        });
    });
    assert_eq!(fs::read_to_string(at("n.90")).unwrap(), "90\n");
    // A lock that the guest has is held when it is restored.
    let exec = |name: &str, script: &str| exec(&first, name, script);
    let script = "exec 9>/s/lock; FLOCK 9; echo has >/s/has; sleep 1000".replace("FLOCK", FLOCK);
    exec("one", &format!("({script}) >/dev/null 2>&1 & until [ -e /s/has ]; do sleep 0.1; done"));
    let lock = fs::File::open(at("lock")).unwrap();
    assert!(flock(&lock, FlockOperation::NonBlockingLockShared).is_err());
    let saved = dir.path().join("saved");
    let saved = saved.to_str().unwrap();
    assert_eq!(first.control(&["snapshot", "create", "one", saved, "--stop"]).0, Some(0));
    flock(&lock, FlockOperation::NonBlockingLockShared).unwrap();
    flock(&lock, FlockOperation::Unlock).unwrap();
    let mut command = first.command(&["restore", saved, "--name", "two"]);
    command.stdin(Stdio::null());
    let restored = Guest::start_in(command, first.runtime());
    await_running(&first, &restored, "two");
    assert!(flock(&lock, FlockOperation::NonBlockingLockShared).is_err());
    well(&first, "two");
    first.control(&["kill", &copy, "two"]);
}

/// Debian's, which has what every vhost-user front end needs.
#[test]
fn a_folder_that_virtiofsd_serves_is_there_too_and_its_end_is_no_hang() {
    const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";
    if !available("a_folder_that_virtiofsd_serves_is_there_too_and_its_end_is_no_hang") {
        return;
    }
    for kernel in [Kernel::TunedPvh, Kernel::Stock] {
        let dir = folder();
        let socket = dir.path().join("socket");
        let serve = || {
            let _ = fs::remove_file(&socket);
            let mut command = Command::new(VIRTIOFSD);
            command.arg(format!("--socket-path={}", socket.display()));
            command.args([
                "-o",
                &format!("source={},cache=auto,sandbox=chroot", dir.path().join("share").display()),
            ]);
            let server = command.stderr(Stdio::null()).spawn().unwrap();
            while !socket.exists() {
                std::thread::sleep(Duration::from_millis(20));
            }
            server
        };
        let mut server = serve();
        let script = "cd /s; echo BEGIN; cat a; echo new >b; dd if=/dev/urandom of=big bs=1M count=5 2>/dev/null; md5sum big >sum; \
                      echo 3 >/proc/sys/vm/drop_caches; md5sum -c sum; echo up; until [ -e go ]; do sleep 0.1; done; echo END";
        let mut command = vmm(kernel, script);
        command.args(["--mem", "256M", "--cpus", "2", "--name", "v"]);
        command.args(["--share", &format!("vhost-user={},to=/s", socket.display())]);
        let guest = Guest::start(command);
        guest.wait_for("up", 1);
        for _ in 0..5 {
            assert_eq!(guest.control(&["pause", "v"]).0, Some(0));
            assert_eq!(guest.control(&["resume", "v"]).0, Some(0));
        }
        fs::write(dir.path().join("share/go"), "").unwrap();
        guest.wait_for("END", 1);
        let text = guest.text();
        assert!(text.contains("from the host") && text.contains("big: OK"), "{text}");
        assert_eq!(fs::read_to_string(dir.path().join("share/b")).unwrap(), "new\n");
        let _ = (server.kill(), server.wait());
        assert_eq!(guest.control(&["status", "v"]).0, Some(0), "without it the machine answers, and ends");
        assert_eq!(guest.control(&["kill", "v"]).0, Some(0));
    }
}

fn come_and_go(file: &Path) {
    fs::write(file, "").unwrap();
    // Longer than the agent waits between two looks.
    std::thread::sleep(Duration::from_millis(1500));
    fs::remove_file(file).unwrap();
}

/// Whatever may be changed there, and in a copy of the guest.
#[test]
fn programs_of_the_guest_hear_of_what_the_host_does() {
    if !available("programs_of_the_guest_hear_of_what_the_host_does") {
        return;
    }
    for (kernel, how) in [(Kernel::TunedPvh, ""), (Kernel::TunedPvh, ":ro"), (Kernel::Stock, "")] {
        let dir = folder();
        let share = dir.path().join("share");
        fs::create_dir(share.join("d")).unwrap();
        let mut command = vmm(kernel, "echo up; guest-inotify /s /s/d /s/a");
        command.args(["--mem", "256M", "--cpus", "2", "--name", "one", "--vsock"]);
        command.args(["--share", &format!("{}:/s{how}", share.display())]);
        let guest = Guest::start(command);
        guest.wait_for("up", 1);
        // The agent has asked for the first time once it tells of something.
        let told = Instant::now() + guest.patience;
        while !guest.text().contains("create begun") {
            assert!(Instant::now() < told, "{}", guest.text());
            come_and_go(&share.join("begun"));
        }
        fs::write(share.join("d/new"), "new").unwrap();
        guest.wait_for("create new", 1);
        guest.wait_for("close new", 1);
        fs::rename(share.join("d/new"), share.join("moved")).unwrap();
        guest.wait_for("from new", 1);
        guest.wait_for("to moved", 1);
        fs::remove_file(share.join("a")).unwrap();
        guest.wait_for("delete a", 1);
        guest.wait_for("delete-self", 1);
        assert_eq!(guest.control(&["fork", "one"]).0, Some(0));
        assert_eq!(guest.control(&["kill", "one"]).0, Some(0));
        // Its console is nobody's.
        let watch = "guest-inotify /s >/tmp/heard & until grep -q 'create later' /tmp/heard; do sleep 0.1; done; echo heard";
        std::thread::scope(|scope| {
            let heard = scope.spawn(|| exec(&guest, "one-1", watch));
            while !heard.is_finished() {
                come_and_go(&share.join("later"));
            }
            assert_eq!(heard.join().unwrap(), "heard");
        });
        assert_eq!(guest.control(&["kill", "one-1"]).0, Some(0));
    }
}

#[test]
fn files_belong_to_the_user_that_was_named_and_modes_hold_for_all() {
    if !available("files_belong_to_the_user_that_was_named_and_modes_hold_for_all") {
        return;
    }
    let dir = folder();
    let script = "mkdir -p /etc; for u in u:x:1000 v:x:1001; do echo $u:100::/:/bin/sh >>/etc/passwd; done; \
                  stat -c %u:%g .; su u -c 'echo mine >m && chmod 600 m && cat m'; \
                  su v -c 'cat m; echo x >a; mkdir d' 2>&1 | grep -c denied; cat m";
    let said = within(Kernel::TunedPvh, dir.path(), ",uid=1000,gid=100", script);
    assert_eq!(said, ["1000:100", "mine", "3", "mine"]);
    let made = fs::metadata(dir.path().join("share/m")).unwrap();
    assert_eq!((made.uid(), made.gid(), made.mode() & 0o7777), (0, 0, 0o600));
}

/// As the attributes of host files, which this needs, in the sandbox as elsewhere.
#[test]
fn owners_modes_and_devices_that_are_kept_are_so_for_the_guest_alone() {
    if !available("owners_modes_and_devices_that_are_kept_are_so_for_the_guest_alone") {
        return;
    }
    let disk = Ext4::new();
    let host = disk.path();
    fs::create_dir(host.join("share")).unwrap();
    fs::write(host.join("share/a"), "from the host\n").unwrap();
    let script = "echo x >f; chown 1000:100 f; chmod 4751 f; mknod n c 1 3; \
                  stat -c '%u:%g %a %F' f n; chown 7 a; rm n; ls | cat";
    let said = within(Kernel::TunedPvh, &host, ",owners=xattr", script);
    assert_eq!(said, ["1000:100 4751 regular file", "0:0 644 character special file", "a", "f"]);
    let made = fs::metadata(host.join("share/f")).unwrap();
    assert_eq!((made.uid(), made.gid(), made.mode() & 0o7000), (0, 0, 0));
    // What is not changed comes from the file itself.
    let said = within(Kernel::TunedPvh, &host, ",owners=xattr", "stat -c '%u:%g %a' a f");
    assert_eq!(said, ["7:0 644", "1000:100 4751"]);
    let said = within(Kernel::TunedPvh, &host, "", "stat -c %u:%g a f");
    assert_eq!(said, ["0:0", "0:0"]);
}

#[test]
fn a_folder_is_there_after_the_guests_reset() {
    if !available("a_folder_is_there_after_the_guests_reset") {
        return;
    }
    let dir = folder();
    let share = format!("{}:/s", dir.path().join("share").display());
    let script =
        "cd /s; echo boot >>boots; [ $(wc -l <boots) = 2 ] || reboot -f; echo BEGIN; cat a boots; echo END";
    // And another one in it.
    let inner = format!("{}:/s/inner", dir.path().join("beside").display());
    let arguments = ["--mem", "256M", "--on-reboot", "reset", "--share", &share, "--share", &inner];
    let said =
        run(Kernel::TunedPvh, &arguments, &script.replace("cat a boots", "cat a boots inner/secret; echo"));
    assert_eq!(said.body(), ["from the host", "boot", "boot", "secret"]);
}

/// A guest, one restored of it, and a copy of that go on with what they have open.
#[test]
fn files_that_are_open_are_so_after_a_restore_and_in_a_copy() {
    if !available("files_that_are_open_are_so_after_a_restore_and_in_a_copy") {
        return;
    }
    let dir = folder();
    let at = |name: &str| dir.path().join("share").join(name);
    let script = "cd /s; exec 3>>log 4<a; echo $$ >/tmp/pid; echo up; i=0; while :; do i=$((i+1)); echo $i >&3; sleep 0.1; done";
    let share = format!("{}:/s", dir.path().join("share").display());
    let mut command = vmm(Kernel::TunedPvh, script);
    command.args(["--name", "gen0", "--vsock", "--rng", "--cpus", "2", "--share", &share]);
    let first = Guest::start(command);
    first.wait_for("up", 1);
    let saved = dir.path().join("saved");
    let saved = saved.to_str().unwrap();
    assert_eq!(first.control(&["snapshot", "create", "gen0", saved, "--stop"]).0, Some(0));
    fs::rename(at("log"), at("older")).unwrap();
    fs::rename(at("older"), at("log")).unwrap();
    fs::write(at("later"), "later").unwrap();
    let lines = || fs::read_to_string(at("log")).unwrap().lines().count();
    let before = lines();
    let mut command = first.command(&["restore", saved, "--name", "gen1"]);
    command.stdin(Stdio::null());
    let restored = Guest::start_in(command, first.runtime());
    await_running(&first, &restored, "gen1");
    let read = "cat /proc/$(cat /tmp/pid)/fd/4 2>&1; cat /s/later; sleep 1";
    assert_eq!(exec(&first, "gen1", read), "from the host\nlater");
    let then = lines();
    assert!(then > before, "{before}, {then}");
    let copied =
        first.command(&["fork", "gen1"]).env("XDG_STATE_HOME", dir.path().join("state")).output().unwrap();
    assert_eq!(copied.status.code(), Some(0), "{}", String::from_utf8_lossy(&copied.stderr));
    let name = String::from_utf8(copied.stdout).unwrap();
    assert_eq!(exec(&first, name.trim(), read), "from the host\nlater");
    assert!(lines() > then);
    well(&first, name.trim());
    well(&first, "gen1");
    first.control(&["kill", name.trim(), "gen1"]);
    // A line of the two at a time is whole, and goes to the end.
    let text = fs::read_to_string(at("log")).unwrap();
    assert!(text.lines().all(|line| line.parse::<u32>().is_ok()), "{text}");
}

//! The socket device: sockets that cannot be, and what is left of those that were.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::getsockname;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::images::*;
use crate::place::*;

/// The path that `vmm status` tells.
fn told(place: &Place) -> PathBuf {
    place.status("web")["vsock"].as_str().expect("a path").into()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn sockets_that_cannot_be() {
    let test = "sockets_that_cannot_be";
    if !has_kvm(test) {
        return;
    }
    let place = Place::new();
    place.file("kernel", kernel(&HALT));
    place.file("file", "");
    let _live = UnixListener::bind(place.path("live")).unwrap();
    let _messages = UnixListener::bind(place.path("half.seqpacket")).unwrap();
    let long = "x".repeat(120);
    for (vsock, words) in [
        ("cid=0", &["cid=0", "hypervisor"][..]),
        ("cid=1", &["cid=1", "itself"]),
        ("cid=2", &["cid=2", "host"]),
        ("v,cid=4294967295", &["4294967295", "any"]),
        ("v,cid=4294967296", &["4294967296"]),
        ("v,cid=x", &["x", "not a number"]),
        ("v,port=3", &["port"]),
        ("v,vhost=on", &["no unix socket"]),
        ("vhost=on,cid=2", &["cid=2", "host"]),
        ("file", &["file", "not a socket"]),
        ("live", &["live", "in use"]),
        ("half", &["half.seqpacket", "in use"]),
        ("missing/v", &["missing/v", "No such file"]),
        (&long, &["too long", "96 bytes"]),
        ("/dev/null/v", &["/dev/null/v", "Not a directory"]),
    ] {
        refused(&place, &format!("--kernel kernel --console off --vsock {vsock}"), BAD_ARGUMENT, words);
    }
    if !Path::new("/dev/vhost-vsock").exists() {
        let arguments = "--kernel kernel --console off --vsock vhost=on";
        refused(&place, arguments, BAD_ARGUMENT, &["open /dev/vhost-vsock"]);
    }
    // A folder that is not ours to write in, for root without its privilege.
    fs::create_dir(place.path("closed")).unwrap();
    fs::set_permissions(place.path("closed"), fs::Permissions::from_mode(0o500)).unwrap();
    let mut command = Command::new("setpriv");
    if !command.arg("--version").output().is_ok_and(|output| output.status.success()) {
        return eprintln!("SKIP: {test}: a folder without permission: needs setpriv");
    }
    let mut command = Command::new("setpriv");
    command.args(["--inh-caps=-dac_override", "--bounding-set=-dac_override", crate::PROGRAM]);
    command.args("--kernel kernel --console off --vsock closed/v".split(' '));
    place.set_up(&mut command);
    refused_command(&place, command, BAD_ARGUMENT, &["closed/v", "Permission denied"]);
}

#[test]
fn sockets_lie_beside_the_control_socket_and_go_with_the_guest() {
    if !has_kvm("sockets_lie_beside_the_control_socket_and_go_with_the_guest") {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    for ends_by in ["stop web --timeout 0", "kill web"] {
        let running = place.start("web", "--vsock");
        let path = told(&place);
        assert_eq!(path, place.path("run/vmm/web.d/vsock"));
        let messages = place.path("run/vmm/web.d/vsock.seqpacket");
        assert_eq!([mode(&path), mode(&messages)], [0o600; 2]);
        drop(UnixStream::connect(&path).unwrap());
        assert!(place.vmm(ends_by).status.success());
        running.finish();
        assert!(!path.exists() && !messages.exists(), "{ends_by} leaves them");
        assert_eq!(std::fs::read_dir(place.path("run/vmm")).unwrap().count(), 0);
    }
    let running = place.start("web", "");
    let status = text(&place.vmm("status web").stdout);
    assert!(!status.contains("vsock"), "there is none: {status}");
    drop(running);
}

#[test]
fn what_a_killed_monitor_left_is_replaced_and_cleaned_up() {
    if !has_kvm("what_a_killed_monitor_left_is_replaced_and_cleaned_up") {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    for vsock in ["my.sock,cid=9", ""] {
        drop(place.start("web", &format!("--vsock {vsock}")));
        let path = if vsock.is_empty() { place.path("run/vmm/web.d/vsock") } else { place.path("my.sock") };
        assert!(path.exists(), "SIGKILL cleans up nothing");
        let running = place.start("web", &format!("--vsock {vsock}"));
        assert_eq!(told(&place), path);
        UnixStream::connect(&path).unwrap();
        // The next one cannot have it.
        if !vsock.is_empty() {
            let arguments = format!("--kernel halt --console off --vsock {vsock}");
            refused(&place, &arguments, BAD_ARGUMENT, &["my.sock", "in use"]);
        }
        drop(running);
    }
    assert!(place.path("run/vmm/web.d/vsock").exists());
    assert!(text(&place.vmm("list --json").stdout).contains("[]"));
    assert!(!place.path("run/vmm/web.d").exists());
}

/// Waits until nobody listens at `socket` any more.
fn await_refusal(socket: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while UnixStream::connect(socket).err().is_none_or(|error| error.kind() != ErrorKind::ConnectionRefused) {
        assert!(Instant::now() < deadline, "{} is served", socket.display());
        thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn a_name_that_is_free_after_a_kill_is_free_with_its_sockets() {
    if !has_kvm("a_name_that_is_free_after_a_kill_is_free_with_its_sockets") {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    for vsock in ["--vsock", "--vsock my.sock"] {
        let mut running = place.start("web", vsock);
        for _ in 0..15 {
            running.child().kill().unwrap();
            // Its process still has a VM to close.
            await_refusal(&place.path("run/vmm/web.sock"));
            let next = place.start("web", vsock);
            assert_eq!(wait(running.child()).code(), None, "it was killed");
            running = next;
        }
        UnixStream::connect(told(&place)).unwrap();
    }
}

#[test]
fn a_socket_is_replaced_whose_owner_is_dead_though_something_holds_it() {
    let test = "a_socket_is_replaced_whose_owner_is_dead_though_something_holds_it";
    if !has_kvm(test) {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    let mut running = place.start("web", "--vsock my.sock");
    let process = pidfd_open(Pid::from_raw(running.pid()).unwrap(), PidfdFlags::empty()).unwrap();
    let mut held = Vec::new();
    for number in 0..64 {
        match pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) {
            Ok(fd) if getsockname(&fd).is_ok_and(|at| format!("{at:?}").contains("my.sock")) => held.push(fd),
            Err(Errno::PERM) => return eprintln!("SKIP: {test}: needs root, for another process's sockets"),
            _ => {}
        }
    }
    assert_eq!(held.len(), 2, "for bytes, and for messages");
    let arguments = "--kernel halt --console off --name other --vsock my.sock";
    refused(&place, arguments, BAD_ARGUMENT, &["my.sock", "in use"]);
    running.child().kill().unwrap();
    wait(running.child());
    UnixStream::connect(place.path("my.sock")).expect("it is held");
    let other = place.start("other", "--vsock my.sock");
    drop(other);
    let left = fs::read_dir(place.dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(
        !left
            .into_iter()
            .any(|name| name.to_string_lossy().starts_with("my.sock.") && name != "my.sock.seqpacket")
    );
}

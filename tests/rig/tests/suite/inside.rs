//! Tests that are themselves the command in the machine: `machine.rs` starts this test program
//! there for each of them. They are about the machine, so elsewhere they are ignored.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::thread;

#[test]
#[ignore = "run in the machine by the test of this name"]
fn kvm_creates_a_machine() {
    const KVM_GET_API_VERSION: u64 = 0xae00;
    const KVM_CREATE_VM: u64 = 0xae01;
    let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
    // SAFETY: neither call takes a pointer.
    let [version, machine] = [KVM_GET_API_VERSION, KVM_CREATE_VM]
        .map(|request| unsafe { libc::ioctl(kvm.as_raw_fd(), request as _, 0) });
    assert_eq!(version, 12);
    assert!(machine > 0, "{}", std::io::Error::last_os_error());
    assert!(fs::read_to_string("/proc/cpuinfo").unwrap().contains(" svm "));
}

#[test]
#[ignore = "run in the machine by the test of this name"]
fn sockets_and_pipes_work_between_processes() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = std::env::var("XDG_RUNTIME_DIR").unwrap();
    for folder in [folder.path(), runtime.as_ref()] {
        let path = folder.join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"ping").unwrap();
        let mut bytes = [0; 4];
        listener.accept().unwrap().0.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"ping");
        let fifo = folder.join("fifo");
        assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        assert!(fs::metadata(&fifo).unwrap().file_type().is_fifo());
        let mut writer = Command::new("sh").args(["-c", "echo pong >\"$0\""]).arg(&fifo).spawn().unwrap();
        assert_eq!(fs::read_to_string(&fifo).unwrap(), "pong\n");
        assert!(writer.wait().unwrap().success());
        fs::remove_file(fifo).unwrap();
        fs::remove_file(path).unwrap();
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let client = thread::spawn(move || TcpStream::connect(address).unwrap());
    listener.accept().unwrap();
    client.join().unwrap();
}

#[test]
#[ignore = "run in the machine by the test of this name"]
fn file_systems_are_mounted() {
    for path in [
        "/proc/self/fd",
        "/sys/kernel/tracing/events/kvm/kvm_exit",
        "/sys/fs/cgroup/cgroup.controllers",
        "/dev/pts/ptmx",
        "/dev/fd/0",
        "/dev/net/tun",
        "/dev/vhost-net",
        "/dev/vhost-vsock",
    ] {
        assert!(fs::exists(path).unwrap(), "{path}");
    }
    fs::write("/dev/shm/rig-test", "x").unwrap();
    fs::write("/run/rig-test", "x").unwrap();
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap();
    for name in ["overlay", "erofs", "ext4", "hugetlbfs"] {
        assert!(filesystems.split_whitespace().any(|word| word == name), "{name}");
    }
}

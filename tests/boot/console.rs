//! Streams through the console: all of it, in order, and at bounded cost when nobody reads.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::guest::{Guest, Kernel, available, vmm};

/// Bytes that differ from place to place.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

#[test]
fn a_stream_goes_both_ways_unchanged_through_a_named_port() {
    if !available("port stream") {
        return;
    }
    // No udev here, which would make /dev/virtio-ports/data.
    let script = "for p in /sys/class/virtio-ports/*; do [ $(cat $p/name) = data ] && d=/dev/${p##*/}; done; \
                  exec 3<>$d; echo ready >&3; cat <&3 >&3";
    echo(8_000_000, script, "--port", "data=socket=");
}

#[test]
fn a_hundred_megabytes_go_both_ways_unchanged_through_hvc0() {
    if available("console stream") {
        echo(100_000_000, "stty raw -echo; echo ready; cat", "--console", "socket=");
    }
}

/// Sends `len` bytes to a guest whose `script` sends them back after a line "ready", both at once, through a socket.
fn echo(len: usize, script: &str, option: &str, place: &str) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("data");
    let mut command = vmm(Kernel::TunedPvh, script);
    command.args(["--mem", "256M", option]).arg(format!("{place}{}", socket.display()));
    let guest = Guest::start(command);
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut theirs = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "connect: {error}"),
        }
        thread::sleep(Duration::from_millis(20));
    };
    theirs.set_read_timeout(Some(Duration::from_secs(200))).unwrap();
    let mut before = Vec::new();
    while !before.ends_with(b"ready\n") {
        let mut byte = [0];
        theirs.read_exact(&mut byte).expect("the guest says that it is ready");
        before.push(byte[0]);
    }
    let sent = pattern(len);
    thread::scope(|scope| {
        let (mut writer, sent) = (theirs.try_clone().unwrap(), &sent);
        scope.spawn(move || writer.write_all(sent).unwrap());
        let mut at = 0;
        let mut buf = vec![0; 1 << 20];
        while at < sent.len() {
            let len = theirs.read(&mut buf).unwrap();
            assert!(len > 0, "the port closed after {at} bytes");
            assert!(buf[..len] == sent[at..at + len], "differs near {at}");
            at += len;
        }
    });
    assert_eq!(guest.control(&["list"]).0, Some(0));
    guest.signal(libc::SIGHUP);
}

/// KiB of the monitor's own memory, if guest RAM is a memfd: that counts as shared memory.
fn own_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_reader_who_stalls_costs_little_and_loses_nothing() {
    if !available("stalled reader") {
        return;
    }
    let bytes = 4 << 20;
    let script = format!("stty -opost 2>/dev/null; head -c {bytes} /dev/zero | tr '\\0' x");
    let mut command = vmm(Kernel::TunedPvh, &script);
    command.args(["--mem", "256M,backing=memfd"]);
    let mut guest = Guest::start_unread(command);
    thread::sleep(Duration::from_secs(12));
    let stalled = own_memory(guest.pid());
    assert!(stalled < 16 << 10, "{stalled} KiB while nobody reads");
    guest.read();
    let ended = guest.finish();
    assert_eq!(ended.code, Some(0), "{}", &ended.text[..ended.text.len().min(2000)]);
    let longest = ended.text.split(|c| c != 'x').map(str::len).max();
    assert_eq!(longest, Some(bytes), "in one piece");
}

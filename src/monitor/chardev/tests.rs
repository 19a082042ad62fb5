//! Host ends from the other side: sockets, pseudo-terminals and files.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::backlog::Backlog;
use super::*;

/// Whether the end wakes its device within `millis`.
fn wakes(end: &Endpoint, millis: u64) -> bool {
    let timeout = Timespec::try_from(Duration::from_millis(millis)).unwrap();
    poll(&mut [PollFd::new(end, PollFlags::IN)], Some(&timeout)).unwrap() > 0
}

/// Other tests start processes, which hold copies of this one's descriptors for a moment: so long that is at most.
const OTHERS: Duration = Duration::from_millis(20);

const INPUT: Interest = Interest { input: true, output: false };
const OUTPUT: Interest = Interest { input: false, output: true };

/// Looks after `end` until it sleeps, wanting `interest`. It must come to that.
fn settle(end: &Endpoint, interest: Interest) {
    let limit = Instant::now() + Duration::from_secs(10);
    end.want(interest);
    while wakes(end, 30) {
        end.service();
        if interest.input {
            assert_eq!(end.read(&mut [0; 8]), 0, "nothing is expected");
        }
        end.want(interest);
        assert!(Instant::now() < limit, "never sleeps");
    }
}

/// Reads `count` bytes, sleeping between them as a device does.
fn take(end: &Endpoint, count: usize) -> Vec<u8> {
    let mut got = Vec::new();
    while got.len() < count {
        end.service();
        let mut buf = [0; 1000];
        let len = end.read(&mut buf);
        got.extend(&buf[..len]);
        end.want(INPUT);
        assert!(len > 0 || wakes(end, 5000), "nothing comes after {} bytes", got.len());
    }
    got
}

fn put(end: &Endpoint, mut data: &[u8]) {
    while !data.is_empty() {
        let taken = end.write(data);
        data = &data[taken..];
        end.want(OUTPUT);
        assert!(taken > 0 || wakes(end, 5000), "stalled with {} bytes left", data.len());
        end.service();
    }
}

fn socket(dir: &tempfile::TempDir) -> (Endpoint, PathBuf) {
    let path = dir.path().join("socket");
    (Endpoint::open(&CharTarget::Socket(path.clone()), &crate::event_loop::running()).unwrap(), path)
}

#[test]
fn a_socket_serves_one_client_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let (end, path) = socket(&dir);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!((end.path(), end.connected()), (Some(path.clone()), false));
    put(&end, b"said to nobody, ");
    for round in 0..3 {
        let mut client = UnixStream::connect(&path).unwrap();
        settle(&end, INPUT);
        assert!(end.connected());
        put(&end, b"hello");
        let mut got = vec![0; if round == 0 { 21 } else { 5 }];
        client.read_exact(&mut got).unwrap();
        assert!(got.ends_with(b"hello") && (round > 0 || got.starts_with(b"said")));
        client.write_all(b"hi").unwrap();
        assert_eq!(take(&end, 2), b"hi");

        let mut second = UnixStream::connect(&path).unwrap();
        settle(&end, INPUT);
        assert_eq!(second.read(&mut got).unwrap(), 0, "turned away");

        // It says its last words and goes. They are read, and the end sleeps again.
        client.write_all(b"bye").unwrap();
        drop(client);
        assert_eq!(take(&end, 3), b"bye");
        assert_eq!(end.read(&mut got), 0);
        settle(&end, INPUT);
        assert!(!end.connected());
    }
}

#[test]
fn a_client_who_left_is_not_waited_for_while_its_words_are_not_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let (end, path) = socket(&dir);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"first").unwrap();
    drop(client);
    thread::sleep(OTHERS);
    let mut next = UnixStream::connect(&path).unwrap();
    next.write_all(b"second").unwrap();
    settle(&end, Interest::default());
    assert!(!end.connected());
    assert_eq!(take(&end, 11), b"firstsecond", "the next one comes in when the first one's words are read");
    settle(&end, INPUT);
    assert!(end.connected());
}

#[test]
fn a_half_closed_client_still_listens_and_does_not_keep_the_device_awake() {
    let dir = tempfile::tempdir().unwrap();
    let (end, path) = socket(&dir);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"question").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(take(&end, 8), b"question");
    assert_eq!(end.read(&mut [0; 8]), 0);
    settle(&end, INPUT);
    put(&end, b"answer");
    let mut got = [0; 6];
    client.read_exact(&mut got).unwrap();
    drop(client);
    settle(&end, INPUT);
    assert!(!end.connected());
}

#[test]
fn a_stalled_client_stalls_and_then_gets_every_byte() {
    let dir = tempfile::tempdir().unwrap();
    let (end, path) = socket(&dir);
    let old: Vec<u8> = (0..100_000u32).map(|i| (i % 249) as u8).collect();
    put(&end, &old);
    let mut client = UnixStream::connect(&path).unwrap();
    settle(&end, Interest::default());
    let mut expect = old[old.len() - Backlog::LIMIT..].to_vec();
    loop {
        let taken = end.write(&[b'n'; 1000]);
        expect.extend(&[b'n'; 1000][..taken]);
        if taken == 0 {
            break;
        }
        assert!(expect.len() < 16 << 20, "never stalls");
    }
    end.want(OUTPUT);
    assert!(!wakes(&end, 30), "sleeps while the client does");
    let reader = thread::spawn(move || {
        let mut got = vec![0; expect.len()];
        client.read_exact(&mut got).map(|()| got == expect)
    });
    assert!(wakes(&end, 5000));
    settle(&end, Interest::default());
    assert!(reader.join().unwrap().unwrap());
}

#[test]
fn only_a_stale_socket_is_replaced_and_ours_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let place = CharTarget::Socket(path.clone());
    drop(UnixListener::bind(&path).unwrap());
    thread::sleep(OTHERS);
    let end = Endpoint::open(&place, &crate::event_loop::running()).expect("nobody listens on the old one");
    assert!(matches!(
        Endpoint::open(&place, &crate::event_loop::running()),
        Err(Error::Socket(listener::Error::InUse(_)))
    ));
    let aside = end.clone();
    drop(end);
    assert!(path.exists(), "a clone keeps it");
    drop(aside);
    assert!(!path.exists());
    fs::write(&path, b"precious").unwrap();
    assert!(matches!(
        Endpoint::open(&place, &crate::event_loop::running()),
        Err(Error::Socket(listener::Error::NotASocket(_)))
    ));
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    let long = CharTarget::Socket(dir.path().join("x".repeat(200)));
    assert!(matches!(Endpoint::open(&long, &crate::event_loop::running()), Err(Error::Socket { .. })));
}

#[test]
fn a_pty_survives_those_who_come_and_go() {
    let end = Endpoint::open(&CharTarget::Pty, &crate::event_loop::running()).unwrap();
    let path = end.path().unwrap();
    assert_eq!(end.to_string(), format!("pty={}", path.display()));
    settle(&end, INPUT);
    assert!(!end.connected());
    put(&end, b"boot\r\n");
    for round in 0..3 {
        let mut slave = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        settle(&end, INPUT);
        assert!(end.connected());
        put(&end, b"login:\x03\n");
        let expect: &[u8] = if round == 0 { b"boot\r\nlogin:\x03\n" } else { b"login:\x03\n" };
        let mut got = vec![0; expect.len()];
        slave.read_exact(&mut got).unwrap();
        assert_eq!(got, expect, "raw, and not echoed");
        slave.write_all(b"root\r").unwrap();
        assert_eq!(take(&end, 5), b"root\r");
        drop(slave);
        settle(&end, INPUT);
        assert!(!end.connected());
        // Somebody is there for only a moment.
        fs::OpenOptions::new().write(true).open(&path).unwrap().write_all(b"quick").unwrap();
        assert_eq!(take(&end, 5), b"quick");
        settle(&end, INPUT);
    }
    // A reader who stalls is waited for.
    let mut slave = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    settle(&end, Interest::default());
    let mut sent = 0;
    while {
        // The kernel moves what it has taken on to the reader's side a little later, and then has room again.
        end.want(OUTPUT);
        wakes(&end, 30)
    } {
        sent += end.write(&[b'x'; 1000]);
        assert!(sent < 16 << 20, "never stalls");
    }
    let mut buf = [0; 4096];
    while sent > 0 {
        sent -= slave.read(&mut buf).unwrap();
    }
    assert!(wakes(&end, 5000));
}

#[test]
fn a_file_takes_output_and_gives_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    fs::write(&path, b"what was there before").unwrap();
    let end = Endpoint::open(&CharTarget::File(path.clone().into()), &crate::event_loop::running()).unwrap();
    put(&end, b"output");
    assert_eq!(end.read(&mut [0; 4]), 0);
    end.want(INPUT);
    assert!(!wakes(&end, 10));
    end.want(OUTPUT);
    assert!(wakes(&end, 1000), "another turn comes at once");
    assert_eq!(fs::read(&path).unwrap(), b"output");
    let nowhere = CharTarget::File(dir.path().join("no/such/folder").into());
    let nowhere = Endpoint::open(&nowhere, &crate::event_loop::running()).unwrap_err();
    assert!(nowhere.to_string().contains("no/such/folder"));
}

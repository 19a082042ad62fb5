//! Agents that are none, and clients that are none: each is an error, and costs nobody else anything.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vmm_agent::protocol::{Exec, Exit, Message, Request, Stream, VERSION, WINDOW};

use super::Guest;
use crate::place::*;

/// `vmm exec web true` against an agent that does what `answer` does, once the client has said its hello, whose nonce it is given.
#[track_caller]
fn refused_by(answer: impl Fn(&mut UnixStream, u64) + Send + Sync + 'static, words: &[&str]) {
    let guest = Guest::without_agent(600.0);
    let answer = std::sync::Arc::new(answer);
    guest.take_connections(move |_| {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let answer = answer.clone();
        thread::spawn(move || {
            let mut hello = [0; 22];
            theirs.read_exact(&mut hello).unwrap();
            answer(&mut theirs, u64::from_le_bytes(hello[14..].try_into().unwrap()));
        });
        Some(ours)
    });
    let output = guest.vmm("exec --timeout 1 web true");
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert_eq!(said.lines().filter(|line| line.starts_with("vmm: error: ")).count(), 1, "{said}");
    for word in words {
        assert!(said.contains(word), "no {word:?} in {said}");
    }
}

fn welcome(nonce: u64) -> Vec<u8> {
    [Message::Hello { version: VERSION, nonce }.to_vec(), Message::Started.to_vec()].concat()
}

#[test]
fn agents_that_make_no_sense_are_told_apart() {
    refused_by(|_, _| (), &["lost"]);
    refused_by(|s, _| s.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").unwrap(), &["is no agent"]);
    refused_by(
        |s, nonce| s.write_all(&Message::Hello { version: 7, nonce }.to_vec()).unwrap(),
        &["version 7", "version 1", "hint: install"],
    );
    refused_by(
        |s, nonce| s.write_all(&Message::Hello { version: VERSION, nonce: !nonce }.to_vec()).unwrap(),
        &["is no agent"],
    );
    // Silent, before and after its hello.
    refused_by(|s, _| drop(s.read_to_end(&mut Vec::new())), &["did not answer"]);
    let silent = |s: &mut UnixStream, nonce| {
        s.write_all(&Message::Hello { version: VERSION, nonce }.to_vec()).unwrap();
        let _ = s.read_to_end(&mut Vec::new());
    };
    refused_by(silent, &["did not answer"]);
    let after = |message: Vec<u8>| {
        move |s: &mut UnixStream, nonce| s.write_all(&[welcome(nonce), message.clone()].concat()).unwrap()
    };
    refused_by(after(vec![]), &["lost"]);
    refused_by(after(vec![200, 0, 0, 0]), &["kind 200"]);
    refused_by(after(vec![48, 255, 255, 255, 1]), &["too long"]);
    refused_by(after(Message::Data(Stream::Stdin, b"x").to_vec()), &["does not belong"]);
    refused_by(after(Message::Credit(Stream::Stdin, u32::MAX).to_vec()), &["room"]);
    refused_by(after(Message::Started.to_vec()), &["does not belong"]);
    refused_by(after(Message::Data(Stream::Stdout, b"").to_vec()[..3].to_vec()), &["lost"]);
    let late =
        [Message::End(Stream::Stderr).to_vec(), Message::Data(Stream::Stderr, b"late").to_vec()].concat();
    refused_by(after(late), &["room"]);
}

/// As a guest whose kernel is there, and whose agent is not.
#[test]
fn a_silent_guest_is_told_in_whole_seconds_with_what_to_try() {
    let guest = Guest::without_agent(600.0);
    let _silent = UnixListener::bind(guest.place.path("vsock")).unwrap();
    let output = guest.vmm("exec --timeout 1 web true");
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("did not answer on vsock port 1023 within 1 s\n"), "{said}");
    for words in ["vmm agent install", "vmm status --vcpus web", "--timeout 60"] {
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn an_agent_that_floods_meets_the_window() {
    let guest = Guest::without_agent(600.0);
    guest.take_connections(|_| {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut hello = [0; 22];
            theirs.read_exact(&mut hello).unwrap();
            theirs.write_all(&welcome(u64::from_le_bytes(hello[14..].try_into().unwrap()))).unwrap();
            while theirs.write_all(&Message::Data(Stream::Stdout, &[b'x'; 1000]).to_vec()).is_ok() {}
        });
        Some(ours)
    });
    // Nobody reads, so no credit is given.
    let mut child = guest.command("exec web true").spawn().unwrap();
    let stdout = child.stdout.take();
    thread::sleep(Duration::from_millis(500));
    let memory = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let peak = memory.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 64 << 10, "{peak} KiB");
    drop(stdout);
    assert_eq!(wait(&mut child).code(), Some(125));
}

#[test]
fn a_guest_that_hangs_midway_is_left_by_who_insists() {
    let guest = Guest::without_agent(600.0);
    let listener = UnixListener::bind(guest.place.path("vsock")).unwrap();
    let mut command = guest.command("exec -i web true");
    command.stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let mut opening = [0; 13];
    stream.read_exact(&mut opening).unwrap();
    assert_eq!(&opening, b"CONNECT 1023\n");
    stream.write_all(b"OK 1073741824\n").unwrap();
    let mut hello = [0; 22];
    stream.read_exact(&mut hello).unwrap();
    stream.write_all(&welcome(u64::from_le_bytes(hello[14..].try_into().unwrap()))).unwrap();
    // From now on it takes nothing: more is typed than any socket holds.
    let mut stdin = child.stdin.take().unwrap();
    let flood = thread::spawn(move || while stdin.write_all(&[b'x'; 1 << 16]).is_ok() {});
    let end = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < end, "it cannot be left");
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(wait(&mut child).code(), Some(128 + 15));
    flood.join().unwrap();
}

#[test]
fn a_guest_without_an_agent_is_told_from_one_that_hangs_and_one_that_boots() {
    let guest = Guest::without_agent(600.0);
    refused(&guest.place, "exec web true", 125, &["vsock"]);
    guest.take_connections(|_| None);
    let output = guest.vmm("exec web true");
    assert!(text(&output.stderr).contains("no agent in the guest"), "{}", text(&output.stderr));
    assert_eq!(output.status.code(), Some(125));

    // One that was just started is asked again.
    let guest = Guest::without_agent(0.5);
    let asked = std::sync::atomic::AtomicU32::new(0);
    guest.take_connections(move |_| {
        if asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst) < 5 {
            return None;
        }
        Some(exits(77))
    });
    assert_eq!(guest.vmm("exec web true").status.code(), Some(77));

    // Neither accepted nor refused.
    let guest = Guest::without_agent(600.0);
    let (held, holds) = std::sync::mpsc::channel::<()>();
    let holds = std::sync::Mutex::new(holds);
    guest.take_connections(move |_| {
        let _ = holds.lock().unwrap().recv();
        None
    });
    let output = guest.vmm("exec --timeout 1 web true");
    drop(held);
    assert!(text(&output.stderr).contains("did not answer"), "{}", text(&output.stderr));

    // A guest that is too busy to answer within the two seconds for which a monitor asks it: it is asked again.
    for (silent, code, words) in [(1, 77, ""), (u32::MAX, 125, "did not answer")] {
        let guest = Guest::without_agent(600.0);
        let asked = std::sync::atomic::AtomicU32::new(0);
        guest.take_connections(move |_| {
            if asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst) < silent {
                thread::sleep(Duration::from_secs(2));
                return None;
            }
            Some(exits(77))
        });
        let output = guest.vmm("exec --timeout 5 web true");
        assert_eq!(output.status.code(), Some(code));
        assert!(text(&output.stderr).contains(words), "{}", text(&output.stderr));
    }
}

/// An agent whose every command ends with `code`.
fn exits(code: u8) -> UnixStream {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let mut hello = [0; 22];
        theirs.read_exact(&mut hello).unwrap();
        let mut answer = welcome(u64::from_le_bytes(hello[14..].try_into().unwrap()));
        Message::Exit(Exit::Code(code)).put(&mut answer);
        theirs.write_all(&answer).unwrap();
    });
    ours
}

/// What the agent says to `bytes`; it closes the connection.
fn said_to(guest: &Guest, bytes: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(guest.place.path("agent")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let _ = stream.write_all(bytes);
    let mut said = Vec::new();
    // It may reset what it has not read.
    let _ = stream.read_to_end(&mut said);
    said
}

#[test]
fn clients_that_make_no_sense_are_refused_and_cost_nobody_else_anything() {
    let mut guest = Guest::new();
    let hello = Message::Hello { version: VERSION, nonce: 5 }.to_vec();
    let exec = |argv: &[&[u8]], stdin| {
        let argv = argv.iter().map(|a| a.to_vec()).collect();
        Message::Request(Request::Exec(Exec { argv, stdin, ..Exec::default() })).to_vec()
    };
    let sleep = exec(&[b"sleep", b"1000"], false);
    let cat = exec(&[b"sleep", b"1000"], true);
    let flood = Message::Data(Stream::Stdin, &[0; 1 << 15]).to_vec().repeat(WINDOW as usize / (1 << 15) + 4);
    for (bytes, words) in [
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), ""),
        (vec![16, 255, 255, 255], ""),
        (sleep.clone(), ""),
        ([&hello[..], &hello].concat(), "does not belong"),
        ([&hello[..], &sleep, &sleep].concat(), "does not belong"),
        ([&hello[..], &sleep, &Message::Data(Stream::Stdin, b"x").to_vec()].concat(), "room"),
        ([&hello[..], &cat, &flood].concat(), "room"),
        ([&hello[..], &sleep, &Message::Credit(Stream::Stdout, 1).to_vec()].concat(), "room"),
        ([&hello[..], &sleep, &Message::Data(Stream::Stdout, b"x").to_vec()].concat(), "does not belong"),
        ([&hello[..], &sleep, &Message::Exit(Exit::Code(0)).to_vec()].concat(), "does not belong"),
        ([&hello[..], &[16, 8, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0]].concat(), "fields"),
        ([&hello[..], &[32, 1, 0, 0, 65]].concat(), "fields"),
        (Message::Hello { version: 9, nonce: 5 }.to_vec(), ""),
    ] {
        let said = text(&said_to(&guest, &bytes));
        assert!(said.contains(words), "{bytes:?}: {said}");
    }
    // One that says nothing for long is not waited for, and holds nobody up meanwhile; one that vanishes midway neither.
    let _silent: Vec<_> = (0..50).map(|_| UnixStream::connect(guest.place.path("agent")).unwrap()).collect();
    for cut in 1..sleep.len() {
        let mut stream = UnixStream::connect(guest.place.path("agent")).unwrap();
        stream.write_all(&hello).unwrap();
        stream.write_all(&sleep[..cut]).unwrap();
    }
    assert_eq!(guest.vmm("exec web echo still").stdout, b"still\n");
    assert!(guest.agent().try_wait().unwrap().is_none());
    let end = std::time::Instant::now() + PATIENCE;
    while super::exec::commands(&guest) != Vec::<String>::new() {
        assert!(std::time::Instant::now() < end, "{:?}", super::exec::commands(&guest));
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn one_session_too_many_is_told_so() {
    let guest = Guest::new();
    let hello = Message::Hello { version: VERSION, nonce: 5 }.to_vec();
    let sleep = Exec { argv: vec![b"sleep".to_vec(), b"1000".to_vec()], ..Exec::default() };
    let opening = [hello, Message::Request(Request::Exec(sleep)).to_vec()].concat();
    let mut held = Vec::new();
    for _ in 0..512 {
        let mut stream = UnixStream::connect(guest.place.path("agent")).unwrap();
        stream.write_all(&opening).unwrap();
        held.push(stream);
    }
    for stream in &mut held {
        let mut answer = [0; 26];
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer[22], 64, "it is under way");
    }
    let output = guest.vmm("exec web true");
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("as many commands as it may"), "{}", text(&output.stderr));
    drop(held);
    let end = std::time::Instant::now() + PATIENCE;
    while guest.vmm("exec web true").status.code() != Some(0) {
        assert!(std::time::Instant::now() < end);
    }
}

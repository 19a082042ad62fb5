//! The socket device under Linux: streams and messages both ways, many connections, stock clients, and a reboot.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use interface::vsock;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept, bind, connect,
    listen, recv, send, socket_with,
};

use crate::guest::{Guest, Kernel, available, vmm};

fn noise(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn serve(path: PathBuf, count: usize, answer: fn(UnixStream)) -> thread::JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        let threads: Vec<_> = (0..count)
            .map(|_| {
                let (stream, _) = listener.accept().unwrap();
                thread::spawn(move || answer(stream))
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    })
}

fn echo(mut stream: UnixStream) {
    std::io::copy(&mut stream.try_clone().unwrap(), &mut stream).unwrap();
}

/// Calls the guest's port, again until somebody there answers.
fn call(path: &Path, port: u32) -> UnixStream {
    loop {
        let Ok(mut stream) = UnixStream::connect(path) else {
            thread::sleep(Duration::from_millis(20));
            continue;
        };
        let mut line = Vec::new();
        let mut byte = [0];
        let asked = writeln!(stream, "CONNECT {port}").is_ok();
        while asked && stream.read(&mut byte).is_ok_and(|n| n == 1) {
            if byte == *b"\n" {
                assert!(line.starts_with(b"OK "), "{}", String::from_utf8_lossy(&line));
                return stream;
            }
            line.push(byte[0]);
        }
        // Refused: the guest has not come that far.
        thread::sleep(Duration::from_millis(20));
    }
}

/// Sends `data` and then its end; returns what comes back.
fn exchange(mut stream: UnixStream, data: &[u8]) -> Vec<u8> {
    let (mut writer, data) = (stream.try_clone().unwrap(), data.to_vec());
    let writer = thread::spawn(move || {
        writer.write_all(&data).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    writer.join().unwrap();
    back
}

/// Sends back the messages of one connection.
fn echo_messages(path: &Path) -> thread::JoinHandle<usize> {
    let listener: OwnedFd =
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&listener, 1).unwrap();
    thread::spawn(move || {
        let stream = accept(&listener).unwrap();
        let (mut count, mut message) = (0, vec![0; 1 << 20]);
        while let Ok((n @ 1.., _)) = recv(&stream, &mut *message, RecvFlags::empty()) {
            assert_eq!(send(&stream, &message[..n], SendFlags::empty()).unwrap(), n);
            count += 1;
        }
        count
    })
}

fn guest_and_host_reach_each_other(kernel: Kernel) {
    if !available("vsock") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let at = |port: u32| dir.path().join(format!("v_{port}"));
    let servers = [serve(at(1), 1, echo), serve(at(3), 300, echo)];
    let messages = echo_messages(&at(2));
    let script = "echo BEGIN; for file in 1 2; do guest-vsock echo 1000 2 >/dev/null 2>&1; echo $?; done; sha256sum /init; \
                  guest-vsock connect 1 </init | sha256sum; guest-vsock -q connect 2 </init | sha256sum; \
                  guest-vsock many 3 300 2>&1; guest-vsock connect 4 </dev/null; echo $?; echo END";
    let mut command = vmm(kernel, script);
    command.args(["--mem", "512M", "--cpus", "2", "--vsock"]).arg(&path);
    let guest = Guest::start(command);
    let data = noise(3 << 20);
    for len in [data.len(), 0, 1, 70_000] {
        assert!(exchange(call(&path, 1000), &data[..len]) == data[..len], "{len} bytes there and back");
    }
    let ended = guest.finish();
    servers.into_iter().for_each(|server| server.join().unwrap());
    let body = ended.body();
    let sums: Vec<_> = body[2..5].iter().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(
        (&body[..2], sums[0] == sums[1], sums[0] == sums[2]),
        (&["0", "0"][..], true, true),
        "{}",
        ended.text
    );
    assert!(messages.join().unwrap() >= 1);
    // 104 is ECONNRESET: nobody listens there.
    assert!(body[5].contains("connections: 300") && body.last() == Some(&"104"), "{}", ended.text);
    assert!(!path.exists(), "the socket goes with its guest");
}

#[test]
fn the_tuned_kernel_and_the_host_reach_each_other() {
    guest_and_host_reach_each_other(Kernel::TunedPvh);
}

#[test]
fn debians_kernel_and_the_host_reach_each_other() {
    guest_and_host_reach_each_other(Kernel::Stock);
}

#[test]
fn stock_clients_reach_a_guest() {
    if !available("vsock's stock clients") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    const PYTHON: &str = "import socket, sys\n\
        s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(b'CONNECT 1000\\n')\n\
        f = s.makefile('rwb'); assert f.readline().startswith(b'OK ')\n\
        s.sendall(b'from python'); s.shutdown(socket.SHUT_WR); print(f.read().decode())";
    let shown = path.display();
    let socat =
        format!("printf 'CONNECT 1000\\nfrom socat' | socat -t 60 - UNIX-CONNECT:{shown} | tail -n 1");
    let clients = [("python3", vec!["python3", "-c", PYTHON]), ("socat", vec!["sh", "-c", &socat])];
    let has = |name: &&str| Command::new(name).arg("-V").stdout(Stdio::null()).status().is_ok();
    let (there, missing): (Vec<_>, Vec<_>) = clients.into_iter().partition(|(name, _)| has(name));
    missing.iter().for_each(|(name, _)| eprintln!("SKIP: vsock's stock clients: this machine lacks {name}"));
    // The guest stays until the host has heard all.
    let listener = UnixListener::bind(dir.path().join("v_1")).unwrap();
    let script = format!("guest-vsock echo 1000 {}; guest-vsock connect 1 </dev/null", there.len() + 1);
    let mut command = vmm(Kernel::TunedPvh, &script);
    command.arg("--vsock").arg(&path);
    let guest = Guest::start(command);
    // It listens from now on.
    assert_eq!(exchange(call(&path, 1000), b"first"), b"first");
    for (name, words) in there {
        let output = Command::new(words[0]).args(&words[1..]).arg(&path).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(said.trim_end(), format!("from {}", name.trim_end_matches('3')), "{output:?}");
    }
    drop(listener.accept().unwrap());
    assert_eq!(guest.finish().code, Some(0));
}

/// Whether the monitor `pid` has a guest that runs.
fn has_vcpu(pid: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    let name = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("comm")).ok();
    threads.flatten().filter_map(name).any(|name| name.starts_with("vcpu"))
}

#[test]
fn what_a_guest_sent_right_before_it_powered_off_arrives() {
    if !available("vsock before a power-off") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let listener = UnixListener::bind(dir.path().join("v_1")).unwrap();
    // More than a socket takes of a reader who stands still, and less than the guest is held up for.
    let len = 384 << 10;
    let mut command = vmm(Kernel::TunedPvh, "guest-vsock send 1 384");
    command.arg("--vsock").arg(&path);
    let guest = Guest::start(command);
    let (mut stream, _) = listener.accept().unwrap();
    // Its program waits for a word, or the end, before it goes.
    stream.write_all(b"x").unwrap();
    while has_vcpu(guest.pid()) {
        thread::sleep(Duration::from_millis(1));
    }
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all);
    let ended = guest.finish();
    assert!(ended.code == Some(0) && all.len() == len, "{} of {len} bytes: {}", all.len(), ended.text);
}

#[test]
fn a_reboot_ends_connections_and_leaves_the_sockets() {
    if !available("vsock over a reboot") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let listener = UnixListener::bind(dir.path().join("v_1")).unwrap();
    let script =
        "guest-vsock echo 1000 1 & guest-vsock connect 1 </dev/null | grep -q again && reboot -f; echo done";
    let mut command = vmm(Kernel::TunedPvh, script);
    command.args(["--on-reboot", "reset", "--vsock"]).arg(&path);
    let guest = Guest::start(command);
    let mut held = call(&path, 1000);
    held.write_all(b"x").unwrap();
    held.read_exact(&mut [0]).unwrap();
    listener.accept().unwrap().0.write_all(b"again").unwrap();
    assert!(matches!(held.read(&mut [0]), Ok(0) | Err(_)), "it ends with the guest that it led to");
    let (mut second, _) = listener.accept().unwrap();
    assert_eq!(exchange(call(&path, 1000), b"new"), b"new");
    second.write_all(b"enough").unwrap();
    drop(second);
    let ended = guest.finish();
    assert!(ended.code == Some(0) && ended.text.contains("done"), "{}", ended.text);
}

#[test]
fn the_hosts_kernel_carries_connections_over_pauses_and_ends_them_at_a_reboot() {
    const CID: u32 = 77;
    if !available("vhost-vsock") {
        return;
    }
    let listener = vsock::listen(4000, SocketType::STREAM).unwrap();
    let next = || UnixStream::from(accept(&listener).unwrap());
    let call = || {
        loop {
            let socket = vsock::socket(SocketType::STREAM).unwrap();
            match connect(&socket, &vsock::Address::new(CID, 1000)) {
                Ok(()) => return UnixStream::from(socket),
                // The guest has not come that far.
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        }
    };
    let start = |name: &str, script: &str| {
        let mut command = vmm(Kernel::TunedPvh, script);
        command.args(["--name", name, "--on-reboot", "reset", "--vsock", &format!("vhost=on,cid={CID}")]);
        command
    };
    let script = "guest-vsock echo 1000 1 & guest-vsock connect 4000 </dev/null | grep -q again && reboot -f; echo done";
    let guest = Guest::start(start("v", script));
    let mut first = next();
    let mut held = call();
    for round in 0..5 {
        let (mut back, data) = (vec![0; 100_000], noise(100_000));
        held.write_all(&data).unwrap();
        assert_eq!(guest.control(&["pause", "v"]).0, Some(0));
        assert_eq!(guest.control(&["resume", "v"]).0, Some(0));
        held.read_exact(&mut back).unwrap();
        assert!(back == data, "round {round}");
    }
    assert!(guest.control(&["status", "v"]).1.contains("address 77"));
    let (code, said) = guest.control(&["exec", "v", "sh", "-c", "echo by AF_VSOCK; exit 42"]);
    assert_eq!((code, &*said), (Some(42), "by AF_VSOCK\n"));
    // The address is taken.
    let output = start("w", "true").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("vsock address 77 is another guest's"), "{said}");
    first.write_all(b"again").unwrap();
    drop(first);
    assert!(matches!(held.read(&mut [0]), Ok(0) | Err(_)), "it ends with the guest that it led to");
    let mut second = next();
    let data = noise(3 << 20);
    assert!(exchange(call(), &data) == data);
    second.write_all(b"enough").unwrap();
    drop(second);
    let ended = guest.finish();
    assert!(ended.code == Some(0) && ended.text.contains("done"), "{}", ended.text);
}

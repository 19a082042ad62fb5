//! `vmm forward` and `vmm ssh-proxy`, with the real agent.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStderr, Stdio};
use std::thread;

use super::Guest;
use crate::place::*;

/// A server in the guest that sends back what it gets, and then its length, once its client has no more to say. Its port.
fn server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut bytes = Vec::new();
                stream.read_to_end(&mut bytes).unwrap();
                stream.write_all(&bytes).unwrap();
                write!(stream, "{}", bytes.len()).unwrap();
            });
        }
    });
    port
}

/// A forward of a port that is free to `port`: the process, where it listens, and what it says from then on.
fn forward(guest: &Guest, port: u16) -> (Child, String, BufReader<ChildStderr>) {
    let mut child = guest.command(&format!("forward web 0:{port}")).spawn().unwrap();
    let mut line = String::new();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    said.read_line(&mut line).unwrap();
    let (address, rest) = line.split_once(' ').unwrap_or_else(|| panic!("{line}"));
    assert!(rest.contains(&format!("port {port} of web")), "{line}");
    (child, address.to_owned(), said)
}

#[test]
fn a_forwarded_port_carries_many_connections_and_their_half_closes() {
    let guest = Guest::new();
    let (mut child, address, _said) = forward(&guest, server());
    let clients: Vec<_> = (0..30u32)
        .map(|number| {
            let address = address.clone();
            thread::spawn(move || {
                let mut stream = TcpStream::connect(address).unwrap();
                let bytes: Vec<u8> = (0..50_000 * number).flat_map(|n| (n ^ number).to_le_bytes()).collect();
                // The server says nothing before it has all, and all is more than any window.
                stream.write_all(&bytes).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
                let mut back = Vec::new();
                stream.read_to_end(&mut back).unwrap();
                assert!(back == [&bytes[..], bytes.len().to_string().as_bytes()].concat(), "{number}");
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    child.kill().unwrap();
    wait(&mut child);
}

#[test]
fn the_end_of_the_virtual_machine_is_told_once() {
    let guest = Guest::new();
    let (mut child, _, mut said) = forward(&guest, 1);
    guest.end();
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert_eq!(line, "web has ended; the next virtual machine of this name will be served\n");
    child.kill().unwrap();
    wait(&mut child);
    assert_eq!(said.read_line(&mut line).unwrap(), 0, "{line}");
}

#[test]
fn a_port_where_nobody_listens_closes_its_connections() {
    let guest = Guest::new();
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (mut child, address, mut said) = forward(&guest, unused);
    let mut bytes = Vec::new();
    let _ = TcpStream::connect(address).unwrap().read_to_end(&mut bytes);
    assert!(bytes.is_empty());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(line.contains("refused"), "{line}");
    child.kill().unwrap();
    wait(&mut child);
}

#[test]
fn a_port_that_is_taken_is_an_error() {
    let guest = Guest::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let output = guest.vmm(&format!("forward web {port}:80"));
    assert_eq!(output.status.code(), Some(4));
    assert!(text(&output.stderr).contains("in use"), "{}", text(&output.stderr));
}

#[test]
fn the_proxy_carries_a_connection_to_its_end() {
    let guest = Guest::new();
    let port = server();
    let mut child = guest.command(&format!("ssh-proxy web {port}")).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"hello").unwrap();
    let output = finish(child);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "hello5".to_owned()));

    // A server that has said all ends it, whoever holds its standard input.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || listener.accept().unwrap().0.write_all(b"bye").unwrap());
    let mut child = guest.command(&format!("ssh-proxy web {port}")).stdin(Stdio::piped()).spawn().unwrap();
    let _stdin = child.stdin.take();
    assert_eq!(text(&finish(child).stdout), "bye");
}

#[test]
fn the_proxy_prefers_what_listens_on_vsock() {
    let guest = Guest::without_agent(600.0);
    guest.take_connections(|port| {
        (port == 22).then(|| {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            thread::spawn(move || write!(theirs, "port {port}").unwrap());
            ours
        })
    });
    assert_eq!(text(&guest.vmm("ssh-proxy web").stdout), "port 22");
    let output = guest.vmm("ssh-proxy web 2222");
    assert_eq!(output.status.code(), Some(4));
    assert!(text(&output.stderr).contains("no agent"), "{}", text(&output.stderr));
}

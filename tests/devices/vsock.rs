//! The socket device beyond single packets: who waits for whom, what it costs, and how connections end.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept, bind, connect,
    listen, recv, send as send_message, socket_with,
};
use vmm_monitor::virtio::vsock::Vsock;
use vmm_monitor::vsock::Sockets;

use crate::guest::{DATA, Guest};
use crate::vsock_driver::*;

/// Bytes of the host's that wait for a program that stands still, beside those in the kernel's own buffers.
pub const ROOM_HERE: usize = 256 << 10;

fn fields(header: Header) -> (u32, u32, u32) {
    (header.flags, header.buf_alloc, header.fwd_cnt)
}

/// Sends what the device has room for, until it says that there is none: behind what was `sent`, of which `forwarded` bytes wait no
/// more.
pub fn fill(guest: &mut Guest, line: &Line, sent: &mut Vec<u8>, forwarded: &mut u32) {
    let noise = noise(0x1_0000);
    loop {
        let room = ROOM_HERE - (sent.len() - *forwarded as usize);
        if room > 0 {
            let piece = &noise[..room.min(noise.len())];
            send_data(guest, line, piece, 0);
            sent.extend_from_slice(piece);
            continue;
        }
        // What a program's socket took is told of, once half of the room is free.
        send(guest, line, CREDIT_REQUEST, 0);
        let (header, _) = expect(guest, line, CREDIT_UPDATE);
        let (_, _, told) = fields(header);
        if told == *forwarded {
            return;
        }
        *forwarded = told;
    }
}

#[test]
fn a_call_reaches_the_guest_and_one_that_is_not_answered_ends() {
    let host = Host::new();
    let mut guest = host.start();
    let (line, mut program) = host.called(&mut guest);
    program.write_all(b"hello").unwrap();
    assert_eq!(expect(&mut guest, &line, RW).1, b"hello");

    // Refused.
    let mut program = host.call(5);
    let (request, _) = receive(&mut guest);
    let line = Line::new(5, request.src_port);
    send(&mut guest, &line, RST, 0);
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
    // Not answered within two seconds.
    let mut program = host.call(6);
    let (request, _) = receive(&mut guest);
    let line = Line::new(6, request.src_port);
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
    expect(&mut guest, &line, RST);
    send(&mut guest, &line, RESPONSE, 0);
    expect(&mut guest, &line, RST);
    // Given up.
    let program = host.call(7);
    let (request, _) = receive(&mut guest);
    drop(program);
    expect(&mut guest, &Line::new(7, request.src_port), RST);
    // Said nothing, or nonsense.
    for words in ["CONNECT\n", "CONNECT 1 2\n", "GET / HTTP/1.1\n\n", &"x".repeat(40)] {
        let mut program = UnixStream::connect(host.path("v")).unwrap();
        program.write_all(words.as_bytes()).unwrap();
        assert!(matches!(
            program.read(&mut [0]).map_err(|error| error.kind()),
            Ok(0) | Err(ErrorKind::ConnectionReset)
        ));
    }
    offer(&mut guest);
    assert!(host.is_at_rest() && offered(&mut guest).is_none());
}

#[test]
fn a_caller_may_say_its_line_in_pieces_and_data_behind_it_is_not_lost() {
    let host = Host::new();
    let mut guest = host.start();
    let mut program = UnixStream::connect(host.path("v")).unwrap();
    for piece in ["CONN", "ECT 7", "7\nand data"] {
        program.write_all(piece.as_bytes()).unwrap();
        guest.settle();
    }
    let (request, _) = receive(&mut guest);
    let line = Line::new(77, request.src_port);
    send(&mut guest, &line, RESPONSE, 0);
    assert_eq!(expect(&mut guest, &line, RW).1, b"and data");
    assert_eq!(read_line(&mut program), format!("OK {}\n", line.host));
}

#[test]
fn a_program_that_stands_still_costs_what_the_guest_was_told_and_holds_up_nobody() {
    let host = Host::new();
    let mut guest = host.start();
    let (line, mut slow) = host.connect(&mut guest, 1);
    let (mut sent, mut forwarded) = (Vec::new(), 0);
    fill(&mut guest, &line, &mut sent, &mut forwarded);
    assert_eq!(sent.len(), forwarded as usize + ROOM_HERE, "the kernel's buffer, and ours");
    assert!(host.is_at_rest(), "nobody is woken until the program reads");
    // Another one has its way meanwhile.
    let (other, mut quick) = host.connect(&mut guest, 2);
    send_data(&mut guest, &other, b"now", 0);
    assert_eq!(read(&mut quick, 3), b"now");
    assert_eq!(read(&mut slow, sent.len()), sent, "all of it, in order");
    let (header, _) = expect(&mut guest, &line, CREDIT_UPDATE);
    let (_, room, told) = fields(header);
    assert!(room as usize == ROOM_HERE && sent.len() - told as usize <= ROOM_HERE / 2);

    // One byte more than it was told: the connection ends, and only that one.
    forwarded = told;
    fill(&mut guest, &line, &mut sent, &mut forwarded);
    send_data(&mut guest, &line, b"x", 0);
    expect(&mut guest, &line, RST);
    send_data(&mut guest, &other, b"still here", 0);
    assert_eq!(read(&mut quick, 10), b"still here");
}

#[test]
fn a_guest_that_takes_nothing_stalls_the_program_and_asks_for_no_memory() {
    let host = Host::new();
    let mut guest = host.start();
    let mut line = Line { buf_alloc: 10_000, ..Line::new(1, PORT) };
    send(&mut guest, &line, REQUEST, 0);
    expect(&mut guest, &line, RESPONSE);
    let mut program = host.listener.accept().unwrap().0;
    program.set_nonblocking(true).unwrap();
    let all = noise(1 << 20);
    let mut written = 0;
    while let Ok(n) = program.write(&all[written..]) {
        written += n;
    }
    assert!(written < all.len());
    let mut taken = Vec::new();
    let mut asked = 0;
    while taken.len() < written {
        let (header, data) = receive(&mut guest);
        let op = header.op;
        match op {
            RW => taken.extend(data),
            CREDIT_REQUEST => {
                asked += 1;
                assert!(
                    (taken.len() as u32).wrapping_sub(line.fwd_cnt) == line.buf_alloc,
                    "to the last byte"
                );
                offer(&mut guest);
                assert!(host.is_at_rest() && offered(&mut guest).is_none(), "it asks once, and waits");
                line.fwd_cnt = taken.len() as u32;
                send(&mut guest, &line, CREDIT_UPDATE, 0);
                taken.extend(wait_offered(&mut guest).1);
            }
            other => panic!("{other}"),
        }
    }
    assert!(asked >= written / 10_000 - 1 && taken == all[..written]);
    assert!(program.write(b"more").is_ok(), "there is room again");
}

#[test]
fn a_driver_without_receive_buffers_is_not_listened_to_for_ever_and_keeps_nobody_busy() {
    let host = Host::new();
    let mut guest = host.start();
    let (line, mut program) = host.connect(&mut guest, 1);
    program.write_all(b"for later").unwrap();
    let calls: Vec<_> = (0..20).map(|_| host.call(GUEST_PORT)).collect();
    // Packets to nobody: each would be answered.
    let stranger = Line::new(99, 98);
    guest.store(DATA, zerocopy::IntoBytes::as_bytes(&stranger.header(RW, 0, 0)));
    let mut taken = 0;
    for _ in 0..20 {
        while guest.rings[TRANSMIT].free() > 0 {
            guest.rings[TRANSMIT].add(&[(DATA, HEADER)], &[]);
        }
        guest.notify(TRANSMIT);
        assert!(host.is_at_rest());
        taken += std::iter::from_fn(|| guest.rings[TRANSMIT].used()).count();
    }
    assert!((200..300).contains(&taken), "{taken} were taken");
    // It gives buffers again, and gets all that waited: a reset for each packet, the data, the calls. (Those wait for two seconds.)
    let (mut resets, mut requests) = (0, 0);
    loop {
        let (header, data) = receive(&mut guest);
        match (header.op, header.src_port) {
            (RST, 98) => resets += 1,
            (REQUEST, _) => requests += 1,
            (RW, PORT) => break assert_eq!((data, header.dst_port), (b"for later".to_vec(), line.guest)),
            other => panic!("{other:?}"),
        }
    }
    assert!(resets >= taken && requests <= calls.len(), "{resets} resets, {requests} calls");
}

#[test]
fn each_direction_ends_by_itself() {
    let host = Host::new();
    let mut guest = host.start();
    // The program first.
    let (line, mut program) = host.called(&mut guest);
    program.write_all(b"last words").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    assert_eq!(expect(&mut guest, &line, RW).1, b"last words");
    assert_eq!(fields(expect(&mut guest, &line, SHUTDOWN).0).0, 2, "it sends no more");
    send_data(&mut guest, &line, b"the answer", 0);
    assert_eq!(read(&mut program, 10), b"the answer");
    send(&mut guest, &line, SHUTDOWN, 3);
    expect(&mut guest, &line, RST);
    assert_eq!(program.read(&mut [0]).unwrap(), 0);

    // The guest first.
    let (line, mut program) = host.connect(&mut guest, 1);
    send_data(&mut guest, &line, b"last words", 0);
    send(&mut guest, &line, SHUTDOWN, 2);
    let mut all = Vec::new();
    program.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last words");
    program.write_all(b"the answer").unwrap();
    assert_eq!(expect(&mut guest, &line, RW).1, b"the answer");
    drop(program);
    assert_eq!(fields(expect(&mut guest, &line, SHUTDOWN).0).0, 3);
    send(&mut guest, &line, RST, 0);

    // What takes no more, but sends.
    let (line, mut program) = host.connect(&mut guest, 2);
    send(&mut guest, &line, SHUTDOWN, 1);
    let wrote = (0..1000).find_map(|_| program.write(&[0; 4096]).err()).expect("an error at last");
    assert_eq!(wrote.kind(), ErrorKind::BrokenPipe);
    send_data(&mut guest, &line, b"still", 0);
    assert_eq!(read(&mut program, 5), b"still");

    // The guest learns that without sending anything.
    let (line, mut program) = host.connect(&mut guest, 3);
    program.shutdown(Shutdown::Read).unwrap();
    assert_eq!(fields(expect_beside(&mut guest, &line, SHUTDOWN).0).0, 1, "it takes no more");
    program.write_all(b"but sends").unwrap();
    assert_eq!(expect(&mut guest, &line, RW).1, b"but sends");
}

/// The next packet on `line`, past those on others.
fn expect_beside(guest: &mut Guest, line: &Line, op: u16) -> (Header, Vec<u8>) {
    loop {
        let (header, data) = receive(guest);
        let (port, seen) = (header.dst_port, header.op);
        if port == line.guest {
            assert_eq!(seen, op);
            return (header, data);
        }
    }
}

#[test]
fn what_a_guest_has_sent_before_it_closed_reaches_a_program_that_takes_its_time() {
    let host = Host::new();
    let mut guest = host.start();
    let (line, mut program) = host.connect(&mut guest, 1);
    let mut sent = Vec::new();
    fill(&mut guest, &line, &mut sent, &mut 0);
    send(&mut guest, &line, SHUTDOWN, 3);
    // It may use its port again at once.
    expect(&mut guest, &line, RST);
    let (again, mut other) = host.connect(&mut guest, 1);
    send_data(&mut guest, &again, b"new", 0);
    assert_eq!(read(&mut other, 3), b"new");
    let mut all = Vec::new();
    program.read_to_end(&mut all).unwrap();
    assert!(all == sent);
    send_data(&mut guest, &again, b"and on", 0);
    assert_eq!(read(&mut other, 6), b"and on");
}

#[test]
fn a_guest_that_does_not_let_go_of_what_is_closed_is_made_to() {
    let host = Host::new();
    let mut guest = host.start();
    let (line, program) = host.connect(&mut guest, 1);
    drop(program);
    assert_eq!(fields(expect(&mut guest, &line, SHUTDOWN).0).0, 3);
    // What was on its way is of no use to anybody.
    send_data(&mut guest, &line, b"late", 0);
    // Eight seconds, as in Linux.
    offer(&mut guest);
    let (header, _) = wait_offered(&mut guest);
    let op = header.op;
    assert_eq!(op, RST);
    send_data(&mut guest, &line, b"later", 0);
    expect(&mut guest, &line, RST);
}

#[test]
fn a_program_that_goes_without_reading_resets() {
    let host = Host::new();
    let mut guest = host.start();
    let (line, program) = host.connect(&mut guest, 1);
    send_data(&mut guest, &line, b"unread", 0);
    drop(program);
    expect(&mut guest, &line, RST);
}

/// A socket of messages.
fn messages() -> OwnedFd {
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

fn message(socket: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    let (n, _) = recv(socket, &mut *bytes, RecvFlags::empty()).unwrap();
    bytes.truncate(n);
    bytes
}

/// Somebody listens on the host's port `port` for messages.
fn listener(host: &Host, port: u32) -> OwnedFd {
    let listener = messages();
    bind(&listener, &SocketAddrUnix::new(host.path(&format!("v_{port}"))).unwrap()).unwrap();
    listen(&listener, 16).unwrap();
    listener
}

#[test]
fn messages_keep_their_bounds_both_ways() {
    let host = Host::new();
    let mut guest = host.start();
    let listener = listener(&host, 50);
    let mut line = Line { kind: SEQPACKET, ..Line::new(1, 50) };
    send(&mut guest, &line, REQUEST, 0);
    expect(&mut guest, &line, RESPONSE);
    let program = accept(&listener).unwrap();
    // In one packet, in several, and with nothing in it.
    let all = noise(200_000);
    send_data(&mut guest, &line, b"one", 1);
    send_data(&mut guest, &line, &all[..60_000], 0);
    send_data(&mut guest, &line, &all[60_000..120_000], 0);
    send_data(&mut guest, &line, &all[120_000..200_000], 1);
    send_data(&mut guest, &line, b"", 1);
    send_data(&mut guest, &line, b"last", 1 | 2);
    assert_eq!(message(&program), b"one");
    assert!(message(&program) == all);
    assert_eq!((message(&program), message(&program)), (vec![], b"last".to_vec()));
    let (header, _) = expect(&mut guest, &line, CREDIT_UPDATE);
    assert!(fields(header).2 >= 200_003, "told when the large one had gone on");

    for bytes in [&b"two"[..], &[], &all[..9000], b"three"] {
        assert_eq!(send_message(&program, bytes, SendFlags::empty()).unwrap(), bytes.len());
        let mut got = Vec::new();
        loop {
            let (header, data) = expect(&mut guest, &line, RW);
            got.extend(data);
            if fields(header).0 == 1 {
                break;
            }
            assert_eq!(fields(header).0, 0);
        }
        assert!(got == bytes);
        line.fwd_cnt += bytes.len() as u32;
    }
    // One for which there is no room yet waits, whole.
    line.buf_alloc = 10_000;
    send(&mut guest, &line, CREDIT_UPDATE, 0);
    send_message(&program, &all[..9000], SendFlags::empty()).unwrap();
    send_message(&program, &all[..1001], SendFlags::empty()).unwrap();
    (0..3).for_each(|_| drop(expect(&mut guest, &line, RW)));
    expect(&mut guest, &line, CREDIT_REQUEST);
    line.fwd_cnt += 9000;
    send(&mut guest, &line, CREDIT_UPDATE, 0);
    assert_eq!(expect(&mut guest, &line, RW).1, &all[..1001]);
    // One for which there will never be ends the connection.
    send_message(&program, &all[..10_001], SendFlags::empty()).unwrap();
    expect(&mut guest, &line, RST);
    let end = recv(&program, &mut [0; 8], RecvFlags::empty());
    assert!(matches!(end, Ok((0, _)) | Err(rustix::io::Errno::CONNRESET)), "{end:?}");
}

#[test]
fn the_host_calls_for_messages_on_a_socket_of_their_own() {
    let host = Host::new();
    let mut guest = host.start();
    let program = messages();
    connect(&program, &SocketAddrUnix::new(host.path("v.seqpacket")).unwrap()).unwrap();
    send_message(&program, b"CONNECT 77\n", SendFlags::empty()).unwrap();
    let (request, _) = receive(&mut guest);
    let line = Line { kind: SEQPACKET, ..Line::new(77, request.src_port) };
    let kind = request.kind;
    assert_eq!(kind, SEQPACKET);
    send(&mut guest, &line, RESPONSE, 0);
    assert_eq!(message(&program), format!("OK {}\n", line.host).into_bytes());
    send_data(&mut guest, &line, b"hello", 1);
    assert_eq!(message(&program), b"hello");
    // An empty message is not the end, which comes behind it.
    send_message(&program, b"", SendFlags::empty()).unwrap();
    drop(program);
    let (header, data) = expect(&mut guest, &line, RW);
    assert_eq!((fields(header).0, data.len()), (1, 0));
    assert_eq!(fields(expect(&mut guest, &line, SHUTDOWN).0).0, 3);
    send(&mut guest, &line, RST, 0);

    // Kinds do not mix, and what was not agreed on is refused.
    let _listener = listener(&host, 50);
    for line in [Line::new(1, 50), Line { kind: SEQPACKET, ..Line::new(1, PORT) }] {
        send(&mut guest, &line, REQUEST, 0);
        expect(&mut guest, &line, RST);
    }
    guest.start(1 << 1);
    let line = Line { kind: SEQPACKET, ..Line::new(1, 50) };
    send(&mut guest, &line, REQUEST, 0);
    expect(&mut guest, &line, RST);
    guest.start(1 << 0);
    let line = Line::new(1, PORT);
    send(&mut guest, &line, REQUEST, 0);
    expect(&mut guest, &line, RST);
    guest.start(1 << 0 | 1 << 2);
    exchange(&host, &mut guest, 1);
}

#[test]
fn empty_messages_that_nobody_takes_are_bounded() {
    let host = Host::new();
    let mut guest = host.start();
    let listener = listener(&host, 50);
    let line = Line { kind: SEQPACKET, ..Line::new(1, 50) };
    send(&mut guest, &line, REQUEST, 0);
    expect(&mut guest, &line, RESPONSE);
    let _program = accept(&listener).unwrap();
    offer(&mut guest);
    let sent = (0..10_000).find(|_| {
        send(&mut guest, &line, RW, 1);
        offered(&mut guest).is_some_and(|(header, _)| header.op == RST)
    });
    assert!(sent > Some(1000), "{sent:?}");
}

#[test]
fn one_that_sends_without_end_leaves_the_others_their_turn() {
    let host = Host::new();
    let mut guest = host.start();
    let (loud, mut program) = host.connect(&mut guest, 1);
    program.set_nonblocking(true).unwrap();
    let mut push = move || while program.write(&[7; 4096]).is_ok() {};
    push();
    let (quiet, mut other) = host.connect_past(&mut guest, 2, loud);
    other.write_all(b"me too").unwrap();
    let mut loud = loud;
    let before = (0..).find(|_| {
        push();
        let (header, data) = receive(&mut guest);
        let port = header.dst_port;
        if port == loud.guest {
            loud.fwd_cnt = loud.fwd_cnt.wrapping_add(data.len() as u32);
            send(&mut guest, &loud, CREDIT_UPDATE, 0);
        }
        port == quiet.guest
    });
    assert!(before < Some(40), "{before:?} packets of the other's");
}

#[test]
fn a_restored_guest_hears_that_its_connections_are_gone_and_makes_new_ones() {
    let host = Host::new();
    let mut guest = host.start();
    let (line, mut program) = host.connect(&mut guest, 1);
    guest.rings[EVENT].add(&[], &[(DATA + 0x1_0000, 4)]);
    guest.notify(EVENT);
    guest.settle();
    assert_eq!(guest.rings[EVENT].used(), None, "a pause moves nothing");
    guest.pause();
    let saved = guest.device.save_bytes();
    let mut guest = Guest::on(guest.unplug(), host.device());
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
    guest.device.restore_bytes(&saved).unwrap();
    guest.store(DATA + 0x1_0000, &[0xff; 4]);
    guest.resume();
    assert_eq!(guest.rings[EVENT].wait_used(10).1, 4);
    assert_eq!(guest.load(DATA + 0x1_0000, 4), [0; 4], "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET");
    send_data(&mut guest, &line, b"to nobody", 0);
    expect(&mut guest, &line, RST);
    // Nobody calls before it has heard of that, which its next buffer for events tells: what it has then it resets.
    offer(&mut guest);
    let _program = host.call(GUEST_PORT);
    // Time in which a call comes through that nothing holds back.
    thread::sleep(Duration::from_millis(100));
    assert_eq!(offered(&mut guest), None);
    guest.rings[EVENT].add(&[], &[(DATA + 0x1_0000, 4)]);
    guest.notify(EVENT);
    let (header, _) = wait_offered(&mut guest);
    let (op, to) = (header.op, header.dst_port);
    assert_eq!((op, to), (REQUEST, GUEST_PORT));
    exchange(&host, &mut guest, 1);
    // It is told once, and not at another pause.
    assert_eq!(guest.rings[EVENT].used(), None);
}

#[test]
fn sockets_outlive_a_reboot_and_connections_do_not() {
    let host = Host::new();
    let mut guest = host.start();
    let (_, mut program) = host.connect(&mut guest, 1);
    guest.reset();
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
    // Who calls meanwhile waits for the next driver.
    let _caller = host.call(GUEST_PORT);
    drop(guest);
    let mut guest = host.start();
    let (request, _) = receive(&mut guest);
    let op = request.op;
    assert_eq!(op, REQUEST);
    exchange_after(&host, &mut guest);
}

fn exchange_after(host: &Host, guest: &mut Guest) {
    let (line, mut program) = host.connect(guest, 1);
    send_data(guest, &line, b"again", 0);
    assert_eq!(read(&mut program, 5), b"again");
}

#[test]
fn sockets_are_their_owners_alone_and_go_with_the_device() {
    let host = Host::new();
    let files = ["v", "v.seqpacket"].map(|name| host.path(name));
    for file in &files {
        assert_eq!(std::fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
    }
    assert!(Sockets::open(&files[0]).is_err(), "in use");
    let Host { sockets, .. } = &host;
    let again = sockets.clone();
    drop(again);
    assert!(files[0].exists());
    let path = host.path("w");
    // What a dead one left is replaced; what is no socket stays, and nothing else is left.
    drop(UnixListener::bind(&path).unwrap());
    drop(Sockets::open(&path).unwrap());
    assert!(!path.exists());
    std::fs::write(host.path("w.seqpacket"), "a file").unwrap();
    assert!(Sockets::open(&path).is_err());
    assert!(!path.exists() && host.path("w.seqpacket").exists());
    assert!(Sockets::open(Path::new(&format!("/tmp/{}", "x".repeat(92)))).is_err(), "too long");
}

/// A folder `mode` that holds the host's sockets, and port 1's listener.
fn folder(mode: u32) -> (tempfile::TempDir, UnixListener, Guest) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode)).unwrap();
    let sockets = Sockets::open(&dir.path().join("v")).unwrap();
    let listener = UnixListener::bind(dir.path().join("v_1")).unwrap();
    let mut guest = Guest::new(Box::new(Vsock::new(sockets, CID as u32)));
    guest.start(0);
    (dir, listener, guest)
}

/// What the guest is answered when it calls `port`.
fn answer(guest: &mut Guest, port: u32) -> u16 {
    let line = Line::new(7, port);
    send(guest, &line, REQUEST, 0);
    let (header, _) = receive(guest);
    if header.op == RESPONSE {
        send(guest, &line, RST, 0);
    }
    header.op
}

#[test]
fn where_others_may_put_sockets_a_guest_reaches_this_users_alone() {
    // Something that listens, and that nobody has offered to guests.
    let elsewhere = tempfile::tempdir().unwrap();
    let private = elsewhere.path().join("private");
    let _private = UnixListener::bind(&private).unwrap();
    for (mode, is_shared) in [(0o700, false), (0o755, false), (0o1777, true), (0o770, true)] {
        let (dir, _listener, mut guest) = folder(mode);
        assert_eq!(answer(&mut guest, 1), RESPONSE, "{mode:o}");
        assert_eq!(answer(&mut guest, 2), RST, "nobody is there");
        // Who can put a link there could have any socket of this user's answer.
        std::os::unix::fs::symlink(&private, dir.path().join("v_2")).unwrap();
        let linked = if is_shared { RST } else { RESPONSE };
        assert_eq!(answer(&mut guest, 2), linked, "{mode:o}");
        std::fs::write(dir.path().join("v_3"), "a file").unwrap();
        assert_eq!(answer(&mut guest, 3), RST);
        let _other = UnixListener::bind(dir.path().join("v_4")).unwrap();
        // Only root can give one away.
        match std::os::unix::fs::chown(dir.path().join("v_4"), Some(65534), None) {
            Ok(()) => assert_eq!(answer(&mut guest, 4), linked, "{mode:o}"),
            Err(error) => eprintln!(
                "SKIP: where_others_may_put_sockets_a_guest_reaches_this_users_alone: another user's: {error}"
            ),
        }
        assert_eq!(answer(&mut guest, 1), RESPONSE, "{mode:o}");
    }
}

//! What a guest sent last, and then was gone: its readers on the host get it all the same.

use std::io::Read;
use std::thread;
use std::time::{Duration, Instant};

use zerocopy::IntoBytes;

use crate::guest::{DATA, Guest, with_each_transport};
use crate::vsock::{ROOM_HERE, fill};
use crate::vsock_driver::*;

/// Puts a packet into the ring, and kicks nobody. It is the `number`th.
fn leave(guest: &mut Guest, number: u64, header: Header, data: &[u8]) {
    let at = DATA + 0x2_0000 + number * 0x1000;
    guest.store(at, &[header.as_bytes(), data].concat());
    guest.rings[TRANSMIT].add(&[(at, HEADER + data.len() as u32)], &[]);
}

fn leave_data(guest: &mut Guest, number: u64, line: &Line, data: &[u8]) {
    leave(guest, number, line.header(RW, 0, data.len() as u32), data);
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

#[test]
fn packets_that_nobody_looked_at_before_the_guest_was_gone_arrive() {
    with_each_transport(|_| {
        let host = Host::new();
        let mut guest = host.start();
        let (line, mut program) = host.connect(&mut guest, 1);
        let (other, mut second) = host.connect(&mut guest, 2);
        leave_data(&mut guest, 0, &line, b"the last ");
        leave_data(&mut guest, 1, &other, b"and others'");
        leave_data(&mut guest, 2, &line, b"words");
        leave(&mut guest, 3, line.header(SHUTDOWN, 3, 0), &[]);
        guest.device.finish(soon()).unwrap();
        drop(guest);
        let mut said = String::new();
        program.read_to_string(&mut said).unwrap();
        assert_eq!(said, "the last words");
        said.clear();
        second.read_to_string(&mut said).unwrap();
        assert_eq!(said, "and others'");
    });
}

#[test]
fn packets_behind_answers_that_the_guest_never_took_arrive_too() {
    with_each_transport(|_| {
        let host = Host::new();
        let mut guest = host.start();
        let (line, mut program) = host.connect(&mut guest, 1);
        let stranger = Line::new(99, 98);
        guest.store(DATA, stranger.header(RW, 0, 0).as_bytes());
        // Each would be answered, and the guest gives no buffers: from some moment on it is not listened to.
        while guest.rings[TRANSMIT].free() > 2 {
            while guest.rings[TRANSMIT].free() > 2 {
                guest.rings[TRANSMIT].add(&[(DATA, HEADER)], &[]);
            }
            guest.notify(TRANSMIT);
            assert!(host.is_at_rest());
            while guest.rings[TRANSMIT].used().is_some() {}
        }
        leave_data(&mut guest, 0, &line, b"after all");
        guest.device.finish(soon()).unwrap();
        drop(guest);
        let mut said = String::new();
        program.read_to_string(&mut said).unwrap();
        assert_eq!(said, "after all");
    });
}

#[test]
fn a_reader_that_takes_its_time_gets_what_waits_and_one_that_stands_still_is_given_up() {
    let host = Host::new();
    let mut guest = host.start();
    let (line, mut slow) = host.connect(&mut guest, 1);
    let (mut sent, mut forwarded) = (Vec::new(), 0);
    fill(&mut guest, &line, &mut sent, &mut forwarded);
    assert_eq!(sent.len(), forwarded as usize + ROOM_HERE, "the kernel's buffer, and ours");
    let start = Instant::now();
    let busy = guest.device.finish(start + Duration::from_millis(20)).unwrap_err();
    assert!(busy.to_string().contains("1 connections whose readers"), "{busy}");
    assert!(start.elapsed() < Duration::from_secs(10), "it does not wait beyond its deadline");
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        let mut piece = [0; 5000];
        while let Ok(n @ 1..) = slow.read(&mut piece) {
            all.extend_from_slice(&piece[..n]);
        }
        all
    });
    guest.device.finish(soon()).unwrap();
    drop(guest);
    assert!(reader.join().unwrap() == sent, "all of it, in order");
}

#[test]
fn a_reset_loses_nothing_that_was_sent_before() {
    let host = Host::new();
    let mut guest = host.start();
    let (line, mut slow) = host.connect(&mut guest, 1);
    let (mut sent, mut forwarded) = (Vec::new(), 0);
    fill(&mut guest, &line, &mut sent, &mut forwarded);
    let (other, mut quick) = host.connect(&mut guest, 2);
    leave_data(&mut guest, 0, &other, b"last words");
    // As Linux does before it powers off: its driver may have kicked, and waits for nothing.
    guest.reset();
    let mut said = String::new();
    quick.read_to_string(&mut said).unwrap();
    assert_eq!(said, "last words");
    // The next driver may use the same ports, and is told of nothing that was before.
    guest.start(0);
    let (again, mut program) = host.connect(&mut guest, 1);
    send_data(&mut guest, &again, b"another", 0);
    assert_eq!(read(&mut program, 7), b"another");
    let mut all = Vec::new();
    slow.read_to_end(&mut all).unwrap();
    assert!(all == sent, "{} of {} bytes, and the end", all.len(), sent.len());
    offer(&mut guest);
    guest.settle();
    assert!(offered(&mut guest).is_none());
}

#[test]
fn drivers_that_leave_something_behind_again_and_again_are_held_to_one_sum() {
    let host = Host::new();
    let mut guest = host.start();
    let mut readers = Vec::new();
    let mut rooms = Vec::new();
    for round in 0..70 {
        let line = Line::new(round, PORT);
        send(&mut guest, &line, REQUEST, 0);
        let (header, _) = expect(&mut guest, &line, RESPONSE);
        rooms.push(header.buf_alloc as usize);
        readers.push(host.listener.accept().unwrap().0);
        // Until the reader's socket is full, and something waits here.
        let room = header.buf_alloc as usize;
        let piece = noise(room.min(0x1_0000));
        let (mut sent, mut told) = (0, 0);
        while sent - told < room {
            let len = piece.len().min(room - (sent - told));
            send_data(&mut guest, &line, &piece[..len], 0);
            sent += len;
            send(&mut guest, &line, CREDIT_REQUEST, 0);
            told = { expect(&mut guest, &line, CREDIT_UPDATE).0.fwd_cnt } as usize;
        }
        guest.start(0);
    }
    assert_eq!((rooms[0], rooms[63]), (ROOM_HERE, ROOM_HERE));
    assert!(rooms[64] < ROOM_HERE, "what waits of earlier drivers' counts");
    drop(readers);
    // Nobody waits for it any more.
    guest.wait_for("there is all room again", |guest| {
        let line = Line::new(1000, PORT);
        send(guest, &line, REQUEST, 0);
        let (header, _) = expect(guest, &line, RESPONSE);
        send(guest, &line, RST, 0);
        header.buf_alloc as usize == ROOM_HERE
    });
}

#[test]
fn a_device_that_no_driver_has_started_has_nothing_to_pass_on() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    guest.device.finish(soon()).unwrap();
    guest.start(0);
    guest.reset();
    guest.device.finish(soon()).unwrap();
}

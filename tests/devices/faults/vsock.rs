//! What hostile and sloppy drivers do to a socket device (5.10).

use zerocopy::IntoBytes;

use super::Fault;
use crate::guest::{DATA, Guest, NEEDS_RESET, STATUS};
use crate::vsock_driver::*;

/// Nobody listens there.
const NOBODY: u32 = 4321;

/// Has the device take any bytes as a packet.
fn send_bytes(guest: &mut Guest, parts: &[&[u8]]) {
    let mut places = Vec::new();
    let mut at = DATA;
    for part in parts {
        guest.store(at, part);
        places.push((at, part.len() as u32));
        at += part.len() as u64;
    }
    assert_eq!(guest.request(TRANSMIT, &places, &[]), 0);
}

/// A connection that a device of this table's subject has, to somebody who is not looked at.
fn connect(guest: &mut Guest, port: u32) -> Line {
    let line = Line::new(port, PORT);
    send(guest, &line, REQUEST, 0);
    expect(guest, &line, RESPONSE);
    line
}

/// The connection `line` is there: its room is told.
fn is_there(guest: &mut Guest, line: &Line) {
    send(guest, line, CREDIT_REQUEST, 0);
    expect(guest, line, CREDIT_UPDATE);
}

/// It is not.
fn is_gone(guest: &mut Guest, line: &Line) {
    send(guest, line, CREDIT_REQUEST, 0);
    expect(guest, line, RST);
}

fn header(op: u16) -> Header {
    Line::new(7, NOBODY).header(op, 0, 0)
}

pub const TABLE: &[Fault] = &[
    Fault("header: short, long, in pieces of one byte, all zeroes", |guest, _| {
        guest.start(0);
        let packet = header(CREDIT_REQUEST);
        let bytes = packet.as_bytes();
        for len in [1, 8, 43] {
            send_bytes(guest, &[&bytes[..len]]);
        }
        send_bytes(guest, &[&[0; 44]]);
        offer(guest);
        guest.settle();
        assert!(offered(guest).is_none(), "nobody is answered");
        // What is behind a header belongs to nobody.
        send_bytes(guest, &[bytes, &[0xee; 500]]);
        assert_eq!({ wait_offered(guest).0.op }, RST);
        let pieces: Vec<_> = bytes.chunks(1).collect();
        send_bytes(guest, &pieces);
        assert_eq!({ receive(guest).0.op }, RST);
        // A packet without a readable part, and one that is to be written to.
        assert_eq!(guest.request(TRANSMIT, &[], &[(DATA, 64)]), 0);
        assert_eq!(guest.request(TRANSMIT, &[(DATA, 44)], &[(DATA + 0x100, 64)]), 0);
        assert_eq!({ receive(guest).0.op }, RST);
    }),
    Fault("header: a length beyond the payload, and the largest", |guest, _| {
        guest.start(0);
        for len in [6, 0x1_0000, u32::MAX] {
            let line = connect(guest, 10);
            send_raw(guest, line.header(RW, 0, len), b"bytes");
            expect(guest, &line, RST);
            is_gone(guest, &line);
        }
        // Less than there is: what is behind it is not sent.
        let line = connect(guest, 10);
        send_raw(guest, line.header(RW, 0, 2), b"bytes");
        is_there(guest, &line);
    }),
    Fault("header: types and operations that are not defined, messages without their feature", |guest, _| {
        guest.start(1 << 1);
        for kind in [0, 2, 3, 4, u16::MAX] {
            let line = Line { kind, ..Line::new(7, PORT) };
            send(guest, &line, REQUEST, 0);
            expect(guest, &line, RST);
        }
        for op in [0, 8, 9, u16::MAX] {
            let line = Line::new(7, NOBODY);
            send(guest, &line, op, 0);
            expect(guest, &line, RST);
            // Nor can a connection make anything of them.
            let line = connect(guest, 11);
            send(guest, &line, op, u32::MAX);
            expect(guest, &line, RST);
            is_gone(guest, &line);
        }
        // A connection has one type.
        let line = connect(guest, 12);
        send(guest, &Line { kind: 9, ..line }, RW, 0);
        expect(guest, &line, RST);
        is_gone(guest, &line);
    }),
    Fault("addresses: of others, of the host, reserved, with their upper halves", |guest, _| {
        guest.start(0);
        for src in [0, 1, 2, 4, u64::from(u32::MAX), CID | 1 << 32, u64::MAX] {
            send_raw(guest, Header { src_cid: src, ..header(REQUEST) }, &[]);
        }
        send_raw(guest, Header { dst_cid: 2 | 1 << 32, ..header(REQUEST) }, &[]);
        offer(guest);
        guest.settle();
        assert!(offered(guest).is_none(), "nobody is answered in another's name");
        // Nobody is there, nor is the guest by this way.
        for (dst, has_buffer) in
            [(0, true), (1, false), (CID, false), (4, false), (u64::from(u32::MAX), false)]
        {
            send_raw(guest, Header { dst_cid: dst, dst_port: PORT, ..header(REQUEST) }, &[]);
            let (header, _) = if has_buffer { wait_offered(guest) } else { receive(guest) };
            assert_eq!(({ header.op }, { header.src_cid }, { header.dst_cid }), (RST, dst, CID));
        }
    }),
    Fault("addresses: ports 0 and the largest, nobody who listens", |guest, _| {
        guest.start(0);
        for (from, to) in
            [(7, NOBODY), (7, 0), (7, u32::MAX), (u32::MAX, PORT), (0, NOBODY), (u32::MAX, u32::MAX)]
        {
            let line = Line::new(from, to);
            send(guest, &line, REQUEST, 0);
            expect(guest, &line, RST);
        }
        let line = connect(guest, 0);
        is_there(guest, &line);
    }),
    Fault("addresses: ten thousand calls, and all ports of the host", |guest, _| {
        guest.start(0);
        for port in 0..10_000u32 {
            let line = Line::new(port, NOBODY + port * 0x1_0000);
            send(guest, &line, REQUEST, 0);
            expect(guest, &line, RST);
        }
    }),
    Fault("state: packets for a connection that is not there", |guest, _| {
        guest.start(0);
        let line = Line::new(7, PORT);
        for op in [RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST] {
            send(guest, &line, op, 3);
            expect(guest, &line, RST);
        }
        send_data(guest, &line, &[1; 5000], 1);
        expect(guest, &line, RST);
        send(guest, &line, RST, 0);
        offer(guest);
        guest.settle();
        assert!(offered(guest).is_none(), "a reset is not answered by one");
    }),
    Fault("state: called twice, with data, answered without a call", |guest, _| {
        guest.start(0);
        let line = Line::new(7, PORT);
        send_raw(guest, line.header(REQUEST, 0, 5), b"early");
        expect(guest, &line, RESPONSE);
        is_there(guest, &line);
        send(guest, &line, REQUEST, 0);
        expect(guest, &line, RST);
        is_gone(guest, &line);
        let line = connect(guest, 8);
        send(guest, &line, RESPONSE, 0);
        expect(guest, &line, RST);
        is_gone(guest, &line);
    }),
    Fault("state: shut down with no flags, undefined ones, one way and then data", |guest, _| {
        guest.start(0);
        let line = connect(guest, 7);
        for flags in [0, 4, 0xffff_fffc] {
            send(guest, &line, SHUTDOWN, flags);
            is_there(guest, &line);
        }
        send(guest, &line, SHUTDOWN, 1);
        send_data(guest, &line, b"what only reads no more", 0);
        is_there(guest, &line);
        send(guest, &line, SHUTDOWN, 2);
        // Both, one after the other.
        expect_past(guest, &line, RST);
        let line = connect(guest, 8);
        send(guest, &line, SHUTDOWN, 2);
        is_there(guest, &line);
        send_data(guest, &line, b"after the end", 0);
        expect(guest, &line, RST);
        is_gone(guest, &line);
    }),
    Fault("state: reset and then data, opened again at once", |guest, _| {
        guest.start(0);
        for _ in 0..100 {
            let line = connect(guest, 7);
            send(guest, &line, RST, 0);
        }
        let line = connect(guest, 7);
        send(guest, &line, RST, 0);
        send_data(guest, &line, b"late", 0);
        expect(guest, &line, RST);
        for _ in 0..100 {
            let line = connect(guest, 7);
            send(guest, &line, SHUTDOWN, 3);
            expect(guest, &line, RST);
        }
    }),
    Fault("credit: no room, all room, counts that go ahead and back", |guest, _| {
        guest.start(0);
        let line = connect(guest, 7);
        for (buf_alloc, fwd_cnt) in
            [(0, 0), (u32::MAX, 0), (0, u32::MAX), (u32::MAX, u32::MAX), (1, 1 << 31), (0x4_0000, 0)]
        {
            send(guest, &Line { buf_alloc, fwd_cnt, ..line }, CREDIT_UPDATE, 0);
            is_there(guest, &line);
        }
    }),
    Fault("credit: data beyond it, in one packet", |guest, _| {
        guest.start(0);
        let line = connect(guest, 7);
        // More than is advertised, at one go: 64 times the same page.
        let part = (DATA + 0x1_0000, 0x1400);
        guest.store(DATA, line.header(RW, 0, 0x1400 * 52).as_bytes());
        let parts: Vec<_> = [(DATA, HEADER)].into_iter().chain([part; 52]).collect();
        assert_eq!(guest.request(TRANSMIT, &parts, &[]), 0);
        // 266,240 bytes are more than 256 KiB.
        expect(guest, &line, RST);
        is_gone(guest, &line);
    }),
    Fault("credit: updates while the connection closes", |guest, _| {
        guest.start(0);
        let line = connect(guest, 7);
        send(guest, &line, SHUTDOWN, 2);
        for _ in 0..50 {
            send(guest, &line, CREDIT_UPDATE, 0);
            is_there(guest, &line);
        }
        send(guest, &line, SHUTDOWN, 1);
        expect_past(guest, &line, RST);
        is_gone(guest, &line);
    }),
    Fault("receive buffers: short, empty, readable, of the ring itself", |guest, _| {
        guest.start(0);
        for len in [1, 43, 44] {
            let old = guest.rings[RECEIVE].available();
            let head = guest.rings[RECEIVE].add(&[], &[(DATA + 0x2_0000, len)]);
            guest.kick(RECEIVE, old);
            send(guest, &Line::new(7, NOBODY), REQUEST, 0);
            assert_eq!(guest.rings[RECEIVE].wait_used(10), (head, 0), "of no use, and given back");
            expect(guest, &Line::new(7, NOBODY), RST);
        }
        let old = guest.rings[RECEIVE].available();
        let head = guest.rings[RECEIVE].add(&[(DATA + 0x2_0000, 100)], &[]);
        guest.kick(RECEIVE, old);
        send(guest, &Line::new(7, NOBODY), REQUEST, 0);
        assert_eq!(guest.rings[RECEIVE].wait_used(10), (head, 0));
        // In pieces of a byte each, the header across them.
        let pieces: Vec<_> = (0..50).map(|i| (DATA + 0x2_0000 + 2 * i, 1)).collect();
        assert_eq!(guest.request(RECEIVE, &[], &pieces), HEADER);
        guest.rings[RECEIVE].add(&[], &[(crate::guest::BASE, 100)]);
        guest.notify(RECEIVE);
        send(guest, &Line::new(7, NOBODY), REQUEST, 0);
        guest.wait_for("NEEDS_RESET", |guest| guest.read(STATUS) & NEEDS_RESET != 0);
    }),
    Fault("receive queue: starved", |guest, _| {
        guest.start(0);
        let packet = header(REQUEST);
        guest.store(DATA, packet.as_bytes());
        while guest.rings[TRANSMIT].free() > 0 {
            guest.rings[TRANSMIT].add(&[(DATA, HEADER)], &[]);
        }
        guest.notify(TRANSMIT);
        guest.settle();
        guest.settle();
    }),
    Fault("events: buffers that are short, and a flood of them", |guest, _| {
        guest.start(0);
        for len in [1, 3, 4, 100] {
            guest.rings[EVENT].add(&[], &[(DATA, len)]);
            guest.notify(EVENT);
        }
        while guest.rings[EVENT].free() > 0 {
            guest.rings[EVENT].add(&[], &[(DATA, 4)]);
        }
        for _ in 0..1000 {
            guest.notify(EVENT);
        }
        guest.settle();
        assert_eq!(guest.rings[EVENT].used(), None, "nothing has happened");
    }),
    Fault("configuration: written all over, nothing changes", |guest, _| {
        guest.start(0);
        for offset in 0..16 {
            guest.write_bytes(0x100 + offset, &[0xff]);
        }
        assert_eq!(guest.config::<8>(0), CID.to_le_bytes());
    }),
];

/// The next packet of this operation on `line`, whatever others come before.
fn expect_past(guest: &mut Guest, line: &Line, op: u16) {
    while {
        let (header, _) = receive(guest);
        assert_eq!({ header.dst_port }, line.guest);
        header.op != op
    } {}
}

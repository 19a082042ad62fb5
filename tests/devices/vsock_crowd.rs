//! The socket device with very many connections: all of them go on, and there is an end to what they may cost.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use vmm_monitor::vsock::MAX_CONNECTIONS;

use crate::guest::Guest;
use crate::vsock_driver::*;

#[test]
fn thousands_of_connections_go_on_side_by_side() {
    let host = Host::new();
    // Each takes two of this process's descriptors, and other tests have some.
    let count = (host.sockets.host().limit() as u32 / 4).min(2000);
    let mut guest = host.start();
    let lines: Vec<_> = (0..count).map(|port| host.connect(&mut guest, port)).collect();
    for (line, _) in &lines {
        send_data(&mut guest, line, &line.guest.to_le_bytes(), 0);
    }
    for (line, program) in &lines {
        let mut program = program;
        let mut port = [0; 4];
        program.read_exact(&mut port).unwrap();
        assert_eq!(u32::from_le_bytes(port), line.guest);
        program.write_all(&port).unwrap();
    }
    let mut ports: Vec<_> =
        (0..count).map(|_| u32::from_le_bytes(receive(&mut guest).1.try_into().unwrap())).collect();
    ports.sort_unstable();
    assert!(ports.into_iter().eq(0..count));
    drop(lines);
    for _ in 0..count {
        let (header, _) = receive(&mut guest);
        let (op, port) = (header.op, header.dst_port);
        assert_eq!(op, SHUTDOWN);
        send(&mut guest, &Line::new(port, PORT), RST, 0);
    }
    exchange(&host, &mut guest, 0);
}

/// Somebody who listens on `port` and takes nobody in: those who wait there cost this process no descriptor.
fn waiting_room(host: &Host, port: u32) -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    bind(&socket, &SocketAddrUnix::new(host.path(&format!("v_{port}"))).unwrap()).unwrap();
    listen(&socket, i32::MAX).unwrap();
    socket
}

/// Calls, and returns the answer with the room that the device says it has for the connection.
fn call(guest: &mut Guest, line: &Line) -> (u16, u32) {
    send(guest, line, REQUEST, 0);
    let (header, _) = receive(guest);
    assert_eq!(({ header.dst_port }, { header.src_port }), (line.guest, line.host));
    (header.op, header.buf_alloc)
}

#[test]
fn one_connection_too_many_is_refused_and_all_together_may_cost_a_bounded_sum() {
    let host = Host::new();
    let limit = host.sockets.host().limit();
    if limit < MAX_CONNECTIONS {
        eprintln!("SKIP: one_connection_too_many: this host allows {limit} connections (ulimit -Hn)");
        return;
    }
    let mut guest = host.start();
    let each: usize = fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap().trim().parse().unwrap();
    let each = each.min(limit);
    // One with room for those that are too many.
    let rooms: Vec<_> =
        (100..=100 + limit.div_ceil(each) as u32).map(|port| (port, waiting_room(&host, port))).collect();
    let line = |number: usize| Line::new(number as u32, rooms[number / each].0);
    let mut room = 0;
    for number in 0..limit {
        let (op, alloc) = call(&mut guest, &line(number));
        assert_eq!(op, RESPONSE, "connection {number}");
        room += u64::from(alloc);
    }
    assert!(room < 110 << 20, "{room} bytes may wait here for readers that stand still");
    let spare = |number: u32| Line::new(number, rooms[rooms.len() - 1].0);
    for number in 20_000..21_000 {
        assert_eq!(call(&mut guest, &spare(number)).0, RST);
    }
    // The host's programs are not taken in, either.
    let mut program = host.call(GUEST_PORT);
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
    // Each that ends makes room for one.
    send(&mut guest, &line(0), RST, 0);
    assert_eq!(call(&mut guest, &spare(30_000)).0, RESPONSE);
    assert_eq!(call(&mut guest, &spare(30_001)).0, RST);
}

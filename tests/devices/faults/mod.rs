//! What hostile and sloppy drivers do, line by line: each line is tried on every device, is answered as the
//! specification says, and is mended by a reset.
//!
//! The tables follow the sections of virtio 1.3. What needs data of one device's own stands in the table of
//! that device.

mod block;
mod console;
mod entropy;
mod life;
mod net;
mod registers;
mod rings;
mod vsock;

use std::thread;

use crate::guest::{DATA, Guest, with_each_transport};
use crate::subjects::{Subject, all};

/// A line: what the driver does, with a device that was just reset.
struct Fault(&'static str, fn(&mut Guest, &Subject));

/// Where the parts of [`ordinary`] requests lie: 16 readable bytes, 512 writable, 1 writable.
const HEADER: (u64, u32) = (DATA, 16);
const BODY: (u64, u32) = (DATA + 0x1000, 512);
const STATUS_BYTE: (u64, u32) = (DATA + 0x100, 1);

/// Says which line it was, if the test fails in it.
struct Context(&'static str, &'static str);

impl Drop for Context {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}: in the line \"{}\"", self.0, self.1);
        }
    }
}

/// A request that every device answers: a block device reads its first sector, a console sends 16 zeroes.
fn ordinary(guest: &mut Guest, subject: &Subject) {
    guest.store(DATA, &[0; 16]);
    let written = guest.request(subject.queue, &[HEADER], &[BODY, STATUS_BYTE]);
    assert!([0, 513].contains(&written), "{written} bytes");
}

/// Runs a table on the devices that `applies` to, with each transport.
fn run(applies: fn(&str) -> bool, table: &[Fault]) {
    for_each(applies, |subject| with_each_transport(|_| run_on(subject, table)));
}

/// One thread for each device: most of the time consoles wait.
fn for_each(applies: fn(&str) -> bool, test: impl Fn(&Subject) + Sync) {
    let (count, test) = (all().len(), &test);
    thread::scope(|scope| {
        for index in 0..count {
            scope.spawn(move || {
                let subject = all().swap_remove(index);
                if applies(subject.name) {
                    test(&subject);
                }
            });
        }
    });
}

fn run_on(subject: &Subject, table: &[Fault]) {
    let mut guest = Guest::new((subject.build)());
    for (i, Fault(name, fault)) in table.iter().enumerate() {
        let _context = Context(subject.name, name);
        guest.reset();
        fault(&mut guest, subject);
        guest.start(0);
        ordinary(&mut guest, subject);
        // Not after each line: a console takes input only after a while.
        if i % 16 == 15 || i + 1 == table.len() {
            guest.start(0);
            (subject.traffic)(&mut guest);
        }
        guest.check_guards();
    }
}

/// On every device.
fn any(_: &str) -> bool {
    true
}

#[test]
fn registers() {
    // Those of virtio over MMIO.
    for_each(any, |subject| run_on(subject, registers::TABLE));
}

#[test]
fn status_and_life() {
    run(any, life::TABLE);
}

#[test]
fn rings() {
    rings::run_chains();
    run(any, rings::TABLE);
}

#[test]
fn block() {
    run(|name| matches!(name, "block" | "block, large blocks"), block::TABLE);
}

#[test]
fn console() {
    run(|name| name.starts_with("console"), console::TABLE);
    run(|name| name == "console with a port", console::WITH_PORTS);
}

#[test]
fn entropy() {
    run(|name| name == "rng", entropy::TABLE);
}

#[test]
fn net() {
    run(|name| name.starts_with("net"), net::TABLE);
}

#[test]
fn vsock() {
    run(|name| name == "vsock", vsock::TABLE);
}

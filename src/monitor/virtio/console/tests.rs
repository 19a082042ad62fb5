//! The console against a driver's real rings and a host end that the test holds.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{Bytes, GuestAddress};

use super::port::PIECE;
use super::*;
use crate::chardev::terminal::tests::{OnTerminal, SCENARIO};
use crate::memory::GuestRam;
use crate::virtio::testing::{CountingNotifier, DriverRing, ram};

const RAM: usize = 4 << 20;
/// Each buffer in flight gets its own place: a queue has at most 16.
const BUFFERS: u64 = 0x10_0000;
const BUFFER: u32 = 16 << 10;

/// A console, its driver's rings, and what the worker would do.
struct Rig {
    ram: Arc<GuestRam>,
    rings: Vec<DriverRing>,
    queues: Vec<Virtqueue>,
    console: Console,
    /// Buffers that the device has, by queue and head.
    lent: BTreeMap<(usize, u16), u64>,
    free: Vec<u64>,
}

impl Rig {
    fn new(console: Console, features: u64) -> Self {
        let mut rig = Self::at_rest(console);
        rig.console.accept(features);
        rig.console.start();
        rig.resume();
        rig
    }

    fn at_rest(console: Console) -> Self {
        let ram = ram(RAM);
        let count = console.traits().queues.len();
        let rings: Vec<_> = (0..count).map(|i| DriverRing::new(&ram, 0x1000 * (i as u64 + 1), 16)).collect();
        let queues =
            rings.iter().map(|ring| ring.virtqueue(Arc::<CountingNotifier>::default(), true)).collect();
        let free = (0..128).map(|i| BUFFERS + i * u64::from(BUFFER)).collect();
        Self { ram, rings, queues, console, lent: BTreeMap::new(), free }
    }

    fn resume(&mut self) {
        (0..self.queues.len()).for_each(|i| self.console.on_queue(i, &mut self.queues));
    }

    fn kick(&mut self, index: usize, add: impl FnOnce(&mut DriverRing) -> u16) -> u16 {
        let old = self.rings[index].available();
        let head = add(&mut self.rings[index]);
        // As a driver does it, so that a missed kick shows.
        if self.rings[index].wants_kick(old, true) {
            self.console.on_queue(index, &mut self.queues);
        }
        head
    }

    /// The driver writes `data` to queue `index`. False if it has no descriptor or no memory left.
    fn transmit(&mut self, index: usize, data: &[u8]) -> bool {
        if self.rings[index].free() < 2 || self.free.is_empty() {
            return false;
        }
        let at = self.free.pop().unwrap();
        self.ram.write_slice(data, GuestAddress(at)).unwrap();
        // In two parts, one of which may be empty.
        let cut = data.len() as u32 / 3;
        let parts = [(at, cut), (at + u64::from(cut), data.len() as u32 - cut)];
        let head = self.kick(index, |ring| ring.add(&parts, &[]));
        self.lent.insert((index, head), at);
        true
    }

    /// The driver gives queue `index` a buffer of `len` bytes.
    fn offer(&mut self, index: usize, len: u32) -> bool {
        if self.rings[index].free() == 0 || self.free.is_empty() {
            return false;
        }
        let at = self.free.pop().unwrap();
        let head = self.kick(index, |ring| ring.add(&[], &[(at, len)]));
        self.lent.insert((index, head), at);
        true
    }

    /// What the device has given back to queue `index`: the bytes that it wrote.
    fn used(&mut self, index: usize) -> Option<Vec<u8>> {
        let (head, len) = self.rings[index].used()?;
        let at = self.lent.remove(&(index, head)).expect("a buffer that the device had");
        self.free.push(at);
        let mut data = vec![0; len as usize];
        self.ram.read_slice(&mut data, GuestAddress(at)).unwrap();
        Some(data)
    }

    /// The event sources that are ready within `wait`.
    fn ready(&self, wait: Duration) -> Vec<usize> {
        let sources = self.console.event_sources();
        let mut fds: Vec<_> = sources.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        poll(&mut fds, Some(&Timespec::try_from(wait).unwrap())).unwrap();
        (0..fds.len()).filter(|i| !fds[*i].revents().is_empty()).collect()
    }

    /// What the worker does when it is woken; false if nothing wakes it within `wait`.
    fn turn(&mut self, wait: Duration) -> bool {
        let ready = self.ready(wait);
        ready.iter().for_each(|source| self.console.on_event(*source, &mut self.queues));
        !ready.is_empty()
    }

    /// Turns until the worker would sleep. It must come to that.
    fn settle(&mut self) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.turn(super::settle::PAUSE + Duration::from_millis(20)) {
            assert!(Instant::now() < end, "the worker never sleeps");
        }
    }

    fn messages(&mut self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.used(CONTROL_RECEIVE)).collect()
    }

    fn say(&mut self, id: u32, event: u16, value: u16) {
        let mut bytes = id.to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        assert!(self.transmit(CONTROL_TRANSMIT, &bytes));
        assert!(self.used(CONTROL_TRANSMIT).is_some());
    }
}

fn pair() -> (Endpoint, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Endpoint::from_stream(ours).unwrap(), theirs)
}

fn console() -> (Console, UnixStream) {
    let (endpoint, theirs) = pair();
    (Console::new(endpoint, vec![]).unwrap(), theirs)
}

fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..len).map(next).collect()
}

/// Streams `out` to the host and `input` to the guest at once, in pieces whose sizes go round `sizes`.
fn stream_both_ways(out: Vec<u8>, input: Vec<u8>, sizes: &[u32]) {
    let (console, theirs) = console();
    let mut rig = Rig::new(console, 0);
    let (mut reader, mut writer) = (theirs.try_clone().unwrap(), theirs);
    let (out_len, input_copy) = (out.len(), input.clone());
    let reading = thread::spawn(move || {
        let mut got = vec![0; out_len];
        reader.read_exact(&mut got).map(|()| got)
    });
    let writing = thread::spawn(move || writer.write_all(&input_copy).map(|()| writer));
    let (mut sent, mut got) = (0, Vec::with_capacity(input.len()));
    let mut sizes = sizes.iter().copied().cycle();
    let end = Instant::now() + Duration::from_secs(120);
    while got.len() < input.len() || sent < out.len() || !rig.lent.keys().all(|(queue, _)| *queue == 0) {
        assert!(Instant::now() < end, "stuck at {} in, {sent} out", got.len());
        while rig.offer(0, sizes.next().unwrap().clamp(1, BUFFER)) {}
        while sent < out.len() {
            let len = (sizes.next().unwrap().min(BUFFER) as usize).min(out.len() - sent);
            if !rig.transmit(1, &out[sent..sent + len]) {
                break;
            }
            sent += len;
        }
        rig.turn(Duration::from_millis(1));
        while let Some(data) = rig.used(0) {
            got.extend(data);
        }
        while rig.used(1).is_some() {}
        assert!(rig.console.ports[0].held() <= 2 * PIECE);
    }
    assert!(reading.join().unwrap().unwrap() == out, "output differs");
    assert!(got == input, "input differs");
    drop(writing.join().unwrap());
}

#[test]
fn thirty_two_megabytes_pass_both_ways_unchanged() {
    stream_both_ways(pattern(16 << 20, 1), pattern(16 << 20, 2), &[4096, 16384, 1, 9000, 0, 333]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_cut_passes_both_ways_unchanged(
        out in 0usize..300_000,
        input in 0usize..300_000,
        sizes in prop::collection::vec(0u32..20_000, 1..12),
    ) {
        prop_assume!(sizes.iter().any(|size| *size > 0));
        stream_both_ways(pattern(out, 3), pattern(input, 4), &sizes);
    }
}

#[test]
fn a_stalled_reader_holds_the_guest_at_bounded_cost_and_may_come_back() {
    let (console, mut theirs) = console();
    let mut rig = Rig::new(console, 0);
    let piece = pattern(BUFFER as usize, 5);
    let mut sent = 0;
    while rig.transmit(1, &piece) {
        sent += piece.len();
        while rig.used(1).is_some() {}
        assert!(sent < 64 << 20, "nothing stalls");
    }
    rig.settle();
    assert!(rig.ready(Duration::from_millis(50)).is_empty(), "the worker sleeps while the reader does");
    assert!(rig.console.ports[0].held() <= 2 * PIECE);
    assert!(rig.queues[1].in_flight() == 1, "one request is at hand, the others stay in the ring");
    let mut got = 0;
    let mut buf = vec![0; 100_000];
    while got < sent {
        let len = theirs.read(&mut buf).unwrap();
        assert!(buf[..len].iter().zip(piece.iter().cycle().skip(got % piece.len())).all(|(a, b)| a == b));
        got += len;
        rig.turn(Duration::ZERO);
    }
    assert_eq!(got, sent);
    while rig.used(1).is_some() {}
    assert!(rig.lent.is_empty());
}

#[test]
fn input_waits_for_buffers_bounded_and_without_spinning() {
    let (console, mut theirs) = console();
    let mut rig = Rig::new(console, 0);
    theirs.set_nonblocking(true).unwrap();
    let input = pattern(1 << 20, 6);
    let mut sent = 0;
    while let Ok(len) = theirs.write(&input[sent..]) {
        sent += len;
        rig.settle();
    }
    assert!(sent < input.len() && rig.console.ports[0].held() <= PIECE, "the host's writer is stopped");
    let mut got = Vec::new();
    while got.len() < sent {
        assert!(rig.offer(0, 1000));
        rig.turn(Duration::ZERO);
        while let Some(data) = rig.used(0) {
            got.extend(data);
        }
    }
    assert!(got == input[..sent]);
}

#[test]
fn early_input_waits_until_the_driver_has_come_to_rest() {
    let (console, mut theirs) = console();
    let mut rig = Rig::new(console, 0);
    theirs.write_all(b"typed before there was a console").unwrap();
    assert!(rig.offer(0, 100));
    let (mut got, mut wrote) = (None, Instant::now());
    for _ in 0..3 {
        rig.turn(Duration::from_millis(5));
        got = got.or_else(|| rig.used(0));
        // A machine that is slow enough has made a pause of its own.
        assert!(got.is_none() || wrote.elapsed() >= super::settle::PAUSE, "Linux would throw it away");
        wrote = Instant::now();
        assert!(rig.transmit(1, b"the log so far"));
    }
    rig.settle();
    let got = got.or_else(|| rig.used(0));
    assert_eq!(got.unwrap(), b"typed before there was a console");
}

#[test]
fn the_end_of_input_is_not_the_end_and_wakes_nobody() {
    let (console, mut theirs) = console();
    let mut rig = Rig::new(console, 0);
    theirs.write_all(b"last").unwrap();
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(rig.offer(0, 100) && rig.offer(0, 100));
    rig.settle();
    assert_eq!(rig.used(0).unwrap(), b"last");
    assert!(rig.transmit(1, b"still here"));
    let mut got = [0; 10];
    theirs.read_exact(&mut got).unwrap();
    drop(theirs);
    rig.settle();
    assert!(rig.transmit(1, b"into the void"), "nobody hears it, and the guest goes on");
    rig.settle();
    assert!(rig.used(1).is_some() && rig.used(1).is_some());
}

#[test]
fn nowhere_takes_everything() {
    let endpoint = Endpoint::open(&crate::config::CharTarget::Off, &crate::event_loop::running()).unwrap();
    let mut rig = Rig::new(Console::new(endpoint, vec![]).unwrap(), 0);
    for _ in 0..100 {
        assert!(rig.transmit(1, &[b'x'; BUFFER as usize]));
        rig.settle();
        assert!(rig.used(1).is_some());
    }
}

#[test]
fn a_request_half_sent_goes_over_to_a_restored_device() {
    let (console, mut theirs) = console();
    let endpoint = console.ports[0].endpoint.clone();
    let mut rig = Rig::new(console, 0);
    let mut sent = Vec::new();
    // The host has typed ahead, too.
    theirs.write_all(b"typed ahead").unwrap();
    rig.settle();
    for i in 0.. {
        let piece = pattern(BUFFER as usize, i);
        if !rig.transmit(1, &piece) {
            break;
        }
        sent.extend(piece);
        while rig.used(1).is_some() {}
    }
    // Some of the request at hand goes out, and then it stalls again.
    let mut got = vec![0; 5000];
    theirs.read_exact(&mut got).unwrap();
    rig.turn(Duration::ZERO);
    rig.console.drain(&mut rig.queues, Instant::now()).unwrap();
    assert!(rig.queues.iter().all(|queue| queue.in_flight() == 0));
    let bytes = crate::state::Saved::save_bytes(&rig.console);
    let mut fresh = Console::new(endpoint, vec![]).unwrap();
    crate::state::Saved::restore_bytes(&mut fresh, &bytes).unwrap();
    assert_eq!(crate::state::Saved::save_bytes(&fresh), bytes);
    rig.console = fresh;
    rig.resume();
    assert!(rig.offer(0, 100));
    theirs.set_nonblocking(true).unwrap();
    let mut buf = vec![0; 100_000];
    while let Ok(len) = theirs.read(&mut buf) {
        got.extend(&buf[..len]);
        rig.turn(Duration::ZERO);
    }
    rig.settle();
    assert_eq!(rig.used(0).unwrap(), b"typed ahead");
    while got.len() < sent.len() {
        if let Ok(len) = theirs.read(&mut buf) {
            got.extend(&buf[..len]);
        }
        rig.turn(Duration::ZERO);
    }
    assert!(got == sent);
}

#[test]
fn state_that_cannot_be_is_refused() {
    let (mut console, _theirs) = self::console();
    let good = console.save();
    let with = |change: fn(&mut State)| {
        let mut state = good.clone();
        change(&mut state);
        state
    };
    assert!(console.restore(with(|s| s.multiport = true)).is_err());
    assert!(console.restore(with(|s| s.ports.clear())).is_err());
    assert!(console.restore(with(|s| s.emergency = vec![0; EMERGENCY_LIMIT + 1])).is_err());
    assert!(console.restore(good).is_ok());
}

#[test]
fn emergency_output_needs_no_driver_and_is_bounded() {
    let (mut console, mut theirs) = self::console();
    assert_eq!(console.config().len(), CONFIG_SIZE);
    console.write_config(EMERG_WR, b"P\0\0\0");
    console.write_config(EMERG_WR, b"a");
    console.write_config(6, b"..n.");
    console.write_config(0, b"xx");
    console.write_config(9, b"x");
    let mut got = [0; 3];
    theirs.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"Pan");
    for _ in 0..1_000_000 {
        console.write_config(EMERG_WR, b"x");
    }
    assert_eq!(console.emergency.len(), EMERGENCY_LIMIT);
    assert!(console.emergency_lost > 0);
    assert_eq!(console.config()[EMERG_WR..], [0; 4]);
}

/// A console on a terminal: says what the driver reads as its size, whenever that changes.
#[test]
#[ignore = "run by the test below, on a terminal of its own"]
fn on_a_terminal() {
    if std::env::var(SCENARIO).is_err() {
        return;
    }
    let endpoint = Endpoint::open(&crate::config::CharTarget::Stdio, &crate::event_loop::running()).unwrap();
    let console = Console::new(endpoint.clone(), vec![]).unwrap();
    let mut known = console.config().to_vec();
    endpoint.write(format!("{known:?}[ready]").as_bytes());
    while endpoint.read(&mut [0; 1]) == 0 {}
    let mut rig = Rig::new(console, 0);
    loop {
        if known != rig.console.config() {
            known = rig.console.config().to_vec();
            endpoint.write(format!("{:?}", &known[..4]).as_bytes());
        }
        rig.turn(Duration::from_secs(60));
    }
}

#[test]
fn the_driver_is_told_the_terminals_size_first_and_whenever_it_changes() {
    let mut child = OnTerminal::start("virtio::console::tests::on_a_terminal", "size");
    child.resize(99, 33);
    child.master.write_all(b"x").unwrap();
    child.expect("[99, 0, 33, 0]");
    child.resize(300, 50);
    child.expect("[44, 1, 50, 0]");
}

fn header(id: u8, event: u8, value: u8) -> Vec<u8> {
    vec![id, 0, 0, 0, event, 0, value, 0]
}

/// A console with a named port on a socket, as the driver finds it after the first messages.
fn multiport(dir: &tempfile::TempDir) -> (Rig, UnixStream, std::path::PathBuf) {
    let path = dir.path().join("port");
    let (main, theirs) = pair();
    let agent =
        Endpoint::open(&crate::config::CharTarget::Socket(path.clone()), &crate::event_loop::running())
            .unwrap();
    let console = Console::new(main, vec![("org.agent".to_owned(), agent)]).unwrap();
    let traits = console.traits();
    assert_eq!((traits.features & F_MULTIPORT, traits.queues.len()), (F_MULTIPORT, 6));
    assert_eq!(console.config()[4..8], [2, 0, 0, 0]);
    (Rig::new(console, F_MULTIPORT), theirs, path)
}

#[test]
fn named_ports_are_introduced_opened_and_closed() {
    let dir = tempfile::tempdir().unwrap();
    let (mut rig, mut main, path) = multiport(&dir);
    for _ in 0..10 {
        assert!(rig.offer(CONTROL_RECEIVE, 4096));
    }
    assert!(rig.messages().is_empty(), "nothing is said before the driver is ready");
    rig.say(0, 0, 1);
    assert_eq!(rig.messages(), [header(0, 1, 0), header(1, 1, 0)]);
    rig.say(0, 3, 1);
    rig.say(1, 3, 1);
    let name: Vec<u8> = [header(1, 7, 1), b"org.agent".to_vec()].concat();
    assert_eq!(rig.messages(), [header(0, 4, 1), name, header(1, 6, 0)]);
    rig.say(0, 6, 1);

    // Somebody connects, and types before the guest has opened the port.
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"early").unwrap();
    rig.settle();
    assert_eq!(rig.messages(), [header(1, 6, 1)]);
    assert!(rig.offer(4, 100) && rig.used(4).is_none());
    rig.say(1, 6, 1);
    rig.settle();
    assert_eq!(rig.used(4).unwrap(), b"early");
    assert!(rig.transmit(5, b"answer") && rig.transmit(1, b"console"));
    let mut got = [0; 6];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"answer");
    let mut got = [0; 7];
    main.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"console");
    drop(client);
    rig.settle();
    assert_eq!(rig.messages(), [header(1, 6, 0)]);

    // What a client sent before it left still arrives.
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"bye").unwrap();
    drop(client);
    assert!(rig.offer(4, 100));
    rig.settle();
    assert_eq!(rig.used(4).unwrap(), b"bye");
}

#[test]
fn without_multiport_the_named_ports_are_not_there() {
    let (main, mut theirs) = pair();
    let (named, _other) = pair();
    let mut rig = Rig::new(Console::new(main, vec![("n".to_owned(), named)]).unwrap(), 0);
    assert!(rig.transmit(1, b"hello") && rig.transmit(CONTROL_TRANSMIT, &header(0, 0, 1)));
    assert!(rig.used(CONTROL_TRANSMIT).is_none());
    let mut got = [0; 5];
    theirs.read_exact(&mut got).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever the driver says, with however little room for answers: nothing grows, nothing spins.
    #[test]
    fn any_control_messages_are_survived(
        said in prop::collection::vec((0u32..4, 0u16..10, 0u16..3, 0u32..12), 1..200),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (mut rig, _main, _path) = multiport(&dir);
        for (id, event, value, room) in said {
            rig.say(if id == 3 { u32::MAX } else { id }, event, value);
            rig.offer(CONTROL_RECEIVE, room);
            rig.messages();
        }
        prop_assert!(rig.transmit(CONTROL_TRANSMIT, b"short"));
        rig.settle();
        rig.console.drain(&mut rig.queues, Instant::now()).unwrap();
        prop_assert!(rig.queues.iter().all(|queue| queue.in_flight() == 0 && !queue.is_broken()));
        rig.console.reset();
        prop_assert!(!rig.console.save().multiport);
    }
}

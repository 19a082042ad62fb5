//! Machines on one segment: who gets what, who is forgotten, and who cannot join.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use vmm_monitor::net::switch::{Neighbours, Switch};
use vmm_monitor::net::traffic::Traffic;
use vmm_monitor::net::{HEADER, Link, Port};
use vmm_monitor::virtio::net::Net;

use crate::guest::{DATA, Guest};
use crate::net::{RECEIVE, TRANSMIT, offer};

const ALL: [u8; 6] = [0xff; 6];
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;

/// A user's folder for the sockets of machines.
struct Runtime {
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Runtime {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm");
        Self { path, _dir: dir }
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

/// A running machine's device, with what it has carried.
struct Machine {
    guest: Guest,
    traffic: std::sync::Arc<Traffic>,
    mac: [u8; 6],
    /// Receive buffers that were used.
    used: u64,
}

/// Receive buffers that a machine has.
const BUFFERS: u64 = 24;
/// Bytes of each.
const BUFFER: u64 = 2048;

impl Machine {
    /// Machine `number` on segment `name`, whose driver does without `without`.
    fn start(dir: &Path, name: &str, number: u8, without: u64) -> Self {
        let mac = [2, 0, 0, 0, 0, number];
        Self::on(Switch::join(dir, name).unwrap(), mac, without)
    }

    /// A machine with the address `mac` at the port `switch`.
    fn on(switch: Switch, mac: [u8; 6], without: u64) -> Self {
        let link = Link::new(switch).unwrap();
        let port = Port::new(vec![link], mac);
        let traffic = port.traffic.clone();
        let mut guest = Guest::new(Box::new(Net::new(port, None)));
        guest.start(without);
        offer(&mut guest, BUFFERS, BUFFER as u32);
        guest.settle();
        Self { guest, traffic, mac, used: 0 }
    }

    fn frame(&self, to: [u8; 6], rest: &[u8]) -> Vec<u8> {
        [&to[..], &self.mac, &[0x88, 0xb5], rest].concat()
    }

    fn send_with(&mut self, header: [u8; HEADER], frame: &[u8]) {
        // Behind the receive buffers.
        let at = DATA + 0x2_0000;
        self.guest.store(at, &[&header[..], frame].concat());
        let old = self.guest.rings[TRANSMIT].available();
        self.guest.rings[TRANSMIT].add(&[(at, (HEADER + frame.len()) as u32)], &[]);
        self.guest.kick(TRANSMIT, old);
        self.guest.rings[TRANSMIT].wait_used(10);
    }

    fn send(&mut self, to: [u8; 6], rest: &[u8]) {
        let frame = self.frame(to, rest);
        self.send_with([0; HEADER], &frame);
    }

    /// The next frame, with its header.
    fn receive_with(&mut self) -> (Vec<u8>, Vec<u8>) {
        let (_, len) = self.guest.rings[RECEIVE].wait_used(10);
        let at = DATA + 0x1000 + BUFFER * self.used;
        self.used += 1;
        (self.guest.load(at, HEADER), self.guest.load(at + HEADER as u64, len as usize - HEADER))
    }

    fn receive(&mut self) -> Vec<u8> {
        self.receive_with().1
    }

    fn has_received(&self) -> u64 {
        self.traffic.received.counts().frames
    }
}

#[test]
fn frames_go_to_whom_they_are_for_and_to_all_while_that_is_not_known() {
    let dir = Runtime::new();
    let mut machines: Vec<_> = (1..4).map(|n| Machine::start(dir.path(), "lab", n, 0)).collect();
    let mut other = Machine::start(dir.path(), "another", 9, 0);
    let [one, two, three] = &mut machines[..] else { unreachable!() };
    // The last one has come after the first, who has not heard a frame of anybody's.
    one.send(ALL, b"who is there?");
    let question = one.frame(ALL, b"who is there?");
    assert_eq!((two.receive(), three.receive()), (question.clone(), question));
    // Two knows now where one is, three where both are; one knows two from its answer.
    two.send([2, 0, 0, 0, 0, 1], b"two is");
    assert_eq!(one.receive(), two.frame([2, 0, 0, 0, 0, 1], b"two is"));
    one.send([2, 0, 0, 0, 0, 2], b"for two alone");
    assert_eq!(two.receive(), one.frame([2, 0, 0, 0, 0, 2], b"for two alone"));
    // An address that nobody has shown goes to all.
    two.send([2, 0, 0, 0, 0, 77], b"for whom?");
    assert_eq!((one.receive().len(), three.receive().len()), (14 + 9, 14 + 9));
    assert_eq!([&*one, two, three].map(Machine::has_received), [2, 2, 2]);
    other.send(ALL, b"elsewhere");
    other.guest.settle();
    assert_eq!((other.has_received(), one.has_received()), (0, 2));
    assert_eq!(one.traffic.sent.counts().dropped.total(), 0);
}

#[test]
fn a_segment_is_its_users_alone_and_goes_with_its_last_machine() {
    let dir = Runtime::new();
    let folder = dir.path().join("switch/lab");
    let (first, second) =
        (Switch::join(dir.path(), "lab").unwrap(), Switch::join(dir.path(), "lab").unwrap());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&folder), 0o700);
    for socket in fs::read_dir(&folder).unwrap() {
        assert_eq!(mode(&socket.unwrap().path()), 0o600);
    }
    drop(first);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    drop(second);
    assert!(!folder.exists());
    // What others may enter, or what stands in its place, is not taken.
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
    let error = Switch::join(dir.path(), "lab").map(drop).unwrap_err();
    assert!(vmm_monitor::error_chain(&error).contains("open to other users"), "{error}");
    fs::remove_dir(&folder).unwrap();
    std::os::unix::fs::symlink("/tmp", &folder).unwrap();
    assert!(Switch::join(dir.path(), "lab").is_err());
}

#[test]
fn what_a_killed_machine_left_is_cleared_away() {
    let dir = Runtime::new();
    let folder = dir.path().join("switch/lab");
    let mut one = Machine::start(dir.path(), "lab", 1, 0);
    // Sockets that nobody serves: one from before, one of a machine that is killed while we know it.
    let stale = |id: &str| folder.join(id);
    drop(UnixDatagram::bind(stale("00000000000000aa")).unwrap());
    let dying = UnixDatagram::bind(stale("00000000000000bb")).unwrap();
    let mut two = Machine::start(dir.path(), "lab", 2, 0);
    assert!(!stale("00000000000000aa").exists() && stale("00000000000000bb").exists());
    drop(dying);
    two.send(ALL, b"who is there?");
    one.receive();
    assert!(!stale("00000000000000bb").exists());
    assert_eq!(two.traffic.sent.counts().dropped.total(), 0, "who is not there misses nothing");
    drop((one, two));
    assert!(!folder.exists());
}

#[test]
fn a_machine_that_fetches_nothing_loses_frames_and_holds_nobody_up() {
    let dir = Runtime::new();
    let mut one = Machine::start(dir.path(), "lab", 1, 0);
    let mut two = Machine::start(dir.path(), "lab", 2, 0);
    let stalled = Switch::join(dir.path(), "lab").unwrap();
    // More than any queue of the host's holds, in frames of every size.
    for number in 0..1000u32 {
        one.send(ALL, &vec![7; (number % 8) as usize * 200]);
        if number < 10 {
            two.receive();
        }
    }
    let counts = one.traffic.sent.counts();
    assert!(counts.dropped.refused > 900 && counts.frames + counts.dropped.refused == 1000, "{counts:?}");
    // To that one alone: it is waited for, but not for long, and not again.
    let mut third = Machine::start(dir.path(), "lab", 3, 0);
    third.guest.pause();
    let start = std::time::Instant::now();
    third.guest.resume();
    third.send(ALL, b"here");
    two.receive();
    third.guest.pause();
    for _ in 0..200 {
        one.send(third.mac, &[7; 500]);
    }
    assert!(start.elapsed() < std::time::Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(one.traffic.sent.counts().dropped.refused > counts.dropped.refused + 150);
    drop(stalled);
    assert!(one.receive().ends_with(b"here"));
    two.send(ALL, b"still there");
    assert!(one.receive().ends_with(b"still there"));
}

#[test]
fn a_checksum_that_is_left_to_the_other_side_is_completed_for_a_guest_that_takes_none() {
    let dir = Runtime::new();
    let mut one = Machine::start(dir.path(), "lab", 1, 0);
    let mut able = Machine::start(dir.path(), "lab", 2, 0);
    let mut plain = Machine::start(dir.path(), "lab", 3, GUEST_CSUM);
    // The sum of RFC 1071's example goes into the first two bytes behind Ethernet's header.
    let frame = one.frame(ALL, &[0, 0, 0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7]);
    let header = [1, 0, 0, 0, 0, 0, 14, 0, 0, 0, 0, 0];
    one.send_with(header, &frame);
    let mut told = header.to_vec();
    told[10] = 1;
    assert_eq!(able.receive_with(), (told, frame.clone()));
    let mut complete = frame;
    complete[14..16].copy_from_slice(&[0x22, 0x0d]);
    assert_eq!(plain.receive_with(), ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0].to_vec(), complete));
}

/// TCP over IPv4 from one machine to all, with `data`, that is to be cut into segments of `size` bytes; with its header.
fn uncut(one: &Machine, data: &[u8], size: u16) -> ([u8; HEADER], Vec<u8>) {
    let len = (40 + data.len()) as u16;
    let [high, low] = len.to_be_bytes();
    let ip = [0x45, 0, high, low, 0, 7, 0x40, 0, 64, 6, 0, 0, 10, 1, 2, 3, 10, 1, 2, 4];
    // The sum over the pseudo-header: the addresses, the protocol, and the length without IP's header.
    let [high, low] = (0x0a01 + 0x0203 + 0x0a01 + 0x0204 + 6 + len - 20).to_be_bytes();
    let tcp = [0, 80, 1, 2, 0, 0, 0, 9, 0, 0, 0, 7, 0x50, 0x18, 1, 0, high, low, 0, 0];
    let frame = [&[0xff; 6][..], &one.mac, &[8, 0], &ip, &tcp, data].concat();
    let words = [54, size, 34, 16, 0].map(u16::to_le_bytes).concat();
    ([&[1, 1][..], &words].concat().try_into().unwrap(), frame)
}

#[test]
fn tcp_goes_uncut_to_a_guest_that_takes_it_and_is_cut_for_one_that_does_not() {
    let dir = Runtime::new();
    let mut one = Machine::start(dir.path(), "lab", 1, 0);
    let mut able = Machine::start(dir.path(), "lab", 2, 0);
    let mut plain: Vec<_> = (3..5)
        .zip([GUEST_TSO4, GUEST_CSUM])
        .map(|(n, without)| Machine::start(dir.path(), "lab", n, without))
        .collect();
    let data: Vec<u8> = (0..1500).map(|n| n as u8).collect();
    let (header, frame) = uncut(&one, &data, 600);
    one.send_with(header, &frame);
    let (told, whole) = able.receive_with();
    assert_eq!((&told[..10], &told[10..]), (&header[..10], &[1, 0][..]));
    assert!(whole == frame);
    for machine in &mut plain {
        let mut back: Vec<u8> = Vec::new();
        for (number, sequence) in (0..3).zip([9, 609, 1209u32]) {
            let (told, segment) = machine.receive_with();
            assert_eq!(told, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "it needs nothing more");
            assert_eq!((&segment[..14], &segment[38..42]), (&frame[..14], &sequence.to_be_bytes()[..]));
            assert_eq!(segment[47] & 8 != 0, number == 2, "PSH is the last one's");
            back.extend(&segment[54..]);
        }
        assert!(back == data);
    }
    // More than a guest has buffers for: what is left of it waits for others, and so does what comes behind it.
    let data: Vec<u8> = (0..50_000).map(|n| (n / 7) as u8).collect();
    let (header, frame) = uncut(&one, &data, 1448);
    one.send_with(header, &frame);
    one.send(ALL, b"behind it");
    let [machine, _] = &mut plain[..] else { unreachable!() };
    let mut back: Vec<u8> = Vec::new();
    while back.len() < data.len() {
        if machine.used == BUFFERS {
            offer(&mut machine.guest, BUFFERS, BUFFER as u32);
            machine.used = 0;
        }
        back.extend(&machine.receive()[54..]);
    }
    assert!(back == data);
    assert_eq!(machine.receive(), one.frame(ALL, b"behind it"));
    assert_eq!(machine.traffic.received.counts().dropped.total(), 0);
}

#[test]
fn messages_of_any_content_reach_no_guest_and_harm_none() {
    let dir = Runtime::new();
    let folder = dir.path().join("switch/lab");
    let mut one = Machine::start(dir.path(), "lab", 1, 0);
    let [socket] = &fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>()[..] else {
        panic!("one machine has one socket")
    };
    let own = u64::from_str_radix(socket.file_name().unwrap().to_str().unwrap(), 16).unwrap();
    let stranger = UnixDatagram::bind(folder.join("00000000000000cc")).unwrap();
    let say = |id: u64, header: [u8; HEADER], frame: &[u8]| {
        stranger.send_to(&[&id.to_ne_bytes()[..], &header, frame].concat(), socket).unwrap();
    };
    let good = |one: &Machine| [&one.mac[..], &[2, 0, 0, 0, 0, 0xcc], &[0x88, 0xb5], b"good"].concat();
    let frame = good(&one);
    for len in [0, 1, 7, 8, 19, 20, 31] {
        stranger.send_to(&[0xcc, 0, 0, 0, 0, 0, 0, 0].repeat(5)[..len], socket).unwrap();
        // Each before the queue is full.
        one.guest.settle();
    }
    // Segments without a checksum, and of what is no TCP; a checksum outside of the frame; a number that is ours, and one that nobody has.
    say(0xcc, [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &frame);
    say(0xcc, [1, 1, 0, 0, 9, 0, 0, 0, 16, 0, 0, 0], &frame);
    say(0xcc, [1, 0, 0, 0, 0, 0, 14, 0, 3, 0, 0, 0], &frame);
    say(own, [0; HEADER], &frame);
    say(0xdd, [0; HEADER], &frame);
    say(0xcc, [0xfe, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9], &frame);
    assert_eq!(one.receive_with(), ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0].to_vec(), frame));
    one.guest.settle();
    assert_eq!(one.has_received(), 1);
    // Who is met by its first frame is answered.
    one.send([2, 0, 0, 0, 0, 0xcc], b"answer");
    let mut answer = [0; 100];
    stranger.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
    let n = stranger.recv(&mut answer).unwrap();
    assert!(answer[..n].ends_with(b"answer"));
}

/// A client's message to servers of DHCP (RFC 2131, 2), a discovery or a request for an address.
fn dhcp(mac: [u8; 6], wanted: Option<[u8; 4]>) -> Vec<u8> {
    let kind = if wanted.is_some() { 3 } else { 1 };
    let mut options = vec![0x63, 0x82, 0x53, 0x63, 53, 1, kind];
    if let Some(address) = wanted {
        options.extend([50, 4]);
        options.extend(address);
    }
    options.push(255);
    let mut message = vec![1, 1, 6, 0, 0x12, 0x34, 0x56, 0x78];
    message.resize(28, 0);
    message.extend(mac);
    message.resize(236, 0);
    message.extend(options);
    let [udp, ip] = [8, 28].map(|front| ((message.len() + front) as u16).to_be_bytes());
    let mut frame = [&ALL[..], &mac, &[8, 0, 0x45, 0], &ip, &[0, 0, 0, 0, 64, 17, 0, 0]].concat();
    frame.extend([0, 0, 0, 0, 255, 255, 255, 255, 0, 68, 0, 67, udp[0], udp[1], 0, 0]);
    [frame, message].concat()
}

/// The kind of an answer, and the address in it.
fn lease(frame: &[u8]) -> (u8, [u8; 4]) {
    let message = &frame[14 + 28..];
    assert_eq!(message[4..8], [0x12, 0x34, 0x56, 0x78], "it is the client's own");
    let kind = message[240..].windows(3).find(|option| option[..2] == [53, 1]).unwrap();
    (kind[2], message[16..20].try_into().unwrap())
}

#[test]
fn a_guest_gets_its_address_from_the_monitor_and_nobody_else_hears_of_it() {
    const OFFER: u8 = 2;
    const ACK: u8 = 5;
    const NAK: u8 = 6;
    let dir = Runtime::new();
    let mut other = Machine::start(dir.path(), "lab", 1, 0);
    let mac = [2, 0, 0, 0, 0, 2];
    let mut switch = Switch::join(dir.path(), "lab").unwrap();
    switch.lease(mac, Some("web")).unwrap();
    let neighbours = Neighbours::default();
    neighbours.add(switch.folder().to_owned());
    let address = neighbours.find("web").unwrap().octets();
    let mut web = Machine::on(switch, mac, 0);
    web.send_with([0; HEADER], &dhcp(mac, None));
    let offer = web.receive();
    assert_eq!((lease(&offer), &offer[..6]), ((OFFER, address), &mac[..]));
    assert!(offer.windows(6).any(|option| option == [51, 4, 255, 255, 255, 255]), "it is for ever");
    web.send_with([0; HEADER], &dhcp(mac, Some(address)));
    assert_eq!(lease(&web.receive()), (ACK, address));
    web.send_with([0; HEADER], &dhcp(mac, Some([10, 0, 0, 1])));
    assert_eq!(lease(&web.receive()).0, NAK);
    other.guest.settle();
    assert_eq!(other.has_received(), 0);
    // Another device behind the port asks whom there is; and so does one whose monitor has no lease.
    let (bridged, plain) = (dhcp([2, 0, 0, 0, 0, 9], None), dhcp(other.mac, None));
    web.send_with([0; HEADER], &bridged);
    other.send_with([0; HEADER], &plain);
    assert_eq!((other.receive(), web.receive()), (bridged, plain));
    // What is cut off is no message, or one without an end: it goes to all, or nowhere.
    let whole = dhcp(mac, None);
    for len in (14..whole.len() - 14).step_by(20) {
        web.send_with([0; HEADER], &whole[..len]);
        other.receive();
    }
    web.guest.settle();
    assert_eq!(web.has_received(), 4);
}

#[test]
fn two_machines_never_have_one_address_and_names_go_with_their_machines() {
    let dir = Runtime::new();
    let join = |segment: &str, name: Option<&str>| {
        let mut switch = Switch::join(dir.path(), segment).unwrap();
        switch.lease([2, 0, 0, 0, 0, 1], name).unwrap();
        switch
    };
    let (web, db, nameless) = (join("lab", Some("web")), join("lab", Some("db")), join("lab", None));
    let elsewhere = join("another", Some("elsewhere"));
    let neighbours = Neighbours::default();
    neighbours.add(web.folder().to_owned());
    let [one, two] = ["web", "DB"].map(|name| neighbours.find(name).unwrap());
    assert!(one != two && one.octets()[..3] == two.octets()[..3], "{one} {two}");
    assert_eq!((neighbours.find("elsewhere"), neighbours.find("stranger")), (None, None));
    let folder = web.folder().to_owned();
    drop(web);
    assert_eq!((neighbours.find("web"), neighbours.find("db")), (None, Some(two)));
    assert_eq!(join("lab", Some("new")).folder(), folder);
    // One that was killed: whoever meets it takes its name away with its socket.
    drop(UnixDatagram::bind(folder.join("00000000000000aa")).unwrap());
    std::os::unix::fs::symlink(format!("{one}/web"), folder.join("00000000000000aa.name")).unwrap();
    let again = join("lab", Some("web"));
    assert_eq!(neighbours.find("web"), Some(one), "its address is free again");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 2 * 3);
    // The same where nobody has met it since: its name is no answer, in the place of nobody's.
    drop(UnixDatagram::bind(folder.join("00000000000000bb")).unwrap());
    std::os::unix::fs::symlink("10.1.2.3/gone", folder.join("00000000000000bb.name")).unwrap();
    assert_eq!((neighbours.find("gone"), neighbours.find("web")), (None, Some(one)));
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 2 * 3);
    drop((db, nameless, again, elsewhere));
    assert!(!folder.exists());
}

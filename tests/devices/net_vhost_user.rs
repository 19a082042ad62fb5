//! Queues that another process serves: what comes through, and what becomes of the device when that process does not do its part.

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vmm_monitor::config;
use vmm_monitor::error_chain;
use vmm_monitor::net::{HEADER, Ports};
use vmm_monitor::virtio::device::VirtioDevice;
use vmm_monitor::virtio::net::Net;

use crate::back_end::{BackEnd, Conduct, FEATURES, Fault, GET_VRING_BASE, MQ, REPLY_ACK, Wire};
use crate::guest::{DATA, EVENT_IDX, Guest, NEEDS_RESET, STATUS, with_each_transport};
use crate::net::{RECEIVE, TO_HOST, TRANSMIT, command, numbered, offer, send};
use crate::subjects::frame;

const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const HOST_TSO4: u64 = 1 << 11;
const MRG_RXBUF: u64 = 1 << 15;
const INDIRECT: u64 = 1 << 28;
const NET_MQ: u64 = 1 << 22;
/// Where configuration space has the link's status.
const LINK: u64 = 6;

pub struct Place {
    dir: tempfile::TempDir,
    pairs: u16,
    ports: Ports,
}

impl Place {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), pairs: 1, ports: Ports::default() }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("back-end")
    }

    pub fn back_end(&self, conduct: Conduct) -> BackEnd {
        let _ = std::fs::remove_file(self.path());
        BackEnd::listen(&self.path(), conduct, Wire::Echo)
    }

    fn config(&self) -> config::Net {
        format!("vhost-user={},queues={}", self.path().display(), self.pairs).parse().unwrap()
    }

    /// The device that a machine would get here, now.
    pub fn device(&mut self) -> Box<dyn VirtioDevice> {
        let config = self.config();
        Box::new(Net::new(self.ports.get(0, &config, None).unwrap(), None))
    }

    /// What is said of the path, and what is to be tried.
    fn refusal(&mut self) -> String {
        let (path, config) = (self.path(), self.config());
        let error = self.ports.get(0, &config, None).unwrap_err();
        assert!(error.is_bad_argument());
        let told = format!("{}; {}", error_chain(&error), error.hint());
        assert!(told.contains(path.to_str().unwrap()), "{told}");
        told
    }
}

/// A frame goes to the back end, and comes back.
pub fn exchange(guest: &mut Guest, number: usize) {
    let said = frame(TO_HOST, &number.to_be_bytes());
    let old = guest.rings[RECEIVE].available();
    let buffer = guest.rings[RECEIVE].add(&[], &[(DATA + 0x3000, 10), (DATA + 0x4000, 2000)]);
    guest.kick(RECEIVE, old);
    let sent = send(guest, TRANSMIT, [0; HEADER], &said);
    assert_eq!(guest.rings[TRANSMIT].wait_used(10), (sent, 0));
    let (used, len) = guest.rings[RECEIVE].wait_used(10);
    assert_eq!((used, len as usize), (buffer, HEADER + said.len()));
    assert_eq!(guest.load(DATA + 0x4002, said.len()), said, "round {number}");
}

fn is_up(guest: &mut Guest) -> bool {
    guest.config::<2>(LINK) == [1, 0]
}

#[test]
fn a_back_end_carries_frames_over_pauses_resets_and_new_devices() {
    let mut place = Place::new();
    let back_end = place.back_end(Conduct::default());
    let mut guest = Guest::shared(place.device());
    for round in 0..3 {
        guest.start(0);
        assert!(is_up(&mut guest));
        exchange(&mut guest, 10 * round);
        guest.settle();
        exchange(&mut guest, 10 * round + 1);
        guest.settle();
        exchange(&mut guest, 10 * round + 2);
        assert_eq!(guest.read(STATUS), 15);
    }
    // The control queue is the monitor's: MAC_ADDR_SET.
    assert_eq!(command(&mut guest, &[1, 1, 2, 0, 0, 0, 0, 9]), 0);
    // As a reboot has it: another device on the same connection, and its memory as it was.
    let rest = guest.unplug();
    let mut guest = Guest::on(rest, place.device());
    guest.start(0);
    exchange(&mut guest, 99);
    let owners = back_end.seen.lock().unwrap().requests.iter().filter(|request| **request == 3).count();
    assert_eq!(owners, 1, "one connection");
}

#[test]
fn after_a_reset_a_back_end_begins_at_the_start_of_the_rings() {
    with_each_transport(|transport| {
        let mut place = Place::new();
        let back_end = place.back_end(Conduct::default());
        let mut guest = Guest::shared(place.device());
        for round in 0..3 {
            guest.start(0);
            exchange(&mut guest, 10 * round);
            let bases = || back_end.seen.lock().unwrap().bases.values().copied().collect::<Vec<_>>();
            assert_eq!(bases(), [0, 0], "{transport:?}, round {round}");
            exchange(&mut guest, 10 * round + 1);
            guest.settle();
            exchange(&mut guest, 10 * round + 2);
            assert_eq!(bases(), [2, 2], "{transport:?}, round {round}: it goes on after a pause");
        }
    });
}

#[test]
fn a_device_that_was_saved_goes_on_with_a_back_end_that_has_not_seen_it() {
    with_each_transport(|transport| {
        let mut place = Place::new();
        let first = place.back_end(Conduct::default());
        let mut guest = Guest::shared(place.device());
        guest.start(0);
        exchange(&mut guest, 1);
        exchange(&mut guest, 2);
        guest.device.pause(Instant::now() + Duration::from_secs(5)).unwrap();
        let saved = guest.device.save_bytes();
        let rest = guest.unplug();
        // As in another process.
        place.ports = Ports::default();
        let second = place.back_end(Conduct::default());
        let mut guest = Guest::on(rest, place.device());
        guest.device.restore_bytes(&saved).unwrap();
        assert!(second.seen.lock().unwrap().bases.is_empty(), "{transport:?}: it is at rest");
        guest.device.resume();
        exchange(&mut guest, 3);
        let bases = |back_end: &BackEnd| -> Vec<_> {
            back_end.seen.lock().unwrap().bases.values().copied().collect()
        };
        assert_eq!((bases(&first), bases(&second)), (vec![0, 0], vec![2, 2]), "{transport:?}");
    });
}

#[test]
fn a_back_end_serves_the_pairs_that_the_driver_uses() {
    let mut place = Place::new();
    place.pairs = 2;
    let conduct = Conduct { features: FEATURES | NET_MQ, protocol: REPLY_ACK | MQ, pairs: 2, fault: None };
    let back_end = place.back_end(conduct);
    let mut guest = Guest::shared(place.device());
    let set = |guest: &mut Guest, pairs: u8| {
        guest.store(DATA, &[4, 0, pairs, 0]);
        assert_eq!(guest.request(4, &[(DATA, 4)], &[(DATA + 0xf00, 1)]), 1);
        guest.load(DATA + 0xf00, 1)[0]
    };
    let second = |guest: &mut Guest, number: u8| {
        guest.rings[2].add(&[], &[(DATA + 0x9000, 2000)]);
        guest.notify(2);
        // Behind what the first pair has.
        let bytes = [&[0; HEADER][..], &frame(TO_HOST, &[number; 50])].concat();
        guest.store(DATA + 0x8000, &bytes);
        guest.rings[3].add(&[(DATA + 0x8000, bytes.len() as u32)], &[]);
        guest.notify(3);
    };
    for round in 0..2 {
        guest.start(0);
        assert_eq!(guest.rings.len(), 5);
        exchange(&mut guest, round);
        assert_eq!(back_end.seen.lock().unwrap().accepted & NET_MQ, NET_MQ);
        second(&mut guest, 7);
        guest.settle();
        exchange(&mut guest, round + 10);
        assert_eq!(guest.rings[3].used(), None, "nobody serves it");
        assert_eq!([0, 3].map(|pairs| set(&mut guest, pairs)), [1, 1]);
        assert_eq!(set(&mut guest, 2), 0);
        guest.rings[3].wait_used(10);
        let (_, len) = guest.rings[2].wait_used(10);
        assert_eq!(
            guest.load(DATA + 0x9000 + HEADER as u64, len as usize - HEADER),
            frame(TO_HOST, &[7; 50])
        );
        // A pause changes nothing of that.
        guest.settle();
        exchange(&mut guest, round + 20);
        second(&mut guest, 8);
        guest.rings[3].wait_used(10);
        guest.rings[2].wait_used(10);
        assert_eq!(set(&mut guest, 1), 0);
        second(&mut guest, 9);
        exchange(&mut guest, round + 30);
        assert_eq!(guest.rings[3].used(), None);
    }
    // A driver without MQ has one pair.
    guest.start(NET_MQ);
    exchange(&mut guest, 40);
    assert_eq!(back_end.seen.lock().unwrap().accepted & NET_MQ, 0);
}

#[test]
fn a_back_end_with_fewer_pairs_than_are_asked_for_is_refused() {
    for (features, protocol, pairs) in [(NET_MQ, 0, 2), (0, MQ, 2), (NET_MQ, MQ, 1)] {
        let mut place = Place::new();
        place.pairs = 2;
        let conduct =
            Conduct { features: FEATURES | features, protocol: REPLY_ACK | protocol, pairs, fault: None };
        let _back_end = place.back_end(conduct);
        let told = place.refusal();
        assert!(told.contains("serves 1 of 2 pairs of queues") && told.contains("queues=1"), "{told}");
    }
}

#[test]
fn a_guest_is_offered_what_the_back_end_knows() {
    for (known, without) in [
        (0, 0),
        (MRG_RXBUF | INDIRECT | EVENT_IDX, 0),
        (CSUM | GUEST_CSUM | HOST_TSO4, 0),
        (CSUM | HOST_TSO4, CSUM),
        // A feature that means nothing without another.
        (HOST_TSO4, 0),
    ] {
        let mut place = Place::new();
        let back_end = place.back_end(Conduct { features: FEATURES | known, ..Conduct::default() });
        let mut guest = Guest::shared(place.device());
        let offered = guest.offered();
        let of_frames = CSUM | GUEST_CSUM | HOST_TSO4 | MRG_RXBUF | INDIRECT | EVENT_IDX;
        let meant = if known & CSUM != 0 { known } else { known & !HOST_TSO4 };
        assert_eq!(offered & of_frames, meant, "{known:#x}");
        assert_eq!(offered >> 18 & 7, 0, "no CTRL_RX, CTRL_VLAN, CTRL_RX_EXTRA");
        guest.start(without);
        guest.wait_for("the back end hears of it", |_| back_end.seen.lock().unwrap().accepted != 0);
        let agreed = if without & CSUM != 0 { known & !(CSUM | HOST_TSO4) } else { meant };
        assert_eq!(back_end.seen.lock().unwrap().accepted, FEATURES | agreed, "{known:#x}");
    }
}

#[test]
fn a_back_end_without_the_protocols_features_serves_from_the_first_kick() {
    for conduct in [
        Conduct { features: 1 << 32, ..Conduct::default() },
        Conduct { protocol: 0, ..Conduct::default() },
        // Features that nobody asked for are not agreed on.
        Conduct { protocol: !0, ..Conduct::default() },
    ] {
        let mut place = Place::new();
        let _back_end = place.back_end(conduct);
        let mut guest = Guest::shared(place.device());
        guest.start(0);
        exchange(&mut guest, 1);
        guest.settle();
        exchange(&mut guest, 2);
    }
}

#[test]
fn a_back_end_that_goes_takes_the_link_down_and_nothing_else() {
    let mut place = Place::new();
    let back_end = place.back_end(Conduct::default());
    let mut guest = Guest::shared(place.device());
    guest.start(0);
    exchange(&mut guest, 1);
    back_end.hang_up();
    guest.wait_for("the link is down", |guest| !is_up(guest));
    // The guest goes on sending; nothing comes of it, and nothing breaks.
    offer(&mut guest, 3, 2048);
    send(&mut guest, TRANSMIT, [0; HEADER], &numbered(2, 60));
    guest.settle();
    assert_eq!(command(&mut guest, &[1, 1, 2, 0, 0, 0, 0, 9]), 0);
    guest.start(0);
    assert_eq!((guest.read(STATUS), is_up(&mut guest)), (15, false));
    // A reboot finds the one that is back.
    let rest = guest.unplug();
    let mut guest = Guest::on(rest, place.device());
    guest.start(0);
    exchange(&mut guest, 3);
    // And one that is not: the device is there all the same.
    drop(back_end);
    guest.wait_for("the link is down", |guest| !is_up(guest));
    let rest = guest.unplug();
    let mut guest = Guest::on(rest, place.device());
    guest.start(0);
    assert_eq!((guest.read(STATUS), is_up(&mut guest)), (15, false));
}

/// An answer to `request`: flags, size, and a payload of eight bytes.
fn says(request: u32, flags: u32, size: u32, payload: u64) -> Fault {
    let words = [request, flags, size].map(u32::to_ne_bytes).concat();
    Fault::Says([words, payload.to_ne_bytes().to_vec()].concat())
}

/// All that a back end can do wrong with `request`.
fn faults(request: u32) -> Vec<Fault> {
    vec![
        Fault::Silent,
        Fault::HangUp,
        Fault::Says(vec![1, 2, 3]),
        Fault::Says(vec![0xff; 64]),
        says(request + 1, 5, 8, 0),
        says(request, 1, 8, 0),
        says(request, 6, 8, 0),
        says(request, 5, 7, 0),
        says(request, 5, u32::MAX, 0),
        says(request, 5, 0, 0),
    ]
}

#[test]
fn a_back_end_that_does_not_keep_to_the_protocol_is_cut_off_in_time() {
    // SET_FEATURES, SET_MEM_TABLE, SET_VRING_KICK and SET_VRING_ENABLE refused, and rings that cannot be told apart.
    let mut all: Vec<_> = [2, 5, 12, 18].map(|request| (request, says(request, 5, 8, 1))).to_vec();
    all.push((GET_VRING_BASE, says(GET_VRING_BASE, 5, 8, 1 << 32 | 7)));
    all.push((GET_VRING_BASE, says(GET_VRING_BASE, 5, 8, 0xffff_ffff << 32)));
    for request in [5, 18, GET_VRING_BASE] {
        all.extend(faults(request).into_iter().map(|fault| (request, fault)));
    }
    for (request, fault) in all {
        let case = format!("{request}: {fault:?}");
        let mut place = Place::new();
        let _back_end = place.back_end(Conduct { fault: Some((request, fault)), ..Conduct::default() });
        let mut guest = Guest::shared(place.device());
        let start = Instant::now();
        guest.start(0);
        guest.settle();
        guest.wait_for(&case, |guest| !is_up(guest));
        guest.start(0);
        assert_eq!((guest.read(STATUS), is_up(&mut guest)), (15, false), "{case}");
        assert!(start.elapsed() < Duration::from_secs(15), "{case}: {:?}", start.elapsed());
    }
}

#[test]
fn a_back_end_that_cannot_be_used_is_one_clear_error() {
    let mut place = Place::new();
    let told = place.refusal();
    assert!(told.contains("No such file") && told.contains("start the back end first"), "{told}");
    File::create(place.path()).unwrap();
    assert!(place.refusal().contains("this is no socket"));
    std::fs::remove_file(place.path()).unwrap();
    drop(UnixListener::bind(place.path()).unwrap());
    let told = place.refusal();
    assert!(told.contains("refused") && told.contains("start the back end first"), "{told}");

    let back_end = place.back_end(Conduct { features: 1 << 30, ..Conduct::default() });
    assert!(place.refusal().contains("lacks VIRTIO_F_VERSION_1"));
    drop(back_end);
    // GET_FEATURES, GET_PROTOCOL_FEATURES and SET_OWNER.
    for request in [1, 15, 3] {
        for fault in faults(request) {
            let case = format!("{request}: {fault:?}");
            let word = match &fault {
                Fault::HangUp => "it has hung up",
                Fault::Says(bytes) if bytes.len() > HEADER => "is answered by message",
                _ => "it does not answer",
            };
            let _back_end = place.back_end(Conduct { fault: Some((request, fault)), ..Conduct::default() });
            let told = place.refusal();
            assert!(told.contains(word), "{case}: {told}");
        }
    }
}

#[test]
fn memory_that_cannot_be_shared_is_not_handed_over() {
    let mut place = Place::new();
    let back_end = place.back_end(Conduct::default());
    let mut guest = Guest::new(place.device());
    guest.negotiate(0);
    guest.set_up();
    guest.write(STATUS, 15);
    assert!(guest.read(STATUS) & NEEDS_RESET != 0);
    assert!(!back_end.seen.lock().unwrap().requests.contains(&5), "no SET_MEM_TABLE");
}

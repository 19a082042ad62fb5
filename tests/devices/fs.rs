//! The file system device: a driver that speaks FUSE, and what becomes of its folder over saves, resets and hosts that hang.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;
use vmm_monitor::config::{Share, ShareFrom, ShareLocks};
use vmm_monitor::share::Folders;
use vmm_monitor::state::Stateless;
use vmm_monitor::virtio::device::{Blocking, Traits, VirtioDevice};
use vmm_monitor::virtio::fs::{Fs, Served};
use vmm_monitor::virtio::queue::{Chain, Virtqueue};

use crate::back_end::{BackEnd, Conduct, Wire};
use crate::guest::{DATA, Guest, NEEDS_RESET, STATUS};

/// include/uapi/linux/fuse.h
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const INIT: u32 = 26;
const ROOT: u64 = 1;

const HIPRIO: usize = 0;
pub const REQUESTS: usize = 1;
const REPLY: u64 = DATA + 0x1000;

/// A folder with one file, and how it is shared.
pub fn folder() -> (TempDir, Share) {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("file"), "what is in it").unwrap();
    let share = Share { from: ShareFrom::Path(dir.path().to_owned()), ..".".parse().unwrap() };
    (dir, share)
}

/// The device on a folder, as a machine would build it.
pub fn device(share: &Share) -> Box<dyn VirtioDevice> {
    Box::new(Fs::new(Folders::default().server(0, 1, share).unwrap(), &share.tag(0)).unwrap())
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn request(guest: &Guest, opcode: u32, node: u64, body: &[u8]) -> u32 {
    let len = 40 + body.len() as u32;
    let header = [words(&[len, opcode]), vec![7; 8], node.to_le_bytes().to_vec(), vec![0; 16]].concat();
    guest.store(DATA, &[header.as_slice(), body].concat());
    len
}

/// Error and body of the reply, of which there are `room` bytes.
fn ask(guest: &mut Guest, opcode: u32, node: u64, body: &[u8], room: u32) -> (i32, Vec<u8>) {
    let len = request(guest, opcode, node, body);
    let written = guest.request(REQUESTS, &[(DATA, 40), (DATA + 40, len - 40)], &[(REPLY, room)]) as usize;
    reply(guest, written)
}

fn reply(guest: &Guest, written: usize) -> (i32, Vec<u8>) {
    let reply = guest.load(REPLY, written);
    assert_eq!(
        (long(&reply, 8), reply[..4].to_vec()),
        (u64::from_le_bytes([7; 8]), words(&[written as u32]))
    );
    (i32::from_le_bytes(reply[4..8].try_into().unwrap()), reply[16..].to_vec())
}

fn init(guest: &mut Guest) {
    let (error, body) = ask(guest, INIT, 0, &words(&[7, 39, 0x20000, u32::MAX >> 2]), 80);
    assert_eq!((error, &body[..8]), (0, &words(&[7, 39])[..]));
}

fn look_up(guest: &mut Guest, name: &str) -> (i32, u64) {
    let (error, body) = ask(guest, LOOKUP, ROOT, format!("{name}\0").as_bytes(), 144);
    (error, body.get(..8).map_or(0, |node| long(node, 0)))
}

fn open(guest: &mut Guest, node: u64) -> u64 {
    let (error, body) = ask(guest, OPEN, node, &words(&[0, 0]), 32);
    assert_eq!(error, 0);
    long(&body, 0)
}

fn read(guest: &mut Guest, node: u64, handle: u64) -> (i32, Vec<u8>) {
    let how = [&handle.to_le_bytes()[..], &[0; 8], &words(&[100, 0]), &[0; 16]].concat();
    ask(guest, READ, node, &how, 116)
}

/// See `subjects`.
pub fn exchange(guest: &mut Guest) {
    init(guest);
    assert_eq!(look_up(guest, "none"), (-libc::ENOENT, 0));
    let (error, node) = look_up(guest, "file");
    assert_eq!(error, 0);
    let handle = open(guest, node);
    assert_eq!(read(guest, node, handle), (0, b"what is in it".to_vec()));
    let (error, _) = ask(guest, RELEASE, node, &[&handle.to_le_bytes()[..], &[0; 16]].concat(), 16);
    assert_eq!(error, 0);
    // One that has no reply, before all others.
    let len = request(guest, FORGET, node, &1u64.to_le_bytes());
    assert_eq!(guest.request(HIPRIO, &[(DATA, len)], &[]), 0);
}

#[test]
fn a_driver_finds_the_tag_and_one_queue_for_requests() {
    let (_keep, share) = folder();
    for (tag, wanted) in [(None, &b"share0\0"[..]), (Some("t".repeat(36)), &[b't'; 36])] {
        let mut guest = Guest::new(device(&Share { tag, ..share.clone() }));
        let config: [u8; 40] = guest.config(0);
        assert_eq!(config[..wanted.len()], *wanted);
        assert_eq!(config[36..], 1u32.to_le_bytes());
    }
}

#[test]
fn what_the_guest_knew_and_had_open_goes_on_after_a_restore_but_for_what_is_gone() {
    let (keep, share) = folder();
    fs::write(keep.path().join("gone"), "").unwrap();
    fs::write(keep.path().join("other"), "this").unwrap();
    let mut guest = Guest::new(device(&share));
    guest.start(0);
    init(&mut guest);
    let mut known = |name| {
        let (error, node) = look_up(&mut guest, name);
        assert_eq!(error, 0);
        (node, open(&mut guest, node))
    };
    let [file, gone, other] = ["file", "gone", "other"].map(&mut known);
    guest.pause();
    let saved = guest.device.save_bytes();
    let rest = guest.unplug();
    fs::remove_file(keep.path().join("gone")).unwrap();
    fs::remove_file(keep.path().join("other")).unwrap();
    fs::write(keep.path().join("new"), "that").unwrap();
    fs::rename(keep.path().join("new"), keep.path().join("other")).unwrap();
    let mut guest = Guest::on(rest, device(&share));
    guest.device.restore_bytes(&saved).unwrap();
    assert_eq!(guest.device.save_bytes(), saved);
    guest.device.resume();
    assert_eq!(read(&mut guest, file.0, file.1), (0, b"what is in it".to_vec()));
    for (node, handle) in [gone, other] {
        assert_eq!(read(&mut guest, node, handle), (-libc::ESTALE, Vec::new()));
    }
    assert_eq!(read(&mut guest, file.0, 99), (-libc::EBADF, Vec::new()));
    assert_eq!(look_up(&mut guest, "file"), (0, file.0));
    let (error, node) = look_up(&mut guest, "other");
    assert!(error == 0 && node != other.0);
    exchange(&mut guest);
}

const SETLKW: u32 = 33;
const FLUSH: u32 = 25;

/// Asks for `file` to be locked as a whole, whenever that may be. The request's place is the `at`th.
fn wait_to_lock(guest: &mut Guest, at: u64, node: u64, handle: u64) -> u16 {
    let place = DATA + 0x3000 + at * 0x200;
    let whole = [0, i64::MAX as u64].map(u64::to_le_bytes).concat();
    let how = [&handle.to_le_bytes()[..], &[0; 8], &whole, &words(&[libc::F_WRLCK as u32, 0, 1, 0])].concat();
    let header =
        [words(&[88, SETLKW]), at.to_le_bytes().to_vec(), node.to_le_bytes().to_vec(), vec![0; 16]].concat();
    guest.store(place, &[header, how].concat());
    let old = guest.rings[REQUESTS].available();
    let head = guest.rings[REQUESTS].add(&[(place, 88)], &[(place + 0x100, 16)]);
    guest.kick(REQUESTS, old);
    head
}

/// The error in the reply.
fn locked(guest: &Guest, at: u64) -> i32 {
    let reply = guest.load(DATA + 0x3000 + at * 0x200 + 0x100, 16);
    assert_eq!((long(&reply, 8), &reply[..4]), (at, &words(&[16])[..]));
    i32::from_le_bytes(reply[4..8].try_into().unwrap())
}

#[test]
fn who_waits_for_a_lock_of_the_hosts_holds_nobody_up_and_goes_on_after_a_restore() {
    let (keep, share) = folder();
    let share = Share { locks: ShareLocks::Shared, ..share };
    let host = fs::File::open(keep.path().join("file")).unwrap();
    flock(&host, FlockOperation::LockExclusive).unwrap();
    let mut guest = Guest::new(device(&share));
    guest.start(0);
    init(&mut guest);
    let (_, node) = look_up(&mut guest, "file");
    let [first, second] = [open(&mut guest, node), open(&mut guest, node)];
    let heads = [(0, first), (1, second)].map(|(at, handle)| wait_to_lock(&mut guest, at, node, handle));
    for _ in 0..3 {
        assert_eq!(read(&mut guest, node, first), (0, b"what is in it".to_vec()));
        guest.settle();
    }
    // As it is saved, and in another device.
    guest.pause();
    let saved = guest.device.save_bytes();
    let rest = guest.unplug();
    let mut guest = Guest::on(rest, device(&share));
    guest.device.restore_bytes(&saved).unwrap();
    assert_eq!(guest.device.save_bytes(), saved);
    guest.device.resume();
    assert_eq!(read(&mut guest, node, first), (0, b"what is in it".to_vec()));
    assert_eq!(guest.rings[REQUESTS].used(), None);
    flock(&host, FlockOperation::Unlock).unwrap();
    // One of them gets it without anybody's asking for anything, and the other when that is closed.
    let (used, len) = guest.rings[REQUESTS].wait_used(10);
    let got = heads.iter().position(|head| *head == used).unwrap();
    assert_eq!((len, locked(&guest, got as u64)), (16, 0));
    assert_eq!(flock(&host, FlockOperation::NonBlockingLockShared), Err(rustix::io::Errno::WOULDBLOCK));
    let closed = [first, second][got];
    let how = [&closed.to_le_bytes()[..], &[0; 16]].concat();
    let len = request(&guest, RELEASE, node, &how);
    let old = guest.rings[REQUESTS].available();
    let release = guest.rings[REQUESTS].add(&[(DATA, len)], &[(REPLY, 16)]);
    guest.kick(REQUESTS, old);
    let both = [(); 2].map(|()| guest.rings[REQUESTS].wait_used(10).0);
    assert!(both.contains(&release) && both.contains(&heads[1 - got]));
    assert_eq!(locked(&guest, 1 - got as u64), 0);
    // A reset lets go of what waits, and of what is held.
    flock(&host, FlockOperation::NonBlockingLockShared).unwrap_err();
    guest.start(0);
    flock(&host, FlockOperation::NonBlockingLockExclusive).unwrap();
    init(&mut guest);
    let (_, node) = look_up(&mut guest, "file");
    let handle = open(&mut guest, node);
    wait_to_lock(&mut guest, 2, node, handle);
    guest.start(0);
    exchange(&mut guest);
}

#[test]
fn a_guest_that_keeps_its_locks_to_itself_is_told_that_there_are_none_here() {
    let (_keep, share) = folder();
    let mut guest = Guest::new(device(&share));
    guest.start(0);
    init(&mut guest);
    let (_, node) = look_up(&mut guest, "file");
    for opcode in [FLUSH, 31, 32, SETLKW] {
        assert_eq!(ask(&mut guest, opcode, node, &[0; 48], 64).0, -libc::ENOSYS);
    }
    let (error, body) = ask(&mut guest, INIT, 0, &words(&[7, 39, 0x20000, u32::MAX >> 2]), 80);
    let flags = u32::from_le_bytes(body[12..16].try_into().unwrap());
    assert_eq!((error, flags & (1 << 1 | 1 << 10)), (0, 0));
}

#[test]
fn a_damaged_state_is_refused_or_leads_nowhere_else() {
    let (keep, share) = folder();
    let beside = keep.path().parent().unwrap().join(format!("{}-beside", keep.path().display()));
    fs::write(&beside, "beside").unwrap();
    let mut guest = Guest::new(device(&share));
    guest.start(0);
    init(&mut guest);
    let (_, node) = look_up(&mut guest, "file");
    open(&mut guest, node);
    guest.pause();
    let saved = guest.device.save_bytes();
    let mut rest = Some(guest.unplug());
    for at in 0..saved.len() {
        for bit in 0..8 {
            let mut saved = saved.clone();
            saved[at] ^= 1 << bit;
            let mut guest = Guest::on(rest.take().unwrap(), device(&share));
            if guest.device.restore_bytes(&saved).is_ok() {
                let again = guest.device.save_bytes();
                assert!(!String::from_utf8_lossy(&again).contains('/'));
            }
            rest = Some(guest.unplug());
        }
    }
    assert_eq!(fs::read(&beside).unwrap(), b"beside");
    fs::remove_file(Path::new(&beside)).unwrap();
}

/// A device whose host lets it wait.
struct Slow(Arc<Host>);

#[derive(Default)]
struct Host {
    taken: Mutex<Option<Chain>>,
    done: Mutex<Option<u16>>,
    /// It is at a request.
    begun: Mutex<bool>,
    hangs: Mutex<bool>,
    goes: Condvar,
}

impl Blocking for Host {
    fn work(&self) -> bool {
        let Some(chain) = self.taken.lock().unwrap().take() else { return false };
        *self.begun.lock().unwrap() = true;
        let hangs = self.goes.wait_while(self.hangs.lock().unwrap(), |hangs| *hangs).unwrap();
        drop(hangs);
        *self.begun.lock().unwrap() = false;
        *self.done.lock().unwrap() = Some(chain.head);
        true
    }
}

impl Slow {
    fn go_on(&self, queues: &mut [Virtqueue]) {
        if let Some(head) = self.0.done.lock().unwrap().take() {
            queues[0].complete(head, 0);
        }
        let mut taken = self.0.taken.lock().unwrap();
        if taken.is_none() && !*self.0.begun.lock().unwrap() {
            *taken = queues[0].pop();
        }
    }
}

impl Stateless for Slow {}

impl VirtioDevice for Slow {
    fn traits(&self) -> Traits {
        Traits { kind: 26, features: 0, queues: vec![64] }
    }
    fn on_queue(&mut self, _: usize, queues: &mut [Virtqueue]) {
        self.go_on(queues);
    }
    fn blocking(&self) -> Option<Arc<dyn Blocking>> {
        Some(self.0.clone())
    }
    fn on_done(&mut self, queues: &mut [Virtqueue]) {
        self.go_on(queues);
    }
    fn drain(&mut self, _: &mut [Virtqueue], _: Instant) -> Result<(), vmm_monitor::bus::Busy> {
        match *self.0.begun.lock().unwrap() {
            true => Err(vmm_monitor::bus::Busy("it hangs".to_owned())),
            false => Ok(()),
        }
    }
    fn reset(&mut self) {
        *self.0.taken.lock().unwrap() = None;
        *self.0.done.lock().unwrap() = None;
    }
}

fn hung() -> (Arc<Host>, Guest) {
    let host = Arc::new(Host::default());
    *host.hangs.lock().unwrap() = true;
    let mut guest = Guest::new(Box::new(Slow(host.clone())));
    guest.start(0);
    for _ in 0..2 {
        let old = guest.rings[0].available();
        guest.rings[0].add(&[(DATA, 1)], &[]);
        guest.kick(0, old);
    }
    let here = host.clone();
    guest.wait_for("it is begun", |_| *here.begun.lock().unwrap());
    (host, guest)
}

impl Host {
    fn release(&self) {
        *self.hangs.lock().unwrap() = false;
        self.goes.notify_all();
    }
}

fn at_once<T>(what: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = what();
    assert!(start.elapsed() < Duration::from_secs(5), "it took {:?}", start.elapsed());
    result
}

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(20)
}

#[test]
fn a_host_that_hangs_holds_up_neither_registers_nor_pauses() {
    let (host, mut guest) = hung();
    at_once(|| {
        assert_eq!(guest.read(STATUS), 15);
        guest.device.write(0x50, &[0; 4]);
        assert!(guest.device.pause(soon()).is_err() && guest.device.pause(soon()).is_err());
        guest.device.resume();
        guest.device.resume();
    });
    host.release();
    let used = [(); 2].map(|()| guest.rings[0].wait_used(10).0);
    assert!(used[0] != used[1]);
    guest.pause();
    guest.device.resume();
    assert_eq!(guest.request(0, &[(DATA, 1)], &[]), 0);
}

#[test]
fn a_pause_that_waited_for_a_host_that_hangs_is_one() {
    let (host, mut guest) = hung();
    assert!(guest.device.pause(soon()).is_err());
    host.release();
    guest.pause();
    assert!(host.taken.lock().unwrap().is_some() || guest.rings[0].used().is_some());
    let count = |guest: &mut Guest| std::iter::from_fn(|| guest.rings[0].used()).count();
    let before = count(&mut guest);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(count(&mut guest), 0, "a paused device stands still");
    guest.device.resume();
    (before..2).for_each(|_| _ = guest.rings[0].wait_used(10));
    assert_eq!(guest.request(0, &[(DATA, 1)], &[]), 0);
}

#[test]
fn a_reset_meanwhile_is_posted_and_over_when_the_host_goes_on() {
    for pause in [false, true] {
        let (host, mut guest) = hung();
        at_once(|| guest.write(STATUS, 0));
        assert_eq!(guest.read(STATUS), 15);
        if pause {
            assert!(guest.device.pause(soon()).is_err());
            guest.device.resume();
        }
        host.release();
        guest.wait_for("the reset is over", |guest| guest.read(STATUS) == 0);
        guest.start(0);
        assert_eq!(guest.request(0, &[(DATA, 1)], &[]), 0);
    }
}

#[test]
fn a_device_whose_host_hangs_can_be_taken_away() {
    let (host, guest) = hung();
    let rest = at_once(|| guest.unplug());
    host.release();
    // Its thread ends by itself.
    let end = Instant::now() + Duration::from_secs(10);
    while Arc::strong_count(&host) > 1 {
        assert!(Instant::now() < end, "the thread goes on");
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(rest);
}

#[test]
fn when_who_serves_it_is_gone_a_device_wants_a_reset_and_finds_one_that_is_back() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("end");
    let back_end = BackEnd::listen(&path, Conduct::default(), Wire::Echo);
    let mut folders = Folders::default();
    let mut device = || Box::new(Served::new(folders.back_end(&path, 0).unwrap(), "tag"));
    let mut guest = Guest::shared(device());
    for round in 0..3 {
        guest.start(0);
        guest.settle();
        assert_eq!(guest.read(STATUS), 15, "round {round}");
        assert_eq!(&guest.config::<4>(0), b"tag\0");
    }
    back_end.hang_up();
    let deadline = Instant::now() + Duration::from_secs(10);
    while guest.read(STATUS) & NEEDS_RESET == 0 {
        assert!(Instant::now() < deadline, "the driver is not told");
        std::thread::sleep(Duration::from_millis(5));
    }
    // As a reboot has it.
    let rest = guest.unplug();
    let mut guest = Guest::on(rest, device());
    guest.start(0);
    assert_eq!(guest.read(STATUS), 15);
    let requests = &back_end.seen.lock().unwrap().requests;
    assert_eq!(requests.iter().filter(|request| **request == 3).count(), 2, "SET_OWNER, of two connections");
}

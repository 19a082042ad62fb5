//! How soon a machine from a pool runs: `cargo bench --package vmm --bench pool [N]`.
//!
//! The guest waits until its event register says that it is a copy, writes a character to its serial port, and halts. What is
//! measured begins with the request on a connection that is there, and ends when this process hears that the console's file has been
//! written to (inotify), which is a wake-up later than it was. N machines are taken one at a time from a full pool, then a full pool of
//! 100 at once. VMM=FILE measures another program than the one that is built with this.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use vmm_monitor::api::client::Client;
use vmm_monitor::api::protocol::Command as Order;
use vmm_monitor::api::registry::Registry;
use vmm_monitor::pool::PoolStatus;

/// Waits for `legacy::acpi_pm`'s EVENT_GENERATION, then writes `!` to COM1 and halts.
const GUEST: [u8; 19] = [
    0x66, 0xba, 0x04, 0x06, // mov dx, 0x604
    0xec, // in al, dx
    0xa8, 0x04, // test al, 4
    0x74, 0xf7, // jz to the start
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, 0x21, // mov al, '!'
    0xee, // out dx, al
    0xf4, // hlt
    0xeb, 0xfd, // jmp to the hlt
];
/// What the machine has beside its processor.
const MACHINE: &str = "--mem 128M --serial stdio --console off --rng --vsock --net user";
/// Between two machines: nothing else is to run.
const QUIET: Duration = Duration::from_millis(30);

/// Where it all happens.
struct Place {
    folder: tempfile::TempDir,
    /// On tmpfs, as XDG_RUNTIME_DIR is.
    run: tempfile::TempDir,
    registry: Registry,
    inotify: std::os::fd::OwnedFd,
    /// When a console was written to.
    written: Receiver<Instant>,
    watched: BTreeSet<PathBuf>,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let run = tempfile::tempdir_in("/dev/shm").unwrap();
        fs::write(folder.path().join("guest"), vmm_bench::elf::kernel(&GUEST)).unwrap();
        let inotify = inotify::init(CreateFlags::CLOEXEC).unwrap();
        let mut events = File::from(inotify.try_clone().unwrap());
        let (tell, written) = channel();
        thread::spawn(move || {
            // Of a file that is watched itself an event has no name, and so 16 bytes; the second word says what it is.
            const IN_MODIFY: u8 = 2;
            let mut bytes = [0; 16 * 128];
            while let Ok(count) = events.read(&mut bytes) {
                let now = Instant::now();
                let events = bytes[..count].chunks_exact(16).filter(|event| event[4] & IN_MODIFY != 0);
                events.for_each(|_| _ = tell.send(now));
            }
        });
        let registry = Registry::at(run.path().join("vmm"));
        Self { folder, run, registry, inotify, written, watched: BTreeSet::new() }
    }

    fn vmm(&self, arguments: &str) {
        let program = std::env::var_os("VMM").unwrap_or_else(|| env!("CARGO_BIN_EXE_vmm").into());
        let mut command = Command::new(program);
        command.args(arguments.split_whitespace()).current_dir(&self.folder).stdout(Stdio::null());
        command.env("XDG_RUNTIME_DIR", self.run.path());
        command.env("XDG_STATE_HOME", self.folder.path().join("state"));
        assert!(command.status().unwrap().success(), "{arguments}");
    }

    fn pool(&self, name: &str) -> PoolStatus {
        Client::connect_pool(&self.registry, name).unwrap().ask_pool(Order::Status).unwrap()
    }

    /// Waits until all spares are ready and nothing happens, and watches their consoles.
    fn await_full(&mut self, name: &str) {
        let mut pool = self.pool(name);
        while pool.ready < pool.size {
            thread::sleep(Duration::from_millis(5));
            pool = self.pool(name);
        }
        for entry in fs::read_dir(self.folder.path().join("state/vmm")).unwrap() {
            let console = entry.unwrap().path().join("console.log");
            if console.to_str().unwrap().contains("@") && console.exists() && !self.watched.contains(&console)
            {
                inotify::add_watch(&self.inotify, &console, WatchFlags::MODIFY).unwrap();
                self.watched.insert(console);
            }
        }
        thread::sleep(QUIET);
        self.written.try_iter().for_each(drop);
    }

    /// Takes `count`: from the request to each one's first word, and to the pool's answer.
    fn take(&self, pool: &str, count: u32) -> (Vec<Duration>, Duration) {
        let mut client = Client::connect_pool(&self.registry, pool).unwrap();
        let start = Instant::now();
        let taken = client.take(count, None, false, false).unwrap();
        let answered = start.elapsed();
        assert_eq!((taken.names.len() as u32, taken.error), (count, None));
        let spoken = (0..count).map(|_| self.written.recv_timeout(Duration::from_secs(10)).unwrap() - start);
        let spoken = spoken.collect();
        let clients = taken.names.iter().map(|name| {
            let mut client = Client::connect(&self.registry, name).unwrap();
            client.ask(Order::Kill).unwrap();
            client
        });
        for client in clients.collect::<Vec<_>>() {
            client.wait_for_end(Duration::from_secs(10)).unwrap();
        }
        (spoken, answered)
    }
}

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)].as_secs_f64() * 1e3;
    println!("{what:<44} p50 {:>7.3} ms  p90 {:>7.3}  p99 {:>7.3}", at(50), at(90), at(99));
}

fn main() {
    let count = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(200);
    let mut place = Place::new();
    place.vmm(&format!("run -d --kernel guest {MACHINE} --name v"));
    place.vmm("pool start one v --size 4");
    place.vmm("pool start many v --size 100");
    // It would be at work all the time.
    place.vmm("kill v");
    let (mut spoken, mut answered) = (Vec::new(), Vec::new());
    for _ in 0..count {
        place.await_full("one");
        let (first, answer) = place.take("one", 1);
        spoken.extend(first);
        answered.push(answer);
    }
    report("one: to its first word", spoken);
    report("one: to the pool's answer", answered);
    let each = place.pool("one").private_bytes.unwrap_or_default();
    println!("{:<44} {} KiB", "memory of a spare's own", each >> 10);
    let (mut spoken, mut answered) = (Vec::new(), Vec::new());
    for _ in 0..(count / 40).max(1) {
        place.await_full("many");
        let (first, answer) = place.take("many", 100);
        spoken.extend(first);
        answered.push(answer);
    }
    report("100 at once: to each one's first word", spoken);
    report("100 at once: to the pool's answer", answered);
    place.vmm("pool stop one many");
    let left = fs::read_dir(place.run.path().join("vmm")).unwrap().count();
    assert_eq!(left, 0, "nothing is left");
}

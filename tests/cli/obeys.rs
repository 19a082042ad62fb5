//! A monitor obeys whoever drives it, whatever guest, host and terminal do.
//!
//! One table: each situation in which a monitor was deaf once, by each order. A situation is set up anew for each order.

use std::any::Any;
use std::cell::OnceCell;
use std::fmt::Debug;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Action, tcflow, tcgetattr};
use serde_json::Value;
use vmm_monitor::event_loop::EventLoop;
use vmm_monitor::machine::Ends;
use vmm_monitor::sandbox::Needs;
use vmm_monitor::session;
use vmm_monitor::threads::{self, Role};

use crate::fuse::Fuse;
use crate::images::*;
use crate::place::*;
use crate::strangers::labyrinth;

/// How many times slower than it should be a machine may be.
const SLOW: u32 = 4;
/// A kill or an answer takes this long at most.
const AT_ONCE: Duration = Duration::from_secs(1).saturating_mul(SLOW);
/// How long a guest may take to power off here.
const GRACE: Duration = Duration::from_secs(1);
/// After this a pause fails.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Pause,
    Stop,
    Kill,
    Signal(Signal),
}

const ORDERS: [Order; 6] = [
    Order::Pause,
    Order::Stop,
    Order::Kill,
    Order::Signal(Signal::TERM),
    Order::Signal(Signal::INT),
    Order::Signal(Signal::HUP),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Situation {
    /// Nobody reads standard error, and there is something to say there: by these options.
    Stderr(&'static str),
    /// Nobody reads standard output.
    Stdout,
    /// Nor can it be opened once more without O_NONBLOCK being everybody's.
    SharedStdout,
    /// Nobody reads the terminal.
    FullTerminal,
    /// Its output is stopped (Ctrl-S).
    StoppedTerminal,
    /// A file of these options, `mount/disk` or one beside it, is never opened.
    HungStart(&'static str),
    /// A request of the guest's is never answered.
    HungDisk,
    /// Two discards of 1 GiB take 20 s each.
    SlowDiscards,
    /// The guest is dead, and symbols are searched for in what is left of it.
    Search,
    Debugger,
    Paused,
}

const SITUATIONS: [Situation; 18] = [
    Situation::Stderr(""),
    Situation::Stderr("-vv"),
    Situation::Stderr("--serial pty"),
    Situation::Stdout,
    Situation::SharedStdout,
    Situation::FullTerminal,
    Situation::StoppedTerminal,
    Situation::HungStart("--kernel asks --disk mount/disk"),
    Situation::HungStart("--kernel mount/disk"),
    Situation::HungStart("--kernel asks --initrd mount/disk"),
    Situation::HungStart("--kernel asks --firmware mount/disk"),
    Situation::HungStart("--kernel asks --serial file=mount/disk"),
    Situation::HungStart("--kernel asks --trace mount/disk"),
    Situation::HungDisk,
    Situation::SlowDiscards,
    Situation::Search,
    Situation::Debugger,
    Situation::Paused,
];

#[test]
fn whatever_happens_a_monitor_obeys() {
    if !has_kvm("whatever_happens_a_monitor_obeys") {
        return;
    }
    // A case mostly waits.
    let failed = thread::scope(|scope| {
        let threads =
            SITUATIONS.map(|situation| scope.spawn(move || ORDERS.map(|order| try_case(situation, order))));
        threads.map(|thread| thread.join().unwrap())
    });
    let failed: Vec<_> = failed.into_iter().flatten().filter_map(Result::err).collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// One case; the error says what it was. All are tried: what they have in common says more than the first.
fn try_case(situation: Situation, order: Order) -> Result<(), String> {
    let begun = Instant::now();
    let case = || {
        let Some(scene) = Scene::set(situation) else { return };
        scene.obeys(order);
    };
    let result = std::panic::catch_unwind(case).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        format!("{situation:?} {order:?}: {}", text.unwrap_or_default())
    });
    eprintln!("{situation:?} {order:?}: {:?}", begun.elapsed());
    result
}

/// A guest called `guest` in a situation.
struct Scene {
    situation: Situation,
    child: Child,
    /// The terminal that it has, and its mode before.
    terminal: Option<(File, String)>,
    /// What makes the situation. Before the place, in which it may be mounted.
    _held: Vec<Box<dyn Any>>,
    place: Place,
}

impl Scene {
    /// None: this machine has not got what it takes. That is said.
    fn set(situation: Situation) -> Option<Self> {
        let place = Place::new();
        place.file("chatters", kernel(&CHATTERS));
        place.file("wrong", pvh_kernel(&WRONG));
        place.file("halts", kernel(&HALT));
        let command =
            |arguments: &str| place.command(&format!("--name guest --mem 64M --stop-timeout 1 {arguments}"));
        let (mut held, mut terminal): (Vec<Box<dyn Any>>, _) = (Vec::new(), None);
        let mut fuse = None;
        let mut command = match situation {
            Situation::Stderr(more) => {
                let mut command = command(&format!("--kernel wrong --console off {more}"));
                let (reader, writer) = full_pipe();
                command.stderr(writer);
                held.push(Box::new(reader));
                command
            }
            Situation::Stdout | Situation::SharedStdout => {
                let mut command = command("--kernel chatters --console off --serial stdio");
                let (reader, writer) =
                    if situation == Situation::Stdout { full_pipe() } else { full_socket() };
                command.stdout(writer);
                held.push(Box::new(reader));
                command
            }
            Situation::FullTerminal | Situation::StoppedTerminal => {
                let mut command = command("-v --kernel chatters --console off --serial stdio");
                let (master, line) = pseudo_terminal();
                if situation == Situation::StoppedTerminal {
                    tcflow(&line, Action::OOff).unwrap();
                }
                let line_again = || Stdio::from(line.try_clone().unwrap());
                command.stdin(line_again()).stdout(line_again()).stderr(line_again());
                terminal = Some((line.try_clone().unwrap(), mode(&line)));
                held.push(Box::new(master));
                command
            }
            Situation::HungStart(_) | Situation::HungDisk | Situation::SlowDiscards => {
                let request = if situation == Situation::HungDisk { READ } else { DISCARD };
                place.file("asks", pvh_kernel(&asks(request)));
                fs::create_dir(place.path("mount")).unwrap();
                match Fuse::mount(&place.path("mount"), 4 << 30) {
                    Ok(mounted) => fuse = Some(mounted),
                    Err(error) => {
                        eprintln!(
                            "SKIP: whatever_happens_a_monitor_obeys: {situation:?} wants /dev/fuse and CAP_SYS_ADMIN: {error}"
                        );
                        return None;
                    }
                }
                match situation {
                    Situation::HungStart(files) => {
                        // What is known of it need not be asked for again: opening it is the next request.
                        fs::metadata(place.path("mount/disk")).unwrap();
                        fs::metadata(place.path("mount")).unwrap();
                        fuse.iter_mut().for_each(Fuse::stop);
                        command(&format!("--console off {files}"))
                    }
                    _ => command("--kernel asks --console off --serial socket=serial --disk mount/disk"),
                }
            }
            Situation::Search => {
                place.file("labyrinth", labyrinth());
                command("--trace record --kernel labyrinth --console off --serial file=out --debug-exit")
            }
            Situation::Debugger => {
                command("--kernel chatters --console off --serial off --gdb unix:gdb.sock")
            }
            Situation::Paused => command("--kernel chatters --console off --serial off"),
        };
        let child = command.spawn().unwrap();
        // Its ends of pipes and terminals are the child's alone.
        drop(command);
        let mut scene = Self { situation, child, terminal, _held: held, place };
        match situation {
            Situation::HungDisk | Situation::SlowDiscards => {
                let mut fuse = fuse.unwrap();
                scene.await_state("running");
                let mut serial = scene.connect("serial");
                if situation == Situation::HungDisk {
                    fuse.stop();
                }
                serial.write_all(b"!").unwrap();
                if situation == Situation::HungDisk {
                    scene.wait_for("the guest's request", |_| fuse.is_asked());
                } else {
                    scene.wait_for("the discards", |scene| scene.has_thread("disk-io1"));
                }
                scene._held.push(Box::new(serial));
                scene._held.push(Box::new(fuse));
            }
            Situation::HungStart(_) => {
                scene.await_state("starting");
                scene._held.push(Box::new(fuse));
            }
            Situation::Search => {
                scene.wait_for("the guest's end", |scene| {
                    fs::read(scene.place.path("out")).is_ok_and(|out| !out.is_empty())
                });
                scene.await_state("stopping");
            }
            Situation::Debugger => {
                let mut debugger = scene.connect("gdb.sock");
                debugger.set_read_timeout(Some(PATIENCE)).unwrap();
                debugger.write_all(b"$?#3f").unwrap();
                let mut answer = [0; 8];
                debugger.read_exact(&mut answer).unwrap();
                scene._held.push(Box::new(debugger));
            }
            Situation::Paused => {
                scene.await_state("running");
                assert!(scene.place.vmm("pause guest").status.success());
            }
            Situation::FullTerminal | Situation::StoppedTerminal => {
                scene.await_state("running");
                scene.wait_for("raw mode", |scene| {
                    scene.terminal.as_ref().is_some_and(|(line, before)| mode(line) != *before)
                });
            }
            _ => scene.await_state("running"),
        }
        Some(scene)
    }

    fn obeys(mut self, order: Order) {
        self.status();
        let place = &self.place;
        let begun = Instant::now();
        let asked = match order {
            Order::Pause => Some(place.command("pause guest").spawn().unwrap()),
            Order::Stop => Some(place.command("stop guest --timeout 1").spawn().unwrap()),
            Order::Kill => Some(place.command("kill guest").spawn().unwrap()),
            Order::Signal(signal) => {
                kill_process(Pid::from_raw(self.child.id() as i32).unwrap(), signal).unwrap();
                None
            }
        };
        // A machine whose guest has ended by itself ends at once, and as it would have.
        let dead = self.situation == Situation::Search;
        let (at_least, at_most) = match order {
            Order::Pause => {
                if !dead {
                    self.status();
                }
                let output = finish(asked.unwrap());
                let took = begun.elapsed();
                assert!(took < PAUSE_LIMIT + AT_ONCE, "a pause took {took:?}");
                let reason = text(&output.stderr);
                let paused = output.status.success();
                assert!(paused || reason.starts_with("vmm: error: "), "a pause without a reason: {reason}");
                if matches!(self.situation, Situation::SlowDiscards | Situation::Paused) {
                    assert!(paused, "{reason}");
                }
                if self.situation == Situation::HungDisk {
                    assert!(reason.contains("virtio-blk0 does not come to rest"), "{reason}");
                }
                if dead {
                    let vcpus = self.place.vmm("status guest --vcpus");
                    for answer in [reason, text(&vcpus.stderr)] {
                        assert!(answer.contains("refused: it has ended"), "{answer}");
                    }
                } else {
                    let runs = if matches!(self.situation, Situation::HungStart(_)) {
                        "starting"
                    } else {
                        "running"
                    };
                    assert_eq!(self.status()["state"], if paused { "paused" } else { runs });
                }
                return self.obeys(Order::Kill);
            }
            Order::Kill | Order::Signal(Signal::HUP) => (Duration::ZERO, AT_ONCE),
            // Nor is there a guest to wait for before it has begun.
            _ if dead || matches!(self.situation, Situation::HungStart(_)) => (Duration::ZERO, AT_ONCE),
            _ => {
                self.status();
                (GRACE, GRACE + AT_ONCE)
            }
        };
        let limit = begun + at_most;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < limit, "it still runs after {at_most:?}");
            thread::sleep(Duration::from_millis(5));
        };
        assert!(begun.elapsed() >= at_least, "it ended after {:?}", begun.elapsed());
        assert_eq!(status.code(), Some(if dead { 1 } else { KILLED }), "{status}");
        let left = fs::read_dir(self.place.path("run/vmm")).into_iter().flatten().count();
        assert_eq!(left, 0, "its socket is left");
        if let Some((line, before)) = &self.terminal {
            assert_eq!(mode(line), *before, "the terminal is not given back");
        }
        if let (Some(asked), false) = (asked, dead) {
            let output = finish(asked);
            assert!(output.status.success(), "{}", text(&output.stderr));
        }
    }

    /// What the monitor says of itself, which it does at once. Null if it is not there.
    #[track_caller]
    fn status(&self) -> Value {
        let asked = Instant::now();
        let answer = self.place.vmm("status guest --json");
        let took = asked.elapsed();
        assert!(took < AT_ONCE, "a status took {took:?}");
        serde_json::from_slice(&answer.stdout).unwrap_or_default()
    }

    #[track_caller]
    fn await_state(&mut self, state: &str) {
        self.wait_for(state, |scene| scene.status()["state"] == state);
    }

    #[track_caller]
    fn wait_for(&mut self, what: impl Debug, is: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is(self) {
            assert!(Instant::now() < deadline, "in vain: {what:?}");
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "{ended:?} before {what:?}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn connect(&mut self, socket: &str) -> UnixStream {
        let path = self.place.path(socket);
        let stream = OnceCell::new();
        self.wait_for(socket.to_owned(), |_| UnixStream::connect(&path).is_ok_and(|s| stream.set(s).is_ok()));
        stream.into_inner().unwrap()
    }

    fn has_thread(&self, name: &str) -> bool {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).into_iter().flatten();
        let mut names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.any(|comm| comm.trim() == name)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = self.child.kill();
        // What holds it up may hold this up, too.
        self._held.clear();
        let _ = self.child.wait();
    }
}

/// mov dx, 0x3f8; mov al, 'x'; out dx, al; jmp to the out
const CHATTERS: [u8; 9] = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xfd];
/// mov byte [the first virtio device's status], 1: of the wrong width, which is worth a warning; jmp to it
const WRONG: [u8; 9] = [0xc6, 0x05, 0x70, 0, 0, 0xfe, 1, 0xeb, 0xf7];

const READ: u32 = 0;
const DISCARD: u32 = 11;

/// Waits for a byte on the serial port, then makes two requests of this type to the first disk, which is a virtio-mmio device
/// (virtio 1.3, 4.2.2), and halts.
fn asks(request: u32) -> Vec<u8> {
    const DEVICE: u32 = 0xfe00_0000;
    const DESCRIPTORS: u32 = 32 << 20;
    const AVAILABLE: u32 = DESCRIPTORS + 0x1000;
    const USED: u32 = DESCRIPTORS + 0x2000;
    // mov dx, 0x3fd; in al, dx; test al, 1; jz to the in
    let mut code = vec![0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb];
    // mov dword [address], value
    let mut store = |address: u32, value: u32| {
        code.extend([0xc7, 0x05]);
        code.extend(address.to_le_bytes());
        code.extend(value.to_le_bytes());
    };
    for status in [0, 1, 3] {
        store(DEVICE + 0x70, status);
    }
    // VIRTIO_F_VERSION_1, and VIRTIO_BLK_F_DISCARD.
    for (half, features) in [(0, 1 << 13), (1, 1)] {
        store(DEVICE + 0x24, half);
        store(DEVICE + 0x20, features);
    }
    let queue = [(0x30, 0), (0x38, 8), (0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED), (0x44, 1)];
    for (register, value) in [(0x70, 11)].into_iter().chain(queue).chain([(0x70, 15)]) {
        store(DEVICE + register, value);
    }
    for number in 0..2 {
        let data = DESCRIPTORS + 0x3000 + number * 0x1000;
        let (first, sectors) = (1 + number * (2 << 20), 2 << 20);
        let (length, flags) = if request == READ { (512, 3) } else { (16, 1) };
        // Type and sector; the range to discard, where there is one; three descriptors: address, length, flags and the next.
        for (at, value) in [(0, request), (8, first), (0x100, first), (0x108, sectors)] {
            store(data + at, value);
        }
        let chain = [(0, 16, 1), (0x100, length, flags), (0x800, 1, 2)];
        for (link, (at, length, flags)) in (3 * number..).zip(chain) {
            let descriptor = DESCRIPTORS + 16 * link;
            store(descriptor, data + at);
            store(descriptor + 8, length);
            store(descriptor + 12, flags | (link + 1) << 16);
        }
    }
    store(AVAILABLE + 4, 3 << 16);
    store(AVAILABLE, 2 << 16);
    store(DEVICE + 0x50, 0);
    code.extend(HALT);
    code
}

/// A pipe that takes nothing more: what reads it, and what writes to it and blocks.
fn full_pipe() -> (OwnedFd, Stdio) {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
    let mut writer = File::from(writer);
    fill(&mut writer);
    fcntl_setfl(&writer, OFlags::empty()).unwrap();
    (reader, writer.into())
}

/// The same of a socket, which cannot be opened by its name in /proc.
fn full_socket() -> (OwnedFd, Stdio) {
    let (reader, mut writer) = UnixStream::pair().unwrap();
    writer.set_nonblocking(true).unwrap();
    fill(&mut writer);
    writer.set_nonblocking(false).unwrap();
    (reader.into(), OwnedFd::from(writer).into())
}

fn fill(writer: &mut impl Write) {
    for size in [4096, 1] {
        while writer.write(&vec![b'.'; size]).is_ok() {}
    }
}

/// A terminal whose output nobody reads: its master and its line.
fn pseudo_terminal() -> (OwnedFd, File) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, vec![]).unwrap();
    let path = std::ffi::OsStr::from_bytes(name.as_bytes());
    let options = File::options().read(true).write(true).open(path);
    (master, options.unwrap())
}

fn mode(line: &File) -> String {
    format!("{:?}", tcgetattr(line).unwrap())
}

/// `timeout` signals its child and then its group, which is the child once more: one wish, and the guest has its time.
#[test]
fn a_guest_keeps_its_grace_period_when_two_signals_come_at_once() {
    if !has_kvm("a_guest_keeps_its_grace_period_when_two_signals_come_at_once") {
        return;
    }
    // By `timeout`, whose two may become one on their way, and by hand, where they do not.
    for by_timeout in [true, false] {
        let place = Place::new();
        // mov dx, 0x604; in al, dx; test al, 1; jz to the in: until the power button is pressed
        let mut code = vec![0x66, 0xba, 0x04, 0x06, 0xec, 0xa8, 0x01, 0x74, 0xfb];
        // mov dx, 0x3f8; mov al, 'p'; out dx, al
        code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, b'p', 0xee]);
        // mov dx, 0x3fd; in al, dx; test al, 1; jz to the in: until it may
        code.extend([0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb]);
        code.extend(out(0x600, 5 << 2 | 1 << 5));
        place.file("heeds", kernel(&code));
        let mut command = Command::new(if by_timeout { "timeout" } else { crate::PROGRAM });
        if by_timeout {
            command.args(["--preserve-status", "1", crate::PROGRAM]);
        }
        command.args("--kernel heeds --mem 64M --console off --serial socket=serial --name guest".split(' '));
        place.set_up(&mut command);
        let mut guest = command.spawn().unwrap();
        let deadline = Instant::now() + PATIENCE;
        let mut serial = loop {
            match UnixStream::connect(place.path("serial")) {
                Ok(serial) => break serial,
                Err(error) => assert!(Instant::now() < deadline, "no serial port: {error}"),
            }
            thread::sleep(Duration::from_millis(5));
        };
        if !by_timeout {
            let pid = Pid::from_child(&guest);
            kill_process(pid, Signal::TERM).unwrap();
            thread::sleep(Duration::from_millis(3));
            kill_process(pid, Signal::TERM).unwrap();
        }
        serial.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut said = [0; 1];
        serial.read_exact(&mut said).unwrap();
        assert_eq!(said, *b"p");
        // The second signal came with the first. A kill by it would be over by now.
        thread::sleep(AT_ONCE / SLOW);
        assert!(guest.try_wait().unwrap().is_none(), "it was killed");
        serial.write_all(b"!").unwrap();
        let output = finish(guest);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    }
}

/// What was opened at the start stays open over reboots: no lock is lost to whoever still looks at the machine before, and nothing is
/// used that has taken the place of image, kernel or KVM device.
#[test]
fn what_was_opened_stays_open_over_reboots_while_somebody_looks() {
    if !has_kvm("what_was_opened_stays_open_over_reboots_while_somebody_looks") {
        return;
    }
    let place = Place::new();
    // One letter for each life, which lasts some thousand exits.
    let says = |letter| {
        let mut code = vec![0x66, 0xba, 0xf8, 0x03, 0xb0, letter, 0xee];
        code.extend([0xb9, 0, 4, 0, 0, 0xec, 0xff, 0xc9, 0x75, 0xfb]); // mov ecx, 1024; in al, dx; dec ecx; jnz to the in
        code.extend(out(0x64, 0xfe));
        kernel(&code)
    };
    place.file("reboots", says(b'r'));
    place.file("another", says(b'x'));
    symlink(std::env::var_os("VMM_KVM").unwrap_or("/dev/kvm".into()), place.path("kvm")).unwrap();
    place.file("disk", vec![0; 4096]);
    place.file("other", vec![0; 8192]);
    let run = "--kernel reboots --mem 64M --console off --serial file=said --disk disk --on-reboot reset --name guest";
    let mut guest = place.command(run).env("VMM_KVM", place.path("kvm")).spawn().unwrap();
    let lives = || fs::metadata(place.path("said")).map_or(0, |said| said.len());
    let deadline = Instant::now() + PATIENCE;
    let mut await_lives = |more: u64| {
        let end = lives() + more;
        while lives() < end {
            assert!(Instant::now() < deadline, "no reboots");
            if guest.try_wait().unwrap().is_some() {
                return false;
            }
            thread::sleep(Duration::from_millis(5));
        }
        true
    };
    let mut goes_on = await_lives(3);
    let viewers = ["top guest --json --interval 100ms"; 3];
    let mut viewers = viewers.map(|arguments| {
        let mut command = place.command(arguments);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    });
    goes_on &= await_lives(40);
    fs::rename(place.path("other"), place.path("disk")).unwrap();
    fs::rename(place.path("another"), place.path("reboots")).unwrap();
    fs::remove_file(place.path("kvm")).unwrap();
    goes_on &= await_lives(20);
    let disks: Vec<_> = fs::read_dir(format!("/proc/{}/fd", guest.id()))
        .into_iter()
        .flatten()
        .filter_map(|fd| fs::read_link(fd.ok()?.path()).ok())
        .filter(|link| link.to_string_lossy().contains("disk"))
        .collect();
    viewers.iter_mut().for_each(|viewer| {
        let _ = viewer.kill();
        let _ = viewer.wait();
    });
    place.vmm("kill guest");
    let output = finish(guest);
    assert!(goes_on && output.status.code() == Some(KILLED), "{}", text(&output.stderr));
    assert!(fs::read(place.path("said")).unwrap().iter().all(|letter| *letter == b'r'));
    let [disk] = &disks[..] else { panic!("not one image is open: {disks:?}") };
    assert!(disk.to_string_lossy().ends_with("disk (deleted)"), "{disk:?}");
}

/// A panic of the monitor's, on a thread made as its threads are, in a process of its own: this test once more.
#[test]
fn a_panic_on_any_thread_ends_the_process_at_once() {
    const NAME: &str = "obeys::a_panic_on_any_thread_ends_the_process_at_once";
    const CHILD: &str = "VMM_TEST_PANICS";
    if std::env::var_os(CHILD).is_some() {
        panics();
    }
    for stalled in [false, true] {
        let place = Place::new();
        let (_master, line) = pseudo_terminal();
        let before = mode(&line);
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", NAME, "--nocapture"]).env(CHILD, "1");
        // To find a backtrace's names takes as long as it takes.
        command.env_remove("RUST_BACKTRACE").env_remove("RUST_LIB_BACKTRACE");
        command.current_dir(place.dir.path()).stdin(line.try_clone().unwrap()).stdout(Stdio::piped());
        let full = stalled.then(full_pipe);
        let (_reader, stderr) =
            full.map_or((None, Stdio::piped()), |(reader, writer)| (Some(reader), writer));
        command.stderr(stderr);
        let begun = Instant::now();
        let output = finish(command.spawn().unwrap());
        let (took, said) = (begun.elapsed(), text(&output.stderr));
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{}\n{said}", output.status);
        assert!(took < AT_ONCE, "it took {took:?}");
        assert!(text(&output.stdout).contains("the terminal is raw"), "{said}");
        assert_eq!(mode(&line), before, "the terminal is not given back");
        assert!(stalled || said.contains("panicked at") && said.contains("a defect"), "{said}");
    }
}

/// What the program does at its start; then a thread panics, while the first waits for ever.
fn panics() -> ! {
    session::end_on_panic(vmm_command::log_output::say);
    let events = EventLoop::new().unwrap();
    let mut ends = Ends::new(events.clone());
    let line = std::io::stdin().as_fd().try_clone_to_owned().unwrap().into();
    let before = mode(&line);
    let _console = ends.get("console", &"stdio".parse().unwrap()).unwrap();
    events.run(Role::Control).unwrap();
    assert_ne!(mode(&line), before);
    println!("the terminal is raw");
    let thread =
        threads::spawn(Role::Device("virtio-blk0".to_owned(), Needs::empty()), || panic!("a defect"));
    let _ = thread.unwrap().join();
    loop {
        thread::park();
    }
}

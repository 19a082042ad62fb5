//! The control socket against a machine that only takes notes: well-behaved clients, hostile ones, and signals.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vmm_monitor::api::client::Client;
use vmm_monitor::api::protocol::{Command, Ended, MAX_REQUEST, Refusal};
use vmm_monitor::api::registry::Registry;
use vmm_monitor::api::server::Server;
use vmm_monitor::api::signals::Signals;
use vmm_monitor::api::{Control, Error, Sample, State, Status, Watch};
use vmm_monitor::config::Plug;
use vmm_monitor::event_loop::EventLoop;
use vmm_monitor::kvm::VcpuState;
use vmm_monitor::machine::Attached;
use vmm_monitor::snapshot::{Below, Folder, Parts, Saving};
use vmm_monitor::threads::Role;

#[derive(Default)]
struct Fake {
    name: String,
    notes: Arc<Mutex<Vec<&'static str>>>,
    paused: Mutex<bool>,
}

impl Fake {
    fn note(&self, what: &'static str) {
        self.notes.lock().unwrap().push(what);
    }

    fn notes(&self) -> Vec<&'static str> {
        self.notes.lock().unwrap().clone()
    }

    /// Waits for `what` to be the last note.
    fn await_note(&self, what: &str) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.notes().last() != Some(&what) {
            assert!(Instant::now() < deadline, "no {what}: {:?}", self.notes());
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Control for Fake {
    fn status(&self) -> Status {
        let state = if *self.paused.lock().unwrap() { State::Paused } else { State::Running };
        Status {
            name: self.name.clone(),
            pid: std::process::id(),
            state,
            uptime_seconds: 1.5,
            cpus: 2,
            memory_bytes: 128 << 20,
            kernel: Some("/boot/vmlinux".into()),
            vsock: None,
            vsock_cid: None,
            ptys: Vec::new(),
            ports: Vec::new(),
            networks: Vec::new(),
            sandbox: "off".to_owned(),
            cgroup: None,
        }
    }

    fn pause(&self) -> Result<(), String> {
        if self.name == "slow" {
            thread::sleep(Duration::from_millis(20));
        }
        *self.paused.lock().unwrap() = true;
        self.note("pause");
        Ok(())
    }

    fn vcpus(&self) -> Result<Vec<VcpuState>, String> {
        Err("it has none".to_owned())
    }

    fn resume(&self) -> Result<(), String> {
        *self.paused.lock().unwrap() = false;
        self.note("resume");
        Ok(())
    }

    fn devices(&self) -> Result<Vec<Attached>, String> {
        Ok(Vec::new())
    }

    fn add_device(&self, _: Plug, _: Vec<OwnedFd>) -> Result<Option<Attached>, Refusal> {
        Err("it has no bus".into())
    }

    fn remove_device(&self, name: &str, _: bool) -> Result<Attached, Refusal> {
        Err(format!("it has no {name}").into())
    }

    fn power_button(&self) -> Result<bool, String> {
        if self.name == "buttonless" {
            return Err("it has no power button".to_owned());
        }
        self.note("button");
        Ok(true)
    }

    fn files(&self) -> Vec<PathBuf> {
        ["config.json", "state", "memory"].map(PathBuf::from).into()
    }

    fn snapshot(&self, _: &Parts, below: Option<Below>, saving: Saving) -> Result<bool, Refusal> {
        self.note("snapshot");
        if below.is_some() { Err("it has no memory".into()) } else { Ok(saving.stay) }
    }

    fn fork(&self, _: Vec<OwnedFd>) -> Result<Vec<OwnedFd>, Refusal> {
        Err("it has no memory".into())
    }

    fn kill(&self) {
        self.note("kill");
    }

    fn exit_status(&self) -> Option<u8> {
        self.notes().contains(&"kill").then_some(10)
    }

    fn keep_end(&self) {
        self.note("keep end");
    }

    fn give_up(&self) {
        self.note("give up");
    }

    fn watch(&self) -> Result<Box<dyn Watch>, String> {
        if self.name == "crowded" {
            return Err("8 viewers are attached already".to_owned());
        }
        self.note("watch");
        Ok(Box::new(Looking(self.notes.clone())))
    }
}

struct Looking(Arc<Mutex<Vec<&'static str>>>);

impl Watch for Looking {
    fn sample(&self) -> Sample {
        serde_json::json!({"viewers": 1})
    }
}

impl Drop for Looking {
    fn drop(&mut self) {
        self.0.lock().unwrap().push("unwatch");
    }
}

struct Scene {
    registry: Registry,
    _dir: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { registry: Registry::at(dir.path().join("vmm")), _dir: dir }
    }

    fn start(&self, name: &str, signals: Option<Signals>) -> (Server, Arc<Fake>) {
        let fake = Arc::new(Fake { name: name.to_owned(), ..Fake::default() });
        let entry = self.registry.register(Some(name)).unwrap();
        let events = EventLoop::new().unwrap();
        let timeout = Duration::from_secs(60);
        let server = Server::start(&events, entry, signals, fake.clone(), timeout).unwrap();
        events.run(Role::Control).unwrap();
        (server, fake)
    }

    fn ask(&self, name: &str, command: Command) -> Result<Status, Error> {
        Client::connect(&self.registry, name)?.ask(command)
    }

    /// A connection with nothing between it and the server.
    fn raw(&self, name: &str) -> UnixStream {
        let stream = UnixStream::connect(self.registry.socket(name)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }
}

/// All that comes until the other side hangs up.
fn read_to_end(mut stream: &UnixStream) -> String {
    let mut bytes = Vec::new();
    let mut part = [0; 4096];
    loop {
        match stream.read(&mut part) {
            Ok(0) => break,
            Ok(count) => bytes.extend_from_slice(&part[..count]),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(e) => panic!("the server did not hang up: {e}"),
        }
    }
    String::from_utf8(bytes).unwrap()
}

#[test]
fn two_machines_are_controlled_apart() {
    let scene = Scene::new();
    let (_a, fake_a) = scene.start("a", None);
    let (_b, fake_b) = scene.start("b", None);
    assert_eq!(scene.registry.names().unwrap(), ["a", "b"]);
    assert_eq!(scene.ask("a", Command::Pause).unwrap().state, State::Paused);
    assert_eq!(scene.ask("a", Command::Status).unwrap(), fake_a.status());
    assert_eq!(scene.ask("b", Command::Status).unwrap().state, State::Running);
    assert_eq!(scene.ask("a", Command::Resume).unwrap().state, State::Running);
    assert_eq!(fake_a.notes(), ["pause", "resume"]);
    assert!(fake_b.notes().is_empty());
    assert!(matches!(scene.ask("c", Command::Status), Err(Error::NoSuchVm(name)) if name == "c"));
}

#[test]
fn stop_wakes_presses_waits_and_then_is_hard() {
    let scene = Scene::new();
    let (server, fake) = scene.start("a", None);
    scene.ask("a", Command::Pause).unwrap();
    let mut client = Client::connect(&scene.registry, "a").unwrap();
    let status = client.ask(Command::Stop { timeout_seconds: Some(1) }).unwrap();
    assert_eq!(status.state, State::Stopping);
    assert_eq!(fake.notes(), ["pause", "resume", "button"]);
    assert!(matches!(scene.ask("a", Command::Pause), Err(Error::Refused { .. })), "too late to pause");
    let pressed = Instant::now();
    fake.await_note("kill");
    let waited = pressed.elapsed();
    assert!((900..3000).contains(&waited.as_millis()), "{waited:?}");
    // The one who stopped it hears of its end, and finds the name free.
    let end = thread::spawn(move || client.wait_for_end(Duration::from_secs(10)));
    drop(server);
    end.join().unwrap().unwrap();
    scene.start("a", None);
}

#[test]
fn a_refusal_reaches_the_one_who_asked() {
    let scene = Scene::new();
    let (_server, fake) = scene.start("buttonless", None);
    let refused = scene.ask("buttonless", Command::Stop { timeout_seconds: None }).unwrap_err();
    assert!(refused.to_string().contains("no power button"), "{refused}");
    assert_eq!(scene.ask("buttonless", Command::Status).unwrap().state, State::Running);
    assert_eq!(scene.ask("buttonless", Command::Kill).unwrap().state, State::Stopping);
    assert_eq!(fake.notes(), ["kill"]);
}

#[test]
fn garbage_is_answered_and_harms_nobody() {
    let scene = Scene::new();
    let (_server, fake) = scene.start("a", None);
    let junk = scene.raw("a");
    (&junk)
        .write_all(b"GET / HTTP/1.1\r\n\xff\x00\xfe\n{}\n{\"version\":1,\"command\":\"explode\"}\n")
        .unwrap();
    (&junk).write_all(&[b'x'; MAX_REQUEST]).unwrap();
    let answers = read_to_end(&junk);
    assert_eq!(answers.lines().count(), 5, "{answers}");
    assert!(answers.lines().all(|line| line.starts_with(r#"{"version":1,"error":"#)), "{answers}");
    // A newer client is told, not misunderstood.
    let newer = scene.raw("a");
    (&newer).write_all(b"{\"version\":2,\"command\":{\"kill\":{}}}\n").unwrap();
    newer.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(read_to_end(&newer).contains("version 2"));
    scene.ask("a", Command::Status).unwrap();
    assert!(fake.notes().is_empty());
}

#[test]
fn a_viewer_is_one_until_its_connection_ends() {
    let scene = Scene::new();
    let (server, fake) = scene.start("a", None);
    let mut viewer = Client::connect(&scene.registry, "a").unwrap();
    for _ in 0..3 {
        assert_eq!(viewer.sample::<Sample>().unwrap().1["viewers"], 1);
    }
    assert_eq!(viewer.ask(Command::Status).unwrap(), fake.status());
    assert_eq!(fake.notes(), ["watch"]);
    drop(viewer);
    fake.await_note("unwatch");
    // One that asks and asks and does not read is cut off.
    let hostile = scene.raw("a");
    hostile.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
    let request = b"{\"version\":1,\"command\":\"sample\"}\n".repeat(64);
    while (&hostile).write_all(&request).is_ok() {}
    fake.await_note("unwatch");
    scene.ask("a", Command::Status).unwrap();
    // The machine's end is the viewer's.
    let mut viewer = Client::connect(&scene.registry, "a").unwrap();
    viewer.sample::<Sample>().unwrap();
    drop(server);
    assert!(matches!(viewer.sample::<Sample>(), Err(Error::NoSuchVm(name)) if name == "a"));
    assert_eq!(fake.notes().last(), Some(&"unwatch"));

    let (_server, _) = scene.start("crowded", None);
    let refused = Client::connect(&scene.registry, "crowded").unwrap().sample::<Sample>().unwrap_err();
    assert!(refused.to_string().contains("8 viewers"), "{refused}");
}

#[test]
fn slow_clients_and_crowds_keep_nobody_waiting_for_long() {
    let scene = Scene::new();
    let (_server, _) = scene.start("a", None);
    let slow = scene.raw("a");
    (&slow).write_all(br#"{"version":1,"comm"#).unwrap();
    let asked = Instant::now();
    scene.ask("a", Command::Status).unwrap();
    assert!(asked.elapsed() < Duration::from_secs(2), "others are served meanwhile");
    // More than the server takes at a time. Those who wait in the queue get their turn when the idle are cut off.
    let crowd: Vec<_> = (0..100).map(|_| scene.raw("a")).collect();
    scene.ask("a", Command::Status).unwrap();
    assert_eq!(read_to_end(&slow), "", "cut off");
    drop(crowd);
}

#[test]
fn those_who_wait_for_the_end_hear_how_it_came_and_leave_room_for_others() {
    let scene = Scene::new();
    let (server, _) = scene.start("a", None);
    let wait = || Client::connect(&scene.registry, "a").unwrap().wait();
    thread::scope(|scope| {
        // One more than may wait is refused, whichever of them that is.
        let waiting: Vec<_> = (0..33).map(|_| scope.spawn(wait)).collect();
        let deadline = Instant::now() + Duration::from_secs(10);
        while !waiting.iter().any(thread::ScopedJoinHandle::is_finished) {
            assert!(Instant::now() < deadline, "nobody is refused");
            thread::sleep(Duration::from_millis(2));
        }
        scene.ask("a", Command::Kill).unwrap();
        drop(server);
        let answers: Vec<_> = waiting.into_iter().map(|thread| thread.join().unwrap()).collect();
        let told = answers.iter().filter(|answer| matches!(answer, Ok(Ended { code: 10 }))).count();
        let refused = answers.iter().filter(|answer| matches!(answer, Err(Error::Refused { .. }))).count();
        assert_eq!((told, refused), (32, 1), "{answers:?}");
    });
    // Without an order there is no end to tell of: the process is about to say why, to its terminal.
    let (server, _) = scene.start("a", None);
    let stream = scene.raw("a");
    (&stream).write_all(b"{\"version\":1,\"command\":\"wait\"}\n").unwrap();
    scene.ask("a", Command::Status).unwrap();
    drop(server);
    assert_eq!(read_to_end(&stream), "");
    // Nothing may follow.
    let (_server, _) = scene.start("a", None);
    let stream = scene.raw("a");
    (&stream).write_all(&b"{\"version\":1,\"command\":\"wait\"}\n".repeat(2)).unwrap();
    assert!(read_to_end(&stream).contains("nothing may follow"));
}

#[test]
fn one_who_asks_and_does_not_listen_is_cut_off() {
    let scene = Scene::new();
    let (_server, _) = scene.start("a", None);
    let deaf = scene.raw("a");
    deaf.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    let request = b"{\"version\":1,\"command\":\"status\"}\n".repeat(100);
    let cut_off = (0..10_000).any(|_| (&deaf).write_all(&request).is_err());
    assert!(cut_off, "a million answers were kept for someone");
    scene.ask("a", Command::Status).unwrap();
}

#[test]
fn one_who_is_gone_before_the_answer_takes_nothing_along() {
    let scene = Scene::new();
    let (_server, fake) = scene.start("slow", None);
    for _ in 0..5 {
        scene.raw("slow").write_all(b"{\"version\":1,\"command\":\"pause\"}\n").unwrap();
        fake.await_note("pause");
        // The next ones have the descriptors that theirs was.
        for _ in 0..3 {
            scene.ask("slow", Command::Status).unwrap();
        }
        scene.ask("slow", Command::Resume).unwrap();
    }
}

/// Who has a machine saved and stopped by that gives the folder its name in between: if that fails the machine goes on.
#[test]
fn one_who_has_it_stand_still_lets_it_go_on_by_hanging_up() {
    let scene = Scene::new();
    let (_server, fake) = scene.start("a", None);
    let saved = |stay: bool| {
        let mut client = Client::connect(&scene.registry, "a").unwrap();
        let folder = Folder::begin(&scene._dir.path().join("saved"), &client.files().unwrap()).unwrap();
        client.snapshot(&folder, None, Saving { stay, ..Saving::default() }).unwrap();
        client
    };
    drop(saved(false));
    let holds = saved(true);
    scene.ask("a", Command::Status).unwrap();
    assert_eq!(fake.notes(), ["snapshot", "snapshot"]);
    drop(holds);
    fake.await_note("resume");
    // It was not there any more when it was answered.
    drop(saved(true));
    fake.await_note("resume");
    let mut stops = saved(true);
    stops.ask(Command::Kill).unwrap();
    drop(stops);
    scene.ask("a", Command::Status).unwrap();
    assert_eq!(fake.notes().last(), Some(&"kill"));
    // Files that are none, or too few.
    let raw = scene.raw("a");
    let _ = (&raw).write_all(b"{\"version\":1,\"command\":\"snapshot\",\"folder\":\"/s\"}\n");
    let mut said = [0; 200];
    let count = (&raw).read(&mut said).unwrap();
    assert!(String::from_utf8_lossy(&said[..count]).contains("error"));
}

/// Whoever does not listen to its clients in time gives them up. It has not ended for that.
#[test]
fn one_who_hangs_up_and_is_there_has_not_ended() {
    let scene = Scene::new();
    let entry = scene.registry.register(Some("busy")).unwrap();
    let (listener, over) = (entry.listener().try_clone().unwrap(), Arc::new(Mutex::new(false)));
    listener.set_nonblocking(true).unwrap();
    let is_over = over.clone();
    let busy = thread::spawn(move || {
        while !*is_over.lock().unwrap() {
            drop(listener.accept());
            thread::sleep(Duration::from_millis(1));
        }
    });
    assert!(matches!(scene.ask("busy", Command::Status), Err(Error::NoAnswer(name)) if name == "busy"));
    *over.lock().unwrap() = true;
    busy.join().unwrap();
}

#[test]
fn many_clients_at_once() {
    let scene = Scene::new();
    let (_server, fake) = scene.start("a", None);
    thread::scope(|scope| {
        for i in 0..16 {
            let scene = &scene;
            scope.spawn(move || {
                for _ in 0..25 {
                    let command = if i % 2 == 0 { Command::Pause } else { Command::Resume };
                    scene.ask("a", command).unwrap();
                }
            });
        }
    });
    assert_eq!(fake.notes().len(), 16 * 25);
}

#[test]
fn signals_press_the_button_once_and_then_end_it() {
    let scene = Scene::new();
    let raise = |signal| signal_hook::low_level::raise(signal).unwrap();
    let signals = Signals::take().unwrap();
    // Before there is anybody to see to it: kept.
    raise(signal_hook::consts::SIGTERM);
    let (server, fake) = scene.start("a", Some(signals));
    fake.await_note("button");
    assert_eq!(scene.ask("a", Command::Status).unwrap().state, State::Stopping);
    // As `timeout` does it: its child, then the child's group.
    raise(signal_hook::consts::SIGTERM);
    scene.ask("a", Command::Status).unwrap();
    assert_eq!(fake.notes(), ["button"], "the guest keeps its time");
    thread::sleep(Duration::from_millis(1100));
    raise(signal_hook::consts::SIGINT);
    fake.await_note("kill");
    assert_eq!(fake.notes(), ["button", "kill"]);
    // A machine that does not end although it was killed goes with its process.
    fake.await_note("give up");
    assert_eq!(fake.notes(), ["button", "kill", "keep end", "give up"]);
    drop(server);

    let (_server, fake) = scene.start("b", Some(Signals::take().unwrap()));
    raise(signal_hook::consts::SIGHUP);
    fake.await_note("kill");
    assert_eq!(fake.notes(), ["kill"]);

    let (_server, fake) = scene.start("buttonless", Some(Signals::take().unwrap()));
    raise(signal_hook::consts::SIGTERM);
    fake.await_note("kill");
}

//! A guest's agent without a guest: the very program, run on this host, behind what looks like a virtual machine with a socket
//! device. What a guest's kernel does about it is tested by tests/boot/agent.rs.

mod copy;
mod cost;
mod exec;
mod forward;
mod hostile;
mod install;
mod orders;
mod podman;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread;
use std::time::Instant;

use vmm_monitor::api::protocol::Command::Wait;
use vmm_monitor::api::protocol::{Answer, reply, request};
use vmm_monitor::api::registry::Registry;
use vmm_monitor::api::{State, Status};

use crate::place::*;

/// The agent, as it goes into guests.
fn program() -> &'static PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| guest::programs::agent().unwrap())
}

/// What looks like a virtual machine called `web`.
pub struct Guest {
    pub place: Place,
    agent: Option<Child>,
    /// Whether it looks as if it had ended, to who waits for that.
    ended: Arc<(Mutex<bool>, Condvar)>,
}

impl Guest {
    /// With the agent in it.
    pub fn new() -> Self {
        let mut guest = Self::without_agent(600.0);
        let socket = guest.place.path("agent");
        let mut command = Command::new(program());
        command.arg("--unix").arg(&socket).stdin(Stdio::null()).current_dir(guest.place.dir.path());
        guest.agent = Some(command.spawn().unwrap());
        let end = Instant::now() + PATIENCE;
        while UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < end, "no agent");
            thread::yield_now();
        }
        guest.take_connections(move |port| (port == 1023).then(|| UnixStream::connect(&socket).unwrap()));
        guest
    }

    /// With nothing in it, for so many seconds: who connects waits until [`Guest::take_connections`].
    pub fn without_agent(uptime_seconds: f64) -> Self {
        let place = Place::new();
        let registry = Registry::at(place.path("run/vmm"));
        let entry = registry.register(Some("web")).unwrap();
        let status = Status {
            name: "web".to_owned(),
            pid: std::process::id(),
            state: State::Running,
            uptime_seconds,
            cpus: 1,
            memory_bytes: 1 << 20,
            kernel: None,
            vsock: Some(place.path("vsock")),
            vsock_cid: None,
            ptys: Vec::new(),
            ports: Vec::new(),
            networks: Vec::new(),
            sandbox: "off".to_owned(),
            cgroup: None,
        };
        let ended = Arc::<(Mutex<bool>, Condvar)>::default();
        let end = ended.clone();
        // Ends with the test: the thread has the entry's socket.
        thread::spawn(move || {
            entry.listener().set_nonblocking(false).unwrap();
            for stream in entry.listener().incoming() {
                let (mut stream, mut byte, status) = (stream.unwrap(), [0], status.clone());
                let (end, mut line) = (end.clone(), Vec::new());
                thread::spawn(move || {
                    while stream.read(&mut byte).is_ok_and(|count| count == 1) {
                        line.push(byte[0]);
                        if byte == *b"\n" {
                            if std::mem::take(&mut line) == request(Wait) {
                                drop(end.1.wait_while(end.0.lock().unwrap(), |ended| !*ended).unwrap());
                                return;
                            }
                            let _ = stream.write_all(&reply(Answer::Status(status.clone())));
                        }
                    }
                });
            }
        });
        Self { place, agent: None, ended }
    }

    /// Whoever waits for its end finds it gone.
    pub fn end(&self) {
        std::fs::remove_file(self.place.path("run/vmm/web.sock")).unwrap();
        *self.ended.0.lock().unwrap() = true;
        self.ended.1.notify_all();
    }

    /// Leads each connection to what `to` says for its port, or refuses it.
    pub fn take_connections(&self, to: impl Fn(u32) -> Option<UnixStream> + Send + Sync + 'static) {
        let listener = UnixListener::bind(self.place.path("vsock")).unwrap();
        let to = std::sync::Arc::new(to);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, to) = (stream.unwrap(), to.clone());
                thread::spawn(move || connect(stream, &*to));
            }
        });
    }

    /// `vmm` with `arguments`, split at blanks.
    pub fn command(&self, arguments: &str) -> Command {
        self.place.command(arguments)
    }

    /// `vmm exec web sh -c SCRIPT`, with more options before the name.
    pub fn script(&self, options: &str, script: &str) -> Command {
        let mut command = self.command(&format!("exec {options} web sh -c"));
        command.arg(script);
        command
    }

    pub fn vmm(&self, arguments: &str) -> Output {
        finish(self.command(arguments).spawn().unwrap())
    }

    /// The agent's process.
    pub fn agent(&mut self) -> &mut Child {
        self.agent.as_mut().unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.agent {
            let _ = agent.kill();
            let _ = agent.wait();
        }
    }
}

fn connect(mut stream: UnixStream, to: &dyn Fn(u32) -> Option<UnixStream>) {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\n") && stream.read(&mut byte).is_ok_and(|count| count == 1) {
        line.push(byte[0]);
    }
    let line = String::from_utf8(line).unwrap();
    let Some(port) = line.strip_prefix("CONNECT ").and_then(|rest| rest.trim_end().parse().ok()) else {
        return;
    };
    let Some(there) = to(port) else { return };
    if stream.write_all(b"OK 1073741824\n").is_err() {
        return;
    }
    let back = (there.try_clone().unwrap(), stream.try_clone().unwrap());
    let forth = thread::spawn(move || carry(stream, there));
    carry(back.0, back.1);
    forth.join().unwrap();
}

fn carry(mut from: UnixStream, mut to: UnixStream) {
    let _ = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}

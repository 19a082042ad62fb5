//! `--gdb`: gdb connects and has the guest's vCPUs as threads: breakpoints, steps, registers, memory.
//!
//! [`Server`] is the monitor's end of it: it shows each machine of a run to the session thread, which speaks gdb's remote
//! protocol through the gdbstub crate.

mod breakpoints;
mod place;
mod registers;
mod session;
mod target;

use std::collections::VecDeque;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};

use place::Door;
use session::{Event, Session};
use vmm_monitor::machine::{self, Outcome};
use vmm_monitor::session::{Built, End, Observer};
use vmm_monitor::threads::{self, Role};

pub use place::{Error, Place};

/// A place where gdb connects, and the thread that serves it.
#[derive(Debug)]
pub struct Server {
    /// What gdb is told of a run's end: the monitor's exit status.
    status: fn(&Result<Outcome, machine::Error>) -> u8,
    say: fn(&str),
    /// How to connect, until that is said.
    invitation: Option<String>,
    events: Sender<Event>,
    wake: Arc<OwnedFd>,
    /// Until there is a machine.
    session: Option<Session>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Opens `place`, and has `say` tell how to connect when there is a machine that waits for it. `kernel` is what gdb would read
    /// symbols from; `status` is the exit status of this process for each way in which a run can end, which gdb is told.
    ///
    /// # Errors
    /// [`Error`]
    pub fn listen(
        place: &Place,
        kernel: Option<&Path>,
        status: fn(&Result<Outcome, machine::Error>) -> u8,
        say: fn(&str),
    ) -> Result<Self, Error> {
        let door = Door::open(place)?;
        let is_elf = |path: &&Path| {
            let mut magic = [0; 4];
            File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"\x7fELF"
        };
        let kernel = kernel.filter(is_elf).unwrap_or(Path::new("vmlinux"));
        // Not a log line: it is what to do next.
        let invitation = format!(
            "vmm: the guest waits for gdb ({}): gdb {} -ex 'target remote {door}'\n",
            door.who(),
            kernel.display()
        );
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = Arc::new(wake.map_err(|error| Error::Thread(error.into()))?);
        let (events, received) = channel();
        let session = Session {
            door,
            events: received,
            wake: wake.clone(),
            queue: VecDeque::new(),
            input: VecDeque::new(),
            machine: None,
            started: false,
        };
        let (invitation, session) = (Some(invitation), Some(session));
        Ok(Self { status, say, invitation, events, wake, session, thread: None })
    }

    fn tell(&self, event: Event) {
        tell(&self.events, &self.wake, event);
    }

    /// Waits for the thread, which has been told of the end.
    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic there is a defect of ours, and goes on as one.
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    }
}

fn tell(events: &Sender<Event>, wake: &OwnedFd, event: Event) {
    // The thread is gone only when the run is over.
    let _ = events.send(event);
    let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
}

impl Observer for Server {
    fn built(&mut self, built: &mut Built<'_>) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let machine = &*built.machine;
        let (events, wake) = (self.events.clone(), self.wake.clone());
        let debug = machine.debug(move |stop| tell(&events, &wake, Event::Stopped(stop)))?;
        self.tell(Event::Machine(debug));
        // Now there is a jail for it.
        if let Some(session) = self.session.take() {
            let thread = threads::spawn(Role::Owner("gdb"), || session.run());
            self.thread = Some(thread.map_err(Error::Thread)?);
        }
        // A reboot's machine is no news.
        if let Some(invitation) = self.invitation.take() {
            (self.say)(&invitation);
        }
        Ok(())
    }

    fn ended(&mut self, end: &End<'_>) {
        self.tell(Event::Ended((!end.reboots).then(|| (self.status)(end.outcome))));
        if !end.reboots {
            self.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tell(Event::Closed);
        self.join();
    }
}

//! The thread that talks to gdb: waits for it, does what it asks, tells it when the guest stops, and goes back to waiting.
//!
//! Whatever a peer sends that is not gdb's protocol ends its connection, never the guest.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use gdbstub::common::Signal;
use gdbstub::stub::state_machine::GdbStubStateMachine as State;
use gdbstub::stub::{DisconnectReason, GdbStub, GdbStubError, MultiThreadStopReason};
use rustix::event::{PollFd, PollFlags};

use super::place::{Door, Line};
use super::target::{self, Guest, thread};
use vmm_monitor::machine::Debug;
use vmm_monitor::vcpu::Stop;

/// What the thread hears.
#[derive(Debug)]
pub enum Event {
    /// A machine is built. Its vCPUs wait.
    Machine(Debug),
    /// A vCPU waits.
    Stopped(Stop),
    /// The machine is over, with this exit status of the monitor; none: there will be another.
    Ended(Option<u8>),
    /// The monitor ends.
    Closed,
}

/// How a conversation ended.
#[derive(Debug, PartialEq, Eq)]
enum Left {
    /// gdb wants no more of it.
    Detached,
    /// gdb wants the machine killed.
    Kill,
    /// The connection broke, or never was gdb's.
    Vanished,
    /// There is nothing left to debug.
    Over,
}

type Failed = GdbStubError<target::Error, io::Error>;

/// What comes next in a conversation.
enum News {
    Byte(u8),
    Event(Event),
    Gone,
}

/// See the module's text.
#[derive(Debug)]
pub struct Session {
    pub door: Door,
    pub events: Receiver<Event>,
    /// Readable when there are events.
    pub wake: Arc<OwnedFd>,
    pub queue: VecDeque<Event>,
    /// From gdb, not looked at yet.
    pub input: VecDeque<u8>,
    pub machine: Option<Debug>,
    /// Some gdb has let the guest run, so that it need not wait for the next.
    pub started: bool,
}

impl Session {
    /// Until there is nothing left to debug.
    pub fn run(mut self) {
        loop {
            while let Some(event) = self.event() {
                match event {
                    Event::Machine(machine) => {
                        if self.started {
                            release(&machine);
                        }
                        self.machine = Some(machine);
                    }
                    // Too late for the gdb that wanted it.
                    Event::Stopped(stop) => {
                        if let Some(machine) = self.machine.as_ref().filter(|_| self.started) {
                            machine.release(stop.vcpu);
                        }
                    }
                    Event::Ended(None) => self.machine = None,
                    Event::Ended(Some(_)) | Event::Closed => return,
                }
            }
            if let Some(machine) = self.machine.clone()
                && let Some(line) = self.door.accept()
            {
                log::info!("gdb: connected");
                if self.serve(machine, line) == Left::Over {
                    return;
                }
                continue;
            }
            self.poll(None);
        }
    }

    /// Holds the machine while somebody is connected.
    fn serve(&mut self, machine: Debug, line: Line) -> Left {
        self.input.clear();
        let mut guest = Guest::new(machine);
        // If it has ended, that is on its way here.
        let _ = guest.debug.hold();
        let left = GdbStub::new(line)
            .run_state_machine(&mut guest)
            .and_then(|state| self.converse(&mut guest, state))
            .unwrap_or_else(|error| {
                log::warn!("gdb: {error}: the connection is closed");
                Left::Vanished
            });
        log::info!("gdb: {left:?}");
        self.started |= guest.resumed || matches!(left, Left::Detached | Left::Kill);
        self.machine = Some(guest.debug.clone());
        match left {
            Left::Over => return left,
            Left::Kill => guest.debug.handle().kill(),
            Left::Detached | Left::Vanished => {}
        }
        let cleared = guest.debug.hold().and_then(|()| guest.clear());
        if cleared.is_ok() && self.started {
            release(&guest.debug);
        }
        left
    }

    fn converse(
        &mut self,
        guest: &mut Guest,
        mut state: State<'static, Guest, Line>,
    ) -> Result<Left, Failed> {
        loop {
            state = match state {
                State::Idle(mut idle) => match self.news(idle.borrow_conn()) {
                    News::Byte(byte) => {
                        guest.budget = Guest::BUDGET;
                        idle.incoming_data(guest, byte)?
                    }
                    News::Gone => return Ok(Left::Vanished),
                    News::Event(Event::Stopped(stop)) => {
                        guest.postpone(stop);
                        idle.into()
                    }
                    News::Event(Event::Machine(machine)) => {
                        guest.replace(machine);
                        idle.into()
                    }
                    News::Event(Event::Ended(None)) => idle.into(),
                    // Killed while gdb looked at it: the protocol has no word for that but the connection's end.
                    News::Event(Event::Ended(Some(_)) | Event::Closed) => return Ok(Left::Over),
                },
                State::Running(mut running) => {
                    let news = match guest.pending.pop_front() {
                        Some(stop) => News::Event(Event::Stopped(stop)),
                        None => self.news(running.borrow_conn()),
                    };
                    match news {
                        News::Byte(byte) => running.incoming_data(guest, byte)?,
                        News::Gone => return Ok(Left::Vanished),
                        News::Event(Event::Stopped(stop)) => match guest.reason(stop) {
                            Some(reason) if self.stop(guest) => running.report_stop(guest, reason)?,
                            _ => running.into(),
                        },
                        News::Event(Event::Machine(machine)) => {
                            guest.replace(machine);
                            // Not SIGTRAP, which gdb would take for the end of the step that rebooted.
                            let signal = Signal::SIGHUP;
                            running.report_stop(
                                guest,
                                MultiThreadStopReason::SignalWithThread { tid: thread(0), signal },
                            )?
                        }
                        News::Event(Event::Ended(Some(status))) => {
                            running.report_stop(guest, MultiThreadStopReason::Exited(status))?
                        }
                        News::Event(Event::Ended(None)) => running.into(),
                        News::Event(Event::Closed) => return Ok(Left::Over),
                    }
                }
                State::CtrlCInterrupt(interrupt) => {
                    let stopped = self.stop(guest).then(|| MultiThreadStopReason::SignalWithThread {
                        tid: guest.current(),
                        signal: Signal::SIGINT,
                    });
                    interrupt.interrupt_handled(guest, stopped)?
                }
                State::Disconnected(disconnected) => {
                    return Ok(match disconnected.get_reason() {
                        DisconnectReason::TargetExited(_) | DisconnectReason::TargetTerminated(_) => {
                            Left::Over
                        }
                        DisconnectReason::Disconnect => Left::Detached,
                        DisconnectReason::Kill => Left::Kill,
                    });
                }
            };
        }
    }

    /// Has all vCPUs stand still. What more of them had stopped for is told later, where it must be. False if the machine has
    /// ended.
    fn stop(&mut self, guest: &mut Guest) -> bool {
        if guest.debug.hold().is_err() {
            return false;
        }
        guest.running = false;
        self.queue.extend(self.events.try_iter());
        for event in std::mem::take(&mut self.queue) {
            match event {
                Event::Stopped(stop) => guest.postpone(stop),
                other => self.queue.push_back(other),
            }
        }
        true
    }

    fn event(&mut self) -> Option<Event> {
        self.queue.pop_front().or_else(|| self.events.try_recv().ok())
    }

    /// Waits for what comes next: events before bytes, so that no peer can keep them from being seen.
    fn news(&mut self, line: &mut Line) -> News {
        loop {
            if let Some(byte) = self.input.pop_front() {
                return News::Byte(byte);
            }
            if let Some(event) = self.event() {
                return News::Event(event);
            }
            if !self.poll(Some(line)) {
                continue;
            }
            let mut bytes = [0; 4096];
            match line.read(&mut bytes) {
                Ok(0) => return News::Gone,
                Ok(count) => self.input.extend(&bytes[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    log::warn!("gdb: {error}");
                    return News::Gone;
                }
            }
        }
    }

    /// Waits for events, for `line` (true: there is something to read), or else for somebody to connect. Whoever does while
    /// another is connected is turned away.
    fn poll(&mut self, line: Option<&Line>) -> bool {
        let mut fds = vec![PollFd::new(&*self.wake, PollFlags::IN)];
        if self.machine.is_some() {
            fds.push(PollFd::new(&self.door, PollFlags::IN));
        }
        if let Some(line) = &line {
            fds.push(PollFd::from_borrowed_fd(line.as_fd(), PollFlags::IN));
        }
        let ready = match rustix::event::poll(&mut fds, None) {
            Ok(_) => fds.iter().map(|fd| !fd.revents().is_empty()).collect(),
            Err(_) => Vec::new(),
        };
        if ready.first() == Some(&true) {
            let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
        }
        let readable = line.is_some() && ready.last() == Some(&true);
        // Not while the first may just be leaving.
        let another = line.is_some() && !readable && self.machine.is_some() && ready.get(1) == Some(&true);
        if another && self.door.accept().is_some() {
            log::warn!("gdb: refused a second connection");
        }
        readable
    }
}

fn release(machine: &Debug) {
    (0..machine.cpus()).for_each(|vcpu| machine.release(vcpu));
}

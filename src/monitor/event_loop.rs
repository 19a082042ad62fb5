//! Event loops: threads that wait for descriptors and call [`Handler`]s.
//!
//! The only user of the event-manager crate, and the only place that waits for more than one descriptor. A [`Worker`] is a loop with
//! one handler; an [`EventLoop`] is shared by several, which come and go while it runs.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::Instant;

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId, SubscriberOps,
};
use rustix::event::EventfdFlags;

use crate::threads::{self, Role};

/// A flag that a thread can wait for: an eventfd. Readable from [`Event::signal`] until [`Event::clear`].
///
/// (vmm-sys-util's cannot be borrowed as a descriptor, which is what [`Sources`] takes.)
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// A flag that is not set.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Sets the flag. Callable from any thread; never blocks.
    pub fn signal(&self) {
        // Fails only where the count is full: then the flag is set anyway.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Takes the flag down.
    pub fn clear(&self) {
        // Fails only where it is not set.
        let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
    }

    /// Another handle on the same flag.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What to wait for on a descriptor. Errors and hang-ups are always reported.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Interest {
    /// Something to read, or the end of it.
    pub input: bool,
    /// Room to write.
    pub output: bool,
}

impl Interest {
    /// Something to read.
    pub const INPUT: Self = Self { input: true, output: false };
    /// Something to read, or room to write.
    pub const BOTH: Self = Self { input: true, output: true };

    fn set(self) -> EventSet {
        let part = |wanted, set| if wanted { set } else { EventSet::empty() };
        part(self.input, EventSet::IN) | part(self.output, EventSet::OUT)
    }
}

/// The descriptors that a handler waits on, level-triggered. They stay the handler's: it removes one before closing it.
pub struct Sources<'a, 'b>(&'a mut EventOps<'b>);

impl Sources<'_, '_> {
    /// Waits on `fd` as well; [`Handler::ready`] is told by `token`.
    ///
    /// # Errors
    /// The descriptor cannot be polled (a regular file), or is there already.
    pub fn add(&mut self, fd: impl AsFd, token: u32, interest: Interest) -> io::Result<()> {
        let events = Events::with_data_raw(fd.as_fd().as_raw_fd(), token, interest.set());
        self.0.add(events).map_err(io::Error::other)
    }

    /// Changes what is waited for on `fd`, which was added under `token`. With no interest at all a hang-up still is reported.
    ///
    /// # Errors
    /// The descriptor is not there.
    pub fn change(&mut self, fd: impl AsFd, token: u32, interest: Interest) -> io::Result<()> {
        let events = Events::with_data_raw(fd.as_fd().as_raw_fd(), token, interest.set());
        self.0.modify(events).map_err(io::Error::other)
    }

    /// Waits on `fd` no longer.
    ///
    /// # Errors
    /// The descriptor is not there.
    pub fn remove(&mut self, fd: impl AsFd) -> io::Result<()> {
        self.0.remove(Events::empty_raw(fd.as_fd().as_raw_fd())).map_err(io::Error::other)
    }
}

/// What an event loop runs.
///
/// Called on the loop's thread, one call at a time. No call may block for long: the loop's other handlers wait, and so does
/// whoever stops it.
pub trait Handler: Send {
    /// Adds the first descriptors. Called once, when the handler is added to a loop.
    ///
    /// # Errors
    /// One of them cannot be polled; the handler is not added then.
    fn start(&mut self, sources: &mut Sources<'_, '_>) -> io::Result<()>;
    /// A descriptor that was added under `token` is ready, or at its end.
    fn ready(&mut self, token: u32, sources: &mut Sources<'_, '_>);
}

type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// A handler's number in its loop, once it is there.
type Place = Arc<Mutex<Option<SubscriberId>>>;

struct Subscribed<H> {
    handler: H,
    failed: Arc<Mutex<Option<io::Error>>>,
}

impl<H: Handler> MutEventSubscriber for Subscribed<H> {
    fn init(&mut self, ops: &mut EventOps) {
        *lock(&self.failed) = self.handler.start(&mut Sources(ops)).err();
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.handler.ready(events.data(), &mut Sources(ops));
    }
}

/// Wakes the loop, which then looks whether it should end.
struct Stop(Event);

impl MutEventSubscriber for Stop {
    fn init(&mut self, ops: &mut EventOps) {
        // An eventfd can be polled, and is there once.
        let _ = ops.add(Events::new_raw(self.0.as_fd().as_raw_fd(), EventSet::IN));
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.0.clear();
    }
}

enum State {
    /// Its handlers wait for [`EventLoop::run`].
    Idle(EventManager<Subscriber>),
    Running {
        endpoint: RemoteEndpoint<Subscriber>,
        thread: ThreadId,
        handle: Option<JoinHandle<()>>,
    },
    Over,
}

struct Inner {
    state: Mutex<State>,
    stopping: AtomicBool,
    stop: Event,
    ended: Arc<Ended>,
}

/// Whether the loop's thread has left the loop.
#[derive(Default)]
struct Ended {
    it: Mutex<bool>,
    told: Condvar,
}

/// A loop that several handlers share, on one thread. Clones are the same loop; it ends with the last of them.
#[derive(Clone)]
pub struct EventLoop(Arc<Inner>);

impl std::fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("EventLoop").finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EventLoop {
    /// A loop without thread: handlers can be added, and are served once it runs.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new() -> io::Result<Self> {
        let mut manager = EventManager::new().map_err(io::Error::other)?;
        let stop = Event::new()?;
        manager.add_subscriber(Box::new(Stop(stop.try_clone()?)) as Subscriber);
        let state = Mutex::new(State::Idle(manager));
        let (stopping, ended) = (AtomicBool::new(false), Arc::default());
        Ok(Self(Arc::new(Inner { state, stopping, stop, ended })))
    }

    /// Serves the handlers on a thread of its own from now on. Nothing happens if it runs already.
    ///
    /// # Errors
    /// The host is out of threads; the loop is over then.
    pub fn run(&self, role: Role) -> io::Result<()> {
        let mut state = lock(&self.0.state);
        let manager = match std::mem::replace(&mut *state, State::Over) {
            State::Idle(manager) => manager,
            other => {
                *state = other;
                return Ok(());
            }
        };
        let endpoint = manager.remote_endpoint();
        let (inner, ended) = (Arc::downgrade(&self.0), self.0.ended.clone());
        let mut manager = manager;
        let handle = threads::spawn(role, move || {
            // Not held between the turns: the last clone ends the loop.
            let goes_on = || inner.upgrade().is_some_and(|inner| !inner.stopping.load(Ordering::SeqCst));
            let mut failed = false;
            let mut it = loop {
                while goes_on() && !failed {
                    failed = manager.run().inspect_err(|error| log::error!("event loop: {error}")).is_err();
                }
                let it = lock(&ended.it);
                // Whoever had it stop may want it to go on.
                if failed || !goes_on() {
                    break it;
                }
            };
            *it = true;
            ended.told.notify_all();
        })?;
        *state = State::Running { endpoint, thread: handle.thread().id(), handle: Some(handle) };
        Ok(())
    }

    /// Adds a handler, which is served until what is returned is dropped. Called by a handler of this loop, it takes effect
    /// after that one's turn, and a failure is only logged.
    ///
    /// # Errors
    /// A descriptor of its cannot be polled; or the loop is over.
    pub fn add(&self, handler: impl Handler + 'static) -> io::Result<Registration> {
        let failed = Arc::<Mutex<Option<io::Error>>>::default();
        let subscriber: Subscriber = Box::new(Subscribed { handler, failed: failed.clone() });
        let id = Place::default();
        let registration = Registration { events: self.clone(), id: id.clone() };
        let (endpoint, own) = match &mut *lock(&self.0.state) {
            State::Idle(manager) => {
                *lock(&id) = Some(manager.add_subscriber(subscriber));
                let failed = lock(&failed).take();
                // Dropped without the state's lock, which removing takes.
                match failed {
                    None => return Ok(registration),
                    Some(error) => {
                        lock(&id).take().map(|id| manager.remove_subscriber(id).map(drop));
                        return Err(error);
                    }
                }
            }
            State::Running { endpoint, thread, .. } => (endpoint.clone(), *thread == thread::current().id()),
            State::Over => return Err(io::Error::other("the event loop is over")),
        };
        let add = move |ops: &mut dyn SubscriberOps<Subscriber = Subscriber>| {
            *lock(&id) = Some(ops.add_subscriber(subscriber));
            lock(&failed).take()
        };
        if own {
            let add = move |ops: &mut dyn SubscriberOps<Subscriber = Subscriber>| {
                if let Some(error) = add(ops) {
                    log::error!("event loop: {error}");
                }
            };
            return endpoint.fire(add).map(|()| registration).map_err(io::Error::other);
        }
        let failed = endpoint.call_blocking::<_, _, event_manager::Error>(move |ops| Ok(add(ops)));
        failed.map_err(io::Error::other)?.map_or(Ok(registration), Err)
    }

    /// Ends the loop and waits for its thread, unless this is that. Its handlers are dropped.
    pub fn stop(&self) {
        self.0.stop();
    }

    fn remove(&self, id: &Place) {
        let (endpoint, own) = match &mut *lock(&self.0.state) {
            State::Idle(manager) => {
                lock(id).take().map(|id| manager.remove_subscriber(id).map(drop));
                return;
            }
            State::Running { endpoint, thread, .. } => (endpoint.clone(), *thread == thread::current().id()),
            State::Over => return,
        };
        let id = id.clone();
        let remove = move |ops: &mut dyn SubscriberOps<Subscriber = Subscriber>| {
            lock(&id).take().map(|id| ops.remove_subscriber(id).map(drop));
        };
        // Fails only where the loop has ended, and the handler with it.
        let _ = match own {
            // A handler of the loop cannot wait for its own turn to end.
            true => endpoint.fire(remove),
            false => endpoint.call_blocking(move |ops| {
                remove(ops);
                Ok(())
            }),
        };
    }
}

impl Inner {
    fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.stop.signal();
        let State::Running { thread, handle, .. } = std::mem::replace(&mut *lock(&self.state), State::Over)
        else {
            return;
        };
        if let (true, Some(handle)) = (thread != thread::current().id(), handle) {
            let _ = handle.join();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A handler's place in an [`EventLoop`]. Dropping it removes the handler; on another thread than the loop's it returns when no
/// call of the handler is under way any more.
#[derive(Debug)]
pub struct Registration {
    events: EventLoop,
    id: Place,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.events.remove(&self.id);
    }
}

/// A thread that serves one [`Handler`]. Dropping it stops and joins the thread, however long that is in the handler's call.
#[derive(Debug)]
pub struct Worker {
    events: EventLoop,
    _registration: Registration,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// The host is out of descriptors or threads, or a source cannot be polled.
    pub fn spawn(role: Role, handler: impl Handler + 'static) -> io::Result<Self> {
        let events = EventLoop::new()?;
        let registration = events.add(handler)?;
        events.run(role)?;
        Ok(Self { events, _registration: registration })
    }

    /// Stops the thread. False if a call of the handler is still under way at `deadline`, after which the thread stops.
    pub fn stop_by(&self, deadline: Instant) -> bool {
        let inner = &self.events.0;
        inner.stopping.store(true, Ordering::SeqCst);
        inner.stop.signal();
        let it = lock(&inner.ended.it);
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = inner.ended.told.wait_timeout_while(it, left, |ended| !*ended);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Undoes [`Worker::stop_by`]. False if the thread has stopped.
    pub fn go_on(&self) -> bool {
        let inner = &self.events.0;
        let ended = lock(&inner.ended.it);
        inner.stopping.store(*ended, Ordering::SeqCst);
        !*ended
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.events.stop();
    }
}

/// A loop for tests, which runs.
#[cfg(test)]
pub(crate) fn running() -> EventLoop {
    let events = EventLoop::new().unwrap();
    events.run(Role::Control).unwrap();
    events
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// Sends on what it reads, and takes further pipes to read from.
    struct Echo {
        pipes: Vec<PipeReader>,
        more: Receiver<PipeReader>,
        wake: Event,
        heard: Sender<(u32, u8)>,
    }

    const WAKE: u32 = u32::MAX;

    impl Handler for Echo {
        fn start(&mut self, sources: &mut Sources<'_, '_>) -> io::Result<()> {
            sources.add(&self.wake, WAKE, Interest::INPUT)?;
            self.pipes.iter().zip(0..).try_for_each(|(pipe, token)| sources.add(pipe, token, Interest::INPUT))
        }

        fn ready(&mut self, token: u32, sources: &mut Sources<'_, '_>) {
            if token == WAKE {
                self.wake.clear();
                for pipe in self.more.try_iter() {
                    sources.add(&pipe, self.pipes.len() as u32, Interest::INPUT).unwrap();
                    self.pipes.push(pipe);
                }
                return;
            }
            let pipe = &mut self.pipes[token as usize];
            let mut byte = [0];
            match pipe.read(&mut byte).unwrap() {
                0 => sources.remove(&*pipe).unwrap(),
                _ => self.heard.send((token, byte[0])).unwrap(),
            }
        }
    }

    type Parts = (Echo, PipeWriter, Event, Sender<PipeReader>, Receiver<(u32, u8)>);

    fn echo() -> Parts {
        let (reader, writer) = pipe().unwrap();
        let ((heard, hear), (give, more)) = (channel(), channel());
        let wake = Event::new().unwrap();
        let echo = Echo { pipes: vec![reader], more, wake: wake.try_clone().unwrap(), heard };
        (echo, writer, wake, give, hear)
    }

    #[test]
    fn a_worker_serves_its_sources_and_stops_when_dropped() {
        let (echo, mut writer, _, _, hear) = echo();
        let worker = Worker::spawn(Role::Errand, echo).unwrap();
        writer.write_all(b"ab").unwrap();
        assert_eq!((hear.recv().unwrap(), hear.recv().unwrap()), ((0, b'a'), (0, b'b')));
        drop(worker);
        assert!(hear.recv().is_err(), "the handler is gone");
    }

    #[test]
    fn handlers_and_sources_come_and_go_while_a_loop_runs() {
        let events = EventLoop::new().unwrap();
        let (early, mut first, wake, give, hear_early) = echo();
        let early = events.add(early).unwrap();
        first.write_all(b"x").unwrap();
        events.run(Role::Errand).unwrap();
        assert_eq!(hear_early.recv().unwrap(), (0, b'x'), "what came before the thread");
        let (late, mut second, .., hear_late) = echo();
        let late = events.add(late).unwrap();
        second.write_all(b"y").unwrap();
        assert_eq!(hear_late.recv().unwrap(), (0, b'y'));
        let (reader, mut third) = pipe().unwrap();
        give.send(reader).unwrap();
        wake.signal();
        third.write_all(b"z").unwrap();
        assert_eq!(hear_early.recv().unwrap(), (1, b'z'));
        // At its end a pipe stays readable: removed, it keeps nobody busy, and the others go on.
        drop(third);
        first.write_all(b"w").unwrap();
        assert_eq!(hear_early.recv().unwrap(), (0, b'w'));
        drop(early);
        assert!(hear_early.recv().is_err(), "removed, with its pipes");
        second.write_all(b"v").unwrap();
        assert_eq!(hear_late.recv().unwrap(), (0, b'v'));
        events.stop();
        assert!(hear_late.recv().is_err());
        assert!(events.add(echo().0).is_err(), "over");
        drop(late);
    }

    #[test]
    fn a_source_that_cannot_be_polled_is_an_error() {
        struct File(std::fs::File);
        impl Handler for File {
            fn start(&mut self, sources: &mut Sources<'_, '_>) -> io::Result<()> {
                sources.add(&self.0, 0, Interest::INPUT)
            }
            fn ready(&mut self, _: u32, _: &mut Sources<'_, '_>) {}
        }
        let file = File(std::fs::File::open("/proc/self/exe").unwrap());
        assert!(Worker::spawn(Role::Errand, file).is_err());
    }
}

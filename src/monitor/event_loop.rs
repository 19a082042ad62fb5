//! Worker threads: wait for file descriptors, call one handler, stop by eventfd.
//!
//! The only user of the event-manager crate. Devices and the control socket implement [`Handler`] and
//! never see epoll.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::thread::{self, JoinHandle};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use rustix::event::EventfdFlags;

/// A flag that a thread can wait for: an eventfd. Readable from [`Event::signal`] until [`Event::clear`].
///
/// (vmm-sys-util's cannot be borrowed as a descriptor, which is what [`Handler::sources`] gives.)
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

/// What a [`Worker`] runs.
pub trait Handler: Send {
    /// The descriptors to wait on, level-triggered for reading. Asked once, when the worker starts; they stay
    /// open for as long as the handler lives. (One whose interest changes can be an epoll descriptor itself.)
    fn sources(&self) -> Vec<BorrowedFd<'_>>;
    /// Source `index` is readable, or at its end. Must not block for long: stopping waits for it.
    fn ready(&mut self, index: usize);
}

/// A thread that serves one [`Handler`]. Dropping it stops and joins the thread.
#[derive(Debug)]
pub struct Worker {
    stop: Event,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread called `name` (cut to 15 bytes by the kernel).
    ///
    /// # Errors
    /// The host is out of descriptors or threads, or a source cannot be polled.
    pub fn spawn(name: &str, handler: impl Handler + 'static) -> io::Result<Self> {
        let stop = Event::new()?;
        let serve = Serve { handler, stop: stop.try_clone()?, stopping: false, failed: None };
        let mut manager = EventManager::new().map_err(io::Error::other)?;
        let id = manager.add_subscriber(serve);
        if let Some(error) = manager.subscriber_mut(id).ok().and_then(|serve| serve.failed.take()) {
            return Err(error);
        }
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
            while !manager.subscriber_mut(id).map_or(true, |serve| serve.stopping) {
                if let Err(error) = manager.run() {
                    log::error!("event loop: {error}");
                    return;
                }
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        // A handler may drop its own worker; a thread cannot join itself.
        self.stop.signal();
        if thread.thread().id() != thread::current().id() {
            let _ = thread.join();
        }
    }
}

/// The token of the stop event; sources have their index.
const STOP: u32 = u32::MAX;

struct Serve<H> {
    handler: H,
    stop: Event,
    stopping: bool,
    failed: Option<io::Error>,
}

impl<H: Handler> MutEventSubscriber for Serve<H> {
    fn init(&mut self, ops: &mut EventOps) {
        let mut add = |fd: i32, token| ops.add(Events::with_data_raw(fd, token, EventSet::IN));
        let mut result = add(self.stop.as_fd().as_raw_fd(), STOP);
        for (index, source) in self.handler.sources().iter().enumerate() {
            result = result.and_then(|()| add(source.as_raw_fd(), index as u32));
        }
        self.failed = result.err().map(io::Error::other);
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        match events.data() {
            STOP => self.stopping = true,
            index => self.handler.ready(index as usize),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    struct Echo(io::PipeReader, mpsc::Sender<u8>);
    impl Handler for Echo {
        fn sources(&self) -> Vec<BorrowedFd<'_>> {
            vec![self.0.as_fd()]
        }
        fn ready(&mut self, index: usize) {
            let mut byte = [index as u8];
            io::Read::read_exact(&mut self.0, &mut byte).unwrap();
            self.1.send(byte[0]).unwrap();
        }
    }

    #[test]
    fn serves_its_sources_and_stops_when_dropped() {
        let (reader, mut writer) = io::pipe().unwrap();
        let (sender, receiver) = mpsc::channel();
        let worker = Worker::spawn("test", Echo(reader, sender)).unwrap();
        io::Write::write_all(&mut writer, b"ab").unwrap();
        assert_eq!(receiver.recv().unwrap(), b'a');
        assert_eq!(receiver.recv().unwrap(), b'b');
        drop(worker);
        assert!(receiver.recv().is_err(), "the handler is gone");
    }

    #[test]
    fn a_source_that_cannot_be_polled_is_an_error() {
        struct File(std::fs::File);
        impl Handler for File {
            fn sources(&self) -> Vec<BorrowedFd<'_>> {
                vec![self.0.as_fd()]
            }
            fn ready(&mut self, _: usize) {}
        }
        let file = File(std::fs::File::open("/proc/self/exe").unwrap());
        assert!(Worker::spawn("test", file).is_err());
    }
}

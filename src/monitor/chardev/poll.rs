//! The one descriptor that an endpoint is waited on with: an epoll set of whatever is of interest right now.
//!
//! Nobody reads events out of it; a device's worker waits for the set itself to be readable and then looks at
//! everything. So what is registered is exactly what should wake the worker, and no more.
//!
//! A set of its own, and not sources of the worker's loop, because vCPUs change it, too: one that reads makes room for input, one that
//! writes finds a client gone and closes it. The kernel then forgets the descriptor by itself, at once, whoever closes it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd};

pub use rustix::event::epoll::EventFlags;

/// What is registered for one descriptor at present; `None`: nothing, not even hang-ups.
pub type Watch = Option<EventFlags>;

/// An epoll set, and a descriptor that is always ready for what epoll takes none for (regular files).
#[derive(Debug)]
pub struct Poll {
    epoll: OwnedFd,
    /// Its count is 1 for ever.
    ready: OwnedFd,
    ready_watch: Watch,
}

impl Poll {
    /// An empty set.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let ready = eventfd(1, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { epoll, ready, ready_watch: None })
    }

    /// A descriptor that is readable when anything of interest is ready.
    pub fn try_clone_fd(&self) -> io::Result<OwnedFd> {
        self.epoll.try_clone()
    }

    /// Makes what is registered for `fd` be `wanted`; a system call only if that changes anything.
    pub fn set(&self, fd: BorrowedFd<'_>, current: &mut Watch, wanted: Watch) -> io::Result<()> {
        let data = epoll::EventData::new_u64(0);
        match (*current, wanted) {
            (None, None) => (),
            (Some(a), Some(b)) if a == b => (),
            (None, Some(events)) => epoll::add(&self.epoll, fd, data, events)?,
            (Some(_), Some(events)) => epoll::modify(&self.epoll, fd, data, events)?,
            (Some(_), None) => epoll::delete(&self.epoll, fd)?,
        }
        *current = wanted;
        Ok(())
    }

    /// Makes the set ready at once, for as long as `ready` stays true.
    pub fn set_ready(&mut self, ready: bool) -> io::Result<()> {
        let mut watch = self.ready_watch;
        let result = self.set(self.ready.as_fd(), &mut watch, ready.then_some(EventFlags::IN));
        self.ready_watch = watch;
        result
    }
}

/// What is ready on `fd` now; nothing if that cannot be told.
pub fn ready_now(fd: BorrowedFd<'_>, events: PollFlags) -> PollFlags {
    let mut fds = [PollFd::from_borrowed_fd(fd, events)];
    match rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
        Ok(1..) => fds[0].revents(),
        _ => PollFlags::empty(),
    }
}

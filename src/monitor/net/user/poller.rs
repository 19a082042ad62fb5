//! Which of the host's descriptors can go on: one epoll set, edge-triggered, itself a descriptor to wait on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{Timespec, epoll};

/// Whose descriptor it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Tcp,
    Udp,
    Ping,
    Listener,
    Timer,
    Wake,
}

const SOURCES: [Source; 6] =
    [Source::Tcp, Source::Udp, Source::Ping, Source::Listener, Source::Timer, Source::Wake];

/// What a descriptor can do now that it could not do before.
#[derive(Debug, Clone, Copy)]
pub struct Ready {
    pub source: Source,
    pub id: u64,
    pub input: bool,
    pub output: bool,
}

/// Events taken at once.
const BATCH: usize = 64;

pub struct Poller(OwnedFd);

impl Poller {
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Reports `fd` until it is closed, once for each time that it becomes ready.
    pub fn add(&self, fd: impl AsFd, source: Source, id: u64) -> io::Result<()> {
        let number = SOURCES.iter().position(|other| *other == source).unwrap_or_default() as u64;
        let data = epoll::EventData::new_u64(id << 3 | number);
        // What is ours says so until it is cleared.
        let flags = match source {
            Source::Wake => epoll::EventFlags::IN,
            _ => epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET,
        };
        Ok(epoll::add(&self.0, fd, data, flags)?)
    }

    /// What has become ready; nothing is waited for.
    pub fn ready(&self) -> Vec<Ready> {
        use epoll::EventFlags as Flags;
        let mut events = Vec::with_capacity(BATCH);
        let _ = epoll::wait(&self.0, rustix::buffer::spare_capacity(&mut events), Some(&Timespec::default()));
        let ready = events.iter().filter_map(|event| {
            let (data, flags) = (event.data.u64(), event.flags);
            let ended = flags.intersects(Flags::HUP | Flags::ERR);
            Some(Ready {
                source: *SOURCES.get((data & 7) as usize)?,
                id: data >> 3,
                input: ended || flags.intersects(Flags::IN | Flags::RDHUP),
                output: ended || flags.contains(Flags::OUT),
            })
        });
        ready.collect()
    }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

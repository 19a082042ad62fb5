//! [`Poller`]: which of many descriptors can go on, as one descriptor to wait on: an epoll set, edge-triggered.
//!
//! For who serves connections that come and go by the hundred, and is itself one source of a loop.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{Timespec, epoll};

use crate::event_loop::Interest;

/// Whose descriptors they are: at most 8 kinds.
pub trait Source: Copy + PartialEq + 'static {
    /// All of them.
    const ALL: &'static [Self];
}

/// What a descriptor can do now that it could not do before.
#[derive(Debug, Clone, Copy)]
pub struct Ready<S> {
    /// The kind that it was added under.
    pub source: S,
    /// The number that it was added under.
    pub id: u64,
    /// There is something to read, or the end of it.
    pub input: bool,
    /// There is room to write, or nobody to write to.
    pub output: bool,
    /// Both directions are at their end.
    pub hung_up: bool,
}

/// Bits of the kind.
const SOURCE: u32 = 3;
/// Events taken at once.
const BATCH: usize = 64;

/// The set.
#[derive(Debug)]
pub struct Poller<S> {
    fd: OwnedFd,
    _source: PhantomData<fn(S)>,
}

impl<S: Source> Poller<S> {
    /// An empty one.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self { fd: epoll::create(epoll::CreateFlags::CLOEXEC)?, _source: PhantomData })
    }

    /// Reports `fd` until it is closed, once for each time that it becomes ready. `id` is below 2^61.
    ///
    /// # Errors
    /// The descriptor cannot be polled, or the host is out of memory.
    pub fn add(&self, fd: impl AsFd, source: S, id: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(&self.fd, fd, data(source, id), edges(interest))?)
    }

    /// Changes what is waited for on `fd`, which was added under the same name. It is reported once more if it is ready.
    ///
    /// # Errors
    /// The descriptor is not there.
    pub fn change(&self, fd: impl AsFd, source: S, id: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(&self.fd, fd, data(source, id), edges(interest))?)
    }

    /// Reports `fd` for as long as it is readable.
    ///
    /// # Errors
    /// As [`Poller::add`].
    pub fn add_steady(&self, fd: impl AsFd, source: S, id: u64) -> io::Result<()> {
        Ok(epoll::add(&self.fd, fd, data(source, id), epoll::EventFlags::IN)?)
    }

    /// Reports `fd` no more.
    ///
    /// # Errors
    /// The descriptor is not there.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.fd, fd)?)
    }

    /// What has become ready; nothing is waited for. The set stays readable while there is more.
    pub fn ready(&self) -> Vec<Ready<S>> {
        use epoll::EventFlags as Flags;
        let mut events = Vec::with_capacity(BATCH);
        let _ =
            epoll::wait(&self.fd, rustix::buffer::spare_capacity(&mut events), Some(&Timespec::default()));
        let ready = events.iter().filter_map(|event| {
            let (data, flags) = (event.data.u64(), event.flags);
            let ended = flags.intersects(Flags::HUP | Flags::ERR);
            Some(Ready {
                source: *S::ALL.get((data & ((1 << SOURCE) - 1)) as usize)?,
                id: data >> SOURCE,
                input: ended || flags.intersects(Flags::IN | Flags::RDHUP),
                output: ended || flags.contains(Flags::OUT),
                hung_up: flags.contains(Flags::HUP),
            })
        });
        ready.collect()
    }
}

impl<S> AsFd for Poller<S> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn data<S: Source>(source: S, id: u64) -> epoll::EventData {
    let number = S::ALL.iter().position(|other| *other == source).unwrap_or_default() as u64;
    epoll::EventData::new_u64(id << SOURCE | number)
}

fn edges(interest: Interest) -> epoll::EventFlags {
    use epoll::EventFlags as Flags;
    let part = |wanted, flag| if wanted { flag } else { Flags::empty() };
    Flags::ET | part(interest.input, Flags::IN | Flags::RDHUP) | part(interest.output, Flags::OUT)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Kind {
        First,
        Second,
    }

    impl Source for Kind {
        const ALL: &'static [Self] = &[Self::First, Self::Second];
    }

    #[test]
    fn each_edge_is_told_once_and_under_its_name() {
        let poller = Poller::new().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        poller.add(&ours, Kind::Second, 1 << 60, Interest::INPUT).unwrap();
        assert!(poller.ready().is_empty(), "no room to write was asked for");
        theirs.write_all(b"ab").unwrap();
        let ready = poller.ready();
        assert_eq!((ready.len(), ready[0].source, ready[0].id), (1, Kind::Second, 1 << 60));
        assert!(ready[0].input && !ready[0].output && !ready[0].hung_up);
        assert!(poller.ready().is_empty(), "told already, though nothing was read");
        theirs.write_all(b"c").unwrap();
        assert!(poller.ready()[0].input);
        (&ours).read_exact(&mut [0; 3]).unwrap();
        poller.change(&ours, Kind::Second, 1 << 60, Interest::BOTH).unwrap();
        assert!(poller.ready()[0].output);
        drop(theirs);
        assert!(poller.ready()[0].hung_up);
        drop(ours);
        assert!(poller.ready().is_empty(), "it is gone with its descriptor");
    }

    #[test]
    fn what_is_steady_is_told_until_it_is_over() {
        let poller = Poller::new().unwrap();
        let flag = crate::event_loop::Event::new().unwrap();
        poller.add_steady(&flag, Kind::First, 7).unwrap();
        flag.signal();
        assert!((0..3).all(|_| poller.ready()[0].source == Kind::First));
        flag.clear();
        assert!(poller.ready().is_empty());
        flag.signal();
        poller.remove(&flag).unwrap();
        assert!(poller.ready().is_empty());
    }
}

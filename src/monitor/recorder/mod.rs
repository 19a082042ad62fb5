//! The recorder: what happens in the monitor as fixed-size [`Event`]s, in one lock-free ring per thread that writes.
//!
//! A vCPU thread or a device's worker asks [`Recorder::is_on`] (one predictable branch) and writes to its own [`Track`];
//! one reader, elsewhere, takes events out with [`Recorder::drain`], and a [`Watcher`] sees them as they pass. Memory is bounded:
//! what finds a ring full is dropped and counted. Knows no device, no file and no rendering: those are `trace`'s.

pub mod event;
pub mod frame;
mod ring;
mod step;
mod x86_64;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

pub use event::{Event, Kind};
use ring::Ring;
pub use step::{Step, Steps};
pub use x86_64::registers::Registers;
pub use x86_64::{clock, registers};

/// All tracks of a machine, and the switch.
#[derive(Debug, Default)]
pub struct Recorder {
    /// Bits: [`RECORDED`], [`WATCHED`].
    wanted: AtomicU8,
    all_registers: AtomicBool,
    tracks: Mutex<Vec<Arc<Shared>>>,
    watcher: Mutex<Option<Watcher>>,
}

/// Somebody keeps the events.
const RECORDED: u8 = 1;
/// Somebody looks at them in passing.
const WATCHED: u8 = 2;

/// Is shown all events as the reader takes them out, in the reader's thread.
pub struct Watcher(pub Box<dyn FnMut(&Taken<'_>) + Send>);

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watcher")
    }
}

/// One thread's events, for the reader.
#[derive(Debug)]
struct Shared {
    name: String,
    /// Made when the first event comes: a machine that nobody traces pays nothing.
    ring: OnceLock<Ring>,
}

/// One thread's events, for that thread: there is one of it, and it is not cloned, because a ring has one writer.
#[derive(Debug)]
pub struct Track {
    shared: Arc<Shared>,
}

/// What the reader took from one track.
#[derive(Debug)]
pub struct Taken<'a> {
    /// Number of the track: the order in which they were made.
    pub track: usize,
    /// Its name: the thread's.
    pub name: &'a str,
    /// In order of time.
    pub events: &'a [Event],
    /// How many were lost before these, since the last time.
    pub dropped: u64,
}

impl Recorder {
    /// Whether events are wanted.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) != 0
    }

    /// Who wants events, as a set of bits. A bit that is new means that its reader has not seen what went before.
    pub fn wanted(&self) -> u8 {
        self.wanted.load(Ordering::Relaxed)
    }

    /// Asks for events, or for no more. Threads see it at their next event.
    pub fn set_on(&self, on: bool) {
        self.want(RECORDED, on);
    }

    /// Shows events to `watcher` from now on, or with `None` to no one. Does not take the place of a reader: somebody has
    /// to [`drain`](Self::drain).
    pub fn watch(&self, watcher: Option<Watcher>) {
        let mut place = lock(&self.watcher);
        self.want(WATCHED, watcher.is_some());
        *place = watcher;
    }

    fn want(&self, who: u8, on: bool) {
        if on {
            self.wanted.fetch_or(who, Ordering::Relaxed);
        } else {
            self.wanted.fetch_and(!who, Ordering::Relaxed);
        }
    }

    /// Asks for the registers at every exit, and not only where its place in the guest is seen for the first time.
    pub fn set_all_registers(&self, on: bool) {
        self.all_registers.store(on, Ordering::Relaxed);
    }

    /// Whether registers are wanted at every exit.
    pub fn wants_all_registers(&self) -> bool {
        self.all_registers.load(Ordering::Relaxed)
    }

    /// A track for the thread called `name`. If there was one of that name (the guest was reset, and its threads made
    /// anew) the new one goes on in its place.
    pub fn track(&self, name: &str) -> Track {
        let mut tracks = self.tracks();
        let known = tracks.iter().find(|track| track.name == name && Arc::strong_count(track) == 1);
        let shared = known.cloned().unwrap_or_else(|| {
            let shared = Arc::new(Shared { name: name.to_owned(), ring: OnceLock::new() });
            tracks.push(shared.clone());
            shared
        });
        Track { shared }
    }

    /// Takes everything out that has been written. One reader at a time.
    pub fn drain(&self, sink: &mut dyn FnMut(Taken<'_>)) {
        let tracks = self.tracks();
        let mut watcher = lock(&self.watcher);
        let mut events = Vec::new();
        for (number, track) in tracks.iter().enumerate() {
            let Some(ring) = track.ring.get() else { continue };
            let dropped = ring.take(&mut events);
            if dropped > 0 || !events.is_empty() {
                let taken = Taken { track: number, name: &track.name, events: &events, dropped };
                if let Some(Watcher(watcher)) = &mut *watcher {
                    watcher(&taken);
                }
                sink(taken);
            }
            events.clear();
        }
    }

    /// Held for the length of a [`Recorder::drain`]: so there is one reader at a time.
    fn tracks(&self) -> MutexGuard<'_, Vec<Arc<Shared>>> {
        lock(&self.tracks)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Track {
    /// Writes an event, or counts it as dropped where the reader is too slow. Never blocks.
    #[inline]
    pub fn write(&mut self, event: Event) {
        self.shared.ring.get_or_init(Ring::new).put(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(time: u64) -> Event {
        Event { time, ..Event::default() }
    }

    #[test]
    fn tracks_are_told_apart_and_drained_once() {
        let recorder = Recorder::default();
        let (mut a, mut b) = (recorder.track("vcpu0"), recorder.track("vcpu1"));
        (0..3).for_each(|time| a.write(event(time)));
        b.write(event(9));
        let mut seen = Vec::new();
        let mut look = |recorder: &Recorder| {
            seen.clear();
            recorder.drain(&mut |taken| {
                seen.push((taken.track, taken.name.to_owned(), taken.events.len(), taken.dropped));
            });
            seen.clone()
        };
        assert_eq!(look(&recorder), [(0, "vcpu0".to_owned(), 3, 0), (1, "vcpu1".to_owned(), 1, 0)]);
        assert_eq!(look(&recorder), []);
        drop(a);
        let mut again = recorder.track("vcpu0");
        again.write(event(10));
        assert_eq!(look(&recorder), [(0, "vcpu0".to_owned(), 1, 0)]);
    }

    #[test]
    fn a_watcher_sees_what_the_reader_takes_and_either_keeps_the_switch_on() {
        let recorder = Recorder::default();
        let mut track = recorder.track("vcpu0");
        recorder.set_on(true);
        let (seen, watched) = std::sync::mpsc::channel();
        recorder.watch(Some(Watcher(Box::new(move |taken| _ = seen.send(taken.events.len())))));
        track.write(event(1));
        let mut read = 0;
        recorder.drain(&mut |taken| read += taken.events.len());
        assert_eq!((read, watched.try_recv()), (1, Ok(1)));
        recorder.watch(None);
        assert!(recorder.is_on() && watched.try_recv().is_err());
        recorder.set_on(false);
        assert!(!recorder.is_on());
    }

    #[test]
    fn a_full_ring_drops_and_counts() {
        let recorder = Recorder::default();
        let mut track = recorder.track("vcpu0");
        let more = 10;
        (0..(Ring::EVENTS + more) as u64).for_each(|time| track.write(event(time)));
        let mut count = 0;
        recorder.drain(&mut |taken| {
            count = taken.events.len();
            assert_eq!(taken.events[count - 1].time, Ring::EVENTS as u64 - 1);
            assert_eq!(taken.dropped, more as u64);
        });
        assert_eq!(count, Ring::EVENTS);
    }

    #[test]
    fn a_reader_beside_the_writer_sees_whole_events_in_order() {
        let recorder = Arc::new(Recorder::default());
        let mut track = recorder.track("vcpu0");
        const ALL: u64 = 300_000;
        let writer = std::thread::spawn(move || {
            for time in 1..=ALL {
                let event =
                    Event { time, rip: time ^ 0xff, guest: time * 3, value: !time, ..Event::default() };
                track.write(event);
            }
        });
        let (mut last, mut seen, mut dropped) = (0, 0, 0);
        while seen + dropped < ALL {
            recorder.drain(&mut |taken| {
                dropped += taken.dropped;
                for event in taken.events {
                    assert!(event.time > last);
                    assert_eq!((event.rip, event.guest), (event.time ^ 0xff, event.time * 3));
                    assert_eq!(event.value, !event.time);
                    last = event.time;
                    seen += 1;
                }
            });
        }
        writer.join().unwrap();
        assert!(seen > 0);
    }
}

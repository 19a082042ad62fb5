//! [`Traffic`]: what a network device has carried and dropped, in counters that any thread may read at any time.
//!
//! Ways are named as the guest sees them: it receives, and it sends. A count is what the device saw: a frame that the host's side
//! drops before (a tap whose queue is full) is in that side's counters alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::config::{Mac, NetTarget};

/// A network device of a machine, for those who look.
#[derive(Debug, Clone)]
pub struct Network {
    /// The device's name in the machine.
    pub device: String,
    /// Where its frames go.
    pub to: NetTarget,
    /// The guest's address, unless it has chosen another.
    pub mac: Mac,
    /// What it has carried.
    pub traffic: Arc<Traffic>,
}

/// A device's counters, from the machine's first start on: a reboot of the guest does not set them back.
#[derive(Debug, Default)]
pub struct Traffic {
    /// To the guest.
    pub received: Way,
    /// From it.
    pub sent: Way,
    up: AtomicBool,
}

impl Traffic {
    /// Whether somebody is at the other end of every link.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// Says whether somebody is.
    pub fn set_up(&self, up: bool) {
        self.up.store(up, Ordering::Relaxed);
    }
}

/// One way's counters. They have one writer at a time, who holds the device: adding takes no lock and no locked instruction.
#[derive(Debug, Default)]
pub struct Way {
    frames: AtomicU64,
    bytes: AtomicU64,
    dropped: [AtomicU64; Drop::COUNT],
}

/// Why a frame was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drop {
    /// The driver's receive modes, addresses or VLANs exclude it.
    Filtered,
    /// It is longer than the driver's buffers; or the user network had no room for it, or no packet that is long enough.
    NoRoom,
    /// Shorter than Ethernet's header; or a header of virtio-net that cannot be right.
    Malformed,
    /// Nobody is at the other end.
    LinkDown,
    /// The host's side did not take it: its interface is down, its frames are shorter, its queue is full.
    Refused,
}

impl Drop {
    const COUNT: usize = 5;
}

/// [`Way`] at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Frames that arrived.
    pub frames: u64,
    /// Their bytes, with Ethernet's header.
    pub bytes: u64,
    /// Frames that did not.
    pub dropped: Dropped,
}

/// Frames dropped, by why: see [`Drop`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "they are the variants of Drop")]
pub struct Dropped {
    pub filtered: u64,
    pub no_room: u64,
    pub malformed: u64,
    pub link_down: u64,
    pub refused: u64,
}

impl Dropped {
    /// All of them.
    pub fn total(&self) -> u64 {
        let Self { filtered, no_room, malformed, link_down, refused } = *self;
        [no_room, malformed, link_down, refused].into_iter().fold(filtered, u64::saturating_add)
    }
}

impl Way {
    /// A frame of `len` bytes was carried.
    pub fn carried(&self, len: usize) {
        add(&self.frames, 1);
        add(&self.bytes, len as u64);
    }

    /// `count` frames were dropped that had been counted as carried, or not at all.
    pub fn dropped(&self, why: Drop, count: u64) {
        add(&self.dropped[why as usize], count);
    }

    /// The counters now.
    pub fn counts(&self) -> Counts {
        let dropped = |why: Drop| self.dropped[why as usize].load(Ordering::Relaxed);
        Counts {
            frames: self.frames.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            dropped: Dropped {
                filtered: dropped(Drop::Filtered),
                no_room: dropped(Drop::NoRoom),
                malformed: dropped(Drop::Malformed),
                link_down: dropped(Drop::LinkDown),
                refused: dropped(Drop::Refused),
            },
        }
    }
}

fn add(counter: &AtomicU64, count: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
}

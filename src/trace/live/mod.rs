//! What a running machine does, seen from outside: `vmm top`.
//!
//! The monitor adds the recorder's events up ([`tally`]) while somebody is attached ([`watch`]), and gives the sums out when it is
//! asked ([`Sample`]); who asks takes the difference between two of them ([`rates`]). Sums, and not a stream of events, because
//! they stay the same size however fast the guest exits: a viewer that is slow, stopped or hostile costs the monitor nothing,
//! misses nothing, and any number of them can ask, each as often as it likes, beside a recording to a file. vCPUs write to their
//! rings as for any recording and wait for nobody.

pub mod rates;
pub mod tally;
pub mod watch;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use vmm_monitor::config::host_path;
use vmm_monitor::net::traffic::Counts;

/// How often something came, and the ticks that it took in the monitor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// How often.
    pub count: u64,
    /// Ticks.
    pub ticks: u64,
}

impl Work {
    fn add(&mut self, ticks: u32) {
        self.count += 1;
        self.ticks += u64::from(ticks);
    }
}

/// One vCPU.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vcpu {
    /// Its exits to the monitor.
    pub exits: Work,
    /// Its thread's time on a processor, in nanoseconds (/proc/PID/task/TID/schedstat, first field). None: not known yet, or not
    /// told by this host.
    pub cpu_ns: Option<u64>,
    /// Its thread's time ready to run and waiting for a processor (the second field).
    pub waiting_ns: Option<u64>,
    /// All its exits, those inside KVM included, as KVM counts them; where it does.
    pub kvm_exits: Option<u64>,
}

/// One device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Exits for its ports and registers.
    pub exits: Work,
    /// Bytes that those moved.
    pub bytes: u64,
    /// Its worker's turns: at a queue that was kicked (kicks that come together are one), or at its host end.
    pub turns: Work,
    /// Of those, at a queue.
    pub kicks: u64,
    /// Requests that were completed.
    pub completed: u64,
    /// Interrupts to the guest by its queues or configuration.
    pub interrupts: u64,
    /// Of a network device: frames to the guest and from it, since the machine's first start.
    #[serde(default)]
    pub received: Counts,
    /// From the guest.
    #[serde(default)]
    pub sent: Counts,
}

/// The sums at one moment, since somebody attached first. Differences of two say what happened between.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Nanoseconds since the monitor's start.
    pub ns: u64,
    /// The same moment in ticks of the recorder's clock.
    pub ticks: u64,
    /// The guest's kernel, for its symbols.
    #[serde(default, with = "host_path::optional")]
    pub kernel: Option<PathBuf>,
    /// The host's processor: "AuthenticAMD", "GenuineIntel".
    pub vendor: String,
    /// The run is being recorded to a file as well.
    pub recorded: bool,
    /// Who looks, the asker included.
    pub viewers: usize,
    /// Exits to the monitor by kind, in the words of `vmm trace`.
    pub reasons: BTreeMap<String, Work>,
    /// By name; those that have been seen.
    pub vcpus: BTreeMap<String, Vcpu>,
    /// By name; those that had something to do.
    pub devices: BTreeMap<String, Device>,
    /// Exits to the monitor by guest instruction pointer.
    pub places: Vec<(u64, Work)>,
    /// Those from more places than are kept apart.
    pub elsewhere: Work,
    /// Events that found a ring full.
    pub lost: u64,
    /// KVM's own counters, all vCPUs together; those of exits.
    pub kvm: BTreeMap<String, u64>,
    /// Kernel code that was seen lately, by address: tells where the kernel runs (KASLR).
    pub code: Vec<(u64, Vec<u8>)>,
}

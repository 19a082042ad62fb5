//! What is compared: one file per suite. Each makes its contenders and has `measure` take the samples.

mod block;
mod boot;
mod console;
mod cpu;
mod exits;
mod fork;
mod image;
mod mem;
mod memory;
mod neighbours;
mod net;
mod places;
mod scale;
mod share;
mod steps;

use std::fmt;
use std::str::FromStr;

use super::measure::Plan;
use super::result::{Contender, Figure, Suite};
use super::rivals::{Setting, copy};
use crate::sandbox::mounts;

/// The suites by name, in the order in which they run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Name {
    /// Start to first output and to exit.
    Boot,
    /// From a snapshot to the first instruction, to a command, and to exit.
    Fork,
    /// A start by its steps.
    Steps,
    /// What idle instances cost in memory.
    Memory,
    /// What instances on one image cost on disk.
    Image,
    /// Round trips of exits.
    Exits,
    /// Integer and floating-point work.
    Cpu,
    /// Memory bandwidth and latency.
    Mem,
    /// Disk I/O.
    Block,
    /// Shared folders.
    Share,
    /// Networks.
    Net,
    /// Ping-pong through the console.
    Console,
    /// Many at once, many CPUs, much memory.
    Scale,
    /// A quiet machine beside noisy ones.
    Neighbours,
}

impl Name {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Boot,
        Self::Fork,
        Self::Steps,
        Self::Memory,
        Self::Image,
        Self::Exits,
        Self::Cpu,
        Self::Mem,
        Self::Block,
        Self::Share,
        Self::Net,
        Self::Console,
        Self::Scale,
        Self::Neighbours,
    ];

    /// As on the command line.
    pub fn text(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Fork => "fork",
            Self::Steps => "steps",
            Self::Memory => "memory",
            Self::Image => "image",
            Self::Exits => "exits",
            Self::Cpu => "cpu",
            Self::Mem => "mem",
            Self::Block => "block",
            Self::Share => "share",
            Self::Net => "net",
            Self::Console => "console",
            Self::Scale => "scale",
            Self::Neighbours => "neighbours",
        }
    }

    /// Whether it boots Linux in a VM, so that a KVM without hardware virtualization cannot show all of it.
    pub fn needs_linux(self) -> bool {
        !matches!(self, Self::Steps | Self::Exits | Self::Image)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|name| name.text() == text);
        found.ok_or_else(|| {
            format!("there is no suite {text:?}; there are {}", Self::ALL.map(Self::text).join(", "))
        })
    }
}

/// Runs a suite. `progress` is told how far it is (0 to 1), and what it is at.
///
/// # Errors
/// Nothing of it can be measured here, and why. A rival that cannot run is no error: it is told in the result.
pub fn run(
    name: Name,
    setting: &Setting,
    plan: Plan,
    progress: &mut dyn FnMut(f64, &str),
) -> Result<Suite, String> {
    if setting.repeatable_clock
        && matches!(name, Name::Cpu | Name::Mem | Name::Block | Name::Console | Name::Neighbours)
    {
        return Err("it measures what a clock that counts instructions hides (caches, disks, schedulers): leave --icount away"
            .to_owned());
    }
    let suite = match name {
        Name::Boot => boot::run(setting, plan, progress),
        Name::Fork => fork::run(setting, plan, progress),
        Name::Steps => steps::run(setting, plan, progress),
        Name::Memory => memory::run(setting, plan, progress),
        Name::Image => image::run(setting, plan, progress),
        Name::Exits => exits::run(setting, plan, progress),
        Name::Cpu => cpu::run(setting, plan, progress),
        Name::Mem => mem::run(setting, plan, progress),
        Name::Block => block::run(setting, plan, progress),
        Name::Share => share::run(setting, plan, progress),
        Name::Net => net::run(setting, plan, progress),
        Name::Console => console::run(setting, plan, progress),
        Name::Scale => scale::run(setting, plan, progress),
        Name::Neighbours => neighbours::run(setting, plan, progress),
    };
    suite.map(|mut suite| {
        // What the exits suite measures runs in this process.
        suite.method.extend(copy::told(&setting.scratch).filter(|_| name != Name::Exits));
        suite
    })
}

/// Mounts of this run's own, where the user may have them: what contenders mount is gone with them, whatever happens. Whether
/// a hybrid layout's cgroup version 2 was hidden on the way.
fn own_mounts() -> bool {
    mounts::private().is_ok() && mounts::hide_hybrid_cgroup()
}

/// What several series found, as one: contenders in the order in which they come, figures of one name joined. The first
/// failure of a contender stands.
fn merge(parts: impl IntoIterator<Item = (Vec<Contender>, Vec<Figure>)>) -> (Vec<Contender>, Vec<Figure>) {
    let (mut contenders, mut figures): (Vec<Contender>, Vec<Figure>) = Default::default();
    for (others, more) in parts {
        for other in others {
            match contenders.iter_mut().find(|contender| contender.name == other.name) {
                None => contenders.push(other),
                Some(contender) => contender.failure = contender.failure.take().or(other.failure),
            }
        }
        for figure in more {
            match figures.iter_mut().find(|known| known.name == figure.name) {
                None => figures.push(figure),
                Some(known) => {
                    known.baseline = known.baseline.take().or(figure.baseline);
                    known.series.extend(figure.series);
                }
            }
        }
    }
    (contenders, figures)
}

//! What is started at once: the processes that bring up many machines or containers, and where those speak.

use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{Life, Rival};
use crate::measure::Absent;

/// A process that is started, for one machine or for several.
pub struct Launch {
    /// Its standard streams are set by whoever starts it.
    pub command: Command,
    /// Its standard input, if it needs any.
    pub input: Option<Stdio>,
    /// What must be asked of it over its API, once it listens.
    pub request: Option<Request>,
    /// Where to listen.
    pub output: Output,
}

/// Waits for the API, and asks.
pub type Request = Box<dyn FnOnce() -> Result<(), String> + Send>;

/// Where what was started speaks.
pub enum Output {
    /// On the process's own standard output, and it ends with it.
    Own,
    /// So many machines in processes of their own, which speak through one pipe. The command ends when all are there.
    Shared {
        /// Our end, which does not block.
        pipe: OwnedFd,
        /// How many.
        machines: usize,
    },
    /// Nowhere: the command ends when it is there.
    None,
}

impl Launch {
    /// A process that is one machine or container.
    pub fn of(command: Command) -> Self {
        Self { command, input: None, request: None, output: Output::Own }
    }

    /// What starts `rival`.
    ///
    /// # Errors
    /// What could not be prepared.
    pub fn of_rival(rival: &mut dyn Rival, life: Life) -> Result<Self, String> {
        let detached = life == Life::Idle && rival.detaches();
        let output = if detached { Output::None } else { Output::Own };
        Ok(Self { output, ..Self::of(rival.command(life)?) })
    }
}

/// A way to bring up many at once. What it needs beside the commands is made when they are first asked for, and taken down when
/// it is dropped.
pub trait Launcher {
    /// Short and unique: "vmm restore".
    fn name(&self) -> &str;
    /// The exact command, and what else is asked.
    fn shown(&self) -> String;
    /// The version that it tells of itself.
    fn version(&self) -> Option<String>;
    /// What starts `count` of them.
    ///
    /// # Errors
    /// What could not be prepared.
    fn launches(&mut self, life: Life, count: usize) -> Result<Vec<Launch>, String>;
    /// What each says, in this order: the first is its first output, and the last is the first of a command that runs in it.
    fn marks(&self) -> Vec<&[u8]>;
    /// Whether a command runs in it.
    fn runs_a_command(&self) -> bool;
    /// The exit status of a run that went well.
    fn good_status(&self) -> i32;
    /// A start that takes longer has failed.
    fn limit(&self) -> Duration;
    /// Whether what it starts is all that is to be weighed.
    fn is_weighed(&self) -> bool {
        true
    }
    /// Removes what idle instances that were killed have left.
    fn tidy(&mut self) {}
}

/// One that can be started, or why not.
pub type Found = Result<Box<dyn Launcher>, Absent>;

/// A rival whose command is started for each.
pub fn each(found: super::Found) -> Found {
    found.map(|rival| Box::new(Each(rival)) as Box<dyn Launcher>)
}

struct Each(Box<dyn Rival>);

impl Launcher for Each {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn shown(&self) -> String {
        self.0.shown()
    }

    fn version(&self) -> Option<String> {
        self.0.version()
    }

    fn launches(&mut self, life: Life, count: usize) -> Result<Vec<Launch>, String> {
        (0..count).map(|_| Launch::of_rival(&mut *self.0, life)).collect()
    }

    fn marks(&self) -> Vec<&[u8]> {
        vec![self.0.marker()]
    }

    fn runs_a_command(&self) -> bool {
        true
    }

    fn good_status(&self) -> i32 {
        self.0.good_status()
    }

    fn limit(&self) -> Duration {
        self.0.limit()
    }

    fn tidy(&mut self) {
        self.0.tidy();
    }
}

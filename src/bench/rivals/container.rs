//! A container that a program makes, under a name of its own each time: what runtimes (`oci`) and engines have in common.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::command::{prepare, shown, version};
use super::{Found, Life, Rival};
use crate::measure::Absent;

/// What tells one program from another.
pub trait Maker: 'static {
    /// Everything behind the program's name.
    fn arguments(&self, life: Life, name: &str) -> Vec<String>;
    /// The arguments of each command that removes what idle containers have left.
    fn tidy(&self) -> Vec<Vec<String>>;
    /// Takes down what was made before the first container; they are gone.
    fn undo(&self, _program: &Path) {}
    /// A start that takes longer has failed.
    fn limit(&self) -> Duration {
        Duration::from_secs(30)
    }
}

/// The rival.
pub struct Container<M: Maker> {
    name: &'static str,
    program: PathBuf,
    maker: M,
    count: usize,
}

impl<M: Maker> Container<M> {
    /// With what `make` prepares: bundles, an image.
    pub fn made(
        name: &'static str,
        program: PathBuf,
        maker: M,
        make: impl FnOnce(&mut M, &Path) -> Result<(), String>,
    ) -> Found {
        let mut container = Self { name, program, maker, count: 0 };
        match make(&mut container.maker, &container.program) {
            Ok(()) => Ok(Box::new(container)),
            Err(why) => Err(Absent { name: name.to_owned(), command: container.shown(), why }),
        }
    }
}

/// Runs one that takes something down: what fails is told, and no more can be done.
pub fn remove(program: &Path, arguments: &[String]) {
    let mut command = Command::new(program);
    command.args(arguments);
    if let Err(why) = prepare(command) {
        log::warn!("something is left behind: {why}");
    }
}

impl<M: Maker> Rival for Container<M> {
    fn name(&self) -> &str {
        self.name
    }

    fn shown(&self) -> String {
        shown(self.program.as_os_str(), &self.maker.arguments(Life::Once, "ID"))
    }

    fn version(&self) -> Option<String> {
        version(&self.program, &["--version"])
    }

    fn command(&mut self, life: Life) -> Result<Command, String> {
        self.count += 1;
        let name = format!("vmm-bench-{}-{}", std::process::id(), self.count);
        let mut command = Command::new(&self.program);
        command.args(self.maker.arguments(life, &name));
        Ok(command)
    }

    fn detaches(&self) -> bool {
        true
    }

    fn tidy(&mut self) {
        self.maker.tidy().iter().for_each(|arguments| remove(&self.program, arguments));
    }

    fn limit(&self) -> Duration {
        self.maker.limit()
    }
}

impl<M: Maker> Drop for Container<M> {
    fn drop(&mut self) {
        // What was interrupted.
        self.tidy();
        self.maker.undo(&self.program);
    }
}

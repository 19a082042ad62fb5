//! A rival whose command is the same each time.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use super::command::{shown, version};
use super::{Found, Life, Rival};
use crate::measure::Absent;

/// A program and its arguments.
pub struct Fixed {
    pub name: &'static str,
    pub program: PathBuf,
    pub arguments: Box<dyn Fn(Life) -> Vec<String>>,
    /// What makes it tell its version.
    pub version: &'static str,
    pub good_status: i32,
    pub marker: Vec<u8>,
    pub guest_ram: bool,
}

impl Fixed {
    /// A program of that name, found or given; `arguments` for each life.
    pub fn new(
        name: &'static str,
        program: PathBuf,
        arguments: impl Fn(Life) -> Vec<String> + 'static,
    ) -> Self {
        let marker = super::program::MARKER.to_vec();
        Self {
            name,
            program,
            arguments: Box::new(arguments),
            version: "--version",
            good_status: 0,
            marker,
            guest_ram: false,
        }
    }

    /// It takes part if `check` says so.
    pub fn if_possible(self, check: Result<(), String>) -> Found {
        match check {
            Ok(()) => Ok(Box::new(self)),
            Err(why) => Err(Absent { name: self.name.to_owned(), command: self.shown(), why }),
        }
    }
}

impl Rival for Fixed {
    fn name(&self) -> &str {
        self.name
    }

    fn shown(&self) -> String {
        shown(self.program.as_os_str(), &(self.arguments)(Life::Once))
    }

    fn version(&self) -> Option<String> {
        version(&self.program, &[self.version])
    }

    fn command(&mut self, life: Life) -> Result<Command, String> {
        let mut command = Command::new(&self.program);
        command.args((self.arguments)(life));
        Ok(command)
    }

    fn marker(&self) -> &[u8] {
        &self.marker
    }

    fn good_status(&self) -> i32 {
        self.good_status
    }

    fn guest_ram(&self) -> bool {
        self.guest_ram
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(60)
    }
}

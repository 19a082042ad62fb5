//! The two that nothing undercuts: a process, and the least container.

use std::path::PathBuf;
use std::process::Command;

use super::fixed::Fixed;
use super::program::{INIT, Root, WAIT};
use super::{Found, Life, Rival, Setting};
use crate::sandbox::container::Container;

/// fork and exec.
pub fn spawn(_: &Setting, root: &Root) -> Found {
    let arguments = |life| if life == Life::Idle { vec![WAIT.to_owned()] } else { Vec::new() };
    Ok(Box::new(Unversioned(Fixed::new("fork + exec", root.folder.join("init"), arguments))))
}

/// The program has no version: asking it would start it.
struct Unversioned(Fixed);

impl Rival for Unversioned {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn shown(&self) -> String {
        self.0.shown()
    }

    fn command(&mut self, life: Life) -> Result<Command, String> {
        self.0.command(life)
    }
}

/// Our own container, by system calls of the measuring process: no runtime is started.
pub fn container(_: &Setting, root: &Root) -> Found {
    Ok(Box::new(Own { root: root.folder.clone() }))
}

struct Own {
    root: PathBuf,
}

impl Rival for Own {
    fn name(&self) -> &str {
        "bare container"
    }

    fn shown(&self) -> String {
        format!("{} {INIT}", Container::new(&self.root).describe())
    }

    fn command(&mut self, life: Life) -> Result<Command, String> {
        let container = Container::new(&self.root);
        let container = if life == Life::Idle { container.detached() } else { container };
        let mut command = container.command(INIT).map_err(|error| format!("a container: {error}"))?;
        if life == Life::Idle {
            command.arg(WAIT);
        }
        Ok(command)
    }

    fn detaches(&self) -> bool {
        true
    }
}

//! [`Tie`]: a connection with which a machine is to end: that of who has taken it from a pool for one command.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::running::Running;
use crate::api::Control;
use crate::event_loop::{Handler, Interest, Sources};

/// Kills the machine that `running` is of once the other end of `connection` is closed: also if the process that had it was killed.
pub(super) struct Tie {
    connection: OwnedFd,
    running: Arc<Running>,
}

impl Tie {
    pub(super) fn new(connection: OwnedFd, running: Arc<Running>) -> Self {
        Self { connection, running }
    }
}

impl Handler for Tie {
    fn start(&mut self, sources: &mut Sources<'_, '_>) -> io::Result<()> {
        // Whatever is still said on it is its pool's: with no interest a hang-up is told.
        sources.add(&self.connection, 0, Interest::default())
    }

    fn ready(&mut self, _: u32, sources: &mut Sources<'_, '_>) {
        // It would be told again and again.
        let _ = sources.remove(&self.connection);
        self.running.kill();
    }
}
